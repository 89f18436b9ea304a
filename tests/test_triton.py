"""The Triton kernels compile for a GPU, which needs none: not all that the interpreter runs would compile."""
import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from bas_repro import triton_kernel as tk

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
compiled = pytest.mark.skipif(interpreted, reason="the interpreter compiles nothing")
KINDS = {  # of convolution: in a block the first, one in the middle of a bottleneck, the last
    "first": {"in_list": None, "shortcut": None, "sums": None, "w_in": 1},
    "middle": {"shortcut": None, "sums": None, "w_in": 1},
    "last": {"out_list": None, "tiles": None, "w_out": 1},
}
SMALL = {  # name: kernel and its compile-time values
    "gate": (tk.gate_kernel, {"C": 64, "H": 16, "S": 64, "STEP": 64, "BLOCK": 32, "BLOCKS": 2}),
    "mask": (tk.mask_kernel, {"C": 64, "BLOCK": 32, "BLOCKS": 2}),
}
TYPES = (  # of pointers, in Triton's words; what is no pointer is an i32
    dict.fromkeys(("x", "w", "shortcut", "y"), "*bf16")
    | dict.fromkeys(("in_list", "out_list", "lists", "tiles"), "*i32")
    | dict.fromkeys(("bias", "sums", "fc1", "bias1", "fc2", "bias2", "mask"), "*fp32")
)
DIVISIBLE = ("c_in", "c_out", "w_tap", "w_in", "w_out")  # by 16, as in every ResNet
STAGES = ((64, 56**2), (128, 28**2), (256, 14**2), (512, 7**2))  # of ResNet-34: channels, pixels
TILES = sorted({tk.tile_for(*stage, share) for stage in STAGES for share in (0.45, 0.9)})


@pytest.fixture
def ptx(tmp_path, monkeypatch):
    "Compile a kernel for an H100."
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def build(kernel, constants, warps=4, stages=3):
        signature = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in kernel.arg_names}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, (n, kind) in enumerate(signature.items())
            if kind.startswith("*") or (n in DIVISIBLE and kind == "i32")
        }
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": warps, "num_stages": stages}
        return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

    return build


def conv(kind, tile, stride=1):
    "The kernel's compile-time values for a 3×3 convolution."
    columns = tile.all_channels if kind == "last" else tile.channels
    sizes = {"BM": tile.pixels, "BN": columns, "BK": tile.depth, "COPY": tile.copy, "WIDE": False}
    return KINDS[kind] | {"K": 3, "STRIDE": stride} | sizes


def spilled(ptx, folder):
    "Bytes of registers that the assembler could not keep."
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if not assembler.exists():
        pytest.skip("triton comes without ptxas")
    (folder / "a.ptx").write_text(ptx)
    command = [assembler, "-v", "--gpu-name=sm_90a", folder / "a.ptx", "-o", folder / "a.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [int(n) for n in re.findall(r"(\d+) bytes spill", said)]


def inner_loops(ptx):
    "The lines of the loops that hold no other loop."
    lines = ptx.splitlines()
    heads = [(re.match(r"(\$L\w+):", line), i) for i, line in enumerate(lines)]
    labels = {m[1]: i for m, i in heads if m}
    jumps = [(re.search(r"\bbra\S*\s+(\$L\w+);", line), i) for i, line in enumerate(lines)]
    loops = [(labels[m[1]], i) for m, i in jumps if m and labels.get(m[1], i) < i]
    alone = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    return ["\n".join(lines[a:b]) for a, b in alone]


@compiled
@pytest.mark.parametrize("name", SMALL)
def test_compiles_for_hopper(name, ptx):
    ptx(*SMALL[name])


@compiled
def test_the_middle_of_a_bottleneck_compiles(ptx):
    "On tensor cores; but it chooses filters and inputs at once, and loads weights one by one."
    assert "wgmma.mma_async" in ptx(tk.conv_kernel, conv("middle", tk.Tile()))


@compiled
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.pixels}x{t.channels}or{t.all_channels}x{t.depth}")
@pytest.mark.parametrize("kind", ["first", "last"])
def test_tiles_of_resnet34_compile_without_spilling_registers(kind, tile, ptx, tmp_path):
    for stride in (1, 2):
        code = ptx(tk.conv_kernel, conv(kind, tile, stride), tile.warps, tile.stages)
        assert spilled(code, tmp_path) == [0, 0]


@compiled
@pytest.mark.parametrize("kind", ["first", "last"])
def test_the_taps_are_a_loop_of_tensor_cores_and_copies_under_way(kind, ptx):
    "No division, no list to load; with copies of 4 channels the features come through the L1 cache."
    for copy, through in ((8, "cp.async.cg"), (4, "cp.async.ca")):
        tile = tk.tile_for(128, 28**2)._replace(copy=copy)
        loops = inner_loops(ptx(tk.conv_kernel, conv(kind, tile), tile.warps))
        [taps] = [loop for loop in loops if "wgmma" in loop]
        assert "wgmma.mma_async" in taps and through in taps
        assert not re.search(r"\b(div|rem)\.|ld\.global", taps)


def test_the_notebook_runs_in_a_process_of_its_own(tmp_path):
    "nbdev_test leaves it out: the interpreter must be chosen before triton is imported."
    papermill = pytest.importorskip("papermill")
    nbs = Path(__file__).parent.parent / "nbs"
    papermill.execute_notebook(nbs / "02f_triton.ipynb", tmp_path / "out.ipynb", cwd=nbs, progress_bar=False)
