"""Tile products into fp32 accumulators, as every kernel here takes them."""

from __future__ import annotations

import torch
import triton.language as tl

from ffa_kernels.backends.triton import interpreted
from ffa_kernels.backends.triton.aot import jit

# The interpreter would multiply the bit patterns of bf16 as integers.
_IN_FP32 = tl.constexpr(interpreted())


def precision(dtype: torch.dtype) -> str:
    """`PRECISION` for operands of `dtype`, as PyTorch has been told to multiply."""
    if dtype != torch.float32:
        return "ieee"
    asked = torch.backends.cuda.matmul
    # The older name raises where the newer one was set.
    newer = getattr(asked, "fp32_precision", None)
    return "tf32" if (asked.allow_tf32 if newer is None else newer == "tf32") else "ieee"


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b for a (m, k), b (k, n) of one dtype and acc (m, n) fp32.

    PRECISION: of fp32 operands, "ieee" or "tf32".
    """
    if _IN_FP32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
