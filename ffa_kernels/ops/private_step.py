"""The whole private step of a logical batch that came in one piece: clip, sum, noise, update."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ffa_kernels.ops._library import call_in_place, define
from ffa_kernels.ops.clip_accumulate import bounds_of, check_bounds, check_records
from ffa_kernels.ops.private_update import check_update


def _check(
    grad_samples: list[Tensor],
    squares: list[Tensor],
    stats: Tensor,
    keep: Tensor | None,
    params: list[Tensor],
    *update: Any,
) -> None:
    max_grad_norm = update[6]
    check_bounds("private_step", max_grad_norm, len(params))
    check_update("private_step", params, *update)
    check_records("private_step", grad_samples, squares, params, stats, keep)


def _fake(
    grad_samples: list[Tensor],
    squares: list[Tensor],
    stats: Tensor,
    keep: Tensor | None,
    params: list[Tensor],
    *update: Any,
) -> Tensor:
    max_grad_norm = update[6]
    first = grad_samples[0]
    return first.new_empty(len(max_grad_norm), first.shape[0], dtype=torch.float64)


_op = define(
    "private_step(Tensor[] grad_samples, Tensor[] squares, Tensor(a!) stats, Tensor? keep,"
    " Tensor(b!)[] params, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps,"
    " Tensor(f!) rng_state, Tensor hyper, int[] tensor_ids, float[] max_grad_norm,"
    " float noise_multiplier, float expected_batch_size, str optimizer, bool nesterov,"
    " bool maximize) -> Tensor",
    _check,
    lambda grad_samples, squares, stats, keep, params, *_: [*grad_samples, *params],
    _fake,
)


def private_step(
    grad_samples: Sequence[Tensor],
    stats: Tensor,
    keep: Tensor | None,
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    rng_state: Tensor,
    hyper: Tensor,
    *,
    tensor_ids: Sequence[int],
    max_grad_norm: float | Sequence[float],
    noise_multiplier: float,
    expected_batch_size: float,
    optimizer: str = "sgd",
    nesterov: bool = False,
    maximize: bool = False,
    squares: Sequence[Tensor] = (),
) -> Tensor:
    """`clip_accumulate` into fresh sums, then `private_update`, the same bits in one op.

    Where a logical batch has one physical batch, its sums need not be in memory.

    Args:
        grad_samples: K tensors (n, *shape_k); `stats`, `keep`, `squares`: as `clip_accumulate`
            has them.
        params: K contiguous tensors shape_k; all else as `private_update` has it.

    Returns:
        The clipping factors, fp64 (groups, n).

    Raises:
        ConfigError: shapes, dtypes or values that do not fit together.
    """
    updated = [list(t) for t in (params, exp_avgs, exp_avg_sqs, steps)]
    factors: Tensor = call_in_place(
        _op,
        (
            *(list(grad_samples), list(squares), stats, keep, *updated, rng_state, hyper),
            *(list(tensor_ids), bounds_of(max_grad_norm), noise_multiplier, expected_batch_size),
            *(optimizer, nesterov, maximize),
        ),
        [*chain(*updated), stats, rng_state],
    )
    return factors
