"""Killed at random moments, started again: every finished file is whole, and the end is the same to the bit.
Also a full disk, a folder that cannot be written, and two processes that make the same run."""
import multiprocessing
import random
import resource
import shutil
import signal
import time

import pandas as pd
import pytest
import torch
from PIL import Image

from bas_repro import analysis, core, data, gate_log, runs, train
from bas_repro.runs import Run

KILLS = {"train": 12, "sweep": 8, "figure": 8, "log": 6}  # of each kind of work
SETTINGS = {"epochs": 3, "batch_size": 64, "holdout": 0.8, "image_size": 4, "compile": "no"}


def study(out):
    return runs.grid({**SETTINGS, "method": ["bas", "plain"]}, out)


# Each kind of work is a function of a folder, run in a process of its own.
def train_one(out):
    train.train(study(out)[0])


def sweep_all(out):
    train.sweep(study(out))


def figure(out):
    "The trade-off of two finished runs, twice over."
    points = analysis.points(analysis.records(study(out/"runs")))
    for _ in range(2):
        core.save_figure(analysis.tradeoff(points, analysis.describe(points)), points, out, "fig3a")


def log(out):
    splits, model = data.load("digits", None, 0.8, 4), study(out/"runs")[0].model()
    for _ in range(4):
        gate_log.write_log(model, splits.test, out/"log.npz", classes=splits.classes)


WORK = {"train": train_one, "sweep": sweep_all, "figure": figure, "log": log}


@pytest.fixture(scope="module")
def start():
    "Start work in a process that has torch imported already: a fork of one that has done nothing else."
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["bas_repro.analysis", "bas_repro.gate_log", "tests.test_kills"])
    patch = pytest.MonkeyPatch()
    patch.setenv("BAS_SAVE_EVERY", "0")
    patch.setenv("OMP_NUM_THREADS", "1")

    def begin(work, *arguments):
        process = server.Process(target=work, args=arguments)
        process.start()
        return process

    yield begin
    patch.undo()


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    "What the work leaves if nobody disturbs it, and how long each kind takes."
    out, seconds = tmp_path_factory.mktemp("undisturbed"), {}
    for kind, work in WORK.items():
        folder = out/"runs" if kind in ("train", "sweep") else out
        for attempt in range(2):  # the first one also loads what is loaded once
            if kind in ("train", "sweep"):
                shutil.rmtree(folder, ignore_errors=True)
            began = time.monotonic()
            process = start(work, folder)
            process.join()
            assert process.exitcode == 0
        seconds[kind] = time.monotonic() - began
    return out, seconds


READ = {".json": core.read_json, ".csv": pd.read_csv, ".npz": gate_log.read_log, ".yaml": core.read_params,
        ".pt": lambda path: torch.load(path, weights_only=True), ".png": lambda path: Image.open(path).load()}


def whole(folder):
    "Read every file that has its final name; how many there are."
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    for path in files:
        READ[path.suffix](path)
    return len(files)


def same(ours, theirs):
    "Are these two finished runs the same to the bit?"
    a, b = (torch.load(folder/"model.pt", weights_only=True) for folder in (ours, theirs))
    log = [pd.read_csv(folder/"log.csv").drop(columns="seconds") for folder in (ours, theirs)]
    equal = all(torch.equal(v, b[k]) for k, v in a.items())
    return equal and record_of(ours) == record_of(theirs) and log[0].equals(log[1])


def record_of(folder):
    "A record but for what the clock says."
    record = core.read_json(folder/"metrics.json")
    return {k: v for k, v in record.items() if not k.startswith(("seconds", "images_per_second"))}


@pytest.mark.parametrize("kind", WORK)
def test_kills(kind, start, undisturbed, count, tmp_path):
    straight, seconds = undisturbed
    moments, kills = random.Random(kind), 0
    if kind in ("figure", "log"):
        shutil.copytree(straight/"runs", tmp_path/"runs")
    folder = tmp_path/"runs" if kind in ("train", "sweep") else tmp_path
    while kills < KILLS[kind]:
        process = start(WORK[kind], folder)
        process.join(moments.uniform(0, seconds[kind]))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            whole(tmp_path)
            count("kills survived")
        elif kind in ("train", "sweep"):
            shutil.rmtree(folder)  # it was quicker: once more from the start
        assert process.exitcode in (0, -signal.SIGKILL)
    process = start(WORK[kind], folder)
    process.join()
    assert process.exitcode == 0 and whole(tmp_path)
    for run in study(tmp_path/"runs")[:1 if kind == "train" else 2]:
        assert same(run.folder, straight/"runs"/run.name)
    files = {"figure": ("fig3a.csv", "fig3a.png"), "log": ("log.npz",)}
    for file in files.get(kind, ()):
        assert (tmp_path/file).read_bytes() == (straight/file).read_bytes()


def on_a_full_disk(out, left):
    "Train where no file can grow above `left` bytes, and leave the error's text."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, left))
    try:
        train_one(out)
    except OSError as error:
        (out/"error.yaml").write_text(f"error: \"{error}\"")


def test_full_disk(start, undisturbed, tmp_path):
    "An OSError, which the command line prints in one line; with room again, the run ends as if undisturbed."
    process = start(on_a_full_disk, tmp_path, 100_000)
    process.join()
    assert "too large" in (tmp_path/"error.yaml").read_text() and whole(tmp_path)
    folder = study(tmp_path)[0].folder
    assert not (folder/"checkpoint.pt").exists() and not list(folder.glob(".*"))  # no half of a file
    start(train_one, tmp_path).join()
    assert same(folder, undisturbed[0]/"runs"/folder.name)


@pytest.mark.parametrize("out", ["/proc", "/dev/null"])
def test_folder_that_cannot_be_written(out, tmp_path, monkeypatch):
    monkeypatch.setattr(core, "root", lambda: tmp_path)
    with pytest.raises(OSError) as caught:
        train_one(out)
    assert out in str(caught.value) and "\n" not in str(caught.value)


def test_two_processes_make_the_same_run(start, undisturbed, tmp_path):
    both = [start(train_one, tmp_path) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0] and whole(tmp_path)
    folder = study(tmp_path)[0].folder
    assert same(folder, undisturbed[0]/"runs"/folder.name)


def test_a_compiled_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    settings = {"model": "resnet8", "epochs": 2, "batch_size": 512, "image_size": 4, "compile": "yes"}
    straight, paused = (Run(tmp_path/name, **settings) for name in ("straight", "paused"))
    train.train(straight)
    assert train.train(paused, until=1) is None and train.train(paused)
    assert same(paused.folder, straight.folder)
