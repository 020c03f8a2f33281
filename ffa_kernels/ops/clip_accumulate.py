"""Clips every record of one physical batch and adds it to the logical batch's sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from ffa_kernels.errors import ConfigError, shown
from ffa_kernels.ops._library import (
    call_in_place,
    check_devices,
    define,
    require,
    require_same,
)

# Outside these the square of a norm that must be clipped would leave fp64's range.
_SMALLEST_BOUND, _LARGEST_BOUND = 2.0**-500, 2.0**500


def bounds_of(max_grad_norm: float | Sequence[float]) -> list[float]:
    """One bound or several, as a list."""
    if isinstance(max_grad_norm, Real):
        return [float(max_grad_norm)]
    if isinstance(max_grad_norm, str) or not isinstance(max_grad_norm, Iterable):
        raise ConfigError(
            f"max_grad_norm is {shown(max_grad_norm)}; accepted: a number, or a list of numbers"
        )
    return list(max_grad_norm)


def check_bounds(op: str, max_grad_norm: list[float], count: int) -> None:
    """One bound for all `count` tensors, or one each."""
    require(count > 0, lambda: f"{op}: no tensors given; accepted: at least one")
    require(
        len(max_grad_norm) in (1, count)
        and all(_SMALLEST_BOUND <= c <= _LARGEST_BOUND or c == math.inf for c in max_grad_norm),
        lambda: (
            f"{op}: max_grad_norm is {max_grad_norm}; accepted: one bound (flat), or {count}, one "
            f"a tensor, each from {_SMALLEST_BOUND:.1e} to {_LARGEST_BOUND:.1e}, or infinity"
        ),
    )


def check_sums(op: str, sums: list[Tensor], max_grad_norm: list[float], count: int) -> None:
    """The sums' dtype follows from the bound: integers on the grid, fp64 where C is infinite."""
    check_bounds(op, max_grad_norm, count)
    require(
        len(sums) == count,
        lambda: f"{op}: {len(sums)} sums for {count} tensors; accepted: one each",
    )
    check_devices(op, sums[0], {"sums": sums})
    dtypes = [torch.float64 if math.isinf(c) else torch.int64 for c in max_grad_norm]
    wanted = [(dtype, True) for dtype in dtypes] * (count // len(dtypes))
    require_same(
        [(total.dtype, total.is_contiguous()) for total in sums],
        wanted,
        lambda k: (
            f"{op}: sums[{k}] is {sums[k].dtype} with strides {sums[k].stride()}; accepted: "
            f"contiguous {wanted[k][0]} for its bound"
        ),
    )


def check_records(
    op: str,
    grad_samples: list[Tensor],
    squares: list[Tensor],
    totals: list[Tensor],
    stats: Tensor,
    keep: Tensor | None,
) -> None:
    """What one physical batch brings: gradients of n records for tensors shaped as `totals`."""
    # First: these lists become addresses.
    require(
        len(grad_samples) == len(totals),
        lambda: (
            f"{op}: {len(grad_samples)} grad_samples for {len(totals)} tensors; accepted: one each"
        ),
    )
    lists = {"grad_samples": grad_samples, "squares": squares}
    kept = {} if keep is None else {"keep": keep}
    check_devices(op, totals[0], {**lists, "stats": stats, **kept})
    require(
        grad_samples[0].dim() > 0,
        lambda: f"{op}: grad_samples[0] is a scalar; accepted: (n, *shape), n records",
    )
    n = grad_samples[0].shape[0]
    wanted = [(n, *total.shape) for total in totals]
    require_same(
        [t.shape if t.is_floating_point() else None for t in grad_samples],
        wanted,
        lambda k: (
            f"{op}: grad_samples[{k}] is {grad_samples[k].dtype} {tuple(grad_samples[k].shape)}; "
            f"accepted: a float type, {wanted[k]}"
        ),
    )
    require(
        len(squares) in (0, len(grad_samples))
        and [(t.dtype, t.shape) for t in squares] == [(torch.float64, (2, n))] * len(squares),
        lambda: (
            f"{op}: squares are {[(t.dtype, tuple(t.shape)) for t in squares]}; accepted: none, or "
            f"{len(grad_samples)} of fp64 {(2, n)}"
        ),
    )
    require(
        keep is None or (keep.dtype == torch.bool and tuple(keep.shape) == (n,)),
        lambda: (
            f"{op}: keep is {None if keep is None else (keep.dtype, tuple(keep.shape))}; accepted: "
            f"None or bool ({n},)"
        ),
    )
    require(
        stats.dtype == torch.int64 and tuple(stats.shape) == (2,) and stats.stride(0) != 0,
        lambda: (
            f"{op}: stats is {stats.dtype} {tuple(stats.shape)}; accepted: int64 (2,), of its own "
            "elements"
        ),
    )


def _check(
    grad_samples: list[Tensor],
    squares: list[Tensor],
    sums: list[Tensor],
    stats: Tensor,
    keep: Tensor | None,
    max_grad_norm: list[float],
) -> None:
    check_sums("clip_accumulate", sums, max_grad_norm, len(grad_samples))
    check_records("clip_accumulate", grad_samples, squares, sums, stats, keep)


def _fake(
    grad_samples: list[Tensor],
    squares: list[Tensor],
    sums: list[Tensor],
    stats: Tensor,
    keep: Tensor | None,
    max_grad_norm: list[float],
) -> Tensor:
    _check(grad_samples, squares, sums, stats, keep, max_grad_norm)
    first = grad_samples[0]
    return first.new_empty(len(max_grad_norm), first.shape[0], dtype=torch.float64)


_op = define(
    "clip_accumulate(Tensor[] grad_samples, Tensor[] squares, Tensor(a!)[] sums, Tensor(b!) stats,"
    " Tensor? keep, float[] max_grad_norm) -> Tensor",
    _check,
    lambda grad_samples, *_: grad_samples,
    _fake,
)


def clip_accumulate(
    grad_samples: Sequence[Tensor],
    sums: Sequence[Tensor],
    stats: Tensor,
    keep: Tensor | None,
    max_grad_norm: float | Sequence[float],
    *,
    squares: Sequence[Tensor] = (),
) -> Tensor:
    """sums_k += sum_i c_i G_{k,i}, each term truncated to a grid and added in integers.

    c_i = min(1, C / |G_i|), |.| over the group's tensors in fp64 and rounded against the record.
    A record with a non-finite norm, or with keep[i] False, is left out by selection: it changes
    no other. The sum has the same bits in any order or split of the records (Holohan and Braghin
    2021 say why floating-point sums leak).

    Args:
        grad_samples: K tensors (n, *shape_k), any float type.
        sums: K tensors shape_k, added to in place: int64 in units of the grid
            2^(floor(log2 C_k) - 32), or fp64 without a grid where C_k is infinite.
        stats: int64 (2,), added to in place: (record, group) pairs that were scaled down, and
            that were dropped as not finite. Computed from private records: not for release.
        keep: bool (n,), False for padding; None keeps all.
        max_grad_norm: one bound C ("flat": one group over all tensors), as a number or a list of
            one, or K ("per layer").
        squares: none, or K of fp64 (2, n), what the kernels of backward know of the norms: row 0
            the sum of |G_{k,i}|^2 over a layer's calls, row 1 how many calls those were. It
            stands for the norm after one call only, for the norm of a sum is no sum of norms;
            otherwise the norm is taken from G.

    Returns:
        The factors c, fp64 (groups, n).

    Raises:
        ConfigError: shapes, dtypes or bounds that do not fit together.
    """
    totals = list(sums)
    arguments = (list(grad_samples), list(squares), totals, stats, keep, bounds_of(max_grad_norm))
    result: Tensor = call_in_place(_op, arguments, [*totals, stats])
    return result
