"Bad calls, by table: each is answered in one line that names value and remedy, and harms nothing stored."
import functools
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18 as torchvision_resnet18, vgg11

from bas_repro import baselines, core, data, gate_log, gates, inference, macs, pspnet, resnet
from bas_repro import runs, subnetworks, train
from bas_repro.batch_shaping import Beta, Kumaraswamy, Normal, RelaxedBernoulli, Uniform, batch_shaping_loss
from bas_repro.runs import Run

ROOT = Path(__file__).parents[1]
x = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@functools.cache
def plain():
    return resnet.resnet20().eval()


@functools.cache
def gated():
    return resnet.resnet20(gated=True).eval()


def logged():
    return gated()(images, return_gates=True)[1]


def spoilt(i, value):
    "x with one value replaced."
    y = x.clone()
    y[i] = value
    return y


class Hostile:
    "Unpickled, it would leave a file behind."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


# What a call is given, the exception and a part of its one line.
CALLS = {
    # Eq. 2
    "one sample": (lambda: batch_shaping_loss(x[:1]), ValueError, "at least 2 samples"),
    "whole numbers": (
        lambda: batch_shaping_loss(torch.ones(4, 2, dtype=torch.int64)),
        TypeError, "floating-point"),
    "no such dimension": (lambda: batch_shaping_loss(x, dim=2), ValueError, "dim must be one of the 2"),
    "negative λ": (lambda: batch_shaping_loss(x, lam=-0.5), ValueError, "got -0.5"),
    "no such reduction": (lambda: batch_shaping_loss(x, reduction="max"), ValueError, "'max'"),
    "outside the support": (lambda: batch_shaping_loss(x + 1), ValueError, "support of Beta"),
    "NaN": (lambda: batch_shaping_loss(spoilt(0, float("nan"))), ValueError, "got nan"),
    "infinity": (lambda: batch_shaping_loss(spoilt(0, float("inf"))), ValueError, "got inf"),
    "prior of another size": (
        lambda: batch_shaping_loss(x, Beta(torch.full((4,), 0.6), 0.4)),
        ValueError, "features"),
    "Beta's a": (lambda: Beta(0.0, 0.4), ValueError, "above 0"),
    "Beta's b": (lambda: Beta(0.6, -1.0), ValueError, "got -1"),
    "Beta of NaN": (lambda: Beta(float("nan"), 0.4), ValueError, "nan"),
    "Normal's deviation": (lambda: Normal(0.0, 0.0), ValueError, "above 0"),
    "Uniform turned round": (lambda: Uniform(1.0, 0.0), ValueError, ""),
    "concrete's p": (lambda: RelaxedBernoulli(1.5, 0.5), ValueError, "below 1"),
    "concrete's temperature": (lambda: RelaxedBernoulli(0.5, 0.0), ValueError, "above 0"),
    "Kumaraswamy's a": (lambda: Kumaraswamy(-1.0, 1.0), ValueError, "above 0"),
    # gates
    "temperature 0": (lambda: gates.GatingModule(16, 16, tau=0), ValueError, "tau=0"),
    "one image in training": (
        lambda: gates.GatingModule(4, 4).train()(torch.rand(1, 4, 8, 8)),
        ValueError, "batch size 1"),
    "negative γ": (lambda: gates.l0_loss(logged(), -0.1), ValueError, "gamma=-0.1"),
    "reduction of Eq. 5": (lambda: gates.l0_loss(logged(), 0.1, "none"), ValueError, "'none'"),
    # networks
    "depth": (lambda: resnet.cifar_resnet(21), ValueError, "depth=21"),
    "width": (lambda: resnet.resnet20(gated=True, width=0), ValueError, "width=0"),
    "gates on gates": (lambda: resnet.gate(resnet.resnet20(gated=True)), ValueError, "gated already"),
    "gates on VGG": (lambda: resnet.gate(vgg11(init_weights=False)), TypeError, "VGG"),
    "gates on a layer": (lambda: resnet.gate(nn.Linear(2, 2)), TypeError, "Linear"),
    "bottleneck": (lambda: resnet.gate(torchvision_resnet18(), bottleneck="three"), ValueError, "'three'"),
    "backbone": (lambda: pspnet.pspnet("vgg16"), ValueError, "'vgg16'"),
    "one class": (lambda: pspnet.pspnet("resnet18", num_classes=1), ValueError, "num_classes=1"),
    # the ledger
    "input size": (lambda: macs.dense_macs(plain(), (32, 32)), ValueError, "(32, 32)"),
    "budget": (lambda: macs.budget_loss(None, [], 1.5, 1), ValueError, "target=1.5"),
    # the competing methods
    "AIG on gates": (lambda: baselines.aig(resnet.resnet20(gated=True)), ValueError, "gated already"),
    "AIG on VGG": (lambda: baselines.aig(vgg11(init_weights=False)), TypeError, "VGG"),
    "SkipNet's kind": (lambda: baselines.skipnet(resnet.resnet20(), kind="rnn"), ValueError, "'rnn'"),
    "sampling without gates": (lambda: baselines.sampled(plain()), ValueError, "skipnet()"),
    "density 0": (lambda: baselines.fbs(resnet.resnet20(), density=0.0), ValueError, "density=0.0"),
    "density of a plain network": (lambda: baselines.set_density(plain(), 0.5), ValueError, "fbs()"),
    "static cut of a plain network": (lambda: baselines.static(plain(), []), TypeError, "has none"),
    "static masks": (lambda: baselines.static(gated(), [torch.ones(16)]), ValueError, "1 masks for 9"),
    # executors
    "engine": (lambda: inference.compact(gated(), "gpu"), ValueError, "engine='gpu'"),
    "forced masks": (lambda: inference.force(gated(), [torch.ones(1, 16)]), ValueError, "1 masks for 9"),
    "dense engines of gates": (
        lambda: inference.dense_engines(gated(), images),
        ValueError, "this one has gates"),
    "export's ending": (
        lambda: inference.export(gated(), "net.pth", (3, 32, 32)),
        ValueError, ".pt2 or .onnx"),
    "another gate log": (
        lambda: inference.compact(gated(), "torch", logged()[:1]),
        ValueError, "log: gates of [16]"),
    # gate logs and sub-networks
    "log without gates": (lambda: gate_log.write_log(plain(), [], "log.npz"), ValueError, "no gates"),
    "log's ending": (lambda: gate_log.write_log(gated(), [], "log.csv"), ValueError, ".npz"),
    "no log": (lambda: gate_log.read_log("nowhere.npz"), FileNotFoundError, "nowhere.npz"),
    "class": (lambda: subnetworks.numbers(["cat", "dog"], ["cat", "dgo"]), ValueError, "'dgo'"),
    "one class alone": (lambda: subnetworks.numbers(["cat", "dog"], ["cat"]), ValueError, "two different"),
    # data
    "data set": (lambda: data.load("mnist"), ValueError, "'mnist'"),
    "no folder": (lambda: data.load("cifar10", "/nowhere"), FileNotFoundError, "/nowhere"),
    "hold-out": (lambda: data.load("digits", holdout=1.0), ValueError, "holdout=1.0"),
    "image size": (lambda: data.load("digits", size=2), ValueError, "image size 2"),
    "no segmentation set": (lambda: data.load("coco"), ValueError, "'coco'"),
    # settings of a run
    "misspelt setting": (lambda: runs.grid({"gama": 0.1}), TypeError, "did you mean 'gamma'"),
    "text for a number": (lambda: runs.grid({"lr": "5e-4"}), TypeError, "5.0e-4"),
    "true for a number": (lambda: runs.grid({"seed": True}), TypeError, "a whole number"),
    "a half epoch": (lambda: runs.grid({"epochs": 1.5}), TypeError, "a whole number"),
    "no values": (lambda: runs.grid({"gamma": []}), ValueError, "at least one"),
    "method": (lambda: Run(method="dropout"), ValueError, "'dropout'"),
    "model": (lambda: Run(model="resnet21"), ValueError, "'resnet21'"),
    "γ below 0": (lambda: Run(gamma=-0.1), ValueError, "gamma=-0.1"),
    "γ that is no number": (lambda: Run(gamma=float("nan")), ValueError, "gamma=nan"),
    "start of the gates": (lambda: Run(gate_bias=float("inf")), ValueError, "gate_bias=inf"),
    "infinite λ": (lambda: Run(lam=float("inf")), ValueError, "lam=inf"),
    "learning rate": (lambda: Run(lr=-1.0), ValueError, "lr=-1.0"),
    "no epochs": (lambda: Run(epochs=0), ValueError, "epochs=0"),
    "batch of one": (lambda: Run(batch_size=1), ValueError, "batch_size=1"),
    "precision": (lambda: Run(precision="fp8"), ValueError, "'fp8'"),
    "device": (lambda: Run(device="tpu"), ValueError, "'tpu'"),
    "target rate": (lambda: Run(method="aig", target=1.0), ValueError, "target=1.0"),
    "budget of a run": (lambda: Run(target_macs=1.2), ValueError, "target_macs=1.2"),
    "γ's calendar": (lambda: Run(gamma_from=300.0, gamma_full=200.0), ValueError, "gamma_full=200.0"),
    "wide ImageNet network": (lambda: Run(model="resnet50", width=2), ValueError, "width=2"),
    "misspelt setting of a run": (lambda: Run(epoch=2), TypeError, "did you mean 'epochs'"),
    "another task's setting": (lambda: Run(crop=(16, 16)), TypeError, "no setting of classification"),
    "blocks for pixels": (lambda: Run(dataset="scenes", method="aig"), ValueError, "method='aig'"),
    "crop": (lambda: Run(dataset="scenes", crop=(8, 8)), ValueError, "crop=[8"),
    "parts of a batch": (lambda: Run(dataset="scenes", accumulate=4), ValueError, "accumulate=4"),
    "no file of weights": (lambda: train.train(Run(dataset="scenes", weights="no.pt")), ValueError, "no.pt"),
    "weights of a CIFAR network": (lambda: Run(weights="IMAGENET1K_V1"), ValueError, "is not released"),
    "streamed digits": (lambda: Run(stream=True), ValueError, "digits"),
    "too few epochs for FBS": (lambda: Run(method="fbs", epochs=1), ValueError, "epochs=1"),
    "no run": (lambda: runs.load("nowhere"), FileNotFoundError, "nowhere"),
    "run's name": (lambda: runs.study("04_cifar10", {"run": "../up"}), ValueError, "plain folder name"),
    "no preset": (lambda: core.read_params("params/none.yaml"), FileNotFoundError, "params/none.yaml"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_call(name, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, kind, part = CALLS[name]
    with pytest.raises(kind) as caught:
        call()
    answered(caught, part, count, longest=300)
    assert not list(tmp_path.iterdir())  # nothing is left behind


# A notebook, one of its parameters with a bad value, and a part of the one line.
EVERYWHERE = [
    ("rum", "x", "unknown parameter 'rum'"),
    ("run", 3, "run=3"),
    ("run", "../up", "plain folder name"),
]
NOTEBOOKS = ("04_cifar10", "05_imagenet", "06_cityscapes", "07_timing", "08_gate_patterns", "09_claims",
             "10_future_uses")
PARAMETERS = [(notebook, *bad) for notebook in NOTEBOOKS for bad in EVERYWHERE] + [
    ("04_cifar10", "gamma", -0.1, "gamma=-0.1"),
    ("04_cifar10", "epochs", 2.5, "epochs=2.5"),
    ("04_cifar10", "dataset", "mnist", "'mnist'"),
    ("04_cifar10", "preset", "none", "-f params/04_cifar10/none.yaml"),
    ("05_imagenet", "image_size", -64, "image_size=-64"),
    ("06_cityscapes", "crop", [8, 8], "crop=[8"),
    ("06_cityscapes", "lam", "big", "lam='big'"),
    ("07_timing", "repeats", 1, "repeats=1"),
    ("07_timing", "engines", "cuda", "'cuda'"),
    ("07_timing", "gpu_batch", 128, "unknown parameter 'gpu_batch'"),
    ("07_timing", "run", "gpu", "run='gpu'"),
    ("09_claims", "outputs", "/nowhere", "/nowhere"),
]


@pytest.mark.parametrize("notebook, name, value, part", PARAMETERS)
def test_bad_parameter(notebook, name, value, part, count, tmp_path, monkeypatch):
    "The cells up to the fourth after a notebook's parameters, one of them replaced as papermill does it."
    cells = json.loads((ROOT/"nbs"/f"{notebook}.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    at = next(i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", []))
    (tmp_path/"settings.ini").write_text((ROOT/"settings.ini").read_text())
    (tmp_path/"params").symlink_to(ROOT/"params")
    monkeypatch.chdir(tmp_path)
    sources = ["".join(cell["source"]) for cell in cells]
    sources[at] += f"\n{name} = {value!r}"
    namespace = {"__name__": "__main__"}
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        for source in sources[:at + 5]:
            exec(source, namespace)
    torch.set_grad_enabled(True)
    answered(caught, part, count)
    assert not list(tmp_path.rglob("*.json"))


def answered(caught, part, count, longest=800):
    "The error is one line that says this, in so many characters; a list of all settings takes most."
    message = str(caught.value)
    good = part in message and "\n" not in message and len(message) < longest
    count("bad calls answered", good)
    assert good, message


PRESET = "notebook: study\nruns:\n- {method: plain}\n"
# On the command line: what is added to the preset, what stands behind it, and a part of the one line.
COMMANDS = [
    ("gama: 0.1", "", "unknown parameter 'gama'"),
    ("gamma: 5e-4", "", "write 5.0e-4"),
    ("lr: -1.0", "", "lr=-1.0"),
    ("[1, 2", "", "is not YAML"),
    ("dataset: cifar10\ndata_root: /nowhere", "", "no folder /nowhere"),
    ("batch_size: 1", "", "batch_size=1"),
    ("", "-p gama 0.1", "unknown parameter 'gama'"),
    ("", "-p lr -1.0", "lr=-1.0"),
    ("", "-p lr [1", "-p lr [1"),
    ("", "params/study/b.yaml", "params/study/b.yaml"),
]


@pytest.mark.parametrize("added, words, part", COMMANDS)
def test_bad_command(added, words, part, count, tmp_path, monkeypatch):
    (tmp_path/"params"/"study").mkdir(parents=True)
    (tmp_path/"params"/"study"/"a.yaml").write_text(PRESET + added)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        train.main(["params/study/a.yaml", *words.split()])
    answered(caught, part, count)
    assert not (tmp_path/"outputs").exists()


def hostile(folder):
    return pickle.dumps(Hostile(str(folder/"harm")))


def archive(**arrays):
    "An .npz file's bytes."
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def shortened(old, folder):
    return old[:len(old) // 2]


def of_seed_1(old, folder):
    return old.replace(b'"seed": 0', b'"seed": 1')


# A file of a finished run, what becomes of it, and a part of the one line.
RUN_FILES = {
    "half a record": ("metrics.json", shortened, "not a whole record"),
    "empty record": ("metrics.json", lambda old, folder: b"", "not a whole record"),
    "a list for a record": ("metrics.json", lambda old, folder: b"[1]", "not a record"),
    "another run's record": ("metrics.json", of_seed_1, "other settings"),
    "pickle for a record": ("metrics.json", lambda old, folder: hostile(folder), "not a whole record"),
    "half a checkpoint": ("checkpoint.pt", shortened, "not a whole checkpoint"),
    "empty checkpoint": ("checkpoint.pt", lambda old, folder: b"", "not a whole checkpoint"),
    "text for a checkpoint": ("checkpoint.pt", lambda old, folder: b"hello", "not a whole checkpoint"),
    "hostile checkpoint": ("checkpoint.pt", lambda old, folder: hostile(folder), "not a whole checkpoint"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run of a second: its settings, and its files, the checkpoint among them."
    out = tmp_path_factory.mktemp("runs")
    run = Run(out, epochs=2, batch_size=512, holdout=0.5, compile="no")
    train.train(run, until=1)
    checkpoint = (run.folder/"checkpoint.pt").read_bytes()
    train.train(run)
    return run, {p.name: p.read_bytes() for p in run.folder.iterdir()} | {"checkpoint.pt": checkpoint}


@pytest.mark.parametrize("name", RUN_FILES)
def test_spoilt_run(name, finished, count, tmp_path):
    done, files = finished
    file, spoil, part = RUN_FILES[name]
    run = Run(tmp_path, **done.settings)
    run.folder.mkdir()
    (run.folder/"log.csv").write_bytes(files["log.csv"])
    (run.folder/file).write_bytes(spoil(files[file], run.folder))
    refused(lambda: train.train(run), part, run.folder/file, count)


def saved(net):
    "A file of a network's weights."
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    return file.getvalue()


# The weights of a finished run: what becomes of them, and a part of the one line.
WEIGHTS = {
    "half": (shortened, "not the weights of a run"),
    "hostile": (lambda old, folder: hostile(folder), "not the weights of a run"),
    "another network's": (lambda old, folder: saved(resnet.cifar_resnet(8)), "not of this run's network"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_spoilt_weights(name, finished, count, tmp_path):
    done, files = finished
    spoil, part = WEIGHTS[name]
    folder = tmp_path/done.name
    folder.mkdir()
    (folder/"metrics.json").write_bytes(files["metrics.json"])
    (folder/"model.pt").write_bytes(spoil(files["model.pt"], folder))
    refused(lambda: runs.load(folder), part, folder/"model.pt", count)


HARMFUL = archive(about=np.array([Hostile("harm")], dtype=object))
# A file that a user may have, what is in it, who reads it, and a part of the one line.
FILES = {
    "YAML with a tab": ("p.yaml", b"a:\n\t- 1", core.read_params, "not YAML"),
    "YAML that is a list": ("p.yaml", b"- 1", core.read_params, "not a list"),
    "YAML that runs code": ("p.yaml", b"!!python/object/apply:os.getcwd []", core.read_params, "not YAML"),
    "a picture for YAML": ("p.yaml", b"\xff\xd8\xff\xe0", core.read_params, "not YAML"),
    "empty YAML": ("p.yaml", b"", core.read_params, "name: value"),
    "empty picture": ("a.jpg", b"", lambda path: data.decode(path, 8), "not a readable picture"),
    "text for a picture": ("a.jpg", b"hello", lambda path: data.decode(path, 8), "not a readable picture"),
    "half a picture": ("a.png", None, lambda path: data.decode(path, 8), "not a readable picture"),
    "empty gate log": ("log.npz", b"", gate_log.read_log, "not a whole gate log"),
    "text for a gate log": ("log.npz", b"hello", gate_log.read_log, "not a whole gate log"),
    "another archive": ("log.npz", archive(a=np.zeros(3)), gate_log.read_log, "not a whole gate log"),
    "hostile gate log": ("log.npz", HARMFUL, gate_log.read_log, "not a whole gate log"),
}


@pytest.mark.parametrize("name", FILES)
def test_spoilt_file(name, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, content, read, part = FILES[name]
    if content is None:
        Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)).save(file)
        content = shortened(Path(file).read_bytes(), tmp_path)
    Path(file).write_bytes(content)
    refused(lambda: read(tmp_path/file), part, tmp_path/file, count)


def refused(call, part, file, count):
    "The error is one line that names the file; all in its folder is as before, and nothing was unpickled."
    before = {p.name: p.read_bytes() for p in file.parent.iterdir()}
    with pytest.raises(ValueError) as caught:
        call()
    answered(caught, part, count)
    assert str(file) in str(caught.value)
    assert {p.name: p.read_bytes() for p in file.parent.iterdir()} == before
