"""Does the Triton kernel beat the dense network on a GPU, and from which open share on?

First the numbers: the executor against the masked network in float32 (TF32 off). Then one layer of 64
channels at 56 pixels and one of 512 at 7, against a dense convolution. Then ResNet-34, random masks, every
image its own (gates are computed and timed, then the masks take their place), against the dense network, eager
and compiled (channels_last, batch norms folded). Everything is captured in CUDA graphs; the replays take turns
and are timed by events; medians. Goals: at most 0.65 of the best dense engine at 45% open, 1.15 all open.

    python benchmarks/triton_kernel.py [--model resnet34] [--batch 128] [--size 224] [--dtype bfloat16]
                                       [--repeats 50]
    TRITON_INTERPRET=1 python benchmarks/triton_kernel.py   # no GPU: a tiny dry run, untimed

`layer_check`, `network_check` and `network_times` return plain numbers for other scripts; times are None
without CUDA. Checks and layers have run on an H200 (outputs/07_timing/gpu), the network has not been timed.
"""
import argparse
from functools import partial
from statistics import median

import torch
import torchvision
from torch import nn
from torch.fx.experimental import optimization
from torch.nn import functional as F

from bas_repro import resnet
from bas_repro import triton_kernel as tk
from bas_repro.gates import Gate
from bas_repro.inference import force, random_masks
from bas_repro.macs import gate_costs, image_macs_of

SHARES = (0.1, 0.3, 0.45, 0.6, 0.8, 1.0)
GOALS = {0.45: 0.65, 1.0: 1.15}
LAYERS = ((64, 56), (512, 7))  # channels, pixels a side


def exact_float32():
    "No TF32: gates decide at a threshold."
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def settled(model, device):
    "A network with batch norms as after training, in evaluation mode."
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)):
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.normal_(m.bias, 0, 0.1)
    return model.eval().to(device)


def relative(found, expected):
    "Relative error."
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def layer_check(channels, pixels, batch, share, device="cuda", dtype=torch.bfloat16, tile=None, repeats=50):
    "Both kinds of our 3×3 convolution, C to C, against F.conv2d: ms (None without CUDA) and relative error."
    exact_float32()
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
    conv, bn = conv.eval().to(device), bn.eval().to(device)
    tile = tile or tk.tile_for(channels, pixels**2, share)
    x = torch.randn(batch, channels, pixels, pixels, device=device)
    x = x.to(dtype, memory_format=torch.channels_last)
    mask = (torch.rand(1, batch, channels, device=device) < share).float()
    lists = tk.lists_of(mask, tile.channels)
    write, rows = (lists.channels[0], lists.tiles[0]), x.permute(0, 2, 3, 1).contiguous()
    packed = [tk._pack_conv(conv, bn, chosen, dtype) for chosen in (True, False)]
    weight = tk.fuse_conv_bn_eval(conv, bn).weight.to(dtype, memory_format=torch.channels_last)
    hidden, _ = tk._conv(rows, packed[0], tile, None, write)
    runs = {
        "first": lambda _: tk._conv(rows, packed[0], tile, None, write),
        "last": lambda _: tk._conv(hidden, packed[1], tile, write[0]),
        "dense": lambda _: F.conv2d(x, weight, padding=1),
    }
    middle = F.relu(F.conv2d(x.float(), weight.float(), padding=1)) * mask[0, :, :, None, None]
    middle = middle.to(dtype).float()
    expected = F.relu(F.conv2d(middle, weight.float(), padding=1))
    found = runs["last"](None)[0].permute(0, 3, 1, 2)
    times = dict.fromkeys(runs)
    if x.is_cuda:
        times = interleaved({name: captured(run, x) for name, run in runs.items()}, repeats)
    about = {"channels": channels, "pixels": pixels, "share": share, "open": mask.mean().item()}
    took = {f"{name}_ms": ms for name, ms in times.items()}
    return about | took | {"tile": tuple(tile), "error": relative(found, expected)}


@torch.no_grad()
def network_check(model, x, share, rates=None):
    "Relative error in float32 of the executor against the masked network; model and x on the same device."
    exact_float32()
    masks = random_masks(model, len(x), share)
    found, expected = tk.Network(model, torch.float32, rates=rates)(x, masks), force(model, masks)(x)
    force(model, None)
    return relative(found, expected)


def captured(run, x):
    "A CUDA graph that replays `run(x)`, after some runs on the side to compile it."
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            run(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        run(x)
    return graph


def interleaved(graphs, repeats):
    "Median milliseconds of each graph; their replays take turns."
    events = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, graph in graphs.items():
            events[name].append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            events[name][-1][0].record()
            graph.replay()
            events[name][-1][1].record()
    torch.cuda.synchronize()
    return {name: median(a.elapsed_time(b) for a, b in pairs[2:]) for name, pairs in events.items()}


def dense(plain, dtype):
    "The dense engines: eager, and compiled with the batch norms folded."
    folded = optimization.fuse(plain).to(dtype, memory_format=torch.channels_last)
    eager = plain.to(dtype, memory_format=torch.channels_last)
    return {"dense eager": eager, "dense compiled": torch.compile(folded, mode="max-autotune-no-cudagraphs")}


def mac_share(model, masks, x):
    "Mean MACs of an image under the masks, gating modules included, over those of the plain network."
    costs = gate_costs(model, x.shape)
    ungated = sum(cost.dense for cost in costs if "gating" not in cost.name)
    return image_macs_of(costs, [Gate(m, m) for m in masks], len(x)).double().mean().item() / ungated


def network_times(model_name, batch, size, dtype, shares=SHARES, repeats=50):
    """A list of {engine, share, macs, ms}: "dense eager" and "dense compiled", then at every share "triton"
    and "triton, copies of 8 bytes"; macs as a part of the plain network's; ms None without CUDA."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = settled(getattr(torchvision.models, model_name)(), device)
    gated = settled(getattr(resnet, model_name)(gated=True), device)
    x = torch.randn(batch, 3, size, size, device=device).to(dtype, memory_format=torch.channels_last)
    runs = {("dense eager", 1.0, 1.0): None, ("dense compiled", 1.0, 1.0): None}
    if x.is_cuda:
        runs = {(name, 1.0, 1.0): captured(run, x) for name, run in dense(plain, dtype).items()}
    for share in shares:
        masks = random_masks(gated, batch, share)
        macs = mac_share(gated, masks, x)
        for name, kind in (("triton", tk.Packed), ("triton, copies of 8 bytes", NearTaps)):
            run = partial(executor(gated, dtype, kind), masks=masks)
            runs[name, share, macs] = captured(run, x) if x.is_cuda else None
    times = interleaved(runs, repeats) if x.is_cuda else runs
    return [{"engine": e, "share": s, "macs": m, "ms": times[e, s, m]} for e, s, m in runs]


class NearTaps(tk.Packed):
    "A packed block whose features are copied 8 bytes at a time, through the L1 cache."

    def sizes(self, pixels=1):
        return super().sizes(pixels)._replace(copy=4)


def executor(gated, dtype, kind):
    "The network in the kernels, its blocks of this kind."
    network = tk.Network(gated, dtype)
    network.blocks = [kind(*block) for block in network.blocks]
    return network


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model, size = (resnet.cifar_resnet(8, gated=True), 8) if device.type == "cpu" else (None, args.size)
    model = settled(model or getattr(resnet, args.model)(gated=True), device)
    x = torch.randn(2 if device.type == "cpu" else 8, 3, size, size, device=device)
    for share in (0.0, 0.45, 1.0):
        error = network_check(model, x, share)
        print(f"float32, {share:.0%} open: relative error against the masked network {error:.1e}")
    layers, batch = (LAYERS, args.batch) if device.type == "cuda" else (((16, 4),), 2)
    for channels, pixels in layers:
        for share in (1.0, 0.45):
            print(layer_check(channels, pixels, batch, share, device, getattr(torch, args.dtype)))
    if device.type == "cpu":
        return
    rows = network_times(args.model, args.batch, args.size, getattr(torch, args.dtype), SHARES, args.repeats)
    best = min(row["ms"] for row in rows if row["engine"].startswith("dense"))
    for row in rows:
        ratio, goal = row["ms"] / best, GOALS.get(row["share"])
        verdict = "" if goal is None or "triton" not in row["engine"] else f"; goal {goal}: {ratio <= goal}"
        print(f"{row['engine']:26} {row['share']:4.0%} open, {row['macs']:.3f} of the MACs: "
              f"{row['ms']:8.3f} ms, {ratio:.3f} of the best dense{verdict}")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="resnet34", help="resnet18, resnet34 or resnet50 (resnet34)")
    parser.add_argument("--batch", type=int, default=128, help="images a batch (128)")
    parser.add_argument("--size", type=int, default=224, help="pixels a side (224)")
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes, help="of what is timed (bfloat16)")
    parser.add_argument("--repeats", type=int, default=50, help="timings of each (50)")
    args = parser.parse_args()
    if not tk.available("cuda" if torch.cuda.is_available() else "cpu"):
        print("no CUDA device here: nothing to time (TRITON_INTERPRET=1 makes a dry run on the CPU)")
    else:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"torch {torch.__version__}, {where}")
        main(args)
