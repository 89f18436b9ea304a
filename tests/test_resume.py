"""A run that is killed goes on where it stopped and ends in the same bits; the command line answers bad input in one line."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from bas_repro import train

ROOT = Path(__file__).parents[1]
SETTINGS = {"epochs": 12, "batch_size": 64, "image_size": 4}
PRESET = "\n".join(f"{k}: {v}" for k, v in SETTINGS.items())


def start(folder):
    "Train the preset in a process of its own, with a checkpoint at each epoch."
    code = "from bas_repro import train; train.SAVE_EVERY = 0; train.main(['params/study/a.yaml'])"
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    (tmp_path / "params" / "study").mkdir(parents=True)
    (tmp_path / "params" / "study" / "a.yaml").write_text(PRESET)
    return tmp_path


def test_killed_run_ends_in_the_same_bits(checkout, tmp_path_factory):
    config = train.Config(**SETTINGS)
    folder = checkout / "outputs" / "study" / train.slug(config)
    process = start(checkout)
    while not (folder / "log.csv").exists() or len(pd.read_csv(folder / "log.csv")) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "metrics.json").exists()
    printed, _ = start(checkout).communicate()
    assert printed.count("epoch=") < config.epochs and "test accuracy" in printed  # it went on, it did not start anew
    straight = tmp_path_factory.mktemp("straight")
    metrics = train.train(config, straight)
    ours, theirs = (torch.load(f / "model.pt", weights_only=True) for f in (folder, straight / train.slug(config)))
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert train.finished(folder, config)["test_accuracy"] == metrics["test_accuracy"]


@pytest.mark.parametrize("preset, says", [
    ("gama: 0.1", "unknown parameter 'gama'"), ("gamma: 5e-4", "write 5.0e-4"), ("lr: -1.0", "lr=-1.0"), ("[1, 2", "is not YAML"),
    ("dataset: cifar10\ndata_root: /no/such/folder", "no folder /no/such/folder"), ("batch_size: 1", "batch_size=1"),
])
def test_bad_presets_are_one_line(checkout, monkeypatch, preset, says):
    monkeypatch.chdir(checkout)
    (checkout / "params" / "study" / "a.yaml").write_text(preset)
    with pytest.raises(SystemExit) as stop:
        train.main(["params/study/a.yaml"])
    assert says in str(stop.value) and "\n" not in str(stop.value)


def test_two_processes_train_what_one_does(checkout):
    (checkout / "params" / "study" / "a.yaml").write_text(PRESET.replace("epochs: 12", "epochs: 1") + "\nmethod: [plain, bas]")
    command = [sys.executable, "-m", "bas_repro.train", "params/study/a.yaml", "--jobs", "2"]
    done = subprocess.run(command, cwd=checkout, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    configs = train.grid({**SETTINGS, "epochs": 1, "method": ["plain", "bas"]})
    assert all(train.finished(checkout / "outputs" / "study" / train.slug(config), config) for config in configs)
