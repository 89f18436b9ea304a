"""Presets: each is a study of checked runs and says nothing twice; wrong ones are answered in one line."""
import math
from collections import Counter
from pathlib import Path

import pytest

from bas_repro import core, runs

ROOT = Path(__file__).parents[1]
ALL = sorted((ROOT / "params").rglob("*.yaml"))
TRAINED = [path for path in ALL if path.parts[-2] in ("04_cifar10", "05_imagenet", "06_cityscapes")]


def named(paths):
    "Parametrised by file."
    return pytest.mark.parametrize("path", paths, ids=lambda path: "/".join(path.parts[-2:]))


def said(path):
    "The lines of a file without the comments behind them."
    lines = (line.partition("  #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def test_there_are_presets():
    assert {path.parent.name for path in TRAINED} == {"04_cifar10", "05_imagenet", "06_cityscapes"}
    assert all(path.parents[1] == ROOT / "params" for path in ALL), "a preset is one file, no folder"


@named(TRAINED)
def test_a_preset_is_a_study(path):
    given = runs.read_preset(path)
    assert (given["notebook"], given["run"]) == (path.parent.name, path.stem)
    study = runs.preset(path)
    assert study.runs and study.folder == ROOT / "outputs" / path.parent.name / path.stem
    assert {run.out for run in study.runs} == {ROOT / "outputs" / path.parent.name}


@named(ALL)
def test_a_preset_says_nothing_twice(path):
    assert [line for line, times in Counter(said(path)).items() if times > 1] == []


@named(TRAINED)
def test_what_all_runs_share_stands_above(path):
    given = core.read_params(path)
    entries = given["runs"]
    first = entries[0]
    everywhere = [name for name in first if all(entry.get(name) == first[name] for entry in entries)]
    if len(entries) > 1:
        assert everywhere == []
    elif len(runs.preset(path).runs) > 1:  # what they differ in is a list
        assert all(isinstance(value, list) for value in first.values())


def test_presets_are_short():
    lines = [line for path in ALL for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) < 600
    comments = Counter(line for line in lines if line.startswith("#"))
    assert [line for line, times in comments.items() if times > 1] == []


@pytest.mark.parametrize("notebook, images, epochs, steps", [
    ("04_cifar10", 50_000, 500, 98_000),
    ("05_imagenet", 1_281_167, 150, 750_750),
])
def test_paper_presets_have_the_papers_steps(notebook, images, epochs, steps):
    study = runs.preset(ROOT / "params" / notebook / "paper.yaml")
    for run in study.runs:
        assert run.epochs == epochs and run.holdout == 0
        assert run.epochs * math.ceil(images / run.batch_size) == steps
        assert runs.is_paper(run, steps), run
        if run.has("reference_steps"):
            assert run.reference_steps == steps


def test_cityscapes_paper_presets_have_the_papers_settings():
    for name in ("paper", "paper-pretrained"):
        study = runs.preset(ROOT / "params" / "06_cityscapes" / f"{name}.yaml")
        assert all(runs.is_paper(run, 150_000) for run in study.runs)


RUNS = """runs:
- {method: plain}
- {method: [bas, l0], gamma: [0.05, 0.1]}
"""
GOOD = f"""notebook: 04_cifar10
run: tried
epochs: 1
{RUNS}"""
# What is changed in it to what, the exception, and a part of its one line.
BAD = {
    "unknown key": (("epochs: 1", "epoch: 1"), TypeError, "did you mean 'epochs'"),
    "unknown key in runs": (("gamma:", "gama:"), TypeError, "did you mean 'gamma'"),
    "no runs": ((RUNS, ""), ValueError, "'runs:'"),
    "runs of another name": (("runs:", "run_list:"), ValueError, "'runs:'"),
    "nothing in runs": ((RUNS, "runs:"), ValueError, "not empty"),
    "runs an empty list": ((RUNS, "runs: []"), ValueError, "not empty"),
    "runs a word": ((RUNS, "runs: bas"), ValueError, "runs='bas'"),
    "runs of words": (("- {method: plain}", "- plain"), ValueError, "give a list such as"),
    "no notebook": (("notebook: 04_cifar10", ""), ValueError, "'notebook:'"),
    "above and in runs": (("plain}", "plain, epochs: 2}"), ValueError, "epochs stands above 'runs:'"),
    "no value": (("[0.05, 0.1]", "[]"), ValueError, "gamma=[]"),
    "no such method": (("plain", "magic"), ValueError, "method='magic' is not known: choose one of plain"),
    "one such method among others": (("[bas, l0]", "[bas, magic]"), ValueError, "method='magic'"),
    "gamma below 0": (("[0.05, 0.1]", "[0.05, -0.1]"), ValueError, "gamma=-0.1: must be 0 or more"),
    "gamma a text": (("[0.05, 0.1]", "[5e-2]"), TypeError, "gamma='5e-2'"),
    "rate of 0": (("plain}", "aig, target: 0.0}"), ValueError, "target=0.0"),
    "rate above 1": (("plain}", "fbs, target: 1.5}"), ValueError, "target=1.5: must be from 0 to 1"),
    "budget in per cent": (("gamma: [0.05, 0.1]", "target_macs: 50.0"), ValueError, "target_macs=50.0"),
    "no such data set": (("epochs: 1", "dataset: mnist"), ValueError, "dataset='mnist' is not known"),
    "no such network": (("epochs: 1", "model: vgg16"), ValueError, "model='vgg16' is not known"),
    "another task's setting": (("epochs: 1", "crop: [32, 32]"), TypeError, "no setting of classification"),
    "no folder's name": (("run: tried", "run: ../tried"), ValueError, "run='../tried'"),
}


@pytest.mark.parametrize("change, error, part", BAD.values(), ids=BAD)
def test_bad_presets(tmp_path, count, change, error, part):
    file = tmp_path / "tried.yaml"
    file.write_text(GOOD)
    assert len(runs.preset(file).runs) == 5 and change[0] in GOOD
    file.write_text(GOOD.replace(*change))
    with pytest.raises(error) as answered:
        runs.preset(file)
    text = str(answered.value)
    count("bad calls answered in one line that names the value", part in text and "\n" not in text)
    assert part in text and "\n" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["tried.yaml"]


def test_a_preset_of_another_notebook(tmp_path):
    file = tmp_path / "tried.yaml"
    file.write_text(GOOD)
    with pytest.raises(ValueError, match=r"^this preset is for nbs/04_cifar10.ipynb, not for 05_imagenet$"):
        runs.study("05_imagenet", runs.read_preset(file))


def test_what_is_given_beside_a_preset(tmp_path):
    file = tmp_path / "tried.yaml"
    file.write_text(GOOD)
    assert {run.gamma for run in runs.preset(file, gamma=0.2).runs if run.has("gamma")} == {0.2}
    assert {run.epochs for run in runs.preset(file, epochs=3).runs} == {3}
    with pytest.raises(TypeError, match="^unknown parameter 'gama': did you mean 'gamma'"):
        runs.preset(file, gama=0.2)
    with pytest.raises(ValueError, match="^gamma=-1.0: must be 0 or more$"):
        runs.preset(file, gamma=-1.0)


def test_the_former_way_is_answered():
    with pytest.raises(ValueError, match="^preset='cpu': .* -f params/04_cifar10/cpu.yaml$"):
        runs.study("04_cifar10", {"preset": "cpu"})
