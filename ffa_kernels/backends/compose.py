"""What backends share: ops made of their other ops, where there is no kernel of their own, and the
base layer's product, alone or with the adapter merged into W."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ffa_kernels.backends import native
from ffa_kernels.backends.grid import zero_sums


def by_way_of_G(
    per_sample_grad: Callable[..., tuple[Tensor, Tensor, Tensor]],
    clip_accumulate: Callable[..., Tensor],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`per_sample_clip` from the two ops that it stands for: G lives as long as the call."""

    def per_sample_clip(
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
        u, G, squares = per_sample_grad(g, h, lora_B, cu_seqlens, scaling, mean_loss)
        return u, clip_accumulate([G], [squares], [total], stats, keep, [max_grad_norm])

    return per_sample_clip


def by_way_of_u(
    per_sample_grad: Callable[..., tuple[Tensor, Tensor, Tensor]],
    linear_backward: Callable[..., Tensor],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`per_sample_backward` from the two ops that it stands for: u lives as long as the call."""

    def per_sample_backward(
        g: Tensor,
        h: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        cu_seqlens: Tensor | None,
        scaling: float,
        mean_loss: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, G, squares = per_sample_grad(g, h, lora_B, cu_seqlens, scaling, mean_loss)
        return linear_backward(g, u, weight, lora_A, lora_B, None, scaling, 0.0), G, squares

    return per_sample_backward


def by_way_of_sums(
    clip_accumulate: Callable[..., Tensor],
    private_update: Callable[..., None],
) -> Callable[..., Tensor]:
    """`private_step` from the two ops that it stands for: the sums live as long as the call."""

    def private_step(
        grad_samples: list[Tensor],
        squares: list[Tensor],
        stats: Tensor,
        keep: Tensor | None,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        rng_state: Tensor,
        hyper: Tensor,
        tensor_ids: list[int],
        max_grad_norm: list[float],
        *settings: Any,
    ) -> Tensor:
        sums = zero_sums(params, max_grad_norm)
        factors = clip_accumulate(grad_samples, squares, sums, stats, keep, max_grad_norm)
        buffers = (exp_avgs, exp_avg_sqs, steps, rng_state, hyper)
        private_update(params, sums, *buffers, tensor_ids, max_grad_norm, *settings)
        return factors

    return private_step


# Tokens of a record, where a choice must not depend on how long the batch's longest one is.
USUAL_TOKENS = 192
# Whether the CPU library's product, which takes the rank-r term into its sums, is the one for fp32.
# Read once: a compiler that traces a layer can not ask the library.
FUSES_FP32 = native.prefers_fp32_product() > 0
# And whether for large ones alone: AMX tiles make it, for which W is parted first, and after which
# a core is slower for a while.
BY_TILES = native.prefers_fp32_product() == 2
# Rows that parting W costs, and what slowing down does, in elements of W times rows. Measured with
# frozen layers of 384 to 2048 features, forward and backward, on a processor with 2 MiB of L2.
_PARTING, _SLOWING = 40, 9e7
# torch 2.6 does not tell.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
# Records of a batch, where a choice must not depend on how many there are.
_USUAL_RECORDS = 6


def bf16_is_faster() -> bool:
    """Whether PyTorch's products of bf16 take less time here than those of fp32. Intel's vectors of
    pairs take twice as long, its tiles do not; a processor without a name is taken for another's.
    """
    pairs: bool = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    tiles = told.get("amx_bf16", False)
    return pairs and (tiles or "Intel" not in told.get("cpu_name", ""))


# Read once, as the constants above.
WIDENS_BF16 = not bf16_is_faster()


def can_merge(weight: Tensor | None, like: Tensor, dropout: bool) -> bool:
    """Whether x (W + s B A)^T is x W^T + s (x A^T) B^T to rounding, and nothing here fuses the
    rank-r term with the product: on a CPU, in types that have bits to spare for it."""
    return (
        weight is not None
        and not dropout
        and like.is_cpu
        and weight.dtype == like.dtype
        and like.dtype in (torch.float32, torch.float64)
        and not (like.dtype == torch.float32 and takes_fp32(like, weight))
    )


def merging_pays(x: Tensor, weight: Tensor | None, dropout: bool, records: int = 0) -> bool:
    """Whether W + s B A costs less than rank-r terms on every row. It reads and writes as much as
    four copies of W, in forward and backward; they read and write y, and then dx, once more.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in), or None.
        dropout: whether x is masked.
        records: how many a batch is expected to have, where records are clipped: the choice, and so
            the rounding of each record's gradient, must then not depend on the batch. 0: it may.
    """
    if weight is None or weight.dim() != 2:
        return False
    expected = records * (1 if x.dim() == 2 else USUAL_TOKENS)
    rows = expected or math.prod(x.shape[:-1])
    d_out, d_in = weight.shape
    # In an exported graph the number of rows is open, and no guard is to close it.
    if not can_merge(weight, x, dropout) or is_exporting():
        return False
    return rows * (d_out + d_in) > 4 * d_out * d_in


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + s B A, for one product."""
    return torch.addmm(weight, lora_B, lora_A, alpha=scaling)


def takes_fp32(x: Tensor, weight: Tensor) -> bool:
    """Whether the CPU library's product is the faster one for x (n, ..., d_in) and W (d_out, d_in)
    in fp32. By tiles that depends on a record's tokens, and not on n: PyTorch's product rounds
    otherwise, and how a record is rounded must not depend on how many others there are."""
    if not (FUSES_FP32 and BY_TILES):
        return FUSES_FP32
    rows = _USUAL_RECORDS * math.prod(x.shape[1:-1])
    return (rows - _PARTING) * weight.numel() >= _SLOWING


def base_product(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """x W^T + b in x's dtype, by the CPU library's product where that is the one to take: that is
    no part of autograd's graph.

    Args:
        rows: x, (..., d_in).
        weight: W, (d_out, d_in), of x's dtype or a narrower one; int8 with a scale.
        bias: (d_out,) or None.
        scale: what W is multiplied with, (d_out, 1) or (1, d_in).
    """
    recorded = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    if rows.is_cpu and not recorded:
        from ffa_kernels.backends import cpu

        if cpu.has_product(rows, weight, bias, scale):
            return cpu.product(rows, weight, bias, scale=scale)
    return plain_product(rows, weight, bias, scale)


def plain_product(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """x W^T + b in x's dtype. A W of fewer bits is multiplied in its own type, where the device has
    instructions for that; x, b and the product are then rounded to it."""
    if scale is not None:
        wide = torch.promote_types(rows.dtype, scale.dtype)
        weight = (weight * scale.to(wide)).to(rows.dtype)
    if weight.dtype == rows.dtype:
        return F.linear(rows, weight, bias)
    if rows.device.type == "cpu" and WIDENS_BF16:
        return F.linear(rows, weight.to(rows.dtype), bias)
    narrow = None if bias is None else bias.to(weight.dtype)
    return F.linear(rows.to(weight.dtype), weight, narrow).to(rows.dtype)


def plain_backward(g: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """g W in g's dtype, as `plain_product` makes x W^T; scale (d_out, 1)."""
    return plain_product(g, weight.t(), None, None if scale is None else scale.t())


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """s left right, rounded once: the rank-r term where the base product is not asked for."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)
