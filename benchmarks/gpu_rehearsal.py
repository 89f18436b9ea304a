"""The rehearsal of on_gpu.py on the CPU: the checks in small, a visit that cuts a run in two, a second visit
that finishes it on another machine, and what came back taken up at home, against runs not interrupted."""
import os
import shutil
import tempfile
import time
from pathlib import Path

import pandas as pd

from bas_repro import core, runs
from benchmarks import gpu_checks, gpu_packing, on_gpu

PRESET = """\
notebook: 04_cifar10
run: rehearsal
dataset: digits
image_size: 4
model: resnet8
batch_size: 128
compile: "no"
device: cpu
runs:
- {method: plain, epochs: 2}
- {method: bas, gamma: [0.1, 0.2], epochs: 36}
"""
SHARE = 0.35  # of the two long runs' time at which the first visit ends


def _machine(folder: Path) -> Path:
    "A bare root with the preset."
    folder.mkdir(parents=True)
    shutil.copy(on_gpu.ROOT/"settings.ini", folder)
    (folder/"rehearsal.yaml").write_text(PRESET)
    return folder


def _visit(root: Path, *arguments: str) -> bool:
    "A visit without checks in a root; what is to come back is in its folder out."
    os.chdir(root)
    words = ["--no-checks", "--runs-at-once", "2", "--out", str(root/"out"), *arguments, "rehearsal.yaml"]
    print(f"visit in {root.name}: {' '.join(arguments)}", flush=True)
    return on_gpu.visit(on_gpu.arguments(words), "cpu", time.monotonic())


def _queue(root: Path) -> list[runs.Run]:
    "The runs of the preset in a root."
    os.chdir(root)
    return on_gpu.queue_of(["rehearsal.yaml"])


def _straight(root: Path) -> float:  # seconds
    "Train all runs without interruption; how long after its start a visit should end to cut the long ones."
    began = time.time()
    _visit(root, "--deadline", "600")
    long = _queue(root)[1:]
    first = min((run.folder/"params.yaml").stat().st_mtime for run in long)
    last = max((run.folder/"metrics.json").stat().st_mtime for run in long)
    return first + SHARE * (last - first) - began


def _interrupted(scratch: Path, after: float) -> tuple[Path, list[float]]:
    "A visit that ends in the middle of a run, and how far each run came; again if the time was not met."
    for attempt in range(3):
        root = _machine(scratch/f"first-{attempt}")
        _visit(root, "--deadline", f"{after + on_gpu.PACKING:.1f}")
        came = [run.progress() for run in _queue(root)]
        if any(0 < progress < 1 for progress in came):
            break
        after *= 0.6 if all(came) else 1.5
    return root, came


def _difference(ours: runs.Run, theirs: runs.Run) -> list[str]:
    "In what two finished runs differ, besides seconds."
    found = []
    records = [run.record() or {} for run in (ours, theirs)]
    for name in sorted(set(records[0]) | set(records[1])):
        timed = name.startswith(("seconds", "images_per_second"))
        if not timed and records[0].get(name) != records[1].get(name):
            found.append(f"{ours.name}: {name}")
    for file in ("log.csv", "gates.csv"):
        paths = [run.folder/file for run in (ours, theirs)]
        tables = [pd.read_csv(path) if path.exists() else pd.DataFrame() for path in paths]
        if not tables[0].drop(columns="seconds", errors="ignore").equals(
                tables[1].drop(columns="seconds", errors="ignore")):
            found.append(f"{ours.name}: {file}")
    return found


def _at_home(home: Path, visits: list[Path], straight: Path) -> list[gpu_checks.Result]:
    "Take up what came back from some visits, and compare."
    os.chdir(home)
    taken = [on_gpu.take_up(root/"out", False) for root in visits]
    there = (home/gpu_packing.BENCH).exists() and all(run.record() for run in _queue(home))
    differ = [line for pair in zip(_queue(home), _queue(straight)) for line in _difference(*pair)]
    weights = [run.model() is not None for run in _queue(home)]
    words = ", ".join(differ) or "no difference"
    return [
        gpu_checks.Result("what came back is taken up", all(taken) and there, f"{len(weights)} networks"),
        gpu_checks.Result("records equal uninterrupted ones", not differ, words),
    ]


def _run(scratch: Path) -> tuple[list[dict], list[gpu_checks.Result]]:
    "All of the rehearsal: what the checks found, and what became of the visits."
    names = ("bench", "straight", "second", "home")
    bench, straight, second, home = (_machine(scratch/name) for name in names)
    (bench/"out").mkdir()
    os.chdir(bench)
    found = on_gpu.stage_a(on_gpu.Visit(bench/"out", time.monotonic() + 600, "cpu"))  # also starts the server
    after = _straight(straight)
    first, came = _interrupted(scratch, after)
    words = ", ".join(f"{progress:.0%}" for progress in came)
    cut = gpu_checks.Result("a visit ends in the middle of a run", any(0 < p < 1 for p in came), words)
    well = _visit(second, "--deadline", "600", "--resume", str(first/"out"))
    resumed = gpu_checks.Result("the next visit finishes it", well, f"{len(came)} runs")
    return found, [cut, resumed, *_at_home(home, [bench, first, second], straight)]


def rehearse() -> bool:
    "Rehearse in a scratch folder. Whether every line passed."
    began, here = time.monotonic(), Path.cwd()
    os.environ["TRITON_INTERPRET"] = "1"  # before the server of processes imports triton
    os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other on a busy machine take minutes
    os.environ["BAS_COMMIT"] = core.code()["commit"]
    on_gpu.LEAST = 1.0  # seconds: runs are short here
    on_gpu.serve()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            checks, visits = _run(Path(scratch).resolve())
    finally:
        os.chdir(here)
    for result in visits:
        print(f"{gpu_checks.word(result)} {result.name}: {result.figure}")
    failed = [one for one in checks if one["passed"] is False] + [one for one in visits if not one.passed]
    print(f"rehearsed in {time.monotonic() - began:.0f} s: {len(failed) or 'none'} failed")
    return not failed
