"""Re-encode a tree of pictures so small that it can travel to a borrowed machine: Imagenette at 224 pixels is
133 MB, and 64 MiB are copied there in all, the repository's 18 MB among them. As by default it is 46 MB.

    python benchmarks/shrink.py data/imagenette data/imagenette.tar [--pixels 112] [--quality 70]

The shorter side becomes that many pixels, enough for networks that see 7/8 of it; smaller pictures stay so.
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
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("tree", type=Path, help="such as data/imagenette")
    parser.add_argument("out", type=Path, help="a tar archive")
    parser.add_argument("--pixels", type=int, default=112, help="of the shorter side (112)")
    parser.add_argument("--quality", type=int, default=70, help="of JPEG (70)")
    args = parser.parse_args()
    try:
        size = shrink(args.tree, args.out, args.pixels, args.quality)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {size / 1e6:.1f} MB")
