"""Experiment notebooks through papermill: parameters show in the results, bad ones are refused by name."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bare(tmp_path):
    "A folder that looks like the repository, without what runs left."
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    for name in ("nbs", "params"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def checkout(bare):
    "The same with the stored records, so that a test's outputs stay out of the real ones."
    shutil.copytree(ROOT / "outputs", bare / "outputs", ignore=shutil.ignore_patterns("*.pt"))
    return bare


def papermill(folder, notebook, *arguments):
    "What papermill says of a notebook run in this folder."
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", f"nbs/{notebook}.ipynb", "x.ipynb"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def cells(path):
    "The cells of a notebook."
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def shown(path):
    "The values that a notebook shows from where it says what was measured."
    all_cells = cells(path)
    start = next(i for i, cell in enumerate(all_cells) if "what was measured" in "".join(cell["source"]))
    outputs = [output.get("data", {}) for cell in all_cells[start:] for output in cell.get("outputs", [])]
    return ["".join(output["text/plain"]) for output in outputs if "text/plain" in output]


def files(folder):
    "All files below a folder, with when they were written."
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("notebook, figure", [("04_cifar10", "fig3a"), ("05_imagenet", "fig3b")])
def test_a_parameter_shows_in_the_result(checkout, notebook, figure):
    "What -p gives wins over -f; the study's folder has the figures, and no stored file is touched."
    before = files(checkout / "outputs")
    arguments = ("-f", f"params/{notebook}/smoke.yaml", "-p", "gamma", "0.2", "-p", "run", "mine")
    done = papermill(checkout, notebook, *arguments)
    assert done.returncode == 0, done.stderr
    folder = checkout / "outputs" / notebook / "mine"
    assert pd.read_csv(folder / f"{figure}.csv").set_index("method").gamma["bas"] == 0.2
    assert yaml.safe_load((folder / "params.yaml").read_text())["gamma"] == 0.2
    assert (folder / f"{figure}.png").stat().st_size > 5000
    assert shown(checkout / "x.ipynb") == shown(ROOT / "nbs" / f"{notebook}.ipynb")  # as the records say now
    after = files(checkout / "outputs")
    assert {path: after.get(path) for path in before} == before


SMOKE = ("-f", "params/04_cifar10/smoke.yaml")
BAD = {
    "unknown beside a preset": (
        (*SMOKE, "-p", "gama", "0.1"), "unknown parameter 'gama': did you mean 'gamma'?"),
    "of no use beside a preset": ((*SMOKE, "-p", "gamma", "-0.1"), "gamma=-0.1: must be 0 or more"),
    "the former form of a preset": (("-p", "preset", "cpu"), "-f params/04_cifar10/cpu.yaml"),
    "a preset of another notebook": (
        ("-f", "params/05_imagenet/smoke.yaml"), "preset is for nbs/05_imagenet.ipynb, not for 04_cifar10"),
}


@pytest.mark.parametrize("arguments, says", BAD.values(), ids=BAD)
def test_bad_parameters_are_refused_by_name(bare, arguments, says):
    done = papermill(bare, "04_cifar10", *arguments)
    assert done.returncode != 0 and says in done.stderr
    assert not (bare / "outputs").exists()


def test_from_the_parameters_to_the_sweep():
    "At most eight lines of code."
    for notebook in ("04_cifar10", "05_imagenet", "06_cityscapes"):
        code = [cell for cell in cells(ROOT / "nbs" / f"{notebook}.ipynb") if cell["cell_type"] == "code"]
        at = next(i for i, cell in enumerate(code) if "parameters" in cell["metadata"].get("tags", []))
        lines = [line.strip() for cell in code[at + 1:] for line in cell["source"]]
        sweep = next(i for i, line in enumerate(lines) if "train.sweep(" in line)
        assert sum(bool(line) for line in lines[:sweep + 1]) <= 8, notebook


def test_the_front_page_is_fresh(checkout):
    "What index.ipynb shows, and README.md from it, is what the records say now."
    ran = papermill(checkout, "index")
    assert ran.returncode == 0, ran.stderr
    printed = []
    for path in (checkout / "x.ipynb", ROOT / "nbs" / "index.ipynb"):
        outputs = [output for cell in cells(path) for output in cell.get("outputs", [])]
        printed.append("".join("".join(o["text"]) for o in outputs if o.get("name") == "stdout").splitlines())
    assert printed[0] == printed[1]


def test_the_page_of_claims_is_fresh(checkout, tell):
    "Every claim's numbers and verdict are what the records say now."
    ran = papermill(checkout, "09_claims")
    assert ran.returncode == 0, ran.stderr
    file = Path("outputs") / "09_claims" / "all" / "claims.csv"
    ours, stored = (pd.read_csv(root / file) for root in (checkout, ROOT))
    pd.testing.assert_frame_equal(ours, stored)
    assert stored.columns.tolist() == ["place", "claim", "paper", "ours", "setting", "n", "verdict", "why"]
    tell("claims: " + ", ".join(f"{n} {verdict}" for verdict, n in stored.verdict.value_counts().items()))
