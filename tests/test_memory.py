"""The planner: its prediction against measured memory, and a limit that only a plan keeps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import memory_child
import pytest
from memory_child import MODELS, build

import ffa_kernels as ffa

MIB = 2**20
pytest.importorskip("transformers")
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


def child(*arguments):
    """(exit code, what it printed last, stderr) of memory_child.py."""
    done = subprocess.run(
        [sys.executable, memory_child.__file__, *map(str, arguments)],
        env={**os.environ, **memory_child.ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    return done.returncode, (done.stdout.splitlines() or [""])[-1], done.stderr


def predicted(name, **options):
    n, tokens = MODELS[name][4:]
    return ffa.plan(build(name), memory="1TiB", batch_size=n, tokens=tokens or 1, **options)


def compared(name, clipping="flat"):
    """Prediction, measurement, and the first over the second less 1."""
    code, out, err = child("measure", name, clipping)
    assert code == 0, err
    made, measured = predicted(name, clipping=clipping), json.loads(out)
    assert made.max_physical_batch_size == MODELS[name][4]
    assert sum(made.parts.values()) == made.peak
    return made, measured, made.peak / measured - 1


@linux
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_predicted_peak_is_the_measured_one_within_a_tenth(name):
    made, measured, error = compared(name)
    print(f"{name}: predicted {made.peak / MIB:.1f} MiB, measured {measured / MIB:.1f}")
    assert abs(error) <= 0.10


@linux
@pytest.mark.full
@pytest.mark.timeout(1200)
def test_six_models_within_a_tenth():
    missed = []
    for name in MODELS:
        for clipping in ("flat", "per_layer"):
            made, measured, error = compared(name, clipping)
            print(f"{name:8} {clipping:9} predicted {made.peak / MIB:7.1f} MiB, measured "
                  f"{measured / MIB:7.1f}, {error:+.1%}")  # fmt: skip
            if abs(error) > 0.10:
                missed.append((name, clipping, error))
    assert not missed


@linux
def test_a_limit_that_only_the_plan_keeps():
    limit = 200 * MIB
    assert predicted("llama").peak > limit
    code, out, err = child("limit", "llama", limit, "planned")
    assert code == 0, err
    assert json.loads(out)["peak"] <= limit
    code, _, err = child("limit", "llama", limit, "unplanned")
    assert code != 0
    assert "allocate memory" in err or "MemoryError" in err, err
