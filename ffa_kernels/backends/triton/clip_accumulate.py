"""Clips each record's gradient and adds it to the sums, in two launches for each dtype and
alignment of tensors.

    norm_i^2 = sum over the group of |G_i|^2            fp64, or as backward's kernels gave it
    c_i      = min(1, C / norm_i)                       0 for a record that is left out
    sums    += sum_i trunc(c_i G_i / grid)              in integers

The first launch ends with the factors: the last of its programs to arrive sums what all of them
left, in an order that depends on nothing but sizes.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from ffa_kernels.backends.grid import NORM_MARGIN, grid_size
from ffa_kernels.backends.triton.aot import Build, jit
from ffa_kernels.backends.triton.launch import launch
from ffa_kernels.backends.triton.tables import (
    BOUND,
    CHUNK,
    CHUNKS,
    FIRST_CHUNK,
    FIRST_TILE,
    GRAD_SAMPLE,
    INDEX,
    INVERSE_GRID,
    NORMS_ARRIVED,
    SQUARES,
    SUM,
    TILE,
    TYPES,
    Content,
    Plan,
    addresses,
    arrives_last,
    column,
    owner,
    plan_of,
    pointer,
    real,
    size,
    whole,
    word,
)

# Records whose rows one program has in flight together, by bytes an element: 16 bytes a thread and
# load, so about as many loads for each type.
RECORDS = {2: 8, 4: 4, 8: 2}
_NORM_RECORDS = 4
_NORM_TILE = 512
_WARPS = 4

_MARGIN = tl.constexpr(NORM_MARGIN)

# Triton's types of the arguments. None is specialised: what was compiled ahead is what runs.
_NORM_TENSORS = {
    "table": "*i64",
    "keep": "*u8",
    "stats": "*i64",
    "factors": "*fp64",
    "partials": "*fp64",
}
_NORM_INTEGERS = dict.fromkeys(
    (
        *("count", "n", "flat", "has_keep", "keep_stride", "stats_stride"),
        *("first_chunk", "programs"),
    ),
    "i32",
)
_SUM_TENSORS = {"table": "*i64", "factors": "*fp64"}
_SUM_INTEGERS = dict.fromkeys(("count", "n", "flat", "first_tile"), "i32")


@jit
def clip_factor(norm_sq, bound):
    """csrc/common/clip.h: 1 within the bound, C / norm beyond it, 0 for a norm not finite."""
    norm = tl.sqrt(norm_sq) * _MARGIN
    within = norm <= bound
    factor = tl.where(within, 1.0, bound / tl.where(within, 1.0, norm))
    return tl.where(norm_sq <= 1.7976931348623157e308, factor, 0.0)


@jit
def settle(norm_sq, bound, kept, here, factors):
    """Writes the factors where `here`; returns how many were scaled down, and how many dropped."""
    factor = clip_factor(norm_sq, bound)
    scaled = tl.sum((here & kept & (factor > 0.0) & (factor < 1.0)).to(tl.int64))
    dropped = tl.sum((here & kept & (factor == 0.0)).to(tl.int64))
    tl.store(factors, tl.where(kept, factor, 0.0), mask=here)
    return scaled, dropped


@jit
def write_factors(
    table,
    keep,
    stats,
    factors,
    partials,
    count,
    n,
    flat,
    has_keep,
    keep_stride,
    stats_stride,
    RECORDS: tl.constexpr,
    TENSORS: tl.constexpr,
):
    """From squares and partial sums to the factors, `RECORDS` records and `TENSORS` at a time."""
    scaled = tl.zeros([], tl.int64)
    dropped = tl.zeros([], tl.int64)
    for first_record in range(0, n, RECORDS):
        record = first_record + tl.arange(0, RECORDS)
        in_batch = record < n
        told = record < tl.where(has_keep != 0, n, 0)
        kept = tl.load(keep + record * keep_stride, mask=told, other=1) != 0
        group_sq = tl.zeros([RECORDS], tl.float64)
        for first in range(0, count, TENSORS):
            k = first + tl.arange(0, TENSORS)
            exists = k < count
            here = in_batch[:, None] & exists[None, :]
            squares = tl.load(column(table, count, SQUARES) + k, mask=exists, other=0)
            known = squares != 0
            given = squares.to(tl.pointer_type(tl.float64))[None, :] + record[:, None]
            calls = tl.load(given + n, mask=here & known[None, :], other=0.0)
            norm_sq = tl.load(given, mask=here & (calls == 1.0), other=0.0)
            chunk = tl.load(column(table, count, FIRST_CHUNK) + k, mask=exists, other=0)
            chunks = tl.load(column(table, count, CHUNKS) + k, mask=exists, other=0)
            summed = here & (calls != 1.0)
            most = tl.max(tl.max(tl.where(summed, chunks[None, :], 0), axis=1), axis=0)
            for c in range(0, most):
                norm_sq += tl.load(
                    partials + (chunk + c)[None, :] * n + record[:, None],
                    mask=summed & (c < chunks)[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
            if flat:
                group_sq += tl.sum(norm_sq, axis=1)
            else:
                bound = tl.load(column(table, count, BOUND) + k, mask=exists, other=0)
                index = tl.load(column(table, count, INDEX) + k, mask=exists, other=0)
                more_scaled, more_dropped = settle(
                    norm_sq,
                    bound.to(tl.float64, bitcast=True)[None, :],
                    kept[:, None],
                    here,
                    factors + index[None, :] * n + record[:, None],
                )
                scaled += more_scaled
                dropped += more_dropped
        if flat:
            bound = real(table, count, BOUND, 0)
            more_scaled, more_dropped = settle(group_sq, bound, kept, in_batch, factors + record)
            scaled += more_scaled
            dropped += more_dropped
    tl.store(stats, tl.load(stats) + scaled)
    tl.store(stats + stats_stride, tl.load(stats + stats_stride) + dropped)


@jit(do_not_specialize=[*_NORM_TENSORS, *_NORM_INTEGERS])
def norms_kernel(
    table,
    keep,
    stats,
    factors,
    partials,
    count,
    n,
    flat,
    has_keep,
    keep_stride,
    stats_stride,
    first_chunk,
    programs,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    RECORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """partials[chunk, i] = sum over the chunk of G_i^2; the last to arrive writes the factors.

    A program has one chunk of a tensor, for `RECORDS` records. It reads nothing of those whose
    norm is known.
    """
    slices = tl.cdiv(n, RECORDS)
    chunk = first_chunk + tl.program_id(0) // slices
    record = tl.program_id(0) % slices * RECORDS + tl.arange(0, RECORDS)
    k = owner(table, count, FIRST_CHUNK, chunk)
    numel = size(table, count, k, ALIGNED)
    grads = pointer(table, count, GRAD_SAMPLE, k, GRAD, ALIGNED)
    squares = word(table, count, SQUARES, k)
    given = squares.to(tl.pointer_type(tl.float64))
    known = record < tl.where(squares != 0, n, 0)
    calls = tl.load(given + n + record, mask=known, other=0.0)
    summed = (record < n) & (calls != 1.0)
    length = tl.multiple_of(word(table, count, CHUNK, k), TILE)
    first = (chunk - word(table, count, FIRST_CHUNK, k)) * length
    last = tl.minimum(first + length, numel)
    # Nothing to sum: no turns.
    last = tl.where(tl.max(summed.to(tl.int32), axis=0) > 0, last, first)
    total = tl.zeros([RECORDS, TILE], tl.float64)
    for e in range(first, last, TILE):
        element = e + tl.arange(0, TILE)
        g = tl.load(
            grads + record.to(tl.int64)[:, None] * numel + element[None, :],
            mask=summed[:, None] & (element < numel)[None, :],
            other=0.0,
        )
        g = wide(g)
        total += g * g
    slot = chunk.to(tl.int64) * n + record
    tl.store(partials + slot, tl.sum(total, axis=1), mask=summed)
    if arrives_last(table + NORMS_ARRIVED, programs):
        write_factors(
            *(table, keep, stats, factors, partials, count, n, flat),
            *(has_keep, keep_stride, stats_stride, 16, 64),
        )


@jit
def clipped_sum(
    table,
    factors,
    count,
    n,
    flat,
    k,
    element,
    mask,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    RECORDS: tl.constexpr,
):
    """sum_i trunc(c_i G_i / grid) over the records, int64; the bits of an fp64 sum for C = inf.

    A record whose factor is 0 is not even read: 0 * NaN would be NaN.
    """
    numel = size(table, count, k, ALIGNED)
    grads = pointer(table, count, GRAD_SAMPLE, k, GRAD, ALIGNED) + element
    factors += tl.where(flat != 0, 0, word(table, count, INDEX, k)) * n
    inverse_grid = real(table, count, INVERSE_GRID, k)
    if real(table, count, BOUND, k) == float("inf"):
        plain = tl.zeros(element.shape, tl.float64)
        for i in range(0, n):
            factor = tl.load(factors + i)
            used = tl.where(factor != 0.0, mask, False)
            plain += wide(tl.load(grads + i * numel, mask=used, other=0.0))
        total = plain.to(tl.int64, bitcast=True)
    else:
        total = tl.zeros(element.shape, tl.int64)
        for first in range(0, n, RECORDS):
            for j in tl.static_range(RECORDS):
                i = first + j
                # The grid is a power of two: only the product with G rounds.
                factor = tl.load(factors + i, mask=i < n, other=0.0) * inverse_grid
                used = tl.where(factor != 0.0, mask, False)
                g = tl.load(grads + i * numel, mask=used, other=0.0)
                total += (factor * wide(g)).to(tl.int64)
    return total


@jit
def wide(g):
    """fp64 of any float type; the interpreter knows the way from bf16 by fp32 alone."""
    if g.dtype != tl.float64:
        g = g.to(tl.float32)
    return g.to(tl.float64)


@jit(do_not_specialize=[*_SUM_TENSORS, *_SUM_INTEGERS])
def accumulate_kernel(
    table,
    factors,
    count,
    n,
    flat,
    first_tile,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    RECORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """sums += sum_i trunc(c_i G_i / grid), one tile a program."""
    tile = first_tile + tl.program_id(0)
    k = owner(table, count, FIRST_TILE, tile)
    element = (tile - word(table, count, FIRST_TILE, k)) * TILE + tl.arange(0, TILE)
    mask = element < size(table, count, k, ALIGNED)
    more = clipped_sum(table, factors, count, n, flat, k, element, mask, GRAD, ALIGNED, RECORDS)
    sums = pointer(table, count, SUM, k, tl.int64, ALIGNED) + element
    total = tl.load(sums, mask=mask, other=0)
    if real(table, count, BOUND, k) == float("inf"):
        total = total.to(tl.float64, bitcast=True) + more.to(tl.float64, bitcast=True)
        total = total.to(tl.int64, bitcast=True)
    else:
        total += more
    tl.store(sums, total, mask=mask)


def bounds_and_grids(
    max_grad_norm: list[float], count: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """For each tensor its bound, and one over its grid."""
    bounds = tuple(max_grad_norm) if len(max_grad_norm) == count else (max_grad_norm[0],) * count
    return bounds, tuple([1.0 if math.isinf(c) else 1.0 / grid_size(c) for c in bounds])


def write_norms(plan: Plan, n: int, stats: Tensor, keep: Tensor | None, groups: int) -> Tensor:
    """Launches `norms_kernel` for all of the plan's chunks; the factors, fp64 (groups, n)."""
    factors = torch.empty((groups, n), dtype=torch.float64, device=stats.device)
    if n == 0:
        return factors
    partials = torch.empty(plan.chunks * n, dtype=torch.float64, device=stats.device)
    slices = -(-n // _NORM_RECORDS)
    kept = factors.view(torch.uint8) if keep is None else keep.view(torch.uint8)
    with whole(plan):
        for part in plan.launches:
            launch(
                norms_kernel,
                part.chunks * slices,
                (plan.table, kept, stats, factors, partials),
                (
                    *(plan.count, n, int(groups == 1), int(keep is not None)),
                    *(kept.stride(0), stats.stride(0), part.first_chunk, plan.chunks * slices),
                ),
                (),
                (TYPES[part.dtype], part.aligned, _NORM_RECORDS, _NORM_TILE),
                num_warps=_WARPS,
                num_stages=1,
            )
    return factors


def clip_accumulate(
    grad_samples: list[Tensor],
    squares: list[Tensor],
    sums: list[Tensor],
    stats: Tensor,
    keep: Tensor | None,
    max_grad_norm: list[float],
) -> Tensor:
    """Clips each record and adds it on the grid; see `ffa_kernels.ops.clip_accumulate`."""
    n, count, device = grad_samples[0].shape[0], len(grad_samples), grad_samples[0].device
    grads, known = [t.contiguous() for t in grad_samples], [t.contiguous() for t in squares]
    bounds, inverse_grids = bounds_and_grids(max_grad_norm, count)
    content = Content(
        numels=tuple([t.numel() for t in sums]),
        dtypes=tuple([t.dtype for t in grads]),
        bounds=bounds,
        inverse_grids=inverse_grids,
        grad_samples=addresses(grads),
        squares=addresses(known),
        sums=addresses(sums),
    )
    plan = plan_of(content, device)
    factors = write_norms(plan, n, stats, keep, len(max_grad_norm))
    if n == 0:
        return factors
    for part in plan.launches:
        launch(
            accumulate_kernel,
            part.tiles,
            (plan.table, factors),
            (count, n, int(len(max_grad_norm) == 1), part.first_tile),
            (),
            (TYPES[part.dtype], part.aligned, RECORDS[part.dtype.itemsize], TILE),
            num_warps=_WARPS,
            num_stages=1,
        )
    return factors


def builds(cc: int) -> list[Build]:
    """Both kernels for each type of G, read 16 bytes at a time or one element at a time."""
    found = []
    for dtype, TYPE in TYPES.items():
        for aligned in (True, False):
            how = f"{TYPE}{'' if aligned else ' unaligned'}"
            types = {"GRAD": TYPE, "ALIGNED": aligned}
            found.append(
                Build(
                    norms_kernel,
                    _NORM_TENSORS | _NORM_INTEGERS,
                    types | {"RECORDS": _NORM_RECORDS, "TILE": _NORM_TILE},
                    num_warps=_WARPS,
                    num_stages=1,
                    tensor_cores=False,
                    label=f"clip_accumulate norms {how}",
                )
            )
            found.append(
                Build(
                    accumulate_kernel,
                    _SUM_TENSORS | _SUM_INTEGERS,
                    types | {"RECORDS": RECORDS[dtype.itemsize], "TILE": TILE},
                    num_warps=_WARPS,
                    num_stages=1,
                    tensor_cores=False,
                    label=f"clip_accumulate sums {how}",
                )
            )
    return found
