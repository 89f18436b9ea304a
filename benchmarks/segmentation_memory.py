"""Peak memory of one training step of a gated PSPNet, as Appendix B.3 has it: 448×672 pixels, batch 6, whole and in parts.

python benchmarks/segmentation_memory.py [--backbone resnet50] [--device cuda]; several minutes and about 15 GB on a CPU.
Each step runs in a process of its own; on a CPU the peak is what the operating system saw (ru_maxrss), less what was there before the network.
"""
import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from bas_repro import core, segmentation, train


def step(config: segmentation.Config, device: str) -> dict:
    "One step on noise: the peak in GiB, its seconds."
    before, (height, width) = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, config.crop
    model = segmentation.build(config, 19).to(device, memory_format=torch.channels_last).train()
    opt, began = train.optimiser(model, config), time.perf_counter()
    x = torch.randn(config.batch_size, 3, height, width, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(19, (config.batch_size, height, width), dtype=torch.uint8, device=device)
    segmentation.gradients(model, x, y, None, config)
    opt.step()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"GiB": round(peak / 2**30, 2), "seconds": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print({name: value for name, value in core.environment(options.device).items() if name in ("torch", "machine", "device", "threads")})
    for method, accumulate in (("shaping", 1), ("shaping", 3), ("plain", 1)):
        config = segmentation.Config(backbone=options.backbone, method=method, accumulate=accumulate, crop=(448, 672))
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            print(f"{options.backbone} {method}, 6 pictures of 448×672 in {accumulate} part(s):", pool.submit(step, config, options.device).result(), flush=True)
