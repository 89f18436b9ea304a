"""What do the gates and their two losses add to a training step of ResNet-20?

The step is the library's own: forward and losses (train.losses) with bf16 autocast in channels_last,
backward, fused Nesterov SGD, on a batch of 256 random 32×32 images. The plain network, the gated one
without losses on its gates, and the gated one with batch-shaping and L0 take turns in one run; medians
of their steps, and ratios to the plain network. The two losses are both on, which the paper's schedules
never ask for: the dearest step there can be. Goal: at most 1.15 compiled.

    python benchmarks/training_step.py [--rounds 20] [--batch 256] [--model resnet20] [--eager] [--threads N]
"""
import argparse
import dataclasses
import platform
import time
from statistics import median

import torch

from bas_repro import methods, train
from bas_repro.runs import Run

GOAL = 1.15  # compiled: the gated network with both losses over the plain one
KINDS = {"plain": "plain", "gated": "gates", "gated, batch-shaping, L0": "bas"}  # name → method
_GATES = {"name": "gates", "dial": "", "uses": ("bottleneck", "gate_bias", "gate_weight_decay"), "loss": None}
_PLAIN = methods.method("plain")
_NO_LOSS = {"check": _PLAIN.check, "lam": _PLAIN.lam, "strength": _PLAIN.strength}
methods.add(dataclasses.replace(methods.method("bas"), **_GATES, **_NO_LOSS))


def plan_of(run):
    "The plan of a run on images of 32×32 pixels."
    model = run.work.build(run, 10)
    return model, train.Plan(run, run.work, train.Length(1, 1, 1), train.ledger(run, model, 10, (32, 32)))


def make_step(method, loss, args, x, y):
    "A function that takes one training step of a new network."
    run = Run(model=args.model, method=method, batch_size=args.batch, precision="bf16", image_size=32)
    model, plan = plan_of(run)
    model = model.to(x.device, memory_format=torch.channels_last).train()
    optimiser = train.optimiser(model, run)
    lam, gamma = (torch.tensor(value, device=x.device) for value in (0.75, 0.1))

    def step():
        train.gradients(model, x, y, lam, gamma, None, plan, loss)
        optimiser.step()
        optimiser.zero_grad()

    return step


def seconds(step, device):
    "Wall-clock seconds of one step."
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def compare(name, loss, device, args):
    "Time the three steps in turn; print medians and ratios to the plain network."
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(10, (args.batch,), device=device)
    steps = {kind: make_step(method, loss, args, x, y) for kind, method in KINDS.items()}
    for step in steps.values():  # compile and warm up
        for _ in range(3):
            step()
    times = {kind: [] for kind in steps}
    for _ in range(args.rounds):
        for kind, step in steps.items():
            times[kind].append(seconds(step, device))
    plain = median(times["plain"])
    for kind, t in times.items():
        took = f"{median(t) * 1e3:8.2f} ms (least {min(t) * 1e3:.2f})"
        print(f"{device:4} {name:8} {kind:25} {took}   {median(t) / plain:.3f} of plain")
    return median(times["gated, batch-shaping, L0"]) / plain


if __name__ == "__main__":
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("--rounds", type=int, default=20, help="timings of each step (20)")
    parser.add_argument("--batch", type=int, default=256, help="images a batch (256)")
    parser.add_argument("--model", default="resnet20", help="a CIFAR network (resnet20)")
    parser.add_argument("--eager", action="store_true", help="also without torch.compile")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    what = f"{args.model}, batches of {args.batch}, bf16, medians of {args.rounds}"
    print(f"torch {torch.__version__}, {machine}; {what}")
    mode = "reduce-overhead" if device == "cuda" else "default"  # as in train.compiled
    ratio = compare("compiled", torch.compile(train.losses, mode=mode, dynamic=False), device, args)
    reached = "reached" if ratio <= GOAL else "missed"
    print(f"compiled, with both losses: {ratio:.3f} of the plain network; goal: {GOAL} at most: {reached}")
    if args.eager:
        compare("eager", train.losses, device, args)
