"""Every script in benchmarks/ runs on the CPU in its smallest form. Its numbers then mean nothing."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
ALL = sorted((ROOT / "benchmarks").glob("*.py"))
SCRIPTS = [path.name for path in ALL if "__main__" in path.read_text(encoding="utf-8")]
# The smallest form of a script, and a part of what it prints; one that is not here is asked for its help.
SMALLEST = {
    "batch_shaping.py": ("--rounds 1", "ours, compiled"),
    "data_path.py": ("tree --size 32 --workers 0 --images 96 --rounds 1", "pixels: 32"),
    "segmentation_memory.py": ("--backbone resnet18 --crop 32 32 --steps 1", "resnet18 shaping, 6 pictures"),
    "training_step.py": ("--rounds 1 --batch 8 --model resnet8 --threads 1", "gated, batch-shaping, L0"),
    "shrink.py": ("tree small.tar --pixels 24", "MB"),
    "triton_kernel.py": ("", "relative error"),
}


@pytest.fixture
def folder(tmp_path):
    "A working folder with a tree of pictures in it."
    for label in ("left", "right"):
        (tmp_path / "tree" / label).mkdir(parents=True)
        for i in range(48):
            Image.new("RGB", (48, 40), (5 * i, 0, 0)).save(tmp_path / "tree" / label / f"{i}.jpg")
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_smallest_form_runs(script, folder):
    words, says = SMALLEST.get(script, ("--help", "usage"))
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words.split()]
    own = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
           "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than all else
           "TRITON_INTERPRET": "1"}
    options = {"capture_output": True, "text": True, "timeout": 300}
    ran = subprocess.run(command, cwd=folder, env=os.environ | own, **options)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert says in ran.stdout
