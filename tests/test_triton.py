"""The Triton kernels compile for a GPU, which needs none: the interpreter of 02f_triton accepts more than the compiler does."""
import os
from pathlib import Path

import papermill
import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from bas_repro import triton_kernel as tk

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
CONV = {"K": 3, "STRIDE": 1, "BM": 64, "BN": 32, "BK": 32, "WIDE": False}
KERNELS = {  # name: kernel and its compile-time values
    "first": (tk.conv_kernel, CONV | {"in_list": None, "shortcut": None, "sums": None, "w_in": 1}),
    "middle": (tk.conv_kernel, CONV | {"shortcut": None, "sums": None, "w_in": 1}),
    "last": (tk.conv_kernel, CONV | {"out_list": None, "tiles": None, "w_out": 1}),
    "gate": (tk.gate_kernel, {"C": 64, "H": 16, "S": 64, "STEP": 64, "BLOCK": 32, "BLOCKS": 2}),
    "mask": (tk.mask_kernel, {"C": 64, "BLOCK": 32, "BLOCKS": 2})}
FEATURES, INTEGERS, FLOATS = ("x", "w", "shortcut", "y"), ("in_list", "out_list", "lists", "tiles"), ("bias", "sums", "fc1", "bias1", "fc2", "bias2", "mask")
DIVISIBLE = ("c_in", "c_out", "w_tap", "w_in", "w_out")  # by 16, as in every ResNet


def kind(name, dtype):
    "The type of an argument in Triton's words."
    return f"*{dtype}" if name in FEATURES else "*i32" if name in INTEGERS else "*fp32" if name in FLOATS else "i32"


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_hopper(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = KERNELS[name]
    signature = {n: "constexpr" if n in constants else kind(n, "bf16") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (n, k) in enumerate(signature.items()) if k[0] == "*" or (n in DIVISIBLE and k == "i32")}
    ptx = compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    if name in ("first", "middle", "last"):
        assert "wgmma.mma_async" in ptx and "cp.async" in ptx  # on tensor cores, with loads under way meanwhile


def test_the_notebook_runs_in_a_process_of_its_own(tmp_path):
    "nbdev_test leaves it out: the interpreter must be chosen before triton is imported."
    nbs = Path(__file__).parent.parent/"nbs"
    papermill.execute_notebook(nbs/"02f_triton.ipynb", tmp_path/"02f_triton.ipynb", cwd=nbs, progress_bar=False)
