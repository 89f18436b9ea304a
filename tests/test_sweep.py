"""A sweep outlives its workers: killed in joblib's pool or on a Dask cluster, the runs end with the numbers of an undisturbed sweep."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from bas_repro import core, train

ROOT = Path(__file__).parents[1]
SETTINGS = {"epochs": 20, "batch_size": 256, "image_size": 4, "method": ["plain", "bas"]}
REPORTED = ("test_accuracy", "macs_mean", "val_accuracy")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train.sweep(train.grid(SETTINGS), tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    core.write_params(tmp_path / "params" / "study" / "both" / "a.yaml", SETTINGS)
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
    ours = [train.finished(folder / train.slug(config), config) for config in train.grid(SETTINGS)]
    return [[m[k] for k in REPORTED] for m in ours] == [[m[k] for k in REPORTED] for m in undisturbed]


def test_a_killed_worker_of_the_pool(checkout, undisturbed):
    code = "from bas_repro import train; train.main(['params/study/both/a.yaml', '--jobs', '2'])"
    sweep = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "BAS_SAVE_EVERY": "0"})
    wait_for_epochs(checkout / "outputs" / "study")
    workers = subprocess.run(["pgrep", "-P", str(sweep.pid), "-f", "popen_loky"], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    printed, said = sweep.communicate()
    assert sweep.returncode == 0 and "a worker died" in said and printed.count("test accuracy") == 2
    assert same(checkout / "outputs" / "study", undisturbed)


def test_a_terminated_sweep_leaves_no_worker_behind(checkout):
    command = [sys.executable, "-m", "bas_repro.train", "params/study/both/a.yaml", "--jobs", "2"]
    sweep = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_epochs(checkout / "outputs" / "study", rows=0)
    workers = subprocess.run(["pgrep", "-P", str(sweep.pid), "-f", "popen_loky"], capture_output=True, text=True).stdout.split()
    sweep.terminate()
    sweep.communicate()
    assert sweep.returncode == 128 + signal.SIGTERM and len(workers) == 2
    assert not any(Path("/proc", worker).exists() for worker in workers)


def test_a_killed_worker_of_a_dask_cluster(checkout, undisturbed, monkeypatch, capfd):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("BAS_SAVE_EVERY", "0")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        first = cluster.workers[0].pid
        killer = threading.Thread(target=lambda: (wait_for_epochs(checkout / "outputs" / "study"), os.kill(first, signal.SIGKILL)))
        killer.start()
        train.main(["params/study/both/a.yaml", "--dask", cluster.scheduler_address])
        killer.join()
        assert cluster.workers[0].pid != first  # the nanny started another one
    assert capfd.readouterr().out.count("test accuracy") == 2 and same(checkout / "outputs" / "study", undisturbed)


def test_dask_that_is_not_there(checkout):
    pytest.importorskip("distributed")
    with pytest.raises(SystemExit, match="error: .*127.0.0.1:9"):
        train.main(["params/study/both/a.yaml", "--dask", "tcp://127.0.0.1:9"])
