"""The gradient of B for each record as Triton kernels: one read of g gives u, G and |G|^2.

A program takes one record and one chunk of g's columns. It walks the record's tokens; each tile of
g comes from memory once and is multiplied twice, into the chunk's gradient, which stays in
registers to the end, and into the chunk's part of u. A second kernel adds the parts in a fixed
order, so that every run gives the same bits.

`per_sample_clip` never stores G: its first pass over g makes u and the norms, its second forms
each gradient again, to clip it and add it.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffa_kernels.backends import reference
from ffa_kernels.backends.compose import by_way_of_G, by_way_of_u
from ffa_kernels.backends.grid import grid_size, known_squares
from ffa_kernels.backends.triton.aot import Build, jit
from ffa_kernels.backends.triton.clip_accumulate import clip_accumulate, settle
from ffa_kernels.backends.triton.dot import dot, precision
from ffa_kernels.backends.triton.gaussian import TYPES
from ffa_kernels.backends.triton.launch import card, launch
from ffa_kernels.backends.triton.linear import linear_backward

_SIZES = ["n", "tokens", "rows", "chunks"]


@jit
def _span(i, cu_seqlens, n, tokens, rows):
    """First row and number of rows of span i: record i, or with `cu_seqlens` record i - 1, where
    spans 0 and n + 1 are the rows before the first record and after the last."""
    if cu_seqlens is None:
        first, count = tl.cast(i, tl.int64) * tokens, tokens
    else:
        begin = tl.load(cu_seqlens + i - 1, mask=i > 0, other=0)
        end = tl.load(cu_seqlens + i, mask=i <= n, other=rows)
        # No offset, however wrong, reads outside.
        begin = tl.minimum(tl.maximum(begin, 0), rows)
        count = tl.minimum(tl.maximum(end, 0), rows) - begin
        first = begin.to(tl.int64)
    return first, count


@jit
def _product(
    g_ptr,
    h_ptr,
    u_ptr,
    b,
    count,
    g_stride,
    is_record,
    d,
    d_out,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WARP_GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g^T h (BLOCK_D, BLOCK_R) in fp32 over `count` rows; u = g b on the way, unless b is None.

    Pointers are to the first row; columns of g are d, those past d_out and R are left out.
    """
    t, k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
    g_tile = t[:, None] * g_stride + d[None, :]
    h_tile = t[:, None] * R + k[None, :]
    if WARP_GROUPS:
        # The asynchronous tensor cores read both operands from shared memory, as they lie or
        # transposed: both products take the one tile that was loaded.
        product = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
        for start in range(0, count, BLOCK_T):
            row = tl.cast(start, tl.int64)
            t_inside = (t < count - start)[:, None]
            h_inside = t_inside & (k < R)[None, :]
            g_inside = t_inside & (d < d_out)[None, :]
            g = tl.load(g_ptr + row * g_stride + g_tile, mask=g_inside, other=0.0)
            h = tl.load(h_ptr + row * R + h_tile, mask=h_inside, other=0.0)
            product = dot(tl.trans(g), h, product, PRECISION)
            if b is not None:
                u = dot(g, b, tl.zeros((BLOCK_T, BLOCK_R), tl.float32), PRECISION)
                tl.store(u_ptr + row * R + h_tile, u.to(u_ptr.dtype.element_ty), mask=h_inside)
    else:
        # mma.sync takes operands from registers. Its loads are asynchronous only where no
        # transposition stands between load and product, so the transposed product is formed. Two
        # products in one block are given the warp layout of the first, under which each warp
        # would hold the whole of the second: that one has a block of its own, which h's load,
        # then no longer asynchronous, must run ahead of.
        product = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        ht_tile = t[None, :] * R + k[:, None]
        h = tl.load(h_ptr + ht_tile, mask=(t < count)[None, :] & (k < R)[:, None], other=0.0)
        for start in range(0, count, BLOCK_T):
            row = tl.cast(start, tl.int64)
            t_inside = (t < count - start)[:, None]
            g_inside = t_inside & (d < d_out)[None, :]
            g = tl.load(g_ptr + row * g_stride + g_tile, mask=g_inside, other=0.0)
            next_inside = (t < count - start - BLOCK_T)[None, :] & (k < R)[:, None]
            next_h = tl.load(h_ptr + (row + BLOCK_T) * R + ht_tile, mask=next_inside, other=0.0)
            if b is None:
                product = dot(h, g, product, PRECISION)
            else:
                u = dot(g, b, tl.zeros((BLOCK_T, BLOCK_R), tl.float32), PRECISION)
                h_inside = t_inside & (k < R)[None, :]
                tl.store(u_ptr + row * R + h_tile, u.to(u_ptr.dtype.element_ty), mask=h_inside)
                if is_record:
                    product = dot(h, g, product, PRECISION)
            h = next_h
        product = tl.trans(product)
    return product


@jit(do_not_specialize=_SIZES)
def gradient_kernel(
    g_ptr,
    h_ptr,
    B_ptr,
    cu_seqlens,
    u_ptr,
    G_ptr,
    squares_ptr,
    n,
    tokens,
    rows,
    chunks,
    d_out,
    g_stride_record,
    g_stride,
    scale,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WARP_GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G_i = scale g_i^T h_i, |G_i|^2 as stored and u = g B, of one span and one chunk of columns.

    u_ptr (chunks, rows, R) and squares_ptr (chunks, n) are a chunk's parts, of one chunk u and
    |G|^2 themselves. Without B_ptr there is no u, without G_ptr G is not stored.
    """
    chunk = tl.program_id(0) % chunks
    span = tl.program_id(0) // chunks
    first, count = _span(span, cu_seqlens, n, tokens, rows)
    if cu_seqlens is None:
        record = span
        g_ptr += span.to(tl.int64) * g_stride_record
    else:
        record = span - 1
        g_ptr += first * g_stride
    is_record = (record >= 0) & (record < n)
    d, k = chunk * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    element = d[:, None] * R + k[None, :]
    inside = (d < d_out)[:, None] & (k < R)[None, :]
    b = None
    if B_ptr is not None:
        b = tl.load(B_ptr + element, mask=inside, other=0.0)
        u_ptr += (chunk.to(tl.int64) * rows + first) * R
    product = _product(
        g_ptr,
        h_ptr + first * R,
        u_ptr,
        b,
        count,
        g_stride,
        is_record,
        d,
        d_out,
        R,
        BLOCK_T,
        BLOCK_D,
        BLOCK_R,
        WARP_GROUPS,
        PRECISION,
    )
    if is_record:
        G = (product * scale).to(h_ptr.dtype.element_ty)
        if G_ptr is not None:
            tl.store(G_ptr + record.to(tl.int64) * d_out * R + element, G, mask=inside)
        exact = tl.where(inside, G.to(tl.float32).to(tl.float64), 0.0)
        tl.store(squares_ptr + chunk.to(tl.int64) * n + record, tl.sum(exact * exact))


@jit
def _sum_of_chunks(parts, size, at, chunks, DTYPE: tl.constexpr, CHUNKS: tl.constexpr):
    """The sum over chunks of parts (chunks, size) at `at`, in an order that is always the same."""
    total = tl.zeros(at.shape, DTYPE)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (at < size)[None, :]
        places = chunk.to(tl.int64)[:, None] * size + at[None, :]
        total += tl.sum(tl.load(parts + places, mask=inside, other=0.0), axis=0)
    return total


@jit(do_not_specialize=["elements", "n", "chunks", "record_blocks", "bound"])
def finish_kernel(
    square_parts,
    u_parts,
    u_ptr,
    out_ptr,
    keep,
    stats,
    elements,
    n,
    chunks,
    record_blocks,
    bound,
    RECORDS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """u and |G_i|^2 from their parts; given `stats`, the clip factors in the place of |G_i|^2.

    The first `record_blocks` programs have RECORDS records each, the others ELEMENTS of u.
    bound: the bits of C, fp64.
    """
    if tl.program_id(0) < record_blocks:
        i = tl.program_id(0).to(tl.int64) * RECORDS + tl.arange(0, RECORDS)
        out = _sum_of_chunks(square_parts, n, i, chunks, tl.float64, CHUNKS)
        if stats is None:
            tl.store(out_ptr + i, out, mask=i < n)
        else:
            kept = i < n
            if keep is not None:
                kept = tl.load(keep + i, mask=i < n, other=0) != 0
            c = bound.to(tl.float64, bitcast=True)
            scaled, dropped = settle(out, c, kept, i < n, out_ptr + i)
            # Integers: whoever adds first does not show.
            tl.atomic_add(stats, scaled)
            tl.atomic_add(stats + 1, dropped)
    elif u_parts is not None:
        at = (tl.program_id(0) - record_blocks).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        u = _sum_of_chunks(u_parts, elements, at, chunks, tl.float32, CHUNKS)
        tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=at < elements)


@jit(do_not_specialize=[*_SIZES, "records", "per_unit"])
def clipped_sum_kernel(
    g_ptr,
    h_ptr,
    cu_seqlens,
    factors,
    sum_ptr,
    n,
    tokens,
    rows,
    chunks,
    records,
    per_unit,
    d_out,
    g_stride_record,
    g_stride,
    scale,
    INFINITE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WARP_GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum += sum_i trunc(c_i G_i / grid), over `records` records and one chunk of columns, for
    the bits of G_i that `gradient_kernel` stores; for an infinite bound sum += sum_i G_i.

    per_unit: the bits of 1 / grid, fp64.
    """
    chunk = tl.program_id(0) % chunks
    first_record = tl.program_id(0) // chunks * records
    d, k = chunk * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float64 if INFINITE else tl.int64)
    for record in range(first_record, tl.minimum(first_record + records, n)):
        factor = tl.load(factors + record)
        if cu_seqlens is None:
            first, count = _span(record, cu_seqlens, n, tokens, rows)
            g = g_ptr + tl.cast(record, tl.int64) * g_stride_record
        else:
            first, count = _span(record + 1, cu_seqlens, n, tokens, rows)
            g = g_ptr + first * g_stride
        # A record that is left out is not even read.
        count = tl.where(factor == 0.0, 0, count)
        product = _product(
            g,
            h_ptr + first * R,
            None,
            None,
            count,
            g_stride,
            True,
            d,
            d_out,
            R,
            BLOCK_T,
            BLOCK_D,
            BLOCK_R,
            WARP_GROUPS,
            PRECISION,
        )
        G = (product * scale).to(h_ptr.dtype.element_ty).to(tl.float32).to(tl.float64)
        if INFINITE:
            acc += G
        else:
            acc += (G * (factor * per_unit.to(tl.float64, bitcast=True))).to(tl.int64)
    element = d[:, None] * R + k[None, :]
    inside = (d < d_out)[:, None] & (k < R)[None, :]
    if INFINITE:
        acc += tl.load(sum_ptr + element, mask=inside, other=0.0)
        tl.store(sum_ptr + element, acc, mask=inside)
    else:
        # Integers: whoever adds first does not show.
        tl.atomic_add(sum_ptr + element, acc, mask=inside)


class Tile(NamedTuple):
    """Tokens and columns of g in a tile, Triton's launch options, which tensor cores, and the
    bound on registers that `launch` takes."""

    tokens: int
    columns: int
    num_warps: int
    num_stages: int
    warp_groups: bool = False
    max_registers: int | None = None


# By padded rank, widest first: u's parts cost 8 r bytes a token and chunk, so that wide chunks
# save traffic where there are records enough to fill the SMs. Chosen by reasoning, not measured.
# Asynchronous tensor cores (compute capability 9), 16-bit types: in flight are two tiles of
# at most 64 KiB, and a warp group's products have 64 rows.
_WARP_GROUPS = {
    16: (Tile(64, 512, 8, 3, True), Tile(64, 256, 4, 3, True), Tile(64, 128, 4, 3, True)),
    32: (Tile(64, 256, 8, 3, True), Tile(64, 128, 4, 3, True)),
    64: (Tile(64, 256, 8, 3, True), Tile(64, 128, 8, 3, True)),
    128: (Tile(64, 128, 8, 3, True), Tile(64, 64, 8, 3, True)),
    256: (Tile(64, 64, 8, 3, True),),
}
# With accumulators in tensor memory the widest tiles spill a few registers.
_TENSOR_MEMORY = _WARP_GROUPS | {
    16: _WARP_GROUPS[16][1:],
    32: (Tile(64, 256, 8, 3, True), Tile(64, 128, 4, 3, True, 168)),
    64: _WARP_GROUPS[64][1:],
}
# mma.sync, 16-bit types: within 99 KiB of shared memory, and with g's tile in registers.
_MMA = {
    16: (Tile(32, 512, 8, 3), Tile(32, 256, 4, 3), Tile(64, 128, 4, 3)),
    32: (Tile(64, 256, 8, 3), Tile(64, 128, 4, 3)),
    64: (Tile(64, 128, 8, 3),),
    128: (Tile(64, 128, 8, 3), Tile(64, 64, 8, 3)),
    256: (Tile(64, 64, 8, 3),),
}
# Records of up to 16 tokens: one tile each, so small that many programs share an SM.
_SHORT_TOKENS = 16
_SHORT = {
    16: (Tile(16, 256, 4, 1),),
    32: (Tile(16, 256, 8, 1),),
    64: (Tile(16, 128, 8, 1),),
    128: (Tile(16, 64, 8, 1),),
    256: (Tile(16, 64, 8, 1),),
}
# fp32 in any precision; exact products run outside the tensor cores, from registers.
_FP32 = {
    16: (Tile(16, 128, 8, 3, max_registers=128), Tile(16, 64, 4, 3)),
    32: (Tile(16, 128, 8, 3, max_registers=168), Tile(16, 64, 8, 3, max_registers=128)),
    64: (Tile(16, 64, 8, 3, max_registers=168),),
    128: (Tile(16, 64, 8, 2),),
    256: (Tile(16, 32, 8, 2),),
}
# Rows of g that do not begin at multiples of 16 elements are loaded one by one.
_RAGGED = {
    16: (Tile(32, 64, 4, 2),),
    32: (Tile(32, 64, 4, 2),),
    64: (Tile(32, 64, 8, 2),),
    128: (Tile(32, 32, 8, 2),),
    256: (Tile(32, 32, 8, 2),),
}
_LARGEST_RANK = 256
_LARGEST_FUSED_RANK = 64
_LARGEST_CLIPPED_RANK = 128
# What a second launch costs, in bytes that an SM moves meanwhile.
_LAUNCH_BYTES = 1 << 16
# Row strides up to this leave offsets within a tile in 32 bits.
_LARGEST_STRIDE = 1 << 24
# Of `finish_kernel`: records and elements of a program, chunks that it loads at a time.
_RECORDS, _ELEMENTS, _CHUNKS, _FINISH = 32, 512, 8, Tile(0, 0, 4, 1)


def _tiles(
    cc: int, dtype: torch.dtype, block_r: int, tokens: int, aligned: bool
) -> tuple[Tile, ...]:
    """The tiles that may serve records of so many tokens on compute capability `cc`."""
    if dtype == torch.float32:
        return _FP32[block_r]
    if not aligned:
        return _RAGGED[block_r]
    if tokens <= _SHORT_TOKENS:
        return _SHORT[block_r]
    return {9: _WARP_GROUPS, 10: _TENSOR_MEMORY}.get(cc // 10, _MMA)[block_r]


def _may_clip(tile: Tile, block_r: int) -> bool:
    """Whether registers also hold the 64-bit sum of the clipped gradients."""
    return tile.columns * block_r <= 1024 * tile.num_warps


class Plan(NamedTuple):
    """How a call runs: tile, chunks of columns, and whether u is made in the same pass."""

    tile: Tile
    chunks: int
    fused: bool


@functools.lru_cache(maxsize=4096)
def _plan(
    cc: int,
    sms: int,
    dtype: torch.dtype,
    n: int,
    tokens: int,
    d_out: int,
    r: int,
    with_u: bool,
    aligned: bool,
    clip: bool,
) -> Plan:
    """The tile with which an SM moves the fewest bytes, an idle one counted as half a busy one."""
    block_r = max(16, triton.next_power_of_2(r))
    size = dtype.itemsize

    def parts(chunks: int) -> int:
        """Bytes of u's parts, written and read, a token."""
        return 8 * r * chunks if with_u and block_r <= _LARGEST_FUSED_RANK and chunks > 1 else 0

    def cost(tile: Tile) -> float:
        chunks = triton.cdiv(d_out, tile.columns)
        moved = min(d_out, tile.columns) * size + parts(chunks) / chunks
        programs = n * chunks
        busiest = float(max(programs * moved / sms, triton.cdiv(programs, sms) * moved / 2))
        return tokens * busiest + (_LAUNCH_BYTES if chunks > 1 else 0)

    tiles = _tiles(cc, dtype, block_r, tokens, aligned)
    tile = min([tile for tile in tiles if not clip or _may_clip(tile, block_r)], key=cost)
    chunks = triton.cdiv(d_out, tile.columns)
    # Parts that cost more than a second read of g are not worth one read.
    fused = with_u and block_r <= _LARGEST_FUSED_RANK and parts(chunks) <= d_out * size
    return Plan(tile, chunks, fused)


class _Problem(NamedTuple):
    """One call's sizes, and its tensors as the kernels take them."""

    g: Tensor  # (n, tokens, d_out) of contiguous columns; with cu_seqlens (1, rows, d_out)
    h: Tensor  # (..., r), contiguous
    cu_seqlens: Tensor | None
    n: int
    rows: int
    scale: float
    plan: Plan

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Arguments n to chunks of the kernels."""
        return self.n, self.g.shape[1], self.rows, self.plan.chunks

    @property
    def layout(self) -> tuple[int, int, int]:
        """Arguments d_out to g_stride of the kernels."""
        return self.g.shape[2], self.g.stride(0), self.g.stride(1)

    @property
    def constexprs(self) -> tuple[Any, ...]:
        """Arguments R to PRECISION of the kernels."""
        return _constexprs(self.plan.tile, self.h.shape[-1], precision(self.g.dtype))


def _bits(value: float) -> int:
    """The fp64 `value` as an integer of the same bits: floats reach a kernel as fp32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _padded_rank(r: int) -> int:
    return max(16, int(triton.next_power_of_2(r)))


def _constexprs(tile: Tile, r: int, precision: str) -> tuple[Any, ...]:
    return r, tile.tokens, tile.columns, _padded_rank(r), tile.warp_groups, precision


def _records(g: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """The number of records, and of rows."""
    rows = math.prod(g.shape[:-1])
    return (g.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1), rows


def _problem(
    g: Tensor,
    h: Tensor,
    with_u: bool,
    cu_seqlens: Tensor | None,
    scaling: float,
    mean_loss: bool,
    clip: bool,
) -> _Problem:
    n, rows = _records(g, cu_seqlens)
    outer = n if cu_seqlens is None else 1
    g = g.reshape(outer, rows // outer, g.shape[-1])
    if g.stride(2) != 1 or g.stride(1) > _LARGEST_STRIDE:
        g = g.contiguous()
    aligned = all(i % 16 == 0 for i in (g.data_ptr(), g.shape[2], g.stride(0), g.stride(1)))
    cc, sms = card(g.device)
    tokens = triton.cdiv(rows, max(n, 1))
    plan = _plan(cc, sms, g.dtype, n, tokens, g.shape[2], h.shape[-1], with_u, aligned, clip)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    scale = scaling * n if mean_loss else scaling
    return _Problem(g, h.contiguous(), cu_seqlens, n, rows, scale, plan)


def _first_pass(
    p: _Problem,
    lora_B: Tensor | None,
    G: Tensor | None,
    out: Tensor,
    stats: Tensor | None = None,
    keep: Tensor | None = None,
    max_grad_norm: float = math.inf,
) -> Tensor:
    """u (rows, r), or (0,) without `lora_B`, by one read of g, which also fills `G` if given, and
    `out` (n,) with |G|^2, or given `stats` with the clip factors."""
    chunks, r, fused = p.plan.chunks, p.h.shape[-1], p.plan.fused
    u = p.g.new_empty((p.rows, r) if fused else 0)
    B = lora_B.contiguous() if lora_B is not None and fused else None
    u_parts, square_parts = u, out
    if chunks > 1:
        u_parts = u.new_empty((chunks, *u.shape), dtype=torch.float32)
    if chunks > 1 or stats is not None:
        square_parts = out.new_empty((chunks, p.n))
    launch(
        gradient_kernel,
        (p.n if p.cu_seqlens is None else p.n + 2) * chunks,
        (p.g, p.h, B, p.cu_seqlens, u_parts if fused else None, G, square_parts),
        (*p.sizes, *p.layout),
        (p.scale,),
        p.constexprs,
        p.plan.tile.num_warps,
        p.plan.tile.num_stages,
        p.plan.tile.max_registers,
    )
    if square_parts is not out:
        sums_u = fused and chunks > 1
        record_blocks = triton.cdiv(p.n, _RECORDS)
        launch(
            finish_kernel,
            record_blocks + (triton.cdiv(u.numel(), _ELEMENTS) if sums_u else 0),
            (square_parts, *((u_parts, u) if sums_u else (None, None)), out, keep, stats),
            (u.numel(), p.n, chunks, record_blocks, _bits(max_grad_norm)),
            (),
            (_RECORDS, _ELEMENTS, _CHUNKS),
            _FINISH.num_warps,
            _FINISH.num_stages,
        )
    # cuBLAS reads g once more, where that is cheaper than u's parts.
    return u if lora_B is None or fused else p.g.flatten(0, 1) @ lora_B


def per_sample_grad(
    g: Tensor,
    h: Tensor,
    lora_B: Tensor | None,
    cu_seqlens: Tensor | None,
    scaling: float,
    mean_loss: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """u = g B, G_i = s g_i^T h_i and |G_i|^2; see `ffa_kernels.ops.per_sample_grad`."""
    (n, rows), d_out, r = _records(g, cu_seqlens), g.shape[-1], h.shape[-1]
    if r > _LARGEST_RANK:
        if cu_seqlens is None:
            return reference.per_sample_grad(g, h, lora_B, None, scaling, mean_loss)
        # The reference reads the offsets, which would wait for the device.
        blocks = [
            per_sample_grad(g, block, None, cu_seqlens, scaling, mean_loss)
            for block in h.split(_LARGEST_RANK, dim=-1)
        ]
        u = g.new_empty(0) if lora_B is None else g @ lora_B
        squares = known_squares(n, g.device)
        squares[0] = torch.stack([block[2][0] for block in blocks]).sum(0)
        return u, torch.cat([block[1] for block in blocks], dim=2), squares
    u_shape = (0,) if lora_B is None else (*g.shape[:-1], r)
    if rows == 0 or d_out == 0 or r == 0:
        squares = known_squares(n, g.device)
        squares[0] = 0.0
        return g.new_zeros(u_shape), g.new_zeros(n, d_out, r), squares
    problem = _problem(g, h, lora_B is not None, cu_seqlens, scaling, mean_loss, clip=False)
    G, squares = g.new_empty(n, d_out, r), known_squares(n, g.device)
    u = _first_pass(problem, lora_B, G, squares[0])
    return u.view(u_shape), G, squares


per_sample_backward = by_way_of_u(per_sample_grad, linear_backward)
_with_G = by_way_of_G(per_sample_grad, clip_accumulate)


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
    """u and the clipped sum without G; see `ffa_kernels.ops.per_sample_clip`. Ranks above 128 go
    by way of G."""
    (n, rows), d_out, r = _records(g, cu_seqlens), g.shape[-1], h.shape[-1]
    if r > _LARGEST_CLIPPED_RANK or min(n, rows, d_out, r) == 0:
        settings = (scaling, mean_loss, max_grad_norm)
        return _with_G(g, h, lora_B, cu_seqlens, total, stats, keep, *settings)
    p = _problem(g, h, lora_B is not None, cu_seqlens, scaling, mean_loss, clip=True)
    factors = g.new_empty((1, n), dtype=torch.float64)
    kept = None if keep is None else keep.contiguous().view(torch.uint8)
    u = _first_pass(p, lora_B, None, factors, stats, kept, max_grad_norm)
    infinite = math.isinf(max_grad_norm)
    # fp64 sums show their order, and so have one program for all records.
    wanted = 1 if infinite else triton.cdiv(2 * card(g.device)[1], p.plan.chunks)
    records = triton.cdiv(n, wanted)
    launch(
        clipped_sum_kernel,
        triton.cdiv(n, records) * p.plan.chunks,
        (p.g, p.h, p.cu_seqlens, factors, total),
        (*p.sizes, records, _bits(1.0 if infinite else 1.0 / grid_size(max_grad_norm)), *p.layout),
        (p.scale,),
        (infinite, *p.constexprs),
        p.plan.tile.num_warps,
        p.plan.tile.num_stages,
        p.plan.tile.max_registers,
    )
    return u.view((0,) if lora_B is None else (*g.shape[:-1], r)), factors


_TYPES = {
    **dict.fromkeys(("squares_ptr", "square_parts", "out_ptr", "factors"), "*fp64"),
    **dict.fromkeys(("elements", "bound", "per_unit"), "i64"),
    **dict.fromkeys(("stats", "sum_ptr"), "*i64"),
    **{"cu_seqlens": "*i32", "keep": "*u8", "u_parts": "*fp32", "scale": "fp32"},
}


def _build(
    kernel: Any,
    *,
    dtype: torch.dtype,
    constexprs: dict[str, Any],
    tile: Tile,
    label: str,
    aligned: bool = True,
    **types: str,
) -> Build:
    """Arguments that are not constexpr have the type in `types`, in _TYPES, or that of g."""
    name = TYPES[dtype]
    signature = {
        argument: (_TYPES | types).get(argument, f"*{name}" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
        if argument not in constexprs
    }
    absent = "".join(f" no {a}" for a, value in constexprs.items() if value is None)
    multiples = ("d_out", "g_stride_record", "g_stride") if aligned else ()
    return Build(
        *(kernel, signature, constexprs, tile.num_warps, tile.num_stages),
        max_registers=tile.max_registers,
        tensor_cores=kernel is not finish_kernel and dtype != torch.float32,
        label=f"{kernel.__name__.removesuffix('_kernel')} {label} {name}{absent}",
        divisible=tuple(a for a, t in signature.items() if t[0] == "*" or a in multiples),
    )


def builds(cc: int) -> list[Build]:
    """Every kernel and tile of compute capability `cc`.

    fp16 and tf32, whose code is that of bf16 and fp32 but for an operand type, stand at the
    smallest rank alone; so do arguments that may be absent or of another type, at its first tile.
    """
    ranks = tuple(_FP32)
    found = [
        *_builds(cc, torch.bfloat16, "ieee", ranks),
        *_builds(cc, torch.float16, "ieee", ranks[:1]),
        *_builds(cc, torch.float32, "ieee", ranks),
        *_builds(cc, torch.float32, "tf32", ranks[:1]),
    ]
    constexprs = {"RECORDS": _RECORDS, "ELEMENTS": _ELEMENTS, "CHUNKS": _CHUNKS}
    for absent in ((), ("keep",), ("stats", "keep"), ("u_parts", "u_ptr")):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            some = constexprs | dict.fromkeys(absent)
            found.append(
                _build(finish_kernel, dtype=dtype, constexprs=some, tile=_FINISH, label="")
            )
    return found


def _builds(cc: int, dtype: torch.dtype, precision: str, ranks: Iterable[int]) -> Iterator[Build]:
    names = ("R", "BLOCK_T", "BLOCK_D", "BLOCK_R", "WARP_GROUPS", "PRECISION")
    cases = ((True, 1 << 20), (True, _SHORT_TOKENS), (False, 1 << 20))
    no_u: dict[str, Any] = {"B_ptr": None, "u_ptr": None}
    records: dict[str, Any] = {"cu_seqlens": None}
    grid: dict[str, Any] = {"INFINITE": False}
    for r in ranks:
        every = [
            (tile, aligned)
            for aligned, tokens in cases
            for tile in _tiles(cc, dtype, r, tokens, aligned)
        ]
        for tile, aligned in dict.fromkeys(every):
            tiled = dict(zip(names, _constexprs(tile, r, precision), strict=True))
            label = (
                f"{tile.tokens}x{tile.columns}/{tile.num_warps}/{tile.num_stages} r{r} {precision}"
            )
            make = functools.partial(
                _build,
                dtype=dtype,
                tile=tile,
                label=label + " ragged" * (not aligned),
                aligned=aligned,
            )
            if r <= _LARGEST_FUSED_RANK:
                yield make(gradient_kernel, constexprs=tiled | records, u_ptr="*fp32")
            yield make(gradient_kernel, constexprs=tiled | records | no_u)
            if _may_clip(tile, r) and r <= _LARGEST_CLIPPED_RANK:
                yield make(clipped_sum_kernel, constexprs=tiled | records | grid)
            if (tile, aligned) == every[0] and r == 16 and dtype != torch.float16:
                yield make(gradient_kernel, constexprs=tiled, u_ptr="*fp32")
                yield make(gradient_kernel, constexprs=tiled | records)
                yield make(gradient_kernel, constexprs=tiled | {"G_ptr": None}, u_ptr="*fp32")
                yield make(gradient_kernel, constexprs=tiled | records | {"R": 3}, u_ptr="*fp32")
                yield make(clipped_sum_kernel, constexprs=tiled | {"INFINITE": True})
