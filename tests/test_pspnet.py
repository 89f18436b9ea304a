"""PSPNet against the ledger of 02c_macs, which comes after it in the order of the notebooks, and on a GPU where there is one."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bas_repro import macs
from bas_repro.gates import GatingModule
from bas_repro.pspnet import pspnet, segmentation_loss
from bas_repro.resnet import gated_layers


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet101"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [(65, 97), (1024, 2048)])
def test_ledger_counts_what_pytorch_counts(backbone, gated, size):
    "At any size, odd ones too: the ledger is PyTorch's count plus the gating modules' pools, which PyTorch leaves out."
    with torch.device("meta"):
        net, x = pspnet(backbone, 7, gated).eval(), torch.empty(1, 3, *size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(x)
    costs = macs.gate_costs(net, x.shape)
    pools = sum(cost.input[0] * cost.input[1] * cost.input[2] for cost in costs if cost.kind == "pool")
    assert macs.dense_macs(net, x.shape) == counter.get_total_flops() // 2 + pools
    assert (pools > 0) == gated and not any(cost.name.startswith("aux") for cost in costs)


def test_cost_of_each_image_counted_from_its_gates():
    "What an image's closed channels save, block by block in plain numbers."
    torch.manual_seed(0)
    net, x = pspnet("resnet18", 7, gated=True).eval(), torch.randn(4, 3, 65, 97)
    for module in net.modules():
        if isinstance(module, GatingModule):
            nn.init.normal_(module.fc2.bias)
    _, gates = net(x, return_gates=True)
    costs = {cost.name: cost for cost in macs.gate_costs(net, x.shape)}
    saved = torch.zeros(4, dtype=torch.int64)
    for gate, layer in zip(gates, gated_layers(net)):
        closed = (gate.value == 0).sum(1)
        for name in layer.outputs + layer.inputs:
            conv, (_, height, width) = net.get_submodule(name), costs[name].output
            other = conv.in_channels if name in layer.outputs else conv.out_channels
            saved += closed * other * 9 * height * width
    assert (saved > 0).all() and len(set(saved.tolist())) == 4
    assert torch.equal(macs.image_macs(net, x), macs.dense_macs(net, x.shape) - saved)


def test_ledger_table_has_every_convolution_of_evaluation():
    net, x = pspnet("resnet18", 7, gated=True).train(), torch.randn(2, 3, 33, 41)
    table = macs.ledger(net, x).set_index("name")
    convolutions = {name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and not name.startswith("aux")}
    assert set(table.index[table.kind == "conv"]) == convolutions and net.training
    assert (table["mean"] <= table["dense"]).all() and table["mean"].sum() < table["dense"].sum()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("gated", [False, True])
def test_training_step_on_cuda_in_bfloat16(gated):
    torch.manual_seed(0)
    net = pspnet("resnet18", 7, gated).cuda().to(memory_format=torch.channels_last)
    x, y = torch.randn(2, 3, 65, 97, device="cuda"), torch.randint(7, (2, 65, 97), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out, gates = net(x, return_gates=True)
        loss = segmentation_loss(out, y)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32 and all(g.logits.dtype == torch.float32 for g in gates)
    assert all(p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    cpu = pspnet("resnet18", 7, gated).eval()
    cpu.load_state_dict(net.state_dict())
    torch.testing.assert_close(cpu(x.cpu())["out"], net.float()(x)["out"].cpu(), rtol=1e-2, atol=1e-2)
