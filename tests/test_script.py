"""run_bilevel.sh: which data it takes, and the settings that go with them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_preprocess
from auxilearn.data.split import load_split
from auxilearn.run.command_line import parse
from auxilearn.run.config import with_method_defaults

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(tmp_path):
    """``script(*flags)``: the ``Config`` that the script, in a folder of its own, would train."""
    home = tmp_path / "project"
    home.mkdir()
    for name in ("run_bilevel.sh", "environment.sh", "requirements.txt"):
        shutil.copy(ROOT / name, home)
    for name in ("data_preprocess.py", "auxilearn"):
        (home / name).symlink_to(ROOT / name)
    (home / "train_bilevel.py").write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    python = tmp_path / "bin" / "python3"  # has all it needs: torch takes seconds to import
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\n[ "$1" = - ] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)

    def run(*flags):
        env = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
        command = ["sh", home / "run_bilevel.sh", *flags]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return parse(json.loads(done.stdout.splitlines()[-1]))

    return run


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "photos" / ("ash", "oak")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(16, 18, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_the_script_takes_any_data(script, photos, tmp_path, command):
    """Folders of images, then the same ones as prepared with a table, which stays as it is."""
    split = tmp_path / "project" / "preprocess_data"
    config = script("--data_root", photos)
    assert load_split(config.split_dir, config.data_root).paths[0].startswith("ash/")
    assert (config.split_dir, config.data_root) == (str(split), str(photos))
    assert (config.method, config.epochs, config.dev_batch_size) == ("joint", 40, 20)
    assert (config.main_lr, config.backbone) == (None, None)  # as the data ask
    table = tmp_path / "table.csv"
    paths = [f"{path.relative_to(photos)},{path.stem}" for path in photos.glob("*/*")]
    table.write_text("\n".join(["path,size", *paths]) + "\n")
    flags = ["--table", table, "--images", photos, "--out_dir", split]
    assert command(data_preprocess.main, *flags)[0] == 0
    config = script(f"--data_root={photos}", "--epochs", "3")
    assert (len(load_split(split).tasks), config.epochs) == (2, 3)
    config = script("--method", "common")  # what is in preprocess_data
    assert (config.split_dir, config.method, config.data_root) == (str(split), "common", None)
    assert script("--data_root", split).data_root is None
    assert script("--split_dir", tmp_path / "nothing").split_dir == str(tmp_path / "nothing")


def test_the_script_has_the_paper_s_settings_for_cub_s_layout(script, tiny_split, tmp_path):
    names = ("method", "epochs", "train_batch_size", "upper_lr", "upper_decay", "seed")
    flags = ["--data_root", tiny_split.parent / "data", "--split_dir", tmp_path / "split"]
    config = script(*flags, "--seed", "3", "--train_batch_size", "5")
    assert [getattr(config, name) for name in names] == ["joint", 100, 5, 1e-2, 5e-5, 3]
    preset = with_method_defaults(parse(["--preset", "paper", *map(str, flags)]))
    config = with_method_defaults(script(*flags))
    network = {name: getattr(preset, name) for name in ("backbone", "image_size", "main_lr")}
    places = {"record_dir": preset.record_dir}
    assert dataclasses.replace(config, **network, **places) == preset
    assert script(*flags, "--preset", "paper").epochs == 100
