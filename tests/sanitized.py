"""Op tests in a process of their own, on a library that csrc/build.py made under sanitizers."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
PATIENCE_S = 1200

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on PATH")

# What is the same contract on every backend.
OPS = [
    f"tests/test_{name}.py"
    for name in (
        *("linear", "per_sample_grad", "per_sample_backward", "per_sample_clip", "packed"),
        "clip_accumulate",
        *("private_update", "private_step", "chacha20", "gaussian", "product"),
    )
]


@functools.cache
def script(name: str):
    """A module of csrc, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "csrc" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def environment_of(kind: str, **variables: str) -> dict[str, str]:
    """What a process needs that shall run the sanitized library of `kind` ("cpu" or "cuda")."""
    library = script("build").build_for_tests(kind, ROOT / "build" / "sanitized")
    runtime = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        f"FFA_{kind.upper()}_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(runtime),
        # Python and torch keep what they allocate.
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def run_tests(kind: str, files: list[str], which: str, **variables: str) -> None:
    """The tests in `files` that pytest's -k picks by `which`; fails with their output."""
    # A sanitizer that ends the process takes with it what pytest has captured of its last words.
    options = ["-q", "-p", "no:cacheprovider", "--capture=sys", "-k", which]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT,
        env=environment_of(kind, **variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    said = done.stdout + done.stderr
    # A sanitizer's words come before the long way that led there.
    found = re.search(r".*(ERROR: AddressSanitizer|: runtime error: )", said)
    assert done.returncode == 0, said[found.start() :][:8000] if found else said[-8000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 10, done.stdout[-2000:]
    print(done.stdout.strip().splitlines()[-1])
