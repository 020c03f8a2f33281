"""y = x W^T + b + s h B^T with h = dropout(x) A^T, and dx = g W + s dropout^T(u A).

A rank-r product is traffic, not arithmetic: what is worth saving is a pass over y or x. The ways,
of which `choices` takes one for each card, dtype and class of shapes:

    addmm   cuBLAS, then the rank-r term added to y in place: one more read and write of y
    stacked y and h by one product with [W; A], one read of x, then the term added in place
    split   h by one read of x, then one product whose accumulator also takes the rank-r term
    fused   h inside that product, from the same tiles of x: one launch, more arithmetic

Backward has u in the place of h already, so for it stacked and fused are split. Tiles of ragged
edges wrap around to rows and columns that exist, and are not stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffa_kernels.backends.compose import plain_backward, plain_product, scaled_product
from ffa_kernels.backends.triton import choices
from ffa_kernels.backends.triton.aot import Build, jit
from ffa_kernels.backends.triton.choices import Choice, Config
from ffa_kernels.backends.triton.dot import dot, precision
from ffa_kernels.backends.triton.dropout import dropout_keep
from ffa_kernels.backends.triton.launch import card, launch

MAX_RANK = 256  # of the kernels; a larger one is no longer small beside d_in
DOWN_RANKS = (16, 64, MAX_RANK)
FUSED_RANKS = (16, 64)
TERM_RANKS = (16, 32)
_SMALLEST_SCALING = 2.0**-60
GROUP_M = 8  # rows of tiles that share their columns of W in L2


@jit
def _place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of this program's tile, in groups of GROUP_M rows."""
    tile = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    rows_here = min(tiles_m - group * GROUP_M, GROUP_M)
    inside = tile % (GROUP_M * tiles_n)
    return group * GROUP_M + inside % rows_here, inside // rows_here


@jit
def _rank_tiles(h, b, rows, columns, first, N, r, BACKWARD: tl.constexpr, BLOCK_R: tl.constexpr):
    """h (rows, ranks) and B^T (ranks, columns), or in backward u and A, from rank `first` on."""
    ranks = first + tl.arange(0, BLOCK_R)
    inside = ranks < r
    h_tile = tl.load(h + rows[:, None] * r + ranks[None, :], mask=inside[None, :], other=0.0)
    if BACKWARD:
        places = ranks[:, None].to(tl.int64) * N + columns[None, :]
    else:
        places = ranks[:, None] + columns[None, :] * r
    return h_tile, tl.load(b + places, mask=inside[:, None], other=0.0)


@jit
def _add_ranks(
    acc,
    h_tile,
    b_tile,
    h,
    b,
    rows,
    columns,
    N,
    r,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + h B^T, whose first BLOCK_R ranks are loaded already."""
    acc = dot(h_tile, b_tile, acc, PRECISION)
    for first in tl.range(BLOCK_R, r, BLOCK_R, num_stages=1):
        h_tile, b_tile = _rank_tiles(h, b, rows, columns, first, N, r, BACKWARD, BLOCK_R)
        acc = dot(h_tile, b_tile, acc, PRECISION)
    return acc


@jit
def down_kernel(
    x,
    a,
    h,
    dropout_state,
    M,
    K,
    r,
    stride_x,
    threshold,
    scale,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h = scale mask(x) A^T: each BLOCK_R ranks read x (M, K) once."""
    tile, rank_tiles = tl.program_id(0), tl.cdiv(r, BLOCK_R)
    rows = tile // rank_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tile % rank_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_K)
    x_places = x + (rows % M).to(tl.int64)[:, None] * stride_x + columns[None, :]
    a_places = a + ranks[None, :] * K + columns[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = columns < K - k
        x_tile = tl.load(x_places, mask=inside[None, :], other=0.0)
        a_tile = tl.load(a_places, mask=inside[:, None] & (ranks < r)[None, :], other=0.0)
        if DROPOUT:
            keep = dropout_keep(
                dropout_state, rows, k // 32, tl.cdiv(K, 32), threshold, BLOCK_K // 32
            )
            x_tile = tl.where(keep, x_tile, 0.0)
        acc = dot(x_tile, a_tile, acc, PRECISION)
        x_places += BLOCK_K
        a_places += BLOCK_K
    places = h + rows.to(tl.int64)[:, None] * r + ranks[None, :]
    stored = (rows < M)[:, None] & (ranks < r)[None, :]
    tl.store(places, (acc * scale).to(h.dtype.element_ty), mask=stored)


@jit
def add_kernel(
    h,
    b,
    y,
    dropout_state,
    M,
    N,
    r,
    threshold,
    scale,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y += scale mask(h B^T) for contiguous y (M, N): the rank-r term with dropout, in place."""
    tile_m, tile_n = _place(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows, w_columns = (rows % M).to(tl.int64), (columns % N).to(tl.int64)
    h_tile, b_tile = _rank_tiles(h, b, x_rows, w_columns, 0, N, r, BACKWARD, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _add_ranks(
        acc, h_tile, b_tile, h, b, x_rows, w_columns, N, r, BACKWARD, PRECISION, BLOCK_R
    )
    keep = dropout_keep(
        dropout_state, rows, tile_n * (BLOCK_N // 32), tl.cdiv(N, 32), threshold, BLOCK_N // 32
    )
    places = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    stored = (rows < M)[:, None] & (columns < N)[None, :]
    base = tl.load(places, mask=stored, other=0.0).to(tl.float32)
    total = base + tl.where(keep, acc * scale, 0.0)
    tl.store(places, total.to(y.dtype.element_ty), mask=stored)


@jit
def matmul_kernel(
    x,
    w,
    bias,
    h,
    b,
    y,
    dropout_state,
    M,
    N,
    K,
    r,
    stride_x,
    stride_wn,
    stride_wk,
    threshold,
    scale,
    HAS_BIAS: tl.constexpr,
    BACKWARD: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = x W^T + bias + scale h B^T, each y (M, N) written once.

    BACKWARD: x is g, W^T is W, h is u, B^T is A; with DROPOUT, scale mask(u A).
    """
    tile_m, tile_n = _place(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows, w_columns = (rows % M).to(tl.int64), (columns % N).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    # Before the loop, so that their latency is not waited for after it.
    h_tile, b_tile = _rank_tiles(h, b, x_rows, w_columns, 0, N, r, BACKWARD, BLOCK_R)

    x_places = x + x_rows[:, None] * stride_x + inner[None, :]
    w_places = w + w_columns[None, :] * stride_wn + inner[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = inner < K - k
        x_tile = tl.load(x_places, mask=inside[None, :], other=0.0)
        w_tile = tl.load(w_places, mask=inside[:, None], other=0.0)
        acc = dot(x_tile, w_tile, acc, PRECISION)
        x_places += BLOCK_K
        w_places += BLOCK_K * stride_wk

    if DROPOUT:
        term = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        term = _add_ranks(
            term, h_tile, b_tile, h, b, x_rows, w_columns, N, r, BACKWARD, PRECISION, BLOCK_R
        )
        keep = dropout_keep(
            dropout_state, rows, tile_n * (BLOCK_N // 32), tl.cdiv(N, 32), threshold, BLOCK_N // 32
        )
        acc += tl.where(keep, term * scale, 0.0)
    else:
        # Scaled here in fp32 and there back: h in 16 bits would be rounded again, or overflow.
        acc = scale * _add_ranks(
            acc / scale, h_tile, b_tile, h, b, x_rows, w_columns, N, r, BACKWARD, PRECISION, BLOCK_R
        )
    if HAS_BIAS:
        acc += tl.load(bias + w_columns).to(tl.float32)[None, :]
    places = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    stored = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(places, acc.to(y.dtype.element_ty), mask=stored)


@jit
def stacked_kernel(
    x,
    w,
    bias,
    a,
    y,
    h,
    M,
    N,
    K,
    r,
    stride_x,
    stride_w,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """[y, h] = x [W; A]^T + [bias, 0]: the last columns of tiles are those of h."""
    y_tiles = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = _place(M, (y_tiles + tl.cdiv(r, BLOCK_N)) * BLOCK_N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    if tile_n < y_tiles:
        first, width, stride, matrix = tile_n * BLOCK_N, N, stride_w, w
    else:
        first, width, stride, matrix = (tile_n - y_tiles) * BLOCK_N, r, K, a
    columns = first + tl.arange(0, BLOCK_N)
    x_places = x + (rows % M).to(tl.int64)[:, None] * stride_x + inner[None, :]
    w_places = matrix + (columns % width).to(tl.int64)[None, :] * stride + inner[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = inner < K - k
        x_tile = tl.load(x_places, mask=inside[None, :], other=0.0)
        w_tile = tl.load(w_places, mask=inside[:, None], other=0.0)
        acc = dot(x_tile, w_tile, acc, PRECISION)
        x_places += BLOCK_K
        w_places += BLOCK_K
    if tile_n < y_tiles:
        out = y
        if HAS_BIAS:
            acc += tl.load(bias + columns % N).to(tl.float32)[None, :]
    else:
        out = h
    places = out + rows.to(tl.int64)[:, None] * width + columns[None, :]
    stored = (rows < M)[:, None] & (columns < width)[None, :]
    tl.store(places, acc.to(y.dtype.element_ty), mask=stored)


@jit
def fused_kernel(
    x,
    w,
    bias,
    a,
    b,
    y,
    h,
    M,
    N,
    K,
    r,
    stride_x,
    stride_wn,
    stride_wk,
    scale,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = x W^T + bias + scale h B^T and h = x A^T; BLOCK_R >= r. Every column of tiles makes h,
    the first one writes it."""
    tile_m, tile_n = _place(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows, w_columns = (rows % M).to(tl.int64), (columns % N).to(tl.int64)
    inner, ranks = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    x_places = x + x_rows[:, None] * stride_x + inner[None, :]
    w_places = w + w_columns[None, :] * stride_wn + inner[:, None] * stride_wk
    a_places = a + ranks[None, :] * K + inner[:, None]
    b_tile = tl.load(
        b + w_columns[None, :] * r + ranks[:, None], mask=(ranks < r)[:, None], other=0.0
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    down = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = inner < K - k
        x_tile = tl.load(x_places, mask=inside[None, :], other=0.0)
        w_tile = tl.load(w_places, mask=inside[:, None], other=0.0)
        a_tile = tl.load(a_places, mask=inside[:, None] & (ranks < r)[None, :], other=0.0)
        acc = dot(x_tile, w_tile, acc, PRECISION)
        down = dot(x_tile, a_tile, down, PRECISION)
        x_places += BLOCK_K
        w_places += BLOCK_K * stride_wk
        a_places += BLOCK_K

    h_tile = down.to(h.dtype.element_ty)
    if tile_n == 0:
        h_places = h + rows.to(tl.int64)[:, None] * r + ranks[None, :]
        tl.store(h_places, h_tile, mask=(rows < M)[:, None] & (ranks < r)[None, :])
    acc = scale * dot(h_tile, b_tile, acc / scale, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + w_columns).to(tl.float32)[None, :]
    places = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    stored = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(places, acc.to(y.dtype.element_ty), mask=stored)


# Tiles by family of cards, largest first; chosen by reasoning until bench/tune.py has run on one.
# A tile of 16-bit x and W takes 2 num_stages block_k (block_m + block_n) bytes of shared memory.
_MATMUL = {
    80: (
        Config(128, 256, 32, 8, 4),
        Config(128, 128, 64, 8, 3),
        Config(128, 64, 64, 4, 3),
        Config(64, 64, 64, 4, 4),
    ),
    86: (
        Config(128, 128, 32, 8, 4),
        Config(128, 64, 64, 8, 3),
        Config(64, 64, 64, 4, 3),
    ),
    90: (
        Config(128, 256, 64, 8, 4),
        Config(128, 128, 64, 8, 3),
        Config(128, 64, 64, 4, 4),
        Config(64, 64, 64, 4, 4),
    ),
    100: (
        Config(128, 256, 64, 8, 4),
        Config(128, 128, 64, 8, 3),
        Config(128, 64, 64, 4, 4),
        Config(64, 64, 64, 4, 4),
    ),
}
_FUSED = (Config(64, 64, 64, 4, 3),)
# The mask is made in registers, whole ChaCha20 blocks a thread.
_MATMUL_DROPOUT = (Config(128, 64, 64, 8, 3), Config(64, 64, 64, 4, 3))
_ADD = Config(64, 64, 0, 4, 1)
# fp32 operands, exact or tf32: exact ones are multiplied outside the tensor cores.
_FP32 = (Config(64, 64, 32, 4, 2),)


def _family(cc: int) -> int:
    """The cards with whose tiles compute capability `cc` is served: by shared memory and dot."""
    if 90 <= cc < 120:
        return 90 if cc < 100 else 100
    return 80 if cc in (80, 87) else 86


def _matmul_configs(cc: int, dtype: torch.dtype, dropout: bool) -> tuple[Config, ...]:
    if dtype == torch.float32:
        return _FP32
    return _MATMUL_DROPOUT if dropout else _MATMUL[_family(cc)]


def _fused_configs(dtype: torch.dtype) -> tuple[Config, ...]:
    return _FP32 if dtype == torch.float32 else _FUSED


def _down_config(cc: int, dtype: torch.dtype, m: int, sms: int, block_r: int) -> Config:
    """Tiles for h: what is in flight must cover the memory's latency, on as many SMs as can be."""
    if dtype == torch.float32:
        return Config(16, block_r, 32, 8, 3) if block_r > 64 else Config(64, block_r, 32, 4, 3)
    block_m = 64 if m > 32 * sms else 16
    if block_r > 64:
        return Config(block_m, block_r, 32, 8, 3)
    if _family(cc) == 86:
        return Config(block_m, block_r, 64, 8 if block_m == 64 else 4, 4)
    return Config(block_m, block_r, 64 if block_m < block_r else 128, 4, 4)


def _down_registers(dtype: torch.dtype, block_r: int) -> int | None:
    """`max_registers` of `down_kernel`, whose exact fp32 products are made in registers."""
    return 255 if dtype == torch.float32 and block_r <= 64 else None


def _padded_rank(r: int) -> int:
    """Columns of the accumulator of h: few sizes, so that few kernels are compiled."""
    return next((block for block in DOWN_RANKS if r <= block), DOWN_RANKS[-1])


def _term_ranks(dtype: torch.dtype, config: Config) -> tuple[int, ...]:
    """Ranks that the rank-r term may take at a time: exact fp32, and accumulators of 128 registers
    a thread, leave registers for no more than the first."""
    crowded = config.block_m * config.block_n >= 128 * 32 * config.num_warps
    return TERM_RANKS[:1] if dtype == torch.float32 or crowded else TERM_RANKS


def _block_r(r: int, dtype: torch.dtype, config: Config) -> int:
    blocks = _term_ranks(dtype, config)
    return next((block for block in blocks if r <= block), blocks[-1])


def _fused_ranks(dtype: torch.dtype) -> tuple[int, ...]:
    """Padded ranks of the fused kernel, whose every tile holds one of h."""
    return FUSED_RANKS[:1] if dtype == torch.float32 else FUSED_RANKS


def _first_that_fills(configs: tuple[Config, ...], m: int, n: int, sms: int) -> Config:
    """The largest tiles of which there is one for each SM, else the smallest."""
    for config in configs:
        if triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n) >= sms:
            return config
    return configs[-1]


def _rows(t: Tensor) -> Tensor:
    """(rows, columns) whose columns are contiguous: a view where the strides allow it."""
    rows = t.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _keep_rule(dropout_p: float) -> tuple[int, float]:
    """The mask's threshold and the factor of what is kept."""
    threshold = round(65536 * dropout_p)
    return threshold, 65536 / max(65536 - threshold, 1)


def _down(x: Tensor, lora_A: Tensor, dropout_state: Tensor | None, dropout_p: float) -> Tensor:
    """h (M, r) of x (M, d_in)."""
    (m, k), r = x.shape, lora_A.shape[0]
    h = x.new_empty(m, r)
    threshold, scale = (0, 1.0) if dropout_state is None else _keep_rule(dropout_p)
    block_r = _padded_rank(r)
    cc, sms = card(x.device)
    config = _down_config(cc, x.dtype, m, sms, block_r)
    launch(
        down_kernel,
        triton.cdiv(m, config.block_m) * triton.cdiv(r, block_r),
        (x, lora_A.contiguous(), h, dropout_state),
        (m, k, r, x.stride(0), threshold),
        (scale,),
        (
            *(dropout_state is not None, precision(x.dtype)),
            *(config.block_m, block_r, config.block_k),
        ),
        config.num_warps,
        config.num_stages,
        _down_registers(x.dtype, block_r),
    )
    return h


def _matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    b: Tensor,
    scaling: float,
    config: Config | None,
    *,
    backward: bool,
    dropout_state: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """One product with its rank-r term; weight is (N, K) whatever its strides."""
    (m, k), n, r = x.shape, weight.shape[0], h.shape[1]
    y = x.new_empty(m, n)
    threshold, scale = (0, 1.0) if dropout_state is None else _keep_rule(dropout_p)
    cc, sms = card(x.device)
    if config is None:
        configs = _matmul_configs(cc, x.dtype, dropout_state is not None)
        config = _first_that_fills(configs, m, n, sms)
    launch(
        matmul_kernel,
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        (x, weight, bias, h.contiguous(), b.contiguous(), y, dropout_state),
        (m, n, k, r, x.stride(0), weight.stride(0), weight.stride(1), threshold),
        (scaling * scale,),
        (
            *(bias is not None, backward, dropout_state is not None, precision(x.dtype)),
            *(
                config.block_m,
                config.block_n,
                config.block_k,
                _block_r(r, x.dtype, config),
                GROUP_M,
            ),
        ),
        config.num_warps,
        config.num_stages,
    )
    return y


def _stacked(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, config: Config | None
) -> tuple[Tensor, Tensor]:
    """x W^T + bias and h in one launch."""
    (m, k), n, r = x.shape, weight.shape[0], lora_A.shape[0]
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    y, h = x.new_empty(m, n), x.new_empty(m, r)
    cc, sms = card(x.device)
    config = config or _first_that_fills(_matmul_configs(cc, x.dtype, False), m, n, sms)
    tiles_n = triton.cdiv(n, config.block_n) + triton.cdiv(r, config.block_n)
    launch(
        stacked_kernel,
        triton.cdiv(m, config.block_m) * tiles_n,
        (x, weight, bias, lora_A.contiguous(), y, h),
        (m, n, k, r, x.stride(0), weight.stride(0)),
        (),
        (
            *(bias is not None, precision(x.dtype)),
            *(config.block_m, config.block_n, config.block_k, GROUP_M),
        ),
        config.num_warps,
        config.num_stages,
    )
    return y, h


def _fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    config: Config | None,
) -> tuple[Tensor, Tensor]:
    """y and h in one launch."""
    (m, k), (n, r) = x.shape, lora_B.shape
    y, h = x.new_empty(m, n), x.new_empty(m, r)
    config = config or _fused_configs(x.dtype)[0]
    launch(
        fused_kernel,
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        (x, weight, bias, lora_A.contiguous(), lora_B.contiguous(), y, h),
        (m, n, k, r, x.stride(0), weight.stride(0), weight.stride(1)),
        (scaling,),
        (
            *(bias is not None, precision(x.dtype), config.block_m, config.block_n),
            *(config.block_k, _padded_rank(r), GROUP_M),
        ),
        config.num_warps,
        config.num_stages,
    )
    return y, h


def _add(
    u: Tensor,
    lora_A: Tensor,
    dx: Tensor,
    scaling: float,
    dropout_state: Tensor,
    dropout_p: float,
) -> None:
    """dx += s dropout^T(u A)."""
    (m, n), r = dx.shape, u.shape[1]
    threshold, scale = _keep_rule(dropout_p)
    launch(
        add_kernel,
        triton.cdiv(m, _ADD.block_m) * triton.cdiv(n, _ADD.block_n),
        (u.contiguous(), lora_A.contiguous(), dx, dropout_state),
        (m, n, r, threshold),
        (scaling * scale,),
        (
            *(
                True,
                precision(dx.dtype),
                _ADD.block_m,
                _ADD.block_n,
                _block_r(r, dx.dtype, _ADD),
                GROUP_M,
            ),
        ),
        _ADD.num_warps,
        _ADD.num_stages,
    )


def _choice(
    op: str, x: Tensor, d_in: int, d_out: int, r: int, scaling: float, dropout: bool
) -> Choice:
    """The chosen way if it can serve the call, else the next simpler one that can."""
    m = x.shape[0]
    dtype = str(x.dtype).removeprefix("torch.")
    choice = choices.choose(op, card(x.device)[0], dtype, m, d_in, d_out, r, dropout)
    # The kernels divide by the scaling, in fp32.
    divides = _SMALLEST_SCALING <= abs(scaling) <= 1 / _SMALLEST_SCALING
    if min(m, d_in, d_out, r) == 0 or r > MAX_RANK or not divides:
        return choices.DEFAULT
    too_wide = choice.way == "fused" and r > _fused_ranks(x.dtype)[-1]
    if choice.way in ("stacked", "fused") and (dropout or too_wide or op == "linear_backward"):
        return Choice("split")
    return choice


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    tap: Tensor | None,
    norm_tap: Tensor | None,
    dropout_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scaling: float,
    dropout_p: float,
    mean_loss: bool,
    merge: bool = False,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + b + s h B^T and h = dropout(x) A^T; see `ffa_kernels.ops.linear`."""
    leading, rows = x.shape[:-1], _rows(x)
    d_out, r = lora_B.shape
    dropout = dropout_state is not None
    way, config = choices.DEFAULT
    if weight is not None and weight.dtype == x.dtype:
        way, config = _choice("linear", rows, rows.shape[1], d_out, r, scaling, dropout)
        bias = None if bias is None else bias.contiguous()
    if weight is not None and way == "fused":
        y, h = _fused(rows, weight, bias, lora_A, lora_B, scaling, config)
    elif weight is not None and way == "stacked":
        y, h = _stacked(rows, weight, bias, lora_A, config)
        y.addmm_(h, lora_B.t(), alpha=scaling)
    elif weight is not None and way == "split":
        h = _down(rows, lora_A, dropout_state, dropout_p)
        y = _matmul(rows, weight, bias, h, lora_B, scaling, config, backward=False)
    else:
        masked = dropout and rows.numel() > 0
        h = _down(rows, lora_A, dropout_state, dropout_p) if masked else rows @ lora_A.t()
        if weight is None:
            y = scaled_product(h, lora_B.t(), scaling)
        else:
            y = plain_product(rows, weight, bias, weight_scale)
            y.addmm_(h, lora_B.t(), alpha=scaling)
    return y.view(*leading, d_out), h.view(*leading, r)


def linear_backward(
    g: Tensor,
    u: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_state: Tensor | None,
    scaling: float,
    dropout_p: float,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """dx = g W + s dropout^T(u A); see `ffa_kernels.ops.linear`."""
    rows = _rows(g)
    u_rows = rows @ lora_B if u is None else u.flatten(0, -2)
    d_out, (r, d_in) = g.shape[-1], lora_A.shape
    dropout = dropout_state is not None
    way, config = choices.DEFAULT
    if weight is not None and weight.dtype == g.dtype:
        way, config = _choice("linear_backward", rows, d_in, d_out, r, scaling, dropout)
    if weight is not None and way == "split":
        dx = _matmul(
            *(rows, weight.t(), None, u_rows, lora_A, scaling, config),
            backward=True,
            dropout_state=dropout_state,
            dropout_p=dropout_p,
        )
    else:
        if weight is not None:
            dx = plain_backward(rows, weight, weight_scale)
        else:
            dx = rows.new_zeros(len(rows), d_in) if dropout else rows.new_empty(len(rows), d_in)
        if dropout_state is None:
            # beta 0: what is in a fresh dx, NaN perhaps, does not count.
            dx.addmm_(u_rows, lora_A, alpha=scaling, beta=1 if weight is not None else 0)
        elif dx.numel() > 0 and scaling != 0:
            _add(u_rows, lora_A, dx, scaling, dropout_state, dropout_p)
    return dx.view(*g.shape[:-1], d_in)


def candidates(
    op: str, cc: int, dtype: torch.dtype, m: int, d_in: int, d_out: int, r: int, dropout: bool
) -> list[Choice]:
    """Every way and tile that could serve a call, for a bench to time; arguments as `choose`."""
    if min(m, d_in, d_out, r) == 0 or r > MAX_RANK:
        return [choices.DEFAULT]
    backward = op == "linear_backward"
    found = [choices.DEFAULT]
    masked = backward and dropout
    found += [Choice("split", config) for config in _matmul_configs(cc, dtype, masked)]
    if not backward and not dropout:
        found += [Choice("stacked", config) for config in _matmul_configs(cc, dtype, False)]
        if r <= _fused_ranks(dtype)[-1]:
            found += [Choice("fused", config) for config in _fused_configs(dtype)]
    return found


_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _build(
    kernel: Any,
    dtype: torch.dtype,
    config: Config,
    constexprs: dict[str, Any],
    label: str,
) -> Build:
    """A build whose sizes are multiples of 16; what is constexpr by value is named there."""
    integers = ("M", "N", "K", "r", "stride_x", "stride_w", "stride_wn", "stride_wk")
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name == "dropout_state":
            signature[name] = "*i64"
        elif name in integers or name == "threshold":
            signature[name] = "i32"
        else:
            signature[name] = "fp32" if name == "scale" else f"*{_TYPES[dtype]}"
    aligned = tuple(
        n for n, t in signature.items() if t not in ("fp32", "*i64") and n != "threshold"
    )
    return Build(
        *(kernel, signature, constexprs, config.num_warps, config.num_stages),
        tensor_cores=dtype != torch.float32,
        max_registers=_down_registers(dtype, constexprs["BLOCK_R"])
        if kernel is down_kernel
        else None,
        label=f"{label} {_TYPES[dtype]} {'x'.join(map(str, config[:3]))}/{config[3]}/{config[4]}",
        divisible=aligned,
    )


def builds(cc: int) -> list[Build]:
    """Every kernel and tile of compute capability `cc`, in each dtype and precision.

    fp16 and tf32, whose code is that of bf16 and fp32 but for an operand type, stand at the
    smallest rank alone.
    """
    return [
        *_builds(cc, torch.bfloat16, "ieee", len(DOWN_RANKS)),
        *_builds(cc, torch.float16, "ieee", 1),
        *_builds(cc, torch.float32, "ieee", len(DOWN_RANKS)),
        *_builds(cc, torch.float32, "tf32", 1),
    ]


def _builds(cc: int, dtype: torch.dtype, precision: str, ranks: int) -> list[Build]:
    found = []

    def add(kernel: Any, label: str, config: Config, block_r: int, **constexprs: Any) -> None:
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
            if name in kernel.arg_names:
                constexprs[name] = getattr(config, name.lower())
        if "GROUP_M" in kernel.arg_names:
            constexprs["GROUP_M"] = GROUP_M
        constexprs["PRECISION"] = precision
        if "BLOCK_R" in kernel.arg_names:
            constexprs["BLOCK_R"] = block_r
            label += f" r{block_r}"
        label += f" {precision}" if dtype == torch.float32 else ""
        found.append(_build(kernel, dtype, config, constexprs, label))

    for block_r in DOWN_RANKS[:ranks]:
        tall, short = (_down_config(cc, dtype, m, 1, block_r) for m in (1 << 20, 1))
        for config in dict.fromkeys((tall, short)):
            add(down_kernel, "h", config, block_r, DROPOUT=False, dropout_state=None)
            add(down_kernel, "h dropout", config, block_r, DROPOUT=True)
    forward: dict[str, Any] = {"HAS_BIAS": True, "BACKWARD": False, "stride_wk": 1}
    backward: dict[str, Any] = {"HAS_BIAS": False, "bias": None, "BACKWARD": True, "stride_wn": 1}
    plain: dict[str, Any] = {"DROPOUT": False, "dropout_state": None}
    for block_r in _term_ranks(dtype, _ADD)[:ranks]:
        add(add_kernel, "add dropout", _ADD, block_r, BACKWARD=True)
    for config in _matmul_configs(cc, dtype, False):
        add(stacked_kernel, "stacked", config, 0, HAS_BIAS=True)
        for block_r in _term_ranks(dtype, config)[:ranks]:
            add(matmul_kernel, "split", config, block_r, **plain, **forward)
            add(matmul_kernel, "split backward", config, block_r, **plain, **backward)
    for config in _matmul_configs(cc, dtype, True):
        for block_r in _term_ranks(dtype, config)[:ranks]:
            add(matmul_kernel, "split backward dropout", config, block_r, DROPOUT=True, **backward)
    for block_r in _fused_ranks(dtype)[:ranks]:
        for config in _fused_configs(dtype):
            add(fused_kernel, "fused", config, block_r, HAS_BIAS=True, stride_wk=1)
    return found
