"""The native kernel reads and writes only what it should: a thousand random networks, images and gates on a
build with AddressSanitizer and UBSan, which finds the faults that are put into copies of it."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bas_repro import native

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "bas_repro" / "csrc"
TRIALS = 1000
SHORT = 200  # trials of the library's own build
FEW = 60  # trials of a copy with a fault, most of which end at one of the first
# as native._build has them, and what makes a library
FLAGS = "-std=c++17 -ffp-contract=fast -fopenmp -Wno-psabi -Wno-subobject-linkage -fPIC -shared"
CHECKS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"

# The sanitizer does not look at masked loads, so each number of theirs is read on its own before.
CHECKED = """
#ifdef __x86_64__
#include <cstdint>
#include <cstring>
#include <immintrin.h>
template <typename T> inline uint32_t checked(uint32_t mask, const void* from) {
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        T number;
        std::memcpy(&number, (const char*)from + i * sizeof(T), sizeof(T));
        volatile T seen = number;
        (void)seen;
    }
    return mask;
}
#define _mm512_maskz_loadu_epi16(mask, from) _mm512_maskz_loadu_epi16(checked<uint16_t>(mask, from), from)
#define _mm512_maskz_loadu_epi32(mask, from) _mm512_maskz_loadu_epi32(checked<uint32_t>(mask, from), from)
#endif
"""

# Edits of a copy: file, what stands there once, what stands there instead.
ROOM = """        if (int64_t(v.size()) < n + 16) v.resize(n + 16);
        return v.data() + (64 - reinterpret_cast<uintptr_t>(v.data()) % 64) % 64 / 4;"""
NO_MORE = "        std::vector<float>(n).swap(v);\n        return v.data();"
EXACT = "native.cpp", ROOM, NO_MORE  # scratch memory of just what is asked for
UNCHECKED = '__attribute__((optimize("O3"), no_sanitize("address", "undefined"))) inline '
EMULATION = [  # of AMX, which is not what is tested and takes most of the time
    ("amx.h", f"inline {name}", UNCHECKED + name) for name in ("float half_of", "void add_tile_products")
]
COLUMNS = "l.to.w; j++) {\n            const int top"  # of max_pool
FAULTS = {  # what is wrong: the edit, and what finds it
    "a panel of one piece too many": (
        ("tiles.h", "q < length; q += LANES", "q <= length; q += LANES"),
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a window of one line too high": (
        ("tiles.h", "l.source.pixel(-l.pad, -l.pad)", "l.source.pixel(-l.pad - 1, -l.pad)"),
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "the next image": (
        ("tiles.h", "r.call.x + r.image * s[0]", "r.call.x + (r.image + 1) * s[0]"),
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a bit that a word has not": (
        ("tiles.h", "1u << s.in[i] % 32", "1u << s.in[i]"),
        "runtime error: shift exponent",
    ),
    "a pixel in the border": (  # which is inside the workspace, where only the trials themselves look
        ("tiles.h", f"j < {COLUMNS}", f"j <= {COLUMNS}"),
        "AssertionError: (scores|numbers in the border)",
    ),
}
PLAIN = "native.cpp", "#define NAME plain", "#undef __x86_64__\n#define NAME plain"  # compiles sooner
WIDE = {  # as FAULTS, in what only processors with bfloat16 have
    "bits of inputs that there are not": (
        ("tiles.h", "loadu_epi16(bits, row + c)", "loadu_epi16(0xffffffffu, row + c)"),
        "AddressSanitizer: heap-buffer-overflow",
    ),
}


def compiler():
    "The compiler that torch calls; skips where it has no sanitizer."
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(command[0]):
        pytest.skip(f"no compiler {command[0]}")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    if "clang" in version or sys.platform != "linux":
        pytest.skip("this test knows only the sanitizers of GCC on Linux")
    return command


def runtime(command):
    "The sanitizer's library, and C++'s, which has to be there before torch throws."
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        ask = [*command, f"-print-file-name={name}"]
        found.append(subprocess.run(ask, capture_output=True, text=True).stdout.strip())
        if not Path(found[-1]).is_absolute():
            pytest.skip(f"the compiler has no {name}")
    return " ".join(found)


def build(folder, *edits):
    "Compile an edited copy of the kernel with the sanitizers."
    command = compiler()
    shutil.copytree(SOURCES, folder / "csrc")
    for name, old, new in edits:
        path = folder / "csrc" / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} has changed, so this test must: {old}"
        path.write_text(text.replace(old, new), encoding="utf-8")
    (folder / "checked.h").write_text(CHECKED, encoding="utf-8")
    own = f"{CHECKS} {FLAGS} -DEMULATE_AMX -include checked.h csrc/native.cpp -o kernel.so".split()
    done = subprocess.run([*command, *own], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    return folder / "kernel.so"


def trials(count, *arguments, **environment):
    "Run trials in a process of their own."
    command = [sys.executable, ROOT / "tests" / "native_trials.py", "--count", str(count), *arguments]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": paths, "OMP_WAIT_POLICY": "passive", **environment}
    return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=600)


def sanitized(kernel, count):
    "Run trials of a build with the sanitizers; Python and torch leak on purpose."
    own = {"LD_PRELOAD": runtime(compiler()), "ASAN_OPTIONS": "detect_leaks=0"}
    return trials(count, "--kernel", kernel, **own)


def told(done):
    "What went wrong, from the seed on."
    return done.stderr.rsplit("\r", 1)[-1][:4000]


def test_a_thousand_trials_are_clean(tmp_path, tell):
    done = sanitized(build(tmp_path, EXACT, *EMULATION), TRIALS)
    assert done.returncode == 0, told(done)
    assert f"{TRIALS} of {TRIALS} clean" in done.stdout
    tell(f"native kernel under AddressSanitizer: {done.stdout.strip()}")


@pytest.mark.parametrize("fault", FAULTS)
def test_trials_find(fault, tmp_path):
    edit, found = FAULTS[fault]
    done = sanitized(build(tmp_path, EXACT, PLAIN, edit), FEW)
    assert done.returncode != 0
    assert re.search(found, done.stderr), told(done)


@pytest.mark.parametrize("fault", WIDE)
def test_trials_find_in_bfloat16(fault, tmp_path):
    if not native.available() or not native.bf16():
        pytest.skip("this processor does not multiply bfloat16")
    edit, found = WIDE[fault]
    done = sanitized(build(tmp_path, EXACT, *EMULATION, edit), FEW)
    assert done.returncode != 0
    assert re.search(found, done.stderr), told(done)


def test_trials_of_the_librarys_own_build():
    if not native.available():
        pytest.skip("no compiler for the native kernel")
    done = trials(SHORT, "--seed", str(TRIALS))
    assert f"{SHORT} of {SHORT} clean" in done.stdout, told(done)
