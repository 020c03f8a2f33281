"""The dropout mask as tiles, from its counter (see csrc/common/dropout.h).

Element k of row m is kept iff half-word k % 32 of ChaCha20 block m ceil(K / 32) + k // 32, of the
stream with tensor_id 0, is >= threshold = round(65536 p).
"""

from __future__ import annotations

import triton.language as tl

from ffa_kernels.backends.triton.aot import jit
from ffa_kernels.backends.triton.chacha20 import chacha20_words


@jit
def dropout_keep(state_ptr, row, first_block, blocks_per_row, threshold, BLOCKS: tl.constexpr):
    """Which elements of a tile are kept.

    state_ptr: *i64 dropout_state[5]; row: integers (R,), the tile's rows of the (M, K) matrix;
    first_block: the tile's first column over 32; blocks_per_row: ceil(K / 32); threshold: integer
    in [0, 65536]; BLOCKS: columns of the tile over 32, a power of two. Rows and columns beyond the
    matrix are allowed; what is returned for them means nothing.

    Returns int1 (R, 32 BLOCKS). Kept values are yet to be scaled by 65536 / (65536 - threshold).
    """
    first = row.to(tl.int64) * blocks_per_row + first_block
    counter = first[:, None] + tl.arange(0, BLOCKS)[None, :]
    words = chacha20_words(state_ptr, 0, counter)
    # A block's 32 answers stay one word until the tile's own layout takes them apart: a tile of
    # half-words would hold 16 times the registers and cross shared memory at that size.
    kept = words[0] & 0
    for j in tl.static_range(16):
        low, high = words[j] & 0xFFFF, words[j] >> 16
        kept |= (low >= threshold).to(tl.uint32) << (2 * j)
        kept |= (high >= threshold).to(tl.uint32) << (2 * j + 1)
    bit = tl.arange(0, 32).to(tl.uint32)
    keep = ((kept[:, :, None] >> bit[None, None, :]) & 1) != 0
    return tl.reshape(keep, [row.shape[0], 32 * BLOCKS])
