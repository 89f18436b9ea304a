"""Experiment notebooks through papermill, as users run them: parameters show in the results, bad ones are refused by name."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from bas_repro import segmentation, train

ROOT = Path(__file__).parents[1]
TRAINED_BY = {"04_cifar10": train, "05_imagenet": train, "06_cityscapes": segmentation}
PRESETS = [path.relative_to(ROOT) for notebook in TRAINED_BY for path in sorted((ROOT / "params" / notebook).rglob("*.yaml"))]


@pytest.fixture
def checkout(tmp_path):
    "A folder that looks like the repository, so that a test's outputs stay out of the real one."
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    for name in ("nbs", "params"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "outputs", tmp_path / "outputs", ignore=shutil.ignore_patterns("*.pt"))  # the stored records
    return tmp_path


def papermill(checkout, notebook, *arguments):
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", f"nbs/{notebook}.ipynb", "x.ipynb", *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def shown(path):
    "The values that a notebook shows from where it says what was measured."
    cells = json.loads(path.read_text())["cells"]
    start = next(i for i, cell in enumerate(cells) if "what was measured" in "".join(cell["source"]))
    return ["".join(o["data"]["text/plain"]) for cell in cells[start:] for o in cell.get("outputs", []) if "text/plain" in o.get("data", {})]


@pytest.mark.parametrize("notebook, figure", [("04_cifar10", "fig3a"), ("05_imagenet", "fig3b")])
def test_a_parameter_shows_in_the_result(checkout, notebook, figure):
    done = papermill(checkout, notebook, "-f", f"params/{notebook}/smoke.yaml", "-p", "gamma", "0.2", "-p", "run", "mine")
    assert done.returncode == 0, done.stderr
    folder = checkout / "outputs" / notebook / "mine"
    assert pd.read_csv(folder / f"{figure}.csv").set_index("method").gamma["bas"] == 0.2
    assert yaml.safe_load((folder / "params.yaml").read_text())["gamma"] == 0.2
    assert (folder / f"{figure}.png").stat().st_size > 5000
    assert shown(checkout / "x.ipynb") == shown(ROOT / "nbs" / f"{notebook}.ipynb")  # the stored results are what the records say now


@pytest.mark.parametrize("name, value, says", [("gama", "0.1", "unknown parameter 'gama': did you mean 'gamma'?")])
def test_a_bad_parameter_is_refused_by_name(checkout, name, value, says):
    before = sorted((checkout / "outputs").rglob("*"))
    done = papermill(checkout, "04_cifar10", "-p", name, value)
    assert done.returncode != 0 and says in done.stderr
    assert sorted((checkout / "outputs").rglob("*")) == before


def test_the_front_page_is_fresh(checkout):
    "What index.ipynb shows, and README.md from it, is what the records say now."
    ran = papermill(checkout, "index")
    assert ran.returncode == 0, ran.stderr
    printed = lambda path: ["".join(o.get("text", "")) for cell in json.loads(path.read_text())["cells"] for o in cell.get("outputs", []) if o.get("name") == "stdout"]
    assert printed(checkout / "x.ipynb") == printed(ROOT / "nbs" / "index.ipynb")


def test_the_page_of_claims_is_fresh(checkout, tell):
    "Every claim's numbers and verdict are what the records say now."
    ran = papermill(checkout, "09_claims")
    assert ran.returncode == 0, ran.stderr
    ours, stored = (pd.read_csv(root / "outputs" / "09_claims" / "all" / "claims.csv") for root in (checkout, ROOT))
    pd.testing.assert_frame_equal(ours, stored)
    tell("claims: " + ", ".join(f"{n} {verdict}" for verdict, n in stored.verdict.value_counts().items()))


@pytest.mark.parametrize("path", PRESETS, ids=str)
def test_every_preset_stands_for_runs(path):
    assert TRAINED_BY[path.parts[1]].preset(ROOT / path)[0]
