"""Names of runs are those that stored runs have, and each method's training is what it was: a change of
either would part the code from its records without a word."""
import json
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest

from bas_repro import data, methods, runs, train
from bas_repro.runs import Run

ROOT = Path(__file__).parents[1]


def stored():
    "(settings, name of the folder) of the records of training runs."
    for path in sorted((ROOT / "outputs").glob("0*/*/metrics.json")):
        settings = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
        if "method" in settings:
            yield settings, path.parent.name


def test_stored_runs_have_their_names():
    names = [(runs.of(settings).name, name) for settings, name in stored()]
    assert len(names) >= 30
    assert [pair for pair in names if pair[0] != pair[1]] == []


BF16 = {"batch_size": 32, "precision": "bf16"}
CIFAR = {"dataset": "cifar10", "epochs": 1, **BF16}
IMAGENET = {"dataset": "imagenet", "image_size": 64, "epochs": 3, "lr": 0.025, "lr_drops": [105, 130, 143],
            **BF16}
CAMVID = {"dataset": "camvid", "image_size": 120, "steps": 1200, "crop": [96, 128], "val_every": 5,
          "precision": "bf16"}
# The name that the code of November 2026 gave to a run, and the settings that it was given.
PINNED = {
    "digits-resnet20-plain-e5-s0-db7210": {"method": "plain", "epochs": 5},
    "digits-resnet20-bas-g0.1-e5-s0-3708ea": {"method": "bas", "epochs": 5},
    "digits-resnet20-l0-g0.1-e5-s0-54c580": {"method": "l0", "epochs": 5},
    "digits-resnet20-shaping-l0.75-e5-s0-61a906": {"method": "shaping", "epochs": 5},
    "digits-resnet20-aig-t0.6-e5-s0-6d372e": {"method": "aig", "epochs": 5},
    "digits-resnet20-skipnet-a0.1-e5-s0-c86836": {"method": "skipnet", "epochs": 5},
    "digits-resnet20-sgad-g0.1-e5-s0-82606c": {"method": "sgad", "epochs": 5},
    "digits-resnet20-fbs-t0.6-e5-s0-ed8895": {"method": "fbs", "epochs": 5},
    "digits-resnet20-bas-m0.5-e5-s0-ef1999": {"method": "bas", "target_macs": 0.5, "epochs": 5},
    "digits-resnet20-bas-m0.5-e3-s0-4e9765": {
        "method": "bas", "schedule": "linear", "epochs": 3, "target_macs": 0.5, "gate_bias": 1.0},
    "digits-resnet18-bas-g0.1-e1-s0-78c3b8": {"method": "bas", "model": "resnet18", "epochs": 1},
    "digits-resnet20-bas-g0.1-e2-s0-7d2ed3": {"method": "bas", "epochs": 2, "compile": "yes"},
    "digits-resnet20-l0-g0.1-warm-e2-s0-ebd844": {"method": "l0", "epochs": 2, "start": "plain"},
    "digits-resnet20x2-bas-g0.1-e1-s0-8e1d9f": {
        "method": "bas", "width": 2, "epochs": 1, "precision": "bf16"},
    "digits-resnet50-bas-g0.1-e1-s0-72fbdb": {
        "method": "bas", "model": "resnet50", "epochs": 1, "bottleneck": "two", "image_size": 16},
    "scenes-pspnet18-plain-i40-s0-82b9ab": {"dataset": "scenes", "method": "plain", "steps": 40},
    "scenes-pspnet18-shaping-l0.2-i40-s0-824029": {"dataset": "scenes", "method": "shaping", "steps": 40},
    "scenes-pspnet18-shaping-l0.2-p12-i40-s0-fea20c": {
        "dataset": "scenes", "method": "shaping", "steps": 40, "pooled": 12, "accumulate": 2},
    "cifar10-resnet20-bas-g0.02-warm-e1-s0-cecb00": {**CIFAR, "start": "plain", "gamma": 0.02},
    "cifar10-resnet20x10-bas-g0.02-e1-s0-2e8e07": {**CIFAR, "width": 10, "gamma": 0.02},
    "cifar10-resnet38-skipnet-a0.1-e1-s0-68fe4d": {**CIFAR, "model": "resnet38", "method": "skipnet"},
    "cifar10-resnet32-sgad-g0.05-e1-s0-d482b6": {
        **CIFAR, "model": "resnet32", "method": "sgad", "gamma": 0.05},
    "imagenet-resnet34-bas-m0.4951-warm-e3-s0-a6fe53": {
        **IMAGENET, "model": "resnet34", "start": "plain", "target_macs": 0.4951},
    "imagenet-resnet18-fbs-t0.65-e3-s0-d49e17": {
        **IMAGENET, "model": "resnet18", "method": "fbs", "target": 0.65},
    "imagenet-resnet34-l0-g0.01-e3-s1-a26869": {
        **IMAGENET, "model": "resnet34", "method": "l0", "gamma": 0.01, "seed": 1},
    "camvid-pspnet18-shaping-l0.2-p54-i1200-s0-b47a49": {**CAMVID, "pooled": 54},
    "camvid-pspnet18-plain-i1200-s2-27bb41": {**CAMVID, "method": "plain", "seed": 2},
}


@pytest.mark.parametrize("name", PINNED)
def test_names_are_pinned(name):
    assert Run(**PINNED[name]).name == name


# Sums over epochs of the task's loss, batch-shaping's, the method's own, and the share of open gates.
DIGITS = {
    "plain": (4.935527, 0, 0, 2),
    "bas": (5.209214, 7.069826, 555.4095, 0.8236569),
    "l0": (5.213253, 0, 541.1066, 0.8114459),
    "shaping": (5.217443, 33.60362, 0, 1.029661),
    "aig": (5.042644, 0, 0.2638686, 1.711372),
    "skipnet": (5.080029, 0, 0, 1.277507),
    "sgad": (5.073377, 0, 87.86406, 1.393953),
    "fbs": (14.56653, 0, 2.968499e-05, 4.044643),
}
SCENES = {"plain": (2.696624, 0, 0, 1), "shaping": (2.686241, 20.96664, 0, 0.5029225)}
COLUMNS = ["loss_task", "loss_shaping", "loss_l0", "open"]


def digits_run(method):
    epochs = 5 if method == "fbs" else 2  # its density falls in four steps
    small = {"image_size": 4, "batch_size": 256, "holdout": 0.5}
    return Run(method=method, epochs=epochs, device="cpu", compile="no", **small)


def scenes_run(method):
    return Run(dataset="scenes", method=method, steps=3, image_size=16, crop=(16, 16), device="cpu")


def totals(run):
    "The sums of some columns of a run's log, in float64: there, processors agree on which gates are open."
    normalise = data.normalise
    with mock.patch.object(data, "normalise", lambda x: normalise(x).double()):
        splits = run.work.read(run, "cpu")
        model = run.work.build(run, len(splits.classes)).double()
        [state] = train.fit([train.Trainee(run, model, splits)])
    return pd.DataFrame(state.log)[COLUMNS].sum().tolist()


def test_every_method_is_here():
    assert set(DIGITS) == set(methods.METHODS)


@pytest.mark.parametrize("method", DIGITS)
def test_training_on_digits_is_pinned(method):
    rel = 1e-2 if method == "fbs" else 1e-4  # which of FBS's equally salient channels stay differs with the CPU
    assert totals(digits_run(method)) == pytest.approx(DIGITS[method], rel=rel)


@pytest.mark.parametrize("method", SCENES)
def test_training_on_scenes_is_pinned(method):
    assert totals(scenes_run(method)) == pytest.approx(SCENES[method], rel=1e-4)
