"""The gradient of B for each record, with what else one read of dL/dy can give."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ffa_kernels.errors import ConfigError
from ffa_kernels.ops._library import by_first, check_offsets, define


def check_products(
    op: str, g: Tensor, h: Tensor, lora_B: Tensor | None, cu_seqlens: Tensor | None
) -> int:
    """What the products of g are made with; the number of records."""
    # Plain ifs and no calls: as in `linear`.
    if (
        g.dim() < 2
        or g.shape[:-1] != h.shape[:-1]
        or g.dtype != h.dtype
        or not g.is_floating_point()
    ):
        raise ConfigError(
            f"{op}: g is {g.dtype} {tuple(g.shape)}, h is {h.dtype} {tuple(h.shape)}; "
            "accepted: (n, ..., d_out) and (n, ..., r) with the same leading sizes and float type"
        )
    if lora_B is not None and (
        lora_B.shape != (g.shape[-1], h.shape[-1]) or lora_B.dtype != g.dtype
    ):
        raise ConfigError(
            f"{op}: lora_B is {lora_B.dtype} {tuple(lora_B.shape)}; accepted: "
            f"{g.dtype} {(g.shape[-1], h.shape[-1])}, (d_out, r) of g and h"
        )
    device = g.device
    if h.device != device or (lora_B is not None and lora_B.device != device):
        name, t = ("h", h) if lora_B is None or h.device != device else ("lora_B", lora_B)
        raise ConfigError(f"{op}: {name} is on {t.device}; accepted: {device}, as g")
    if cu_seqlens is None:
        return g.shape[0]
    check_offsets(op, cu_seqlens, math.prod(g.shape[:-1]), g.device)
    return cu_seqlens.shape[0] - 1


def _check(
    g: Tensor, h: Tensor, lora_B: Tensor | None, cu_seqlens: Tensor | None, *_: object
) -> None:
    check_products("per_sample_grad", g, h, lora_B, cu_seqlens)


def _fake(
    g: Tensor,
    h: Tensor,
    lora_B: Tensor | None,
    cu_seqlens: Tensor | None,
    scaling: float,
    mean_loss: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n = check_products("per_sample_grad", g, h, lora_B, cu_seqlens)
    r = h.shape[-1]
    u = g.new_empty(0) if lora_B is None else g.new_empty(*g.shape[:-1], r)
    return u, g.new_empty(n, g.shape[-1], r), g.new_empty(2, n, dtype=torch.float64)


per_sample_grad_op = define(
    "per_sample_grad(Tensor g, Tensor h, Tensor? lora_B, Tensor? cu_seqlens, float scaling,"
    " bool mean_loss) -> (Tensor, Tensor, Tensor)",
    _check,
    by_first,
    _fake,
)


def per_sample_grad(
    g: Tensor,
    h: Tensor,
    lora_B: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    scaling: float = 1.0,
    mean_loss: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """u = g B, G_i = s g_i^T h_i and |G_i|^2, from one read of g.

    With `lora_B` None and h the input of a trained linear, G is that layer's weight gradient.

    Args:
        g: (n, ..., d_out), dL/dy; the first dimension is the record.
        h: (n, ..., r), the frozen projection x A^T, of g's dtype.
        lora_B: (d_out, r) of g's dtype, or None when u is not wanted.
        cu_seqlens: int32 (n + 1,) where records of many lengths are packed: g and h are rows
            (..., d_out) and (..., r), and record i is rows cu_seqlens[i] to cu_seqlens[i + 1] - 1
            of them, maybe none. Rows of no record have u and are in no G.
        scaling: s = alpha / r.
        mean_loss: the batch's loss is a mean over records: G is multiplied by n, so that it is
            the gradient of record i's own loss.

    Returns:
        u (..., r), or (0,) without `lora_B`; G (n, d_out, r) of g's dtype; fp64 (2, n), the squared
        norms of the G that is stored over ones, which say that they are of one call: what
        `clip_accumulate` takes as `squares`.

    Raises:
        ConfigError: shapes or dtypes that do not fit together.
    """
    result: tuple[Tensor, Tensor, Tensor] = per_sample_grad_op(
        g, h, lora_B, cu_seqlens, scaling, mean_loss
    )
    return result
