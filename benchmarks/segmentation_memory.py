"""Peak memory of one training step of a gated PSPNet, as Appendix B.3 has it: 448×672 pixels, batch 6,
whole and in parts.

    python benchmarks/segmentation_memory.py [--backbone resnet50] [--device cuda] [--crop 448 672]
                                              [--steps 3]

Several minutes and about 15 GB on a CPU. Each step runs in a process of its own; on a CPU the peak is
what the operating system saw (ru_maxrss), less what was there before the network.
"""
import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from bas_repro import core, gates, resnet, train
from bas_repro.runs import Run

STEPS = (("shaping", 1), ("shaping", 3), ("plain", 1))  # method, and in how many parts


def resident() -> float:
    "The most memory that this process has had, in bytes."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step(run: Run, device: str) -> dict:
    "One step on noise: the peak in GiB, its seconds."
    before, (height, width) = resident(), map(int, run.crop)
    model = run.work.build(run, 19)
    costs, drawn = train.ledger(run, model, 19, (height, width)), gates.draws(resnet.blocks_of(model))
    plan = train.Plan(run, run.work, train.Length(1, 1, 1), costs, drawn)
    model = model.to(device, memory_format=torch.channels_last).train()
    opt, began = train.optimiser(model, run), time.perf_counter()
    x = torch.randn(run.batch_size, 3, height, width, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(19, (run.batch_size, height, width), dtype=torch.uint8, device=device)
    lam, none = torch.tensor(run.settings.get("lam", 0.0), device=device), torch.zeros((), device=device)
    noise = torch.rand(run.batch_size * sum(map(sum, drawn)), device=device)
    train.gradients(model, x, y, noise, lam, none, None, plan)
    opt.step()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident() - before
    return {"GiB": round(peak / 2**30, 2), "seconds": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--crop", type=int, nargs=2, default=(448, 672), help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=3, help="how many of the three steps (3)")
    options = parser.parse_args()
    made = core.environment(options.device)
    print({name: made[name] for name in ("torch", "machine", "device", "threads") if name in made})
    for method, parts in STEPS[: options.steps]:
        given = {"backbone": options.backbone, "method": method, "accumulate": parts, "crop": options.crop}
        run = Run(dataset="scenes", **given)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            peak = pool.submit(step, run, options.device).result()
        sizes = "×".join(map(str, options.crop))
        print(f"{options.backbone} {method}, 6 pictures of {sizes} in {parts} part(s):", peak, flush=True)
