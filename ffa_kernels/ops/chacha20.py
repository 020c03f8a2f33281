"""ChaCha20 keystream words, from which all noise, masks and samples are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from ffa_kernels.ops._library import by_first, check_rng_state, define, require


def _check(rng_state: Tensor, tensor_id: int, first_block: int, n_blocks: int) -> None:
    check_rng_state("chacha20", "rng_state", rng_state)
    require(
        0 <= tensor_id < 1 << 32,
        lambda: f"chacha20: tensor_id is {tensor_id}; accepted: 0 to 2^32 - 1",
    )
    require(
        first_block >= 0 and n_blocks >= 0 and first_block + n_blocks <= 1 << 32,
        lambda: (
            f"chacha20: blocks {first_block} to {first_block + n_blocks}; accepted: 0 to 2^32, "
            "which is where the counter would repeat"
        ),
    )


def _fake(rng_state: Tensor, tensor_id: int, first_block: int, n_blocks: int) -> Tensor:
    return rng_state.new_empty(n_blocks, 16, dtype=torch.int32)


_op = define(
    "chacha20(Tensor rng_state, int tensor_id, int first_block, SymInt n_blocks) -> Tensor",
    _check,
    by_first,
    _fake,
)


def chacha20(rng_state: Tensor, tensor_id: int, first_block: int, n_blocks: int) -> Tensor:
    """The ChaCha20 block function (RFC 8439, section 2.3) over consecutive blocks.

    Args:
        rng_state: int64 (5,): the 256-bit key as four little-endian 64-bit words, then the step.
        tensor_id: the last nonce word, in [0, 2^32); the first two are the step.
        first_block: the block counter of the first block.
        n_blocks: how many blocks; the counter never passes 2^32.

    Returns:
        int32 (n_blocks, 16): the bit patterns of the uint32 words.

    Raises:
        ConfigError: an argument outside the stated range.
    """
    result: Tensor = _op(rng_state, tensor_id, first_block, n_blocks)
    return result
