"""Properties that must hold for any input: of the loss, the gates, the ledger of MACs and the executors."""
import copy
import functools

import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from bas_repro import inference, macs, native, resnet
from bas_repro.batch_shaping import Beta, Kumaraswamy, Uniform, batch_shaping_loss
from bas_repro.gates import Gate, GatingModule, l0_loss
from bas_repro.runs import Run

EXAMPLES = {"loss": 40, "gates": 20, "ledger": 15, "executors": 20, "settings": 50}
seeds = st.integers(0, 2**31)
shares = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


def holds(kind, **strategies):
    "A property: tried on examples from a fixed seed, each of them counted."
    def decorate(test):
        def run(count):
            def counted(**values):
                test(**values)
                count(f"property examples ({kind})")

            fixed = settings(max_examples=EXAMPLES[kind], deadline=None, derandomize=True, database=None)
            fixed(given(**strategies)(counted))()

        run.__doc__ = test.__doc__
        return run
    return decorate


def draw(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_loss(x, a, b):
    "Eq. 2 of Kumaraswamy's distribution with a loop."
    n, total = len(x), 0
    for column in x.T.tolist():
        for i, v in enumerate(sorted(column)):
            total += ((i + 1) / (n + 1) - (1 - (1 - v**a)**b))**2 / n
    return total


shapes = st.floats(0.2, 5)


@holds("loss", seed=seeds, n=st.integers(2, 40), features=st.integers(1, 5), a=shapes, b=shapes)
def test_loss_is_the_distance_of_two_cdfs(seed, n, features, a, b):
    "Eq. 2 with a loop, for a prior whose CDF is one line; not below 0; any order of the samples."
    x = draw(seed, n, features)
    loss = batch_shaping_loss(x, Kumaraswamy(a, b))
    assert_close(loss.item(), slow_loss(x, a, b), rtol=1e-9, atol=1e-12)
    assert loss >= 0
    assert_close(batch_shaping_loss(x[torch.randperm(n)], Kumaraswamy(a, b)), loss)


@holds("loss", seed=seeds, n=st.integers(2, 30), lam=st.floats(0, 100))
def test_loss_is_linear_in_lambda_and_zero_at_the_quantiles(seed, n, lam):
    x = draw(seed, n, 3)
    assert_close(batch_shaping_loss(x, lam=lam), lam * batch_shaping_loss(x))
    even = torch.arange(1, n + 1, dtype=torch.float64)[:, None] / (n + 1)
    assert batch_shaping_loss(even[torch.randperm(n)], Uniform(0., 1.)) < 1e-25


@holds("loss", seed=seeds, n=st.integers(2, 12))
def test_loss_has_the_gradient_of_finite_differences(seed, n):
    x = (draw(seed, n, 2) * 0.8 + 0.1).requires_grad_()
    gaps = x.detach().sort(0).values.diff(dim=0)
    if gaps.numel() and gaps.min() < 1e-4:
        return  # a step would change the order
    assert torch.autograd.gradcheck(lambda v: batch_shaping_loss(v, Beta(2.0, 1.5)), x, eps=1e-6, atol=1e-6)


strengths = st.floats(0, 10)


@holds("gates", seed=seeds, n=st.integers(2, 9), c=st.integers(1, 12), k=st.integers(1, 20), gamma=strengths)
def test_gates_are_zero_or_one_and_cost_what_is_likely_open(seed, n, c, k, gamma):
    torch.manual_seed(seed)
    module, x = GatingModule(c, k), torch.randn(n, c, 4, 4)
    for training in (True, False):
        gate = module.train(training)(x)
        assert gate.value.shape == gate.logits.shape == (n, k)
        assert ((gate.value == 0) | (gate.value == 1)).all()
    assert torch.equal(gate.value, (gate.logits > 0).float())  # in evaluation: no noise
    assert_close(module(x.flip(0)).logits.flip(0), gate.logits)  # and each image by itself
    assert_close(l0_loss([gate, gate], gamma, "sum"), 2 * l0_loss([gate], gamma, "sum"))
    assert 0 <= l0_loss([gate], gamma) <= gamma + 1e-6


@functools.cache
def small():
    "A gated ResNet-8 whose batch normalizations do something."
    torch.manual_seed(0)
    net = resnet.cifar_resnet(8, gated=True)
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.1)
    return net.eval()


def masked(net, seed, n, share):
    return inference.force(copy.deepcopy(net), inference.random_masks(net, n, share, seed))


def of_image(gates, i):
    return [Gate(g.logits[i:i + 1], g.value[i:i + 1]) for g in gates]


@holds("ledger", seed=seeds, n=st.integers(1, 4), share=shares, size=st.sampled_from([8, 16, 20]))
def test_ledger_is_monotone_and_each_image_pays_for_itself(seed, n, share, size):
    net, x = small(), torch.rand(n, 3, size, size)
    costs, masks = macs.gate_costs(net, x.shape), inference.random_masks(net, n, share, seed)
    with torch.no_grad():
        _, gates = inference.force(copy.deepcopy(net), masks)(x, return_gates=True)
    cost = macs.image_macs_of(costs, gates, n)
    more = [g._replace(value=torch.maximum(g.value, torch.rand_like(g.value).round())) for g in gates]
    full = [g._replace(value=torch.ones_like(g.value)) for g in gates]
    assert (cost <= macs.image_macs_of(costs, more, n)).all()
    assert (macs.image_macs_of(costs, full, n) == macs.dense_macs(net, (3, size, size))).all()
    alone = [macs.image_macs_of(costs, of_image(gates, i), 1) for i in range(n)]
    assert torch.equal(torch.cat(alone), cost)


sides = st.integers(5, 20)


@holds("executors", seed=seeds, n=st.integers(1, 5), share=shares, height=sides, width=sides,
       dense_above=st.one_of(st.none(), st.floats(0, 1)), engine=st.sampled_from(["torch", "native"]))
def test_executors_give_what_the_masked_network_gives(seed, n, share, height, width, dense_above, engine):
    if engine == "native" and not native.available():
        engine = "torch"
    net, x = masked(small(), seed, n, share), torch.randn(n, 3, height, width)
    with torch.no_grad():
        ours, theirs = inference.compact(net, engine, None, dense_above, "float32")(x), net(x)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@holds("settings", gamma=strengths, seed=st.integers(0, 999), method=st.sampled_from(["plain", "bas", "l0"]))
def test_same_settings_same_folder(gamma, seed, method):
    "Equal settings have one name, others another one; what a run does not use does not count."
    run = Run(gamma=gamma, seed=seed, method=method)
    assert run.name == Run(gamma=float(gamma), seed=seed, method=method).name
    assert run.name != run.replace(seed=seed + 1).name
    assert (run.replace(gamma=gamma + 1).name == run.name) == (method == "plain")
