"""Does the Triton kernel beat the dense network on a GPU, and from which open share on?

ResNet-34, random images and random masks, every image its own; gates are computed and their kernels timed,
then the masks take their place. The executor at open shares of 10 to 100% stands against the dense network in
eager mode and compiled (bf16, channels_last, batch norms folded). Everything is captured in CUDA graphs; the
replays take turns and are timed by events; medians. First of all the executor is compared with the masked
network in float32. Goals: at 45% open at most 0.65 of the best dense engine, with all open at most 1.2.

    python benchmarks/triton_kernel.py [--model resnet34] [--batch 128] [--size 224] [--dtype bfloat16]
                                       [--repeats 50] [--tune]
    python benchmarks/triton_kernel.py --interpret   # no GPU: a tiny dry run in Triton's interpreter, untimed
"""
import argparse
import os
import sys
from functools import partial
from itertools import product
from statistics import median

import torch

if "--interpret" in sys.argv:  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

import torchvision
from torch import nn
from torch.fx.experimental import optimization

from bas_repro import resnet
from bas_repro import triton_kernel as tk
from bas_repro.gates import Gate
from bas_repro.inference import force, random_masks
from bas_repro.macs import gate_costs, image_macs_of

SHARES = (0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)
GOALS = {0.45: 0.65, 1.0: 1.2}


def networks(args, device):
    "The gated network with batch norms as after training, and torchvision's plain one."
    torch.manual_seed(0)
    if args.interpret:
        gated = resnet.cifar_resnet(8, gated=True)
    else:
        gated = getattr(resnet, args.model)(gated=True)
    for m in gated.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)):
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.normal_(m.bias, 0, 0.1)
    return gated.eval().to(device), getattr(torchvision.models, args.model)().eval().to(device)


def check(model, x, masks):
    "Relative error of the executor in float32 against the masked network."
    with torch.no_grad():
        found, expected = tk.Network(model, torch.float32)(x, masks), force(model, masks)(x)
    force(model, None)
    return ((found - expected).norm() / expected.norm()).item()


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


def compare(gated, graphs, x, tile, shares, args):
    "Time the executor at several open shares against the dense engines; print milliseconds and ratios."
    shares, graphs = {share: random_masks(gated, len(x), share) for share in shares}, dict(graphs)
    for share, masks in shares.items():
        graphs[share] = captured(partial(tk.Network(gated, x.dtype, tile), masks=masks), x)
    times = interleaved(graphs, args.repeats)
    eager, best = times["dense eager"], min(times["dense eager"], times["dense compiled"])
    print(f"{tile}\ndense eager {eager:.3f} ms, dense compiled {times['dense compiled']:.3f} ms")
    for share, masks in shares.items():
        ms, verdict = times[share], ""
        if share in GOALS:
            verdict = f"; goal {GOALS[share]}: {'reached' if ms / best <= GOALS[share] else 'missed'}"
        macs = mac_share(gated, masks, x)
        ratios = f"{ms / eager:.3f} of eager, {ms / best:.3f} of the best dense"
        print(f"{share:4.0%} open, {macs:.3f} of the MACs: {ms:8.3f} ms, {ratios}{verdict}")


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.interpret:
        args.batch, args.size = 2, 8
    gated, plain = networks(args, device)
    x = torch.randn(args.batch, 3, args.size, args.size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    small = x[: min(8, args.batch)]
    for share in (0.0, 0.45, 1.0):
        masks = random_masks(gated, len(small), share)
        macs, error = mac_share(gated, masks, small), check(gated, small, masks)
        what = f"float32, {share:.0%} open, {macs:.3f} of the MACs"
        print(f"{what}: relative error against the masked network {error:.1e}")
    if args.interpret:
        return
    x = x.to(getattr(torch, args.dtype))
    graphs = {name: captured(run, x) for name, run in dense(plain, x.dtype).items()}
    compare(gated, graphs, x, tk.Tile(), SHARES, args)
    chosen = (16, 16), (32, 32), (64, 32), (64, 64)  # channels of a tile, depth
    for pixels, all_channels, (channels, depth), warps in product((64, 128), (64, 128), chosen, (4, 8)):
        if args.tune:
            compare(gated, graphs, x, tk.Tile(pixels, channels, all_channels, depth, warps), GOALS, args)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="resnet34", help="resnet18, resnet34 or resnet50 (resnet34)")
    parser.add_argument("--batch", type=int, default=128, help="images a batch (128)")
    parser.add_argument("--size", type=int, default=224, help="pixels a side (224)")
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes, help="of what is timed (bfloat16)")
    parser.add_argument("--repeats", type=int, default=50, help="timings of each (50)")
    parser.add_argument("--tune", action="store_true", help="try many sizes of tiles")
    parser.add_argument("--interpret", action="store_true", help="a tiny dry run on the CPU")
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.interpret):
        print("no CUDA device here: nothing to time (--interpret makes a dry run on the CPU)")
    else:
        what = "interpreter on the CPU; ResNet-8 for CIFAR, 2 images of 8 pixels"
        if not args.interpret:
            what = f"{torch.cuda.get_device_name()}; {args.model}, batches of {args.batch}, "
            what += f"{args.size} pixels, {args.dtype}, medians of {args.repeats}"
        print(f"torch {torch.__version__}, {what}")
        main(args)
