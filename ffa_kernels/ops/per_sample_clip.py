"""`per_sample_grad` of one layer, clipped by its own bound and summed, with G nowhere in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ffa_kernels.ops._library import by_first, check_devices, define, require
from ffa_kernels.ops.clip_accumulate import check_records, check_sums
from ffa_kernels.ops.per_sample_grad import check_products


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
) -> int:
    n = check_products("per_sample_clip", g, h, lora_B, cu_seqlens)
    shape = (g.shape[-1], h.shape[-1])
    require(
        tuple(total.shape) == shape,
        lambda: f"per_sample_clip: total is {tuple(total.shape)}; accepted: {shape}, (d_out, r)",
    )
    check_devices("per_sample_clip", g, {"total": total, "stats": stats})
    check_sums("per_sample_clip", [total], [max_grad_norm], 1)
    # A view of no memory stands for the G that is nowhere.
    nowhere = g.new_empty(()).expand(n, *shape)
    check_records("per_sample_clip", [nowhere], [], [total], stats, keep)
    require(
        stats.is_contiguous(),
        lambda: f"per_sample_clip: stats has strides {stats.stride()}; accepted: contiguous",
    )
    return n


def _fake(
    g: Tensor, h: Tensor, lora_B: Tensor | None, cu_seqlens: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    n = _check(g, h, lora_B, cu_seqlens, *rest)
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
