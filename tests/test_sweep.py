"""A sweep outlives its workers: killed in joblib's pool or on a Dask cluster, the runs end with the numbers
of an undisturbed sweep."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch._dynamo.utils import counters

from bas_repro import core, runs, train

ROOT = Path(__file__).parents[1]
SETTINGS = {"epochs": 20, "batch_size": 256, "image_size": 4}
METHODS = ["plain", "bas"]
PRESET = "params/study/both.yaml"
REPORTED = ("test_accuracy", "macs_mean", "val_accuracy")


def study(out):
    return runs.grid({**SETTINGS, "method": METHODS}, out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    torch.set_num_threads(1)  # as in joblib's workers: sums depend on it
    return train.sweep(study(tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    core.write_params(tmp_path / PRESET, {"notebook": "study", **SETTINGS, "runs": [{"method": METHODS}]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def wait_for_epochs(folder, rows=1):
    "Until some run there has an epoch behind it, and is not complete."
    for _ in range(1200):
        logs = [f for f in folder.glob("*/log.csv") if not (f.parent / "metrics.json").exists()]
        if any(len(pd.read_csv(f)) >= rows for f in logs):
            return
        time.sleep(0.05)
    raise AssertionError("no run has begun")


def same(folder, undisturbed):
    "Are the records there those of the undisturbed sweep?"
    ours = [run.record() for run in study(folder)]
    return [[m[k] for k in REPORTED] for m in ours] == [[m[k] for k in REPORTED] for m in undisturbed]


def started(command, environment):
    "A sweep in a process of its own."
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment})


def workers_of(sweep):
    "Numbers of the processes in joblib's pool."
    command = ["pgrep", "-P", str(sweep.pid), "-f", "popen_loky"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


def test_a_killed_worker_of_the_pool(checkout, undisturbed):
    code = f"from bas_repro import train; train.main([{PRESET!r}, '--jobs', '2'])"
    sweep = started([sys.executable, "-c", code], {"BAS_SAVE_EVERY": "0"})
    wait_for_epochs(checkout / "outputs" / "study")
    os.kill(int(workers_of(sweep)[0]), signal.SIGKILL)
    printed, said = sweep.communicate()
    assert sweep.returncode == 0 and "a worker died" in said and printed.count("test accuracy") == 2
    assert same(checkout / "outputs" / "study", undisturbed)


def test_a_terminated_sweep_leaves_no_worker_behind(checkout):
    sweep = started([sys.executable, "-m", "bas_repro.train", PRESET, "--jobs", "2"], {})
    wait_for_epochs(checkout / "outputs" / "study", rows=0)
    workers = workers_of(sweep)
    sweep.terminate()
    sweep.communicate()
    assert sweep.returncode == 128 + signal.SIGTERM and len(workers) == 2
    assert not any(Path("/proc", worker).exists() for worker in workers)


def test_a_killed_worker_of_a_dask_cluster(checkout, undisturbed, monkeypatch, capfd):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("BAS_SAVE_EVERY", "0")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        first = cluster.workers[0].pid

        def kill():
            wait_for_epochs(checkout / "outputs" / "study")
            os.kill(first, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        train.main([PRESET, "--dask", cluster.scheduler_address])
        killer.join()
        assert cluster.workers[0].pid != first  # the nanny started another one
    assert capfd.readouterr().out.count("test accuracy") == 2
    assert same(checkout / "outputs" / "study", undisturbed)


def test_dask_that_is_not_there(checkout, monkeypatch):
    distributed = pytest.importorskip("distributed")
    client = distributed.Client
    monkeypatch.setattr(distributed, "Client", lambda address, timeout: client(address, timeout=1))
    with pytest.raises(SystemExit, match="error: .*127.0.0.1:9"):
        train.main([PRESET, "--dask", "tcp://127.0.0.1:9"])


def test_runs_that_differ_in_seed_and_strengths_share_a_compiled_graph():
    "A new graph for each run, or for λ and γ given as numbers, would eat the minutes that a GPU is lent."
    settings = {"model": "resnet8", "batch_size": 256, "epochs": 1, "compile": "yes", "device": "cpu"}
    three = [runs.Run(**settings), runs.Run(**settings, seed=1, gamma=1.0), runs.Run(**settings, seed=2, lam=0.1)]
    counters.clear()
    splits = three[0].work.read(three[0], "cpu")
    found = train.fit([train.Trainee(run, run.work.build(run, 10), splits) for run in three])
    assert counters["stats"]["unique_graphs"] == 1
    [alone] = train.fit([train.Trainee(three[1], three[1].work.build(three[1], 10), splits)])
    assert alone.log[-1]["loss_task"] == found[1].log[-1]["loss_task"]  # to the bit, beside others or not
    assert counters["stats"]["unique_graphs"] == 1
