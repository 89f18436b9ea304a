"""A segmentation run that is killed goes on where it stopped and ends in the same bits; what it cannot use it refuses in one line."""
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

from bas_repro import segmentation

ROOT = Path(__file__).parents[1]
SETTINGS = {"dataset": "camvid", "data_root": ".", "crop": [16, 16], "batch_size": 4, "accumulate": 2, "pooled": 8, "steps": 20}  # an epoch a step
PRESET = "\n".join(f"{k}: {v}" for k, v in SETTINGS.items())


def start(folder):
    "Train the preset in a process of its own, with a checkpoint at each epoch."
    code = "from bas_repro import segmentation, train; train.SAVE_EVERY = 0; segmentation.main(['params/study/a.yaml'])"
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    (tmp_path / "params" / "study").mkdir(parents=True)
    (tmp_path / "params" / "study" / "a.yaml").write_text(PRESET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def camvid(checkout):
    "Four pairs a part in CamVid's layout, of 32×24 pixels."
    for part in ("train", "val", "test"):
        for name, mode in ((part, "RGB"), (f"{part}annot", "L")):
            (checkout / "camvid" / name).mkdir(parents=True)
            for i in range(4):
                Image.new(mode, (32, 24), 11 if mode == "L" and i == 0 else 3 if mode == "L" else (90, 120, 30 * i)).save(checkout / "camvid" / name / f"{i}.png")
    return checkout / "camvid"


def test_killed_run_ends_in_the_same_bits(camvid, checkout):
    config = segmentation.grid(SETTINGS)[0]
    folder = checkout / "outputs" / "study" / segmentation.slug(config)
    process = start(checkout)
    while not (folder / "log.csv").exists() or len(pd.read_csv(folder / "log.csv")) < 2:  # a row is written before its checkpoint
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "metrics.json").exists()
    printed, _ = start(checkout).communicate()
    assert 0 < printed.count("epoch=") < 20 and "mIoU" in printed  # it went on, it did not start anew
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    straight = segmentation.run(config, checkout / "straight")
    torch.set_num_threads(threads)
    ours, theirs = (torch.load(f / segmentation.slug(config) / "model.pt", weights_only=True) for f in (folder.parent, checkout / "straight"))
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert segmentation.finished(folder, config)["test_iou"] == straight["test_iou"]


def small(checkout, **others):
    return segmentation.Config(dataset="camvid", data_root=str(checkout), crop=(16, 16), batch_size=4, steps=1, **others)


def test_a_tree_trains_with_a_picture_that_is_void_everywhere(camvid):
    config = small(camvid.parent)
    metrics = segmentation.run(config, camvid.parent / "out")
    images = pd.read_csv(camvid.parent / "out" / segmentation.slug(config) / "images.csv")
    assert images.classes.tolist() == [0, 1, 1, 1] and metrics["size"] == [24, 32] and metrics["macs_mean"] == images.macs.mean()


@pytest.mark.parametrize("spoil, says", [
    (lambda tree: Image.new("L", (30, 24)).save(tree / "trainannot" / "1.png"), "trainannot/1.png has 30×24 pixels"),
    (lambda tree: Image.new("L", (32, 24), 12).save(tree / "testannot" / "2.png"), "testannot/2.png has the label 12"),
    (lambda tree: (tree / "valannot" / "0.png").unlink(), "no annotation .*valannot/0.png"),
    (lambda tree: (tree / "train" / "3.png").write_bytes(b"no picture"), "train/3.png is not a readable picture"),
])
def test_bad_files_end_the_command_in_one_line_that_names_them(camvid, spoil, says, monkeypatch):
    spoil(camvid)
    (camvid.parent / "params" / "study" / "a.yaml").write_text(f"dataset: camvid\ndata_root: {camvid.parent}\ncrop: [16, 16]\nbatch_size: 4\nsteps: 1")
    with pytest.raises(SystemExit, match=says) as stop:
        segmentation.main(["params/study/a.yaml"])
    assert "\n" not in str(stop.value)


def test_a_crop_larger_than_the_pictures_names_one(camvid):
    with pytest.raises(ValueError, match=r"train/\d.png: a crop 40 wide and 16 high is larger than the picture of 32×24 pixels"):
        segmentation.run(segmentation.Config(dataset="camvid", data_root=str(camvid.parent), crop=(16, 40), batch_size=4, steps=1), camvid.parent / "out")
