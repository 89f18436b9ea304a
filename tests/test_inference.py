"""Hundreds of random masks, everything off and everything on among them: what the executors give is what the
masked network gives, for every engine that this machine has."""
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from bas_repro import native
from bas_repro.baselines import aig, fbs, skipnet
from bas_repro.inference import compact, dense_engines, force, random_masks
from bas_repro.resnet import CifarResNet, gate, resnet20

IMAGES = 8


def bottlenecks(way="one", **options):
    "A small network of torchvision's class."
    return gate(ResNet(Bottleneck, [1, 2, 1, 1], num_classes=10, width_per_group=32, **options), way)


NETS = {
    "resnet20": lambda: resnet20(gated=True),
    "basic": lambda: gate(ResNet(BasicBlock, [1, 2, 1, 1], num_classes=10)),
    "one": bottlenecks,
    "shared": lambda: bottlenecks("shared"),
    "two": lambda: bottlenecks("two"),
    "resnext": lambda: gate(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=8)),
    "aig": lambda: aig(resnet20()),
    "skipnet": lambda: skipnet(resnet20()),
    "fbs": lambda: fbs(resnet20(), 0.5),
}


def network(name):
    "A network whose batch normalizations do something."
    torch.manual_seed(0)
    net = NETS[name]()
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.1)
    return net.eval()


UNSERVED = ("two", "resnext", "aig", "skipnet", "fbs")  # what the native engine does not compute


def executor(net, name, engine, *options, **more):
    "compact() in float32; skips where the engine cannot run."
    if engine == "native" and not native.available():
        pytest.skip("no compiler for the native kernel")
    if engine == "native" and name in UNSERVED:
        with pytest.raises(RuntimeError, match="the native engine does not compute .*; use engine='auto'"):
            compact(net, engine, *options, **more)
        engine = "auto"
    return compact(net, engine, *options, precision="float32", **more)


@torch.no_grad()
def worst(net, exe, x, masks):
    "The largest relative error of an image; gates must be equal."
    (want, own), (got, gates) = (force(m, masks)(x, return_gates=True) for m in (net, exe))
    force(net, None)
    force(exe, None)
    assert all(torch.equal(a.value, b.value) for a, b in zip(own, gates, strict=True))
    return ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()


@pytest.mark.parametrize("engine", ["torch", "native", "masked"])
@pytest.mark.parametrize("name", NETS)
def test_outputs_are_those_of_the_masked_network(name, engine):
    net, x = network(name), torch.randn(IMAGES, 3, 32, 32)
    exe = executor(net, name, engine)
    for seed, share in enumerate((0, 0.2, 0.5, 0.8, 1)):
        assert worst(net, exe, x, random_masks(net, IMAGES, share, seed)) < 1e-5
    assert worst(net, exe, x, None) < 1e-5


@pytest.mark.parametrize("engine", ["torch", "native", "masked"])
@pytest.mark.parametrize("name", ["resnet20", "one", "shared", "two"])
def test_dropped_and_permuted_channels_change_nothing_with_some_blocks_run_dense(name, engine):
    net, x = network(name), torch.randn(6, 3, 32, 32)
    masks = random_masks(net, 6, 0.25)
    exe = executor(net, name, engine, torch.cat(masks, 1), dense_above=0.3)
    assert worst(net, exe, x, masks) < 1e-5


def test_double_precision_and_the_model_itself_are_left_alone():
    net, x = network("one").double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert worst(net, compact(net, "torch"), x, None) < 1e-12
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_dense_engines_agree():
    torch.manual_seed(0)
    net, x = CifarResNet(1).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        engines = dense_engines(net, x)
        assert {"eager", "eager channels_last", "inductor"} <= set(engines)
        for name, engine in engines.items():
            error = (engine(x) - net(x)).norm() / net(x).norm()
            assert error <= (2e-2 if "bf16" in name else 1e-4), name
