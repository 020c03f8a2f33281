"""The logical step: noise, then the optimizer, a launch for each dtype and alignment of tensors.

    grad  = (sum + round(sigma z / grid)) grid / L
    param = optimizer(param, grad)

`private_step` makes the sum from the records on the way, so that it is never in memory. Step
counters stay on the device: a CUDA graph of this draws fresh noise at each replay.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from ffa_kernels.backends.compose import by_way_of_sums
from ffa_kernels.backends.triton.aot import Build, jit
from ffa_kernels.backends.triton.clip_accumulate import (
    RECORDS,
    bounds_and_grids,
    clip_accumulate,
    clipped_sum,
    write_norms,
)
from ffa_kernels.backends.triton.gaussian import gaussians
from ffa_kernels.backends.triton.launch import launch
from ffa_kernels.backends.triton.tables import (
    BOUND,
    EXP_AVG,
    EXP_AVG_SQ,
    EXPECTED_BATCH_SIZE,
    FIRST_TILE,
    INDEX,
    INVERSE_GRID,
    NOISE,
    PARAM,
    STEP,
    SUM,
    TENSOR_ID,
    TILE,
    TILES_ARRIVED,
    TYPES,
    Content,
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

_WARPS = 4

# Compiled apart, for they touch different memory. The rest of a call is in flags of one argument:
# what it saves in instructions is not worth a build for each.
RULES = ("none", "sgd", "momentum", "adam")
_NOISY, _NESTEROV, _MAXIMIZE, _DECOUPLED = map(tl.constexpr, (1, 2, 4, 8))

# Step counters that the last program raises at a time.
_STEPS = 128


@jit
def round_half_even(v):
    """The nearest integer: adding 2^52 leaves fp64 no fraction, and from there on it has none."""
    size = tl.abs(v)
    rounded = tl.where(
        size < 4503599627370496.0, (size + 4503599627370496.0) - 4503599627370496.0, size
    )
    return tl.where(v < 0.0, -rounded, rounded)


@jit
def power(base, exponent):
    """base^exponent in fp64, for a base of 0 or more and an exponent above 0."""
    positive = tl.where(base > 0.0, base, 1.0)
    return tl.where(base > 0.0, tl.exp(exponent * tl.log(positive)), 0.0)


@jit
def read(places, inside, REAL: tl.constexpr):
    return tl.load(places, mask=inside, other=0.0).to(REAL)


@jit
def write(places, value, inside):
    # bf16 by way of fp32: the interpreter has no other.
    value = value if places.dtype.element_ty == tl.float64 else value.to(tl.float32)
    tl.store(places, value.to(places.dtype.element_ty), mask=inside)


@jit
def optimize(
    table,
    hyper,
    count,
    k,
    grad,
    element,
    inside,
    PARAMETER: tl.constexpr,
    REAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    flags,
    RULE: tl.constexpr,
):
    """torch.optim's SGD, Adam and AdamW as csrc/common/optimizer.h has them: scalars in fp64,
    elements in the parameter's precision."""
    hyper += word(table, count, INDEX, k) * 5
    lr, weight_decay = tl.load(hyper), tl.load(hyper + 1)
    beta1, beta2 = tl.load(hyper + 2), tl.load(hyper + 3)
    step = tl.load(pointer(table, count, STEP, k, tl.float32, False)).to(tl.float64)
    grad = tl.where((flags & _MAXIMIZE) != 0, -grad, grad)
    params = pointer(table, count, PARAM, k, PARAMETER, ALIGNED) + element
    param = read(params, inside, REAL)
    if (flags & _DECOUPLED) != 0:
        param = param * (1.0 - lr * weight_decay).to(REAL)
    else:
        grad = grad + weight_decay.to(REAL) * param
    if RULE != "adam":
        direction = grad
        if RULE == "momentum":
            buffers = pointer(table, count, EXP_AVG, k, PARAMETER, ALIGNED) + element
            buffer = read(buffers, inside, REAL)
            later = beta1.to(REAL) * buffer + (1.0 - beta2).to(REAL) * grad
            # Selected: at the first step the buffer may hold anything.
            buffer = tl.where(step == 0.0, grad, later)
            write(buffers, buffer, inside)
            ahead = grad + beta1.to(REAL) * buffer
            direction = tl.where((flags & _NESTEROV) != 0, ahead, buffer)
        param = param - lr.to(REAL) * direction
    else:
        exp_avgs = pointer(table, count, EXP_AVG, k, PARAMETER, ALIGNED) + element
        exp_avg_sqs = pointer(table, count, EXP_AVG_SQ, k, PARAMETER, ALIGNED) + element
        exp_avg = read(exp_avgs, inside, REAL)
        exp_avg_sq = read(exp_avg_sqs, inside, REAL)
        exp_avg = exp_avg + (1.0 - beta1).to(REAL) * (grad - exp_avg)
        exp_avg_sq = beta2.to(REAL) * exp_avg_sq + (1.0 - beta2).to(REAL) * (grad * grad)
        write(exp_avgs, exp_avg, inside)
        write(exp_avg_sqs, exp_avg_sq, inside)
        step_size = (lr / (1.0 - power(beta1, step + 1.0))).to(REAL)
        root_correction = tl.sqrt(1.0 - power(beta2, step + 1.0)).to(REAL)
        eps = tl.load(hyper + 4).to(REAL)
        root = tl.sqrt(exp_avg_sq) if tl.float64 == REAL else tl.sqrt_rn(exp_avg_sq)
        param = param - step_size * (exp_avg / (root / root_correction + eps))
    write(params, param, inside)


@jit(
    do_not_specialize=[
        *("table", "factors", "rng_state", "hyper"),
        *("count", "n", "flat", "first_tile", "programs", "flags"),
    ]
)
def update_kernel(
    table,
    factors,
    rng_state,
    hyper,
    count,
    n,
    flat,
    first_tile,
    programs,
    flags,
    FROM_RECORDS: tl.constexpr,
    TYPE: tl.constexpr,
    REAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    RULE: tl.constexpr,
    RECORDS: tl.constexpr,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """param = RULE(param, (sum + noise) / L), one tile a program; FROM_RECORDS makes the sum.

    The last of all programs, over all launches, counts the step: by then each has read it.
    """
    tile = first_tile + tl.program_id(0)
    k = owner(table, count, FIRST_TILE, tile)
    tile_of_k = tile - word(table, count, FIRST_TILE, k)
    element = tile_of_k * TILE + tl.arange(0, TILE)
    inside = element < size(table, count, k, ALIGNED)
    if FROM_RECORDS:
        total = clipped_sum(
            table, factors, count, n, flat, k, element, inside, TYPE, ALIGNED, RECORDS
        )
    else:
        sums = pointer(table, count, SUM, k, tl.int64, ALIGNED) + element
        total = tl.load(sums, mask=inside, other=0)
        tl.store(sums, tl.zeros_like(total), mask=inside)
    infinite = real(table, count, BOUND, k) == float("inf")
    grad = tl.where(infinite, total.to(tl.float64, bitcast=True), total.to(tl.float64))
    if (flags & _NOISY) != 0:
        block = tile_of_k * (TILE // 8) + tl.arange(0, TILE // 8)
        z = gaussians(rng_state, word(table, count, TENSOR_ID, k), block)
        grad += round_half_even(tl.reshape(z, [TILE]) * real(table, count, NOISE, k))
    # Powers of two, and 1 for an infinite bound: only the division rounds.
    grad = grad * (1.0 / real(table, count, INVERSE_GRID, k))
    grad = grad / tl.load(table + EXPECTED_BATCH_SIZE).to(tl.float64, bitcast=True)
    if RULE == "none":
        write(pointer(table, count, PARAM, k, TYPE, ALIGNED) + element, grad, inside)
    else:
        optimize(
            *(table, hyper, count, k, grad.to(REAL), element, inside, TYPE, REAL, ALIGNED),
            *(flags, RULE),
        )
    if arrives_last(table + TILES_ARRIVED, programs):
        tl.store(rng_state + 4, tl.load(rng_state + 4) + 1)
        if RULE != "none":
            for first in range(0, count, STEPS):
                j = first + tl.arange(0, STEPS)
                words = tl.load(column(table, count, STEP) + j, mask=j < count, other=0)
                steps = words.to(tl.pointer_type(tl.float32))
                tl.store(steps, tl.load(steps, mask=j < count, other=0.0) + 1.0, mask=j < count)


def _update(
    op: str,
    grads: list[Tensor],
    squares: list[Tensor],
    stats: Tensor | None,
    keep: Tensor | None,
    sums: list[Tensor],
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
    nesterov: bool,
    maximize: bool,
) -> Tensor | None:
    """The step from `sums`, or from `grads` where there are any: then the factors come back."""
    device, count = params[0].device, len(params)
    bounds, inverse_grids = bounds_and_grids(max_grad_norm, count)
    noise_std = noise_multiplier * math.sqrt(sum(c * c for c in max_grad_norm))
    noisy = noise_multiplier > 0
    flags = (
        noisy * _NOISY.value
        | nesterov * _NESTEROV.value
        | maximize * _MAXIMIZE.value
        | (optimizer == "adamw") * _DECOUPLED.value
    )
    content = Content(
        numels=tuple([t.numel() for t in params]),
        dtypes=tuple([t.dtype for t in params]),
        bounds=bounds,
        inverse_grids=inverse_grids,
        grad_samples=addresses(grads),
        squares=addresses(squares),
        sums=addresses(sums),
        params=addresses(params),
        exp_avgs=addresses(exp_avgs),
        exp_avg_sqs=addresses(exp_avg_sqs),
        steps=addresses(steps),
        tensor_ids=tuple(tensor_ids),
        noises=tuple([noise_std * inverse for inverse in inverse_grids]) if noisy else (),
        expected_batch_size=expected_batch_size,
    )
    plan = plan_of(content, device)
    factors, n = None, 0
    if stats is not None:
        n = grads[0].shape[0]
        factors = write_norms(plan, n, stats, keep, len(max_grad_norm))
    state, options = rng_state.contiguous(), hyper.contiguous()
    with whole(plan):
        for part in plan.launches:
            launch(
                update_kernel,
                part.tiles,
                (plan.table, options if factors is None else factors, state, options),
                (count, n, int(len(max_grad_norm) == 1), part.first_tile, plan.tiles, flags),
                (),
                (
                    *(factors is not None, TYPES[part.dtype], _real(part.dtype), part.aligned),
                    *(_rule(optimizer, bool(exp_avgs)),),
                    *(RECORDS[part.dtype.itemsize], TILE, _STEPS),
                ),
                num_warps=_WARPS,
                num_stages=1,
                max_registers=_max_registers(part.dtype, part.aligned),
            )
    if state is not rng_state:
        rng_state.copy_(state)
    return factors


def _rule(optimizer: str, has_moments: bool) -> str:
    """Which of RULES the kernel is compiled for; what else an optimizer asks for are flags."""
    if optimizer == "sgd" and has_moments:
        return "momentum"
    return "adam" if optimizer == "adamw" else optimizer


def _max_registers(dtype: torch.dtype, aligned: bool) -> int:
    """As of `launch`: what spills nothing on any card."""
    return 128 if aligned and dtype != torch.float64 else 255


def _real(dtype: torch.dtype) -> tl.dtype:
    """In what the optimizer of such a parameter computes."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def private_update(
    params: list[Tensor],
    sums: list[Tensor],
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
    nesterov: bool,
    maximize: bool,
) -> None:
    """Noise, then the optimizer's step; see `ffa_kernels.ops.private_update`."""
    _update(
        *("private_update", [], [], None, None, sums, params, exp_avgs, exp_avg_sqs, steps),
        *(rng_state, hyper, tensor_ids, max_grad_norm, noise_multiplier, expected_batch_size),
        *(optimizer, nesterov, maximize),
    )


_with_sums = by_way_of_sums(clip_accumulate, private_update)


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
    noise_multiplier: float,
    expected_batch_size: float,
    optimizer: str,
    nesterov: bool,
    maximize: bool,
) -> Tensor:
    """The factors, then all else in one read of G; see `ffa_kernels.ops.private_step`."""
    update = (exp_avgs, exp_avg_sqs, steps, rng_state, hyper, tensor_ids, max_grad_norm)
    settings = (noise_multiplier, expected_batch_size, optimizer, nesterov, maximize)
    if any(g.dtype != p.dtype for g, p in zip(grad_samples, params, strict=True)):
        # A launch has one type.
        return _with_sums(grad_samples, squares, stats, keep, params, *update, *settings)
    grads, known = [t.contiguous() for t in grad_samples], [t.contiguous() for t in squares]
    found = _update(
        *("private_step", grads, known, stats, keep, [], params),
        *update,
        *settings,
    )
    assert found is not None
    return found


def builds(cc: int) -> list[Build]:
    """The kernel for each type, rule and source of the sum."""
    pointers = {"table": "*i64", "factors": "*fp64", "rng_state": "*i64", "hyper": "*fp64"}
    integers = dict.fromkeys(("count", "n", "flat", "first_tile", "programs", "flags"), "i32")
    return [
        Build(
            update_kernel,
            pointers | integers,
            {
                "FROM_RECORDS": from_records,
                "TYPE": TYPES[dtype],
                "REAL": _real(dtype),
                "ALIGNED": aligned,
                "RULE": rule,
                "RECORDS": RECORDS[dtype.itemsize],
                "TILE": TILE,
                "STEPS": _STEPS,
            },
            num_warps=_WARPS,
            num_stages=1,
            max_registers=_max_registers(dtype, aligned),
            tensor_cores=False,
            label=" ".join(
                [
                    *("private", "step" if from_records else "update", str(TYPES[dtype]), rule),
                    *(() if aligned else ("unaligned",)),
                ]
            ),
        )
        for dtype in TYPES
        for from_records in (False, True)
        for rule in RULES
        for aligned in (True, False)
    ]
