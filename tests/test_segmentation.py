"A segmentation run that was killed ends in the same bits; bad files are refused in one line."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from bas_repro import core, train
from bas_repro.runs import Run

ROOT = Path(__file__).parents[1]
PRESET = "params/study/a.yaml"
SMALL = {"dataset": "camvid", "crop": [16, 16], "batch_size": 4}
LONG = {**SMALL, "accumulate": 2, "pooled": 8, "steps": 20}  # an epoch a step


def start(folder):
    "Train the preset in a process of its own, with a checkpoint at each epoch."
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BAS_SAVE_EVERY": "0"}
    command = [sys.executable, "-m", "bas_repro.train", PRESET]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **own}, **pipes)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    core.write_params(tmp_path / PRESET, {"notebook": "study", **LONG, "runs": [{"method": "shaping"}]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAS_DATA", str(tmp_path))
    return tmp_path


def draw(file, mode, i):
    "A picture of 32×24 pixels, or its labels: of the first everywhere void, of the others one class."
    colour = (90, 120, 30 * i) if mode == "RGB" else 11 if i == 0 else 3
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (32, 24), colour).save(file)


@pytest.fixture
def camvid(checkout):
    "Four pairs a part in CamVid's layout."
    for part in ("train", "val", "test"):
        for name, mode in ((part, "RGB"), (f"{part}annot", "L")):
            for i in range(4):
                draw(checkout / "camvid" / name / f"{i}.png", mode, i)
    return checkout / "camvid"


def test_killed_run_ends_in_the_same_bits(camvid, checkout):
    run = Run(checkout / "outputs" / "study", **LONG)
    process = start(checkout)
    while not (run.folder / "log.csv").exists() or len(run.log()) < 2:  # a row comes before its checkpoint
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run.folder / "metrics.json").exists()
    printed, _ = start(checkout).communicate()
    assert 0 < printed.count("epoch=") < 20 and "mIoU" in printed  # it went on, it did not start anew
    straight = Run(checkout / "straight", data_root=str(checkout), **LONG)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.train(straight)
    torch.set_num_threads(threads)
    ours, theirs = (one.model().state_dict() for one in (run, straight))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert run.record()["test_iou"] == straight.record()["test_iou"]


def test_a_tree_trains_with_a_picture_that_is_void_everywhere(camvid, checkout):
    run = Run("out", data_root=str(checkout), **SMALL, steps=1)
    record = train.train(run)
    images = pd.read_csv(run.folder / "images.csv")
    assert images.classes.tolist() == [0, 1, 1, 1]
    assert record["size"] == 24 and record["macs_mean"] == images.macs.mean()


def spoil_size(tree):
    Image.new("L", (30, 24)).save(tree / "trainannot" / "1.png")


def spoil_label(tree):
    Image.new("L", (32, 24), 12).save(tree / "testannot" / "2.png")


def spoil_pair(tree):
    (tree / "valannot" / "0.png").unlink()


def spoil_picture(tree):
    (tree / "train" / "3.png").write_bytes(b"no picture")


@pytest.mark.parametrize("spoil, says", [
    (spoil_size, "trainannot/1.png has 30×24 pixels"),
    (spoil_label, "testannot/2.png has the label 12"),
    (spoil_pair, "no annotation .*valannot/0.png"),
    (spoil_picture, "train/3.png is not a readable picture"),
])
def test_bad_files_end_the_command_in_one_line_that_names_them(camvid, checkout, spoil, says):
    spoil(camvid)
    with pytest.raises(SystemExit, match=says) as stop:
        train.main([PRESET, "-p", "data_root", str(checkout), "-p", "steps", "1"])
    assert "\n" not in str(stop.value)


def test_a_crop_larger_than_the_pictures_names_one(camvid, checkout):
    says = r"train/\d.png: a crop 40 wide and 16 high is larger than the picture of 32×24 pixels"
    with pytest.raises(ValueError, match=says):
        train.train(Run("out", **{**SMALL, "crop": [16, 40]}, data_root=str(checkout), steps=1))
