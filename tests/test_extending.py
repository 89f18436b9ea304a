"""A method and a data set, added from outside the library, go through training, record, log and figure; and
methods are known to the library by their entries alone: no other code has their names."""
import ast
import inspect
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from bas_repro import analysis, baselines, core, data, gates, methods, runs, train
from bas_repro.runs import Run

LIBRARY = Path(__file__).parents[1] / "bas_repro"
SETTINGS = {"model": "resnet8", "epochs": 3, "batch_size": 32, "compile": "no"}


def add_toy_method():
    class Gate(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.pool, self.score = gates.GlobalPool(), nn.Linear(channels, 1)

        def forward(self, x):
            logits = self.score(self.pool(x)) + 2
            noise = torch.randn_like(logits) if self.training else torch.zeros_like(logits)
            return gates.Gate(logits, gates.straight_through(logits, noise, 1.0))

    def convert(net, run):
        blocks = [(name, block) for name, block in net.named_modules() if type(block) is BasicBlock]
        for name, block in blocks:
            net.set_submodule(name, baselines.DroppedBlock(block, Gate(block.conv1.in_channels)))
        return net

    methods.add(methods.Method(
        "toy", "Toy", "blocks dropped at a fixed price", look=("p", "-."), dial="gamma",
        uses=("gate_weight_decay",), gates=(Gate,), convert=convert, strength=lambda run, moment: run.gamma,
        loss=lambda run, ledger, gated, out, y, strength: strength * sum(g.value.mean() for g in gated),
    ))


def read_toy(root, size, holdout):
    "Dark and light pictures."
    y = torch.arange(240) % 2
    noise = torch.randint(100, (len(y), 3, size, size), generator=core.generator(0, "toy"))
    images = data.Images((noise + 100 * y[:, None, None, None]).to(torch.uint8), y)
    train_images, val = data.split(images.part(slice(200)), holdout)
    return train_images, val, images.part(slice(200, None)), ("dark", "light")


def add_toy_data():
    data.DATASETS["toy"] = data.DataSet("Toy", "classification", read_toy, 8, bundled=True)


@pytest.fixture
def toy(tmp_path):
    "Both are there during a test, and gone after it."
    add_toy_method()
    add_toy_data()
    yield tmp_path
    del methods.METHODS["toy"], data.DATASETS["toy"]


def test_a_method_and_a_data_set_from_outside(toy):
    assert len(inspect.getsource(add_toy_method).splitlines()) <= 25
    study = runs.grid({"dataset": "toy", "method": ["plain", "toy"], "gamma": [0.05, 0.3], **SETTINGS}, toy)
    assert [run.name[:-7] for run in study] == [
        "toy-resnet8-plain-e3-s0", "toy-resnet8-toy-g0.05-e3-s0", "toy-resnet8-toy-g0.3-e3-s0"]
    records = train.sweep(study, 1)
    plain, toys = records[0], records[1:]
    assert all(record["test_accuracy"] > 0.8 and record["data"] == "Toy" for record in records)
    assert plain["gates"] == 0 and all(record["gates"] == 3 for record in toys)
    assert all(record["macs_mean"] <= record["macs_full"] > plain["macs_full"] for record in toys)
    assert all(record["settings"]["method"] == "toy" for record in toys)
    logs = [run.log() for run in study]
    assert all(len(log) == 3 for log in logs) and (logs[0].loss_l0 == 0).all() and (logs[1].loss_l0 > 0).all()
    assert logs[2].gamma.tolist() == pytest.approx([0.3] * 3)
    black = torch.zeros(2, 3, 8, 8)
    assert torch.equal(study[1].model()(black), runs.load(study[1].folder)(black))


def test_its_optimiser_keeps_weight_decay_from_its_gates(toy):
    run = Run(toy, dataset="toy", method="toy", **SETTINGS)
    body, own = train.optimiser(run.work.build(run, 2), run).param_groups
    assert len(own["params"]) == 6 and own["weight_decay"] == 0 and body["weight_decay"] > 0


def test_its_figures(toy):
    study = runs.grid({"dataset": "toy", "method": ["plain", "toy"], **SETTINGS}, toy)
    train.sweep(study)
    points = analysis.points(analysis.records(study))
    assert points.method.tolist() == ["plain", "toy"] and points.named.tolist() == ["plain", "Toy"]
    for figure in (analysis.tradeoff(points, "toy"), analysis.curves(analysis.logs(study), "toy")):
        assert isinstance(figure, matplotlib.figure.Figure)


def test_on_the_command_line(toy, monkeypatch, capsys):
    monkeypatch.chdir(toy)
    preset = toy / "params" / "study" / "a.yaml"
    core.write_params(preset, {"notebook": "study", **SETTINGS, "epochs": 1, "runs": [{"seed": 0}]})
    train.main([str(preset), "-p", "method", "toy", "-p", "dataset", "toy"])
    assert "toy-resnet8-toy-g0.1-e1-s0" in capsys.readouterr().out
    for name, value in (("method", "toi"), ("dataset", "toi")):
        with pytest.raises(SystemExit, match=f"^error: {name}='toi' is not known: choose one of .*toy"):
            train.main([str(preset), "-p", name, value])


def test_what_is_removed_is_unknown_again():
    for name in ("method", "dataset"):
        with pytest.raises(ValueError, match=f"{name}='toy' is not known"):
            Run(**{name: "toy"})


TABLES = ("SETTINGS", "TASKS", "PAPER", "SEGMENTATION")  # data: defaults, and the paper's own numbers


def named_in(tree):
    "(line, name) of the texts in a module that are exactly a method's name, but for what may say so."
    allowed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in TABLES:
            allowed |= {id(inner) for inner in ast.walk(node)}
        if isinstance(node, ast.keyword) and ast.unparse(node) == "method='plain'":  # the reference network
            allowed.add(id(node.value))
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in allowed]
    return [(node.lineno, node.value) for node in texts if node.value in set(methods.METHODS)]


OWN = ("methods.py", "baselines.py", "_modidx.py")


@pytest.mark.parametrize("path", sorted(set(LIBRARY.glob("*.py")) - {LIBRARY / name for name in OWN}),
                         ids=lambda path: path.name)
def test_no_other_code_has_a_methods_name(path):
    assert named_in(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_search_finds_names():
    lines = "run = Run(method='plain')", "TASKS = {'method': 'bas'}", "right = run.method.name == 'bas'"
    assert named_in(ast.parse("\n".join(lines))) == [(3, "bas")]
