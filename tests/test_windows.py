"""The scripts where what POSIX alone has is missing, as on Windows (which itself is not tested)."""

import subprocess
import sys

from tests.conftest import ROOT, TINY

WITHOUT_POSIX = """
import os, runpy, signal, sys
import torch  # its own needs are its own
for module in ("fcntl", "grp", "pwd", "resource", "syslog", "termios"):
    sys.modules[module] = None
for name in dir(signal):
    if name.startswith("SIG") and name not in (
        "SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"
    ):
        delattr(signal, name)
for name in ("pause", "pthread_kill", "pthread_sigmask", "setitimer", "sigwait"):
    delattr(signal, name)
for name in (
    "fork", "forkpty", "getgid", "getloadavg", "getpgid", "getuid", "geteuid", "killpg", "mkfifo",
    "nice", "sched_getaffinity", "setsid", "uname",
):
    delattr(os, name)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script, *flags):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX, script, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_preprocessing_and_training_run(tiny_split, tmp_path):
    root, split, cache = tiny_split.parent / "data", tmp_path / "split", tmp_path / "cache"
    run("data_preprocess.py", "--data_root", str(root), "--out_dir", str(split))
    flags = {**TINY, "epochs": 1, "cache_dir": cache, "data_root": root, "split_dir": split}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    out = run("train_bilevel.py", *words, "--record_dir", str(tmp_path), "--exp_name", "run")
    assert (tmp_path / "full" / "run" / "summary.json").exists(), out
    assert list(cache.iterdir())


def test_the_other_scripts_start():
    for script in ("reproduce_tables.py", "inspect_schedule.py"):
        assert script in run(script, "--help")
