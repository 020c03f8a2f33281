"""Standard Gaussians from ChaCha20: the noise of the private step."""

from __future__ import annotations

import torch
from torch import Tensor

from ffa_kernels.ops._library import check_rng_state, define, require


def _check(rng_state: Tensor, tensor_id: int, numel: int, dtype: torch.dtype) -> None:
    check_rng_state("gaussian", "rng_state", rng_state)
    require(
        0 <= tensor_id < 1 << 32,
        lambda: f"gaussian: tensor_id is {tensor_id}; accepted: 0 to 2^32 - 1",
    )
    require(
        0 <= numel <= 1 << 35,
        lambda: f"gaussian: numel is {numel}; accepted: 0 to 2^35, one block counter's reach",
    )
    require(dtype.is_floating_point, lambda: f"gaussian: dtype is {dtype}; accepted: a float type")


def _chosen_by(rng_state: Tensor, tensor_id: int, numel: int, dtype: torch.dtype) -> list[Tensor]:
    # The state's dtype says nothing of the values drawn: theirs decides.
    return [torch.empty(0, dtype=dtype, device=rng_state.device)]


def _fake(rng_state: Tensor, tensor_id: int, numel: int, dtype: torch.dtype) -> Tensor:
    return rng_state.new_empty(numel, dtype=dtype)


_op = define(
    "gaussian(Tensor rng_state, int tensor_id, SymInt numel, ScalarType dtype) -> Tensor",
    _check,
    _chosen_by,
    _fake,
)


def gaussian(
    rng_state: Tensor, tensor_id: int, numel: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Independent N(0, 1) draws by Box-Muller from 64-bit uniforms (tail beyond 8.5 sigma).

    Element e comes from block e // 8 of the keystream (see `chacha20`); a block's eight 64-bit
    words make four pairs of uniforms u1 in (0, 1], u2 in [0, 1) of 53 bits each, and each pair
    the two values sqrt(-2 ln u1) (cos, sin)(2 pi u2). The same state gives the same values on
    every backend, within 2e-6.

    Args:
        rng_state: int64 (5,), key and step as in `chacha20`.
        tensor_id: which tensor of the step the noise is for, in [0, 2^32).
        numel: how many values, at most 2^35.
        dtype: a floating-point type; mathematics in fp64, then rounded.

    Returns:
        (numel,) of `dtype`.

    Raises:
        ConfigError: an argument outside the stated range.
    """
    result: Tensor = _op(rng_state, tensor_id, numel, dtype)
    return result
