"""The logical step: noise on the clipped sums, then the optimizer, for all trained tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ffa_kernels.ops._library import (
    call_in_place,
    check_devices,
    check_rng_state,
    define,
    require,
    require_each,
    require_same,
)
from ffa_kernels.ops.clip_accumulate import bounds_of, check_sums

OPTIMIZERS = ("none", "sgd", "adam", "adamw")


def check_update(
    op: str,
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rng_state: Tensor,
    hyper: Tensor,
    tensor_ids: list[int],
    max_grad_norm: list[float],
    noise_multiplier: float,
    expected_batch_size: float,
    optimizer: str,
    *_: object,
) -> None:
    """What is updated, how, and with which noise."""
    count = len(params)
    check_rng_state(op, "rng_state", rng_state)
    require(
        optimizer in OPTIMIZERS,
        lambda: f"{op}: optimizer is {optimizer!r}; accepted: {', '.join(OPTIMIZERS)}",
    )
    adaptive = optimizer in ("adam", "adamw")
    for name, buffers, sizes in (
        ("exp_avgs", exp_avgs, (count,) if adaptive else (0, count)),
        ("exp_avg_sqs", exp_avg_sqs, (count,) if adaptive else (0,)),
        ("steps", steps, (0,) if optimizer == "none" else (count,)),
    ):
        require(
            len(buffers) in sizes,
            lambda name=name, buffers=buffers, sizes=sizes: (  # type: ignore[misc]
                f"{op}: {len(buffers)} {name} for {optimizer}; accepted: "
                f"{' or '.join(map(str, sizes))}"
            ),
        )
    lists = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    check_devices(op, params[0], {**lists, "rng_state": rng_state, "hyper": hyper})
    layouts = [(p.shape, p.dtype, p.is_contiguous()) for p in params]
    require_each(
        [contiguous and dtype.is_floating_point for _, dtype, contiguous in layouts],
        lambda k: (
            f"{op}: params[{k}] is {params[k].dtype} with strides {params[k].stride()}; accepted: "
            "a contiguous float tensor"
        ),
    )
    for name, buffers in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        require_same(
            [(b.shape, b.dtype, b.is_contiguous()) for b in buffers],
            layouts if buffers else [],
            lambda k, name=name, buffers=buffers: (  # type: ignore[misc]
                f"{op}: {name}[{k}] is {buffers[k].dtype} {tuple(buffers[k].shape)}; accepted: "
                f"contiguous {layouts[k][1]} {tuple(layouts[k][0])}, as its parameter"
            ),
        )
    require_each(
        [step.dtype == torch.float32 and step.numel() == 1 for step in steps],
        lambda k: (
            f"{op}: steps[{k}] is {steps[k].dtype} {tuple(steps[k].shape)}; accepted: a float32 "
            "scalar"
        ),
    )
    require(
        len(tensor_ids) == len(set(tensor_ids)) == count
        and all([0 <= i < 1 << 32 for i in tensor_ids]),
        lambda: (
            f"{op}: tensor_ids are {tensor_ids}; accepted: {count} different ones from "
            "0 to 2^32 - 1"
        ),
    )
    require(
        hyper.dtype == torch.float64 and tuple(hyper.shape) == (count, 5),
        lambda: f"{op}: hyper is {hyper.dtype} {tuple(hyper.shape)}; accepted: fp64 ({count}, 5)",
    )
    require(
        math.isfinite(noise_multiplier) and noise_multiplier >= 0,
        lambda: f"{op}: noise_multiplier is {noise_multiplier}; accepted: 0 or more",
    )
    require(
        noise_multiplier == 0 or all(map(math.isfinite, max_grad_norm)),
        lambda: f"{op}: noise needs a finite max_grad_norm, given infinity",
    )
    require(
        math.isfinite(expected_batch_size) and expected_batch_size > 0,
        lambda: f"{op}: expected_batch_size is {expected_batch_size}; accepted: above 0",
    )


def _check(params: list[Tensor], sums: list[Tensor], *update: Any) -> None:
    max_grad_norm = update[6]
    check_sums("private_update", sums, max_grad_norm, len(params))
    check_devices("private_update", params[0], {"sums": sums})
    require_same(
        [p.shape for p in params],
        [total.shape for total in sums],
        lambda k: (
            f"private_update: params[{k}] is {params[k].dtype} {tuple(params[k].shape)}; accepted: "
            f"{tuple(sums[k].shape)}, as its sum"
        ),
    )
    check_update("private_update", params, *update)


def _fake(*arguments: object) -> None:
    return None


_op = define(
    "private_update(Tensor(a!)[] params, Tensor(b!)[] sums, Tensor(c!)[] exp_avgs,"
    " Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor(f!) rng_state, Tensor hyper,"
    " int[] tensor_ids, float[] max_grad_norm, float noise_multiplier, float expected_batch_size,"
    " str optimizer, bool nesterov, bool maximize) -> ()",
    _check,
    lambda params, *_: params,
    _fake,
)


def private_update(
    params: Sequence[Tensor],
    sums: Sequence[Tensor],
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
) -> None:
    """param <- optimizer(param, (sum + sigma C z) / L), in place, then sum <- 0, step + 1.

    z is drawn by `gaussian` under (rng_state, tensor_ids[k]) and sigma C z rounded to the sum's
    grid, so that what is released lies on it. With one bound a tensor, C is sqrt(sum C_k^2).
    The optimizers are PyTorch's, formula for formula.

    Args:
        params: K contiguous tensors; with optimizer "none" they receive the noised gradient.
        sums: as `clip_accumulate` left them; zeroed.
        exp_avgs: first moments, or SGD's momentum buffers; empty where there are none.
        exp_avg_sqs: second moments of Adam and AdamW; empty otherwise.
        steps: fp32 scalars, steps taken so far, incremented; empty for "none".
        rng_state: int64 (5,); its step is incremented, so no noise is drawn twice. On a GPU it,
            `steps` and `hyper` lie on the device: nothing here waits for it.
        hyper: fp64 (K, 5): lr, weight decay, beta1 or momentum, beta2 or dampening, eps.
        tensor_ids: K different ids in [0, 2^32).
        max_grad_norm: as given to `clip_accumulate`.
        noise_multiplier: sigma, the noise's standard deviation in units of C.
        expected_batch_size: L, the divisor.
        optimizer: "none", "sgd", "adam" or "adamw".
        nesterov: SGD's Nesterov momentum.
        maximize: ascend.

    Raises:
        ConfigError: shapes, dtypes or values that do not fit together.
    """
    updated = [list(t) for t in (params, sums, exp_avgs, exp_avg_sqs, steps)]
    call_in_place(
        _op,
        (
            *(*updated, rng_state, hyper, list(tensor_ids), bounds_of(max_grad_norm)),
            *(noise_multiplier, expected_batch_size, optimizer, nesterov, maximize),
        ),
        [*chain(*updated), rng_state],
    )
