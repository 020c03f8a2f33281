"""The CPU kernels under the address and undefined-behaviour sanitizers: the ops' own tests."""

import functools
import subprocess
import sys

import pytest
from sanitized import OPS, PATIENCE_S, environment_of, needs_compiler, run_tests

pytestmark = [needs_compiler, pytest.mark.timeout(PATIENCE_S)]

COPIES = ("baseline", "avx2", "avx512")
# Of the bf16 product alone.
UNITS = ("avx512bf16", "amx")
# But for the products' below, the others call what these call, through autograd or one after
# another.
KERNELS = [
    f"tests/test_{name}.py"
    for name in (
        *("per_sample_grad", "per_sample_backward", "packed", "clip_accumulate"),
        *("private_update", "private_step", "gaussian", "rank_term"),
    )
]

PRODUCTS = "exact or strides or any_batch or its_row"


@functools.cache
def copy_that_runs(isa: str) -> str:
    """The copy of the kernels that this machine runs when it is asked for that of `isa`."""
    code = """
import ctypes, os
library = ctypes.CDLL(os.environ["FFA_CPU_LIBRARY"])
library.ffa_cpu_isa.restype = ctypes.c_char_p
print(library.ffa_cpu_isa().decode())
"""
    environment = environment_of("cpu", FFA_CPU_ISA=isa)
    command = [sys.executable, "-S", "-E", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def there(isa: str) -> str:
    if copy_that_runs(isa) != isa:
        pytest.skip(f"this machine has no {isa}")
    return isa


@pytest.fixture(params=COPIES)
def copy(request) -> str:
    return there(request.param)


@pytest.fixture(params=(*COPIES, *UNITS))
def copy_or_unit(request) -> str:
    return there(request.param)


def test_the_kernels_under_sanitizers(copy):
    """But for opcheck, which is slow there and sees the same Python code as on any backend."""
    run_tests("cpu", KERNELS, "cpu and not opcheck", FFA_CPU_ISA=copy)


def test_the_products_under_sanitizers(copy_or_unit):
    run_tests("cpu", ["tests/test_product.py"], PRODUCTS, FFA_CPU_ISA=copy_or_unit)


@pytest.mark.full
def test_the_whole_contract_under_sanitizers(copy_or_unit):
    """With the tests that compare backends, which are named for none."""
    run_tests("cpu", OPS, "not reference and not triton", FFA_CPU_ISA=copy_or_unit)
