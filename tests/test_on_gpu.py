"""benchmarks/on_gpu.py: rehearsed on the CPU, bad input, kills while packing, only what that machine has."""
import importlib.metadata
import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bas_repro import core, runs, train

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import gpu_packing, on_gpu

ROOT = Path(__file__).parents[1]
SETTINGS = {"dataset": "digits", "image_size": 4, "model": "resnet8", "device": "cpu"}
THERE = (  # distributions on the borrowed machine; what they need is there too
    "torch", "torchvision", "triton", "numpy", "scipy", "pyyaml", "safetensors", "pandas", "matplotlib",
    "seaborn", "scikit-learn", "torchmetrics", "joblib", "tqdm", "pillow", "pytest", "hypothesis",
)
NOT_THERE = ("papermill", "nbdev", "fastcore", "execnb", "IPython", "jupyter_core", "nbformat", "distributed")


def run_script(*words, python=(sys.executable,), cwd=ROOT, **environment):
    "on_gpu.py in a process of its own."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [*python, str(ROOT/"benchmarks"/"on_gpu.py"), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_rehearsal(tell):
    "Checks, a run cut in two, taken up on another machine, finished: as if nothing had happened."
    began = time.monotonic()
    found = run_script("--rehearse")
    lines = found.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    assert found.returncode == 0 and not failed, found.stdout[-3000:] + found.stderr[-3000:]
    ends = ("a visit ends in the middle of a run", "the next visit finishes it",
            "what came back is taken up", "records equal uninterrupted ones")
    for name in ends:
        assert [line for line in lines if line.startswith(f"PASS {name}:")]
    passed = sum(line.startswith("PASS") for line in lines)
    tell(f"on_gpu.py --rehearse: {passed} lines PASS in {time.monotonic() - began:.0f} s")


# Bad input: the words, and a part of the one line


@pytest.fixture
def root(tmp_path, monkeypatch):
    "A bare root, in which the working folder is."
    shutil.copy(ROOT/"settings.ini", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path/"digits.yaml").write_text("notebook: 04_cifar10\ndataset: digits\nruns:\n- {method: plain}\n")
    (tmp_path/"empty").mkdir()
    return tmp_path


BAD = {
    "short": (["digits.yaml", "--out", "out", "--deadline", "30"], "--deadline 30 s is too short for the first"),
    "no group": (["digits.yaml", "--out", "out", "--runs-at-once", "0"], "--runs-at-once 0: give 1 or more"),
    "no preset": (["absent.yaml", "--out", "out"], "absent.yaml"),
    "read-only": (["digits.yaml", "--out", "/proc"], "--out /proc: nothing can be written there"),
    "a file": (["digits.yaml", "--out", "settings.ini"], "--out settings.ini: nothing can be written there"),
    "nowhere": (["digits.yaml"], "$OUT is not set"),
    "nothing came": (["unpack", "empty"], "empty has none of bench.json, records.tar.gz"),
    "no such folder": (["unpack", "absent"], "give a folder that came back"),
    "resumed from nothing": (["digits.yaml", "--out", "out", "--resume", "empty"], "empty has none of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, root, monkeypatch, count):
    words, line = BAD[case]
    monkeypatch.delenv("OUT", raising=False)
    with pytest.raises(SystemExit) as caught:
        on_gpu.main(words)
    text = str(caught.value)
    count("bad calls of on_gpu.py answered", line in text and "\n" not in text)
    assert text.startswith("error: ") and line in text and "\n" not in text


def test_no_gpu(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here.*--rehearse"):
        on_gpu.main(["digits.yaml", "--out", "out"])


def test_no_commit(root, monkeypatch):
    monkeypatch.setattr(core, "code", lambda: {"commit": "unknown"})
    with pytest.raises(SystemExit, match="BAS_COMMIT is not set"):
        on_gpu.main(["digits.yaml", "--out", "out"])


def test_full(root, monkeypatch):
    usage = shutil.disk_usage(root)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match="1 MiB are free, 64 are needed"):
        on_gpu.main(["digits.yaml", "--out", "out"])


# Checks in processes of their own


def hang(number, visit, root, file):
    time.sleep(60)


def crash(number, visit, root, file):
    core.write_json(file, {"results": [{"name": "before", "seconds": 1.0}]})
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_check_that_hangs_or_crashes_ends_alone(root):
    visit = on_gpu.Visit(root, time.monotonic() + 60, "cpu")
    hung = on_gpu.run_check(0, visit, 1.0, hang)
    assert [one["figure"] for one in hung] == ["ran past its 1 s"] and hung[0]["passed"] is False
    before, crashed = on_gpu.run_check(0, visit, 30.0, crash)
    assert before["name"] == "before" and crashed["figure"] == "died with exit code -11"


def test_groups():
    "Runs of equal length in the order of the queue, whatever their networks; what changes in training, alone."
    queue = [runs.Run(**SETTINGS, method=method, seed=seed, epochs=epochs)
             for epochs in (4, 5) for seed in range(2) for method in ("plain", "fbs", "bas")]
    groups = train.groups(queue, 3)
    assert sorted(map(queue.index, sum(groups, []))) == list(range(len(queue)))
    assert [len(group) for group in groups] == [3, 1, 1, 1, 3, 1, 1, 1]
    assert all(len(group) == 1 for group in groups if any(run.method.name == "fbs" for run in group))
    assert all(len({run.epochs for run in group}) == 1 for group in groups)


def test_what_is_compiled_ahead():
    "Each structure of a network once, whatever its seed, length and λ, and nothing that is not compiled."
    methods = [("plain", {}), ("bas", {"lam": 0.5}), ("bas", {"lam": 0.2}), ("bas", {"target_macs": 0.5})]
    queue = [runs.Run(**SETTINGS, method=method, seed=seed, compile=compiled, **own)
             for seed in range(2) for method, own in methods for compiled in ("yes", "no")]
    found = on_gpu.structures(queue)
    assert len(found) == 3 and all(run.compile == "yes" for run in found)


# Packing


def study():
    "Six runs that are complete or begun without having been trained."
    return [runs.Run(core.root()/"outputs"/"04_cifar10", **SETTINGS, method="plain", seed=seed)
            for seed in range(6)]


def begin(run, rows=2, numbers=50_000):
    "Leave what a run that was stopped leaves."
    core.write_params(run.folder/"params.yaml", run.identity)
    with core.whole(run.folder/"log.csv") as part:
        part.write_text("epoch\n" + "1\n" * rows)
    core.write_state(run.folder/"checkpoint.pt", {"settings": run.identity, "model": torch.rand(numbers)})


def finish(run, accuracy=0.5):
    "Leave what a finished run leaves."
    begin(run, 4)
    core.write_state(run.folder/"model.pt", {"w": torch.rand(200, 200), "b": torch.rand(9)})
    core.write_json(run.folder/"metrics.json", {"settings": run.identity, "test_accuracy": accuracy})
    (run.folder/"checkpoint.pt").unlink()


@pytest.fixture
def packed(root):
    "A folder with the archives of three finished and two begun runs."
    packer = gpu_packing.Packer(study(), root/"back")
    for run in study()[:3]:
        finish(run)
    for run in study()[3:5]:
        begin(run)
    assert packer.pack() == []
    shutil.move(root/"outputs", root/"there")
    return root/"back"


def test_round_trip(packed, root):
    taken, refused = gpu_packing.unpack(packed)
    assert len(taken) == 8 and not refused
    for run in study()[:5]:
        theirs = root/"there"/"04_cifar10"/run.name
        names = sorted(path.name for path in theirs.iterdir())
        assert sorted(path.name for path in run.folder.iterdir()) == names
        for name in set(names) - {"model.pt"}:
            assert (run.folder/name).read_bytes() == (theirs/name).read_bytes()
    state = core.read_state(study()[0].folder/"model.pt")
    assert state["w"].dtype == torch.float16 and state["b"].dtype == torch.float32


def test_what_is_finished_or_further_here_stays(packed):
    finished, also, other = study()[0], study()[3], study()[4]
    finish(finished, 0.7)
    finish(also)
    begin(other, 3)
    kept = [path.read_bytes() for run in (finished, also, other) for path in sorted(run.folder.iterdir())]
    taken, refused = gpu_packing.unpack(packed)
    assert len(refused) == 2 and all("complete here with another record" in line for line in refused)
    after = [path.read_bytes() for run in (finished, also, other) for path in sorted(run.folder.iterdir())]
    assert after == kept and study()[1].record()


@pytest.mark.parametrize("name", ["records.tar.gz", "models.tar", "resume-1.tar"])
def test_cut_short(name, packed):
    data = (packed/name).read_bytes()
    for share in (0.0, 0.3, 0.8):
        (packed/name).write_bytes(data[:int(len(data) * share)])
        taken, refused = gpu_packing.unpack(packed)
        assert taken and len(refused) == 1 and f"{name} is cut short or damaged" in refused[0]
        assert "\n" not in refused[0]


def test_another_commit(packed, monkeypatch):
    monkeypatch.setattr(core, "code", lambda: {"commit": "f" * 40})
    taken, refused = gpu_packing.unpack(packed)
    assert not taken and len(refused) == 3 and all("--any-commit" in line for line in refused)
    assert not study()[0].record()
    taken, refused = gpu_packing.unpack(packed, any_commit=True)
    assert len(taken) == 8 and not refused


def test_other_settings_and_strange_paths(root):
    run, other = study()[:2]
    begin(run)
    settings = {"settings": other.identity}
    buffer = io.BytesIO()
    torch.save(settings, buffer)
    files = gpu_packing._files(run, "params.yaml")
    folder = run.folder.relative_to(root).as_posix()
    back = root/"back"
    back.mkdir()
    files[f"{folder}/checkpoint.pt"] = buffer.getvalue()
    (back/"resume-1.tar").write_bytes(gpu_packing.archive(files))
    (back/"resume-2.tar").write_bytes(gpu_packing.archive({"outputs/../../evil": b"1"}))
    (back/"resume-3.tar").write_bytes(gpu_packing.archive({f"{folder}/checkpoint.pt": b"1"}))
    taken, refused = gpu_packing.unpack(back)
    assert not taken and f"has the settings of {other.name}" in refused[0]
    assert "no file of a run" in refused[1] and len(refused) == 3


def test_what_finds_no_room_is_named(root, monkeypatch):
    monkeypatch.setattr(gpu_packing, "MOST", 500_000)
    monkeypatch.setattr(gpu_packing, "ROOM", 900_000)
    packer = gpu_packing.Packer(study(), root/"back")
    for run in study():
        begin(run, numbers=40_000)
    left = packer.pack()
    names = [path.name for path in (root/"back").iterdir()]
    assert sum(path.stat().st_size for path in (root/"back").iterdir()) < 950_000
    assert len(left) == 1 and "it will start anew" in left[0]
    assert study()[5].name in left[0] and sorted(names) == ["resume-1.tar", "resume-2.tar", "resume-3.tar"]


def pack_for_ever(root):
    "Pack again and again while runs begin, go on and end."
    os.chdir(root)
    packer = gpu_packing.Packer(study(), root/"back")
    for turn in range(10_000):
        run = study()[turn // 8 % 6]
        if turn % 8 < 7 and not run.record():
            begin(run, turn % 8)
        elif not run.record():
            finish(run)
        packer.pack()


def limited(root):
    "Pack where no file can grow beyond what records need; leave the error's words."
    os.chdir(root)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    packer = gpu_packing.Packer(study(), root/"back")
    finish(study()[5])
    visit = on_gpu.Visit(root/"back", time.monotonic() + 60, "cpu")
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    assert not on_gpu._pack(visit, packer)


@pytest.fixture(scope="module")
def server():
    "A server of processes that has everything imported."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.on_gpu", "tests.test_on_gpu"])
    return context


def test_killed_while_packing(server, root, count):
    "Every archive there is whole, and no run that was in one is in none."
    moments = random.Random(0)
    for attempt in range(8):
        process = server.Process(target=pack_for_ever, args=(root,))
        process.start()
        while not list((root/"back").glob("*.tar")):
            time.sleep(0.02)
        time.sleep(moments.uniform(0.05, 0.4))
        process.kill()
        process.join()
        archives = [path for path in (root/"back").iterdir() if not path.name.startswith(".")]
        packed = {name.split("/")[2] for path in archives for name in gpu_packing.read_archive(path)[1]}
        assert packed and len(list((root/"back").iterdir())) <= 6
        sure = {run.name for run in study() if run.folder.exists()} - packed
        assert len(sure) <= 1  # the one that has just begun
        count("kills while packing survived")
        shutil.rmtree(root/"outputs")
        shutil.rmtree(root/"back")


def test_a_full_disk_leaves_what_was_packed(server, packed, root, count):
    shutil.move(root/"there", root/"outputs")
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    process = server.Process(target=limited, args=(root,))
    process.start()
    process.join()
    after = {path.name: path.read_bytes() for path in packed.iterdir()}
    words = after.pop("log.txt").decode()
    assert process.exitcode == 0 and "takes no more" in words and words.count("\n") == 1
    assert after["resume-1.tar"] == before["resume-1.tar"] and not list(packed.glob(".*"))
    for path in packed.glob("*.tar*"):
        gpu_packing.read_archive(path)


# Only what that machine has


def needed(names):
    "Distributions, those that they need, those that these need …"
    found, left = {}, list(names)
    while left:
        name = re.split(r"[^\w.-]", left.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        left += [line for line in found[name].requires or [] if "extra ==" not in line]
    return found.values()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "Python with the standard library and links to the borrowed machine's packages alone."
    site = tmp_path_factory.mktemp("site")
    for distribution in needed(THERE):
        for top in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            target = distribution.locate_file(top)
            if not (site/top).exists() and Path(target).exists():
                (site/top).symlink_to(target)
    return site


def in_bare(code, site, cwd=ROOT):
    "Run code there."
    start = f"import sys; sys.path += [{str(site)!r}, {str(ROOT)!r}]; "
    command = [sys.executable, "-I", "-S", "-c", start + code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_needs_only_what_that_machine_has(bare, tmp_path):
    "All that the script imports, and a check in a process of its own."
    code = f"""
import importlib.util
there = [name for name in {NOT_THERE!r} if importlib.util.find_spec(name)]
assert not there, there
import time
from pathlib import Path
from benchmarks import gpu_checks, gpu_packing, gpu_rehearsal, on_gpu, training_step, triton_kernel
from bas_repro import inference, segmentation, train
lines = on_gpu.run_check(1, on_gpu.Visit(Path({str(tmp_path)!r}), time.monotonic() + 60, "cpu"), 60)
assert lines and all(line["passed"] for line in lines), lines
on_gpu.main(["--help"])
"""
    found = in_bare(code, bare)
    assert found.returncode == 0 and "--rehearse" in found.stdout, found.stderr[-2000:]
