"""Every Triton kernel and configuration compiled for each card: it fits and spills nothing."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from ffa_kernels.backends.triton import aot
from ffa_kernels.errors import ConfigError

QUICK = (80, 86, 90)
PATIENCE_S = 7200


def table(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The table's command in a process of its own, where Triton compiles."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "ffa_kernels.backends.triton", *arguments],
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )


def check_bars(cc: int, every: int) -> None:
    done = table("--cc", str(cc), "--every", str(every))
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    builds, broken = map(int, re.search(r"^(\d+) builds, (\d+) broken", done.stdout, re.M).groups())
    assert builds == sum(row.endswith("  ok") for row in done.stdout.splitlines())
    assert broken == 0


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("cc", QUICK)
def test_bars_hold_in_a_slice(cc):
    check_bars(cc, every=40)


@pytest.mark.full
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("cc", aot.SHARED_LIMITS)
def test_bars_hold(cc):
    check_bars(cc, every=1)


BUILD = aot.Build(None, {}, {}, 4, 3, tensor_cores=True, label="a product")


@pytest.mark.parametrize(
    "used, fault",
    [
        (aot.Resources(255, 8, 101376, 512, 1), "spills 8 bytes"),
        (aot.Resources(255, 0, 101377, 512, 1), "needs 101377 bytes of shared memory of 101376"),
        (aot.Resources(255, 0, 101376, 513, 1), "needs 513 columns of tensor memory"),
        (aot.Resources(255, 0, 101376, 512, 0), "uses no tensor cores"),
    ],
)
def test_a_broken_bar_is_named(used, fault):
    assert used.faults(BUILD, 86) == [fault]


def test_a_build_within_the_bars_has_no_fault():
    assert aot.Resources(255, 0, 101376, 512, 1).faults(BUILD, 86) == []


def test_instructions_of_every_generation_of_tensor_cores_are_known():
    listing = """
        HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0 ;
        FFMA R1, R2, R3, R1 ;
        R2UR UR4, R12 ;
    """
    assert aot._TENSOR_CORES.findall(listing) == ["HMMA", "HGMMA", "UTCHMMA"]


@pytest.mark.skipif(not aot.interpreted(), reason="kernels are not interpreted here")
def test_nothing_is_compiled_under_the_interpreter():
    with pytest.raises(ConfigError, match="TRITON_INTERPRET is 1; accepted: unset"):
        aot.compile_build(BUILD, 90)
    done = table("--cc", "90", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is 1; accepted: unset" in done.stderr
