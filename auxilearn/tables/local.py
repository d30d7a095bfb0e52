"""Training runs side by side on this machine.

Each run is a process forked from one that has imported PyTorch, which saves seconds a run. It
behaves as its command line does.
"""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from auxilearn.errors import Interrupted, UserError, run_script

ROOT = Path(__file__).resolve().parent.parent.parent


class Outcome(NamedTuple):
    """How a job ended.

    ``code``: exit code of the training run (negative: killed by that signal), or None if Slurm
    ended the job; ``state`` is then Slurm's word for it.
    """

    code: int | None
    state: str = ""

    def __str__(self):
        if self.code is None:
            return f"Slurm: {self.state}"
        if self.code == -signal.SIGKILL:
            return "killed by SIGKILL, perhaps because memory ran out"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        return f"exit code {self.code}"


def launch(jobs, count, main, gpus=()):
    """Run ``jobs``, at most ``count`` at a time. Yields (job, ``Outcome``), as they finish.

    Args:
        jobs: have ``argv`` (flags of the training script) and ``log`` (file, appended to).
        main: the script's ``main()``, which reads ``sys.argv``; a function of a module, by name.
        gpus: names of GPUs for CUDA_VISIBLE_DEVICES, dealt out evenly; empty leaves it as it is.

    If the caller is interrupted (Ctrl-C, SIGTERM) or killed, the runs end after their step, with a
    checkpoint. Raises Interrupted for SIGTERM; UserError on Windows, which cannot fork.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise UserError(
            "runs side by side are forked, which Windows cannot: run the lines of --dry_run there, "
            "or use WSL"
        )
    context = multiprocessing.get_context("forkserver")
    # The server starts in the current folder; PYTHONPATH lets it find what it imports ahead.
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)
    context.set_forkserver_preload([main.__module__])
    waiting, running = list(jobs), {}
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            while waiting and len(running) < count:
                job = waiting.pop(0)
                gpu = _least_used(gpus, running.values())
                process = context.Process(target=_run, args=(main, job.argv, str(job.log), gpu))
                process.start()
                running[process.sentinel] = (process, job, gpu)
            for sentinel in wait(list(running)):
                process, job, _ = running.pop(sentinel)
                process.join()
                yield job, Outcome(process.exitcode)
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.join()
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_):
    raise Interrupted("stopped; the same command goes on from here", 143)


def _least_used(gpus, running):
    used = [gpu for _, _, gpu in running]
    return min(gpus, key=used.count, default=None)


def _run(main, argv, log, gpu):
    """A run's process: ``python train_bilevel.py ARGV...`` with its output in ``log``."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.setpgid(0, 0)  # Ctrl-C reaches the sweep alone, whose one signal ends the run
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = [f"{main.__module__}.py", *argv]
    run_script(main)


def _end_with_parent():
    """End after the step if the sweep was killed, so that the next one can go on with the run."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def usable_cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_gpus(numbers):
    """Names for CUDA_VISIBLE_DEVICES of the GPUs ``numbers``, by default all that are visible.

    Raises UserError: there is no such GPU.
    """
    import torch

    count = torch.cuda.device_count()
    for number in numbers:
        if not 0 <= number < count:
            raise UserError(f"--gpus {number}: {count} GPUs are visible here, counted from 0")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return [names[number] for number in (numbers or range(count))]
