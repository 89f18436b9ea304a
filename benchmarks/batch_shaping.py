"""How much faster is the batch-shaping loss than one that asks SciPy for the CDF and the density each time?

Forward and backward on [256, 336] (the gates of a CIFAR ResNet-20) and [256, 3776] (ResNet-34) float32, one
thread: the straightforward loss, ours, and ours compiled, in turn, in one run; medians and ratios. The CPU
always, and a CUDA device where there is one (there also whether a step makes the CPU wait for the device).

    python benchmarks/batch_shaping.py [--rounds 15]
"""
import argparse
import time
from statistics import median

import numpy as np
import scipy
import torch
from scipy.stats import beta

from bas_repro.batch_shaping import batch_shaping_loss


class Straightforward(torch.autograd.Function):
    "Appendix A with Eq. 2's constants: torch.sort, SciPy's CDF forward and density backward, on the CPU."
    @staticmethod
    def forward(ctx, x):
        x_sort, order = x.sort(0)
        n = len(x)
        ecdf = torch.arange(1, n + 1, device=x.device)[:, None] / (n + 1)
        host = x_sort.cpu().numpy()
        gap = ecdf - torch.from_numpy(beta.cdf(host, 0.6, 0.4).astype(np.float32)).to(x.device)
        ctx.save_for_backward(x_sort, order, gap)
        return gap.square().mean(0).sum()

    @staticmethod
    def backward(ctx, upstream):
        x_sort, order, gap = ctx.saved_tensors
        pdf = torch.from_numpy(beta.pdf(x_sort.cpu().numpy(), 0.6, 0.4).astype(np.float32))
        pdf = pdf.clamp(max=1e4).to(gap.device)
        return upstream * torch.zeros_like(gap).scatter_(0, order, -2 / len(gap) * pdf * gap)


def step(loss, x):
    "Seconds of one forward and backward pass, the value, and the gradient."
    x = x.clone().requires_grad_()
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    value = loss(x)
    value.backward()
    wait()
    return time.perf_counter() - start, value.item(), x.grad


def waits(loss, x):
    "Does a step make the CPU wait for the CUDA device?"
    x = x.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(x).backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def compare(features, device, rounds):
    "Time the three losses in turn and print medians and ratios."
    torch.manual_seed(0)
    x = torch.rand(256, features, device=device).clamp(1e-3, 1 - 1e-3)
    compiled = torch.compile(batch_shaping_loss, fullgraph=True)
    losses = {"straightforward (SciPy)": Straightforward.apply, "ours": batch_shaping_loss}
    losses["ours, compiled"] = compiled
    _, value, grad = step(Straightforward.apply, x)
    for loss in losses.values():  # warm up, and the same numbers
        for _ in range(3):
            _, v, g = step(loss, x)
        assert abs(v / value - 1) < 1e-4 and (g - grad).abs().quantile(0.99) < 1e-5 * grad.abs().max()
    seconds = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            seconds[name].append(step(loss, x)[0])
    base = median(seconds["straightforward (SciPy)"])
    for name, s in seconds.items():
        wait = f"  waits for the device: {waits(losses[name], x)}" if device == "cuda" else ""
        took = f"{median(s) * 1e3:9.3f} ms (least {min(s) * 1e3:.3f})"
        print(f"[256, {features}] {device:4} {name:24} {took}   {base / median(s):6.1f} times as fast{wait}")


if __name__ == "__main__":
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each loss (15)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, NumPy {np.__version__}, SciPy {scipy.__version__}"
    print(f"{versions}; 1 thread, medians of {rounds}")
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for features in (336, 3776):
            compare(features, device, rounds)
