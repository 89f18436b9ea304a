"""The Triton kernels compile for a GPU, which needs none: not all that the interpreter runs would compile."""
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from bas_repro import triton_kernel as tk

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(interpreted, reason="the interpreter compiles nothing")
CONV = {"K": 3, "STRIDE": 1, "BM": 64, "BN": 32, "BK": 32, "WIDE": False}
KERNELS = {  # name: kernel and its compile-time values
    "first": (tk.conv_kernel, CONV | {"in_list": None, "shortcut": None, "sums": None, "w_in": 1}),
    "middle": (tk.conv_kernel, CONV | {"shortcut": None, "sums": None, "w_in": 1}),
    "last": (tk.conv_kernel, CONV | {"out_list": None, "tiles": None, "w_out": 1}),
    "gate": (tk.gate_kernel, {"C": 64, "H": 16, "S": 64, "STEP": 64, "BLOCK": 32, "BLOCKS": 2}),
    "mask": (tk.mask_kernel, {"C": 64, "BLOCK": 32, "BLOCKS": 2}),
}
TYPES = (  # of pointers, in Triton's words; what is no pointer is an i32
    dict.fromkeys(("x", "w", "shortcut", "y"), "*bf16")
    | dict.fromkeys(("in_list", "out_list", "lists", "tiles"), "*i32")
    | dict.fromkeys(("bias", "sums", "fc1", "bias1", "fc2", "bias2", "mask"), "*fp32")
)
DIVISIBLE = ("c_in", "c_out", "w_tap", "w_in", "w_out")  # by 16, as in every ResNet


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_hopper(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = KERNELS[name]
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (n, kind) in enumerate(signature.items())
        if kind.startswith("*") or (n in DIVISIBLE and kind == "i32")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    if name in ("first", "middle", "last"):
        assert "wgmma.mma_async" in ptx and "cp.async" in ptx  # on tensor cores, loads under way meanwhile


def test_the_notebook_runs_in_a_process_of_its_own(tmp_path):
    "nbdev_test leaves it out: the interpreter must be chosen before triton is imported."
    papermill = pytest.importorskip("papermill")
    nbs = Path(__file__).parent.parent / "nbs"
    papermill.execute_notebook(nbs / "02f_triton.ipynb", tmp_path / "out.ipynb", cwd=nbs, progress_bar=False)
