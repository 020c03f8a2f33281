"""`per_sample_grad` of one layer, clipped by its own bound and summed, with G nowhere in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ffa_kernels.ops._library import by_first, check_offsets, define, require
from ffa_kernels.ops.clip_accumulate import check_records, check_sums


def _check(
    g: Tensor,
    h: Tensor,
    lora_B: Tensor | None,
    cu_seqlens: Tensor | None,
    total: Tensor,
    stats: Tensor,
    keep: Tensor | None,
    scaling: float,
    mean_loss: bool,
    max_grad_norm: float,
) -> None:
    require(
        g.dim() >= 2
        and g.shape[:-1] == h.shape[:-1]
        and g.dtype == h.dtype
        and g.is_floating_point(),
        lambda: (
            f"per_sample_clip: g is {g.dtype} {tuple(g.shape)}, h is {h.dtype} {tuple(h.shape)}; "
            "accepted: (n, ..., d_out) and (n, ..., r) with the same leading sizes and float type"
        ),
    )
    shape = (g.shape[-1], h.shape[-1])
    require(
        lora_B is None or (tuple(lora_B.shape) == shape and lora_B.dtype == g.dtype),
        lambda: (
            f"per_sample_clip: lora_B is {lora_B.dtype} {tuple(lora_B.shape)}; accepted: "  # type: ignore[union-attr]
            f"{g.dtype} {shape}, (d_out, r) of g and h"
        ),
    )
    if cu_seqlens is not None:
        check_offsets("per_sample_clip", cu_seqlens, math.prod(g.shape[:-1]), g.device)
    require(
        tuple(total.shape) == shape,
        lambda: f"per_sample_clip: total is {tuple(total.shape)}; accepted: {shape}, (d_out, r)",
    )
    check_sums("per_sample_clip", [total], [max_grad_norm], 1)
    n = g.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # A view of no memory stands for the G that is nowhere.
    check_records("per_sample_clip", [g.new_empty(()).expand(n, *shape)], [], [total], stats, keep)
    require(
        stats.is_contiguous(),
        lambda: f"per_sample_clip: stats has strides {stats.stride()}; accepted: contiguous",
    )


def _fake(
    g: Tensor,
    h: Tensor,
    lora_B: Tensor | None,
    cu_seqlens: Tensor | None,
    total: Tensor,
    stats: Tensor,
    keep: Tensor | None,
    scaling: float,
    mean_loss: bool,
    max_grad_norm: float,
) -> tuple[Tensor, Tensor]:
    _check(g, h, lora_B, cu_seqlens, total, stats, keep, scaling, mean_loss, max_grad_norm)
    n = g.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    u = g.new_empty(0) if lora_B is None else g.new_empty(*g.shape[:-1], h.shape[-1])
    return u, g.new_empty(1, n, dtype=torch.float64)


_op = define(
    "per_sample_clip(Tensor g, Tensor h, Tensor? lora_B, Tensor? cu_seqlens, Tensor(a!) total,"
    " Tensor(b!) stats, Tensor? keep, float scaling, bool mean_loss, float max_grad_norm)"
    " -> (Tensor, Tensor)",
    _check,
    by_first,
    _fake,
)


def per_sample_clip(
    g: Tensor,
    h: Tensor,
    lora_B: Tensor | None,
    total: Tensor,
    stats: Tensor,
    keep: Tensor | None,
    max_grad_norm: float,
    *,
    cu_seqlens: Tensor | None = None,
    scaling: float = 1.0,
    mean_loss: bool = False,
) -> tuple[Tensor, Tensor]:
    """u = g B, and total += sum_i c_i G_i on the grid, with c_i = min(1, C / |G_i|).

    The same bits as `per_sample_grad` and then `clip_accumulate` of this tensor alone ("per
    layer"), for a layer that runs once in a forward: the norm of a sum over several calls is no
    function of theirs. Triton's kernel reads g twice and writes no G: less traffic where a record
    has fewer than 2 r tokens, and always less memory. The other backends go by way of G.

    Args:
        g, h, lora_B, cu_seqlens, scaling, mean_loss: as `per_sample_grad` has them.
        total: (d_out, r), contiguous, added to in place: int64 in units of the grid of C, or fp64
            where C is infinite.
        stats: contiguous int64 (2,); `keep`: as `clip_accumulate` has them.
        max_grad_norm: C.

    Returns:
        u (..., r), or (0,) without `lora_B`; the factors c, fp64 (1, n).

    Raises:
        ConfigError: shapes, dtypes or a bound that do not fit together.
    """
    result: tuple[Tensor, Tensor] = _op(
        g, h, lora_B, cu_seqlens, total, stats, keep, scaling, mean_loss, max_grad_norm
    )
    return result
