"""Backward of an adapted layer at once: the gradient of its input and each record's of B."""

from __future__ import annotations

import torch
from torch import Tensor

from ffa_kernels.errors import ConfigError
from ffa_kernels.ops._library import by_first, define
from ffa_kernels.ops.per_sample_grad import check_products


def _check(
    g: Tensor,
    h: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    cu_seqlens: Tensor | None,
    *_: object,
) -> int:
    n = check_products("per_sample_backward", g, h, lora_B, cu_seqlens)
    dtype, device, shape_A = g.dtype, g.device, lora_A.shape
    if len(shape_A) != 2 or shape_A[0] != h.shape[-1] or lora_A.dtype != dtype:
        raise ConfigError(
            f"per_sample_backward: lora_A is {lora_A.dtype} {tuple(shape_A)}; accepted: {dtype} "
            f"({h.shape[-1]}, d_in), with the r of h"
        )
    if weight.shape != (g.shape[-1], shape_A[1]) or weight.dtype != dtype:
        raise ConfigError(
            f"per_sample_backward: weight is {weight.dtype} {tuple(weight.shape)}; accepted: "
            f"{dtype} {(g.shape[-1], shape_A[1])}, (d_out, d_in) of g and lora_A"
        )
    if lora_A.device != device or weight.device != device:
        name, t = ("lora_A", lora_A) if lora_A.device != device else ("weight", weight)
        raise ConfigError(f"per_sample_backward: {name} is on {t.device}; accepted: {device}, as g")
    return n


def _fake(
    g: Tensor,
    h: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    cu_seqlens: Tensor | None,
    scaling: float,
    mean_loss: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n = _check(g, h, weight, lora_A, lora_B, cu_seqlens)
    G = g.new_empty(n, *lora_B.shape)
    return g.new_empty(*g.shape[:-1], lora_A.shape[1]), G, g.new_empty(2, n, dtype=torch.float64)


per_sample_backward_op = define(
    "per_sample_backward(Tensor g, Tensor h, Tensor weight, Tensor lora_A, Tensor lora_B,"
    " Tensor? cu_seqlens, float scaling, bool mean_loss) -> (Tensor, Tensor, Tensor)",
    _check,
    by_first,
    _fake,
)


def per_sample_backward(
    g: Tensor,
    h: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    scaling: float = 1.0,
    mean_loss: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = g W + s u A, with u = g B, and G_i = s g_i^T h_i with |G_i|^2: `per_sample_grad` and the
    gradient of `linear`'s input at once. A backend may keep u to itself.

    Args:
        g: (n, ..., d_out), dL/dy; the first dimension is the record.
        h: (n, ..., r), the frozen projection x A^T, of g's dtype.
        weight: (d_out, d_in), frozen, of g's dtype.
        lora_A: (r, d_in), frozen, of g's dtype.
        lora_B: (d_out, r) of g's dtype.
        cu_seqlens: as in `per_sample_grad`; rows of no record have dx too.
        scaling: s = alpha / r.
        mean_loss: G is multiplied by n, and dx is not.

    Returns:
        dx (..., d_in); G (n, d_out, r); fp64 (2, n): the last two as by `per_sample_grad`.

    Raises:
        ConfigError: shapes, dtypes or devices that do not fit together.
    """
    result: tuple[Tensor, Tensor, Tensor] = per_sample_backward_op(
        g, h, weight, lora_A, lora_B, cu_seqlens, scaling, mean_loss
    )
    return result
