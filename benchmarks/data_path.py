"""Images a second of decoding and augmentation, ours (data.Files) beside torchvision's plain pipeline, on
the same files and workers.

    taskset -c 0,1 python benchmarks/data_path.py data/imagenette/train --workers 2

Plain is what torchvision's training recipe does: ImageFolder, RandomResizedCrop, RandomHorizontalFlip,
ToTensor, Normalize, in a DataLoader. Ours, with the same shares of the picture's area, decodes at
reduced scale where the crop allows, resamples the part alone, and leaves bytes, which are normalised on
the training device: it is timed without that, as beside a GPU, and with `normalise` on the CPU.
`--enlarge S` first re-encodes the files with a shorter side of S pixels, the size of ImageNet's own
(most are 500×375), for a tree of small ones. They run in turn; each number is the median of `--rounds`.
`--out FILE.csv` adds the numbers to a table.
"""
import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from bas_repro import core, data

AREA = (0.08, 1.0)  # smallest and largest share of a picture: torchvision's own


def enlarged(folder: Path, n: int, size: int) -> tempfile.TemporaryDirectory:
    "The first n pictures of each class, 4:3, their shorter side `size` pixels, as JPEG of quality 90."
    tree = tempfile.TemporaryDirectory()
    for cls in sorted(f for f in folder.iterdir() if f.is_dir()):
        (Path(tree.name) / cls.name).mkdir()
        for file in sorted(cls.iterdir())[:n]:
            large = Image.open(file).convert("RGB").resize((size * 4 // 3, size), Image.Resampling.BICUBIC)
            large.save(Path(tree.name) / cls.name / f"{file.stem}.jpg", quality=90)
    return tree


def plain(folder, size, workers, batch, n):
    "Batches of torchvision's plain pipeline."
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    varied = [transforms.RandomResizedCrop(size, AREA), transforms.RandomHorizontalFlip()]
    numbers = [transforms.ToTensor(), transforms.Normalize(mean, deviation)]
    tree = datasets.ImageFolder(folder, transforms.Compose([*varied, *numbers]))
    order = torch.randperm(len(tree), generator=torch.Generator().manual_seed(0))[:n]
    return iter(DataLoader(Subset(tree, order.tolist()), batch, num_workers=workers))


def ours(folder, size, workers, batch, n):
    "Batches of data.Files, in bytes."
    files, _ = data.list_tree(folder, round(size * 8 / 7))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:n]
    files = dataclasses.replace(files, workers=workers, varied=(size, 0, 0), area=AREA)
    return data.batches(files, order.split(batch))


def normalised(*arguments):
    "The same, normalised on the CPU."
    return ((data.normalise(x), y) for x, y in ours(*arguments))


def speed(loader, folder, size, workers, batch, n) -> float:  # images a second, after the first batch
    batches = loader(folder, size, workers, batch, n)
    seen = len(next(batches)[1])
    began = time.perf_counter()
    return sum(len(y) for _, y in batches) / (time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a tree <class>/*")
    parser.add_argument("--size", type=int, nargs="+", default=[224, 64], help="pixels a side of the crops")
    parser.add_argument("--enlarge", type=int, default=0, help="shorter side of the files; 0: as they are")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a CSV file that the numbers are added to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = core.environment("cpu")
    tree = enlarged(options.folder, 100, options.enlarge) if options.enlarge else None
    for size in options.size:
        arguments = (Path(tree.name) if tree else options.folder, size, options.workers, 64, options.images)
        loaders = (plain, ours, normalised)
        rounds = [[speed(loader, *arguments) for loader in loaders] for _ in range(options.rounds)]
        a, b, c = map(statistics.median, zip(*rounds))
        files = f"{options.enlarge * 4 // 3}×{options.enlarge}" if tree else "as they are"
        row = {
            "pixels": size, "files": files, "workers": options.workers,
            "torchvision": round(a), "ours": round(b), "ratio": round(b / a, 2),
            "normalised on the CPU": round(c), "ratio, normalised": round(c / a, 2),
            "rounds": options.rounds, "machine": made["machine"], "commit": made["commit"],
        }
        print(", ".join(f"{name}: {value}" for name, value in row.items()), flush=True)
        if options.out:
            before = pd.read_csv(options.out) if options.out.exists() else pd.DataFrame()
            with core.whole(options.out) as file:
                pd.concat([before, pd.DataFrame([row])]).to_csv(file, index=False)


if __name__ == "__main__":
    main()
