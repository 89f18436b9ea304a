"""Re-encode a tree of pictures so small that it can be copied to a borrowed machine: Imagenette at 224 pixels
is 133 MB, and 64 MB are copied there in all.

    python benchmarks/shrink.py data/imagenette data/imagenette.tar [--pixels 128] [--quality 75]

The shorter side becomes that many pixels; pictures that are smaller stay as they are. 128 pixels are enough for
training at 112 (7/8 of it, as in the paper's evaluation).
"""
import argparse
import io
import sys
import tarfile
from pathlib import Path

from joblib import Parallel, delayed
from PIL import Image
from torchvision.transforms import functional as TF
from tqdm import tqdm


def shrunk(path: Path, pixels: int, quality: int) -> bytes:
    "A picture as a small JPEG."
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    if min(picture.size) > pixels:
        picture = TF.resize(picture, pixels)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def shrink(tree: Path, out: Path, pixels: int, quality: int) -> int:  # bytes
    "Write a tree's pictures into a tar archive, under its own name."
    files = sorted(path for path in tree.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise ValueError(f"{tree} has no pictures: give a folder such as data/imagenette")
    jobs = (delayed(shrunk)(path, pixels, quality) for path in files)
    pictures = Parallel(n_jobs=-1, return_as="generator")(jobs)
    with tarfile.open(out, "w") as tar:
        for path, picture in zip(tqdm(files), pictures):
            member = tarfile.TarInfo(f"{tree.name}/{path.relative_to(tree).with_suffix('.jpg')}")
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
    return out.stat().st_size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="such as data/imagenette")
    parser.add_argument("out", type=Path, help="a tar archive")
    parser.add_argument("--pixels", type=int, default=128, help="of the shorter side (128)")
    parser.add_argument("--quality", type=int, default=75, help="of JPEG (75)")
    args = parser.parse_args()
    try:
        size = shrink(args.tree, args.out, args.pixels, args.quality)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {size / 1e6:.1f} MB")
