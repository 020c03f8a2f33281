"""What `import ffa_kernels` costs, and what it leaves alone."""

import statistics
import subprocess
import sys

MEASURE = """
import time, torch
began = time.perf_counter()
import ffa_kernels
ffa_kernels.FFALinear, ffa_kernels.convert, ffa_kernels.PrivacyEngine, ffa_kernels.ops
print(time.perf_counter() - began)
import sys
heavy = {"transformers", "triton", "opacus", "peft", "matplotlib"} & set(sys.modules)
before = {"triton"} if "triton" in PRELOADED else set()
assert not heavy - before, heavy
"""
# PyTorch itself brings triton where it is installed; only what we add counts.
PROGRAM = "import sys, torch; PRELOADED = set(sys.modules)" + MEASURE


def test_import_and_first_names_are_light():
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(3)
    ]
    assert statistics.median(seconds) < 0.3, seconds
