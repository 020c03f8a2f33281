"""The adapted linear layer and its backward; the one op that has autograd.

Formulas in FFA-LoRA, arXiv 2403.12313: W and A frozen, B trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ffa_kernels.backends.compose import merging_pays
from ffa_kernels.errors import ConfigError, UnsupportedError
from ffa_kernels.ops._library import (
    LIBRARY,
    check_offsets,
    check_rng_state,
    define,
    values_alone,
)
from ffa_kernels.ops.per_sample_backward import per_sample_backward_op
from ffa_kernels.ops.per_sample_grad import per_sample_grad, per_sample_grad_op


def _shape(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else tuple(t.shape)


def _fits(weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a base of this type goes with activations of `dtype`."""
    if weight_scale is not None:
        return weight.dtype == torch.int8
    return weight.dtype == dtype or (weight.dtype == torch.bfloat16 and dtype == torch.float32)


def _scales(weight_scale: Tensor, weight: Tensor | None) -> bool:
    """Whether it is what an int8 weight is multiplied with."""
    return (
        weight is not None
        and weight.dtype == torch.int8
        and weight_scale.dtype.is_floating_point
        and weight_scale.shape == (weight.shape[0], 1)
    )


def _check(
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
) -> None:
    # Plain ifs on what was read once: this runs before each small product.
    dtype, shape, shape_A, shape_B = x.dtype, x.shape, lora_A.shape, lora_B.shape
    if weight is None:
        if len(shape_A) != 2 or len(shape_B) != 2 or bias is not None:
            raise ConfigError(
                f"linear: without a weight, lora_A is {tuple(shape_A)}, lora_B {tuple(shape_B)} "
                f"and bias {_shape(bias)}; accepted: (r, d_in), (d_out, r), None"
            )
        d_out, d_in = shape_B[0], shape_A[1]
    else:
        if weight.dim() != 2 or not (weight.is_floating_point() or weight_scale is not None):
            raise ConfigError(
                f"linear: weight is {weight.dtype} {tuple(weight.shape)}; accepted: a float type, "
                "or int8 beside a weight_scale, (d_out, d_in)"
            )
        d_out, d_in = weight.shape
    if len(shape) < 2 or shape[-1] != d_in or not dtype.is_floating_point:
        raise ConfigError(
            f"linear: x is {dtype} {tuple(shape)}; accepted: a float type, (n, ..., {d_in}), "
            f"the d_in of {'lora_A' if weight is None else 'weight'}"
        )
    if weight_scale is not None and not _scales(weight_scale, weight):
        raise ConfigError(
            f"linear: weight_scale is {weight_scale.dtype} {tuple(weight_scale.shape)}; accepted: "
            f"None, or a float type ({d_out}, 1) beside an int8 weight"
        )
    if weight is not None and weight.dtype != dtype and not _fits(weight, weight_scale, dtype):
        base = (dtype, torch.bfloat16) if dtype == torch.float32 else (dtype,)
        raise ConfigError(
            f"linear: weight is {weight.dtype}; accepted: {' or '.join(map(str, base))}, for "
            f"x is {dtype}"
        )
    if bias is not None and bias.shape != (d_out,):
        raise ConfigError(
            f"linear: bias is {_shape(bias)}; accepted: None or ({d_out},), the weight's d_out"
        )
    if len(shape_A) != 2 or shape_A[1] != d_in or shape_B != (d_out, shape_A[0]):
        raise ConfigError(
            f"linear: lora_A is {tuple(shape_A)} and lora_B {tuple(shape_B)}; accepted: "
            f"(r, {d_in}) and ({d_out}, r)"
        )
    if lora_A.dtype != dtype or lora_B.dtype != dtype or (bias is not None and bias.dtype != dtype):
        for name, t in (("bias", bias), ("lora_A", lora_A), ("lora_B", lora_B)):
            if t is not None and t.dtype != dtype:
                raise ConfigError(f"linear: {name} is {t.dtype}; accepted: {dtype}, the dtype of x")
    device = x.device
    for t in (weight, weight_scale, bias, lora_A, lora_B, dropout_state):
        if t is not None and t.device != device:
            # A kernel is given addresses, and none says where it leads.
            named = {"weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B}
            named["weight_scale"] = weight_scale
            name = next((name for name, other in named.items() if other is t), "dropout_state")
            raise ConfigError(f"linear: {name} is on {t.device}; accepted: {device}, as x")
    if cu_seqlens is None:
        n = shape[0]
    else:
        check_offsets("linear", cu_seqlens, math.prod(shape[:-1]), device)
        n = cu_seqlens.shape[0] - 1
    if tap is not None and (tap.shape != (n, d_out, shape_A[0]) or not tap.dtype.is_floating_point):
        raise ConfigError(
            f"linear: tap is {tap.dtype} {tuple(tap.shape)}; accepted: a float type, "
            f"{(n, d_out, shape_A[0])}, which is (n, d_out, r) with n the first size of x, or "
            "of cu_seqlens less 1"
        )
    if norm_tap is not None and (
        tap is None or norm_tap.dtype != torch.float64 or norm_tap.shape != (2, n)
    ):
        raise ConfigError(
            f"linear: norm_tap is {norm_tap.dtype} {tuple(norm_tap.shape)}; accepted: fp64 "
            f"{(2, n)}, beside a tap"
        )
    if dropout_state is not None:
        check_rng_state("linear", "dropout_state", dropout_state)
        if not 0.0 <= dropout_p < 1.0:
            raise ConfigError(f"linear: dropout_p is {dropout_p}; accepted: 0 <= p < 1")


def _fake(
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
    _check(
        *(x, weight, bias, lora_A, lora_B, tap, norm_tap, dropout_state, cu_seqlens),
        *(scaling, dropout_p, mean_loss, merge, weight_scale),
    )
    leading = x.shape[:-1]
    return x.new_empty(*leading, lora_B.shape[0]), x.new_empty(*leading, lora_A.shape[0])


def _by_base(x: Tensor, weight: Tensor | None, *_: object) -> tuple[Tensor, ...]:
    """x, and W where it is of another type."""
    return (x,) if weight is None or weight.dtype == x.dtype else (x, weight)


_op = define(
    "linear(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? tap,"
    " Tensor? norm_tap, Tensor? dropout_state, Tensor? cu_seqlens, float scaling,"
    " float dropout_p, bool mean_loss, bool merge=False, Tensor? weight_scale=None)"
    " -> (Tensor, Tensor)",
    _check,
    _by_base,
    _fake,
)


def _backward_check(
    g: Tensor,
    u: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_state: Tensor | None,
    scaling: float,
    dropout_p: float,
    weight_scale: Tensor | None = None,
) -> None:
    # Dtypes and devices too: what autograd keeps may come back as something else, by way of hooks.
    shape, dtype, device, (r, d_in) = g.shape, g.dtype, g.device, lora_A.shape
    d_out = shape[-1]
    if (
        (u is not None and (u.shape != (*shape[:-1], r) or u.dtype != dtype))
        or (weight is not None and weight.shape != (d_out, d_in))
        or (weight is not None and not _fits(weight, weight_scale, dtype))
        or (weight_scale is not None and not _scales(weight_scale, weight))
        or lora_B.shape != (d_out, r)
        or lora_A.dtype != dtype
        or lora_B.dtype != dtype
        or any(
            t is not None and t.device != device
            for t in (u, weight, lora_A, lora_B, dropout_state, weight_scale)
        )
    ):
        given = (g, u, weight, lora_A, lora_B, dropout_state, weight_scale)
        told = ["None" if t is None else f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in given]
        raise ConfigError(
            "linear_backward: g, u, weight, lora_A, lora_B, dropout_state and weight_scale are "
            f"{', '.join(told)}; accepted: (n, ..., d_out), (n, ..., r) or None, (d_out, d_in) or "
            "None, (r, d_in), (d_out, r), all of one dtype but a bf16 weight beside fp32 and an "
            "int8 one beside a weight_scale, int64 (5,) or None, and (d_out, 1) or None, on one "
            "device"
        )
    if dropout_state is not None:
        check_rng_state("linear_backward", "dropout_state", dropout_state)


def _backward_fake(
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
    return g.new_empty(*g.shape[:-1], lora_A.shape[1])


# u is g B. Without it a backend may multiply by W + s B A, where `can_merge`, as in a forward with
# `merge`; else it makes u.
_backward_op = define(
    "linear_backward(Tensor g, Tensor? u, Tensor? weight, Tensor lora_A, Tensor lora_B,"
    " Tensor? dropout_state, float scaling, float dropout_p, Tensor? weight_scale=None) -> Tensor",
    _backward_check,
    lambda g, u, weight, *_: _by_base(g, weight),
    _backward_fake,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Any],
        x: Tensor,
        trained_B: Tensor | None,
        tap: Tensor | None,
        norm_tap: Tensor | None,
        frozen: tuple[Any, ...],
    ) -> Tensor:
        # What is in a tuple autograd does not look at: beside a tap, that includes B.
        weight, bias, lora_A, lora_B, dropout_state, cu_seqlens, *settings = frozen
        *known, weight_scale = settings
        y: Tensor
        y, h = run(
            *(x, weight, bias, lora_A, lora_B, tap, norm_tap, dropout_state, cu_seqlens, *settings)
        )
        ctx.set_materialize_grads(False)
        # Not x: backward needs it for nothing, and it is d_in / r times the size of h.
        kept = (h, weight, lora_A, lora_B, dropout_state, cu_seqlens)
        ctx.save_for_backward(*kept, weight_scale)
        ctx.settings = (tap is not None, *known)
        # A view is not changed in place, as an activation may do.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g,) = grads
        if g is None:
            return (None,) * 6
        if not torch.is_grad_enabled():
            return _gradients(ctx, g)
        _, wants_x, wants_B, _, _, _ = ctx.needs_input_grad
        # dx is made of B, and B's gradient of x, also where g depends on neither.
        if g.requires_grad or (wants_x and (wants_B or ctx.settings[0])):
            raise UnsupportedError(
                "linear: its gradient has no gradient (create_graph=True); accepted: a first "
                "backward"
            )
        with torch.no_grad():
            return _gradients(ctx, g)


def _plain(weight: Tensor | None, g: Tensor, dropout_state: Tensor | None) -> bool:
    """Whether nothing but products in one dtype make dx."""
    return dropout_state is None and weight is not None and weight.dtype == g.dtype


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    # Read once: a checkpoint's tensors are gone then.
    saved = ctx.saved_tensors
    h, weight, lora_A, lora_B, dropout_state, cu_seqlens, weight_scale = saved
    _, wants_x, wants_B, _, wants_norm, _ = ctx.needs_input_grad
    grad_x = u = tap_grad = norm_tap_grad = grad_B = None
    tapped, scaling, dropout_p, mean_loss, merge = ctx.settings
    makes_u = wants_x and not merge
    direct = values_alone((g, *saved))
    if makes_u and tapped and _plain(weight, g, dropout_state):
        op = per_sample_backward_op
        grad_x, tap_grad, norm_tap_grad = (op.implementation if direct else op)(
            g, h, weight, lora_A, lora_B, cu_seqlens, scaling, mean_loss
        )
    else:
        fixed = (weight, lora_A, lora_B, dropout_state, scaling, dropout_p, weight_scale)
        ops: tuple[Any, ...] = (_backward_op, per_sample_grad_op)
        input_gradient, per_record = (op.implementation for op in ops) if direct else ops
        # First, where it can be: this large product hides the time in which g comes into the cache.
        if wants_x and not makes_u:
            grad_x = input_gradient(g, None, *fixed)
        if tapped:
            u, tap_grad, norm_tap_grad = per_record(
                g, h, lora_B if makes_u else None, cu_seqlens, scaling, mean_loss
            )
        elif wants_B:
            # The whole batch as one record gives the ordinary gradient.
            flat_g, flat_h = g.flatten(0, -2), h.flatten(0, -2)
            u, summed, _ = per_sample_grad(
                *(flat_g.unsqueeze(0), flat_h.unsqueeze(0), lora_B if makes_u else None),
                scaling=scaling,
            )
            grad_B = summed[0]
            u = u.view(h.shape) if makes_u else None
        if makes_u:
            grad_x = input_gradient(g, u, *fixed)
    # Autograd adds up a layer's calls: the second row of norm_tap's gradient then counts them.
    if not wants_norm:
        norm_tap_grad = None
    return None, grad_x, grad_B, tap_grad, norm_tap_grad, None


# What `apply` does for functorch before it calls this takes as long as the layer's smaller product.
_apply: Any = super(torch.autograd.Function, _Linear).apply


def _differentiated(x: Tensor, lora_B: Tensor, tap: Tensor | None, norm_tap: Tensor | None) -> bool:
    """Whether a gradient is asked for, of those that there are."""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or (lora_B if tap is None else tap).requires_grad
        or (norm_tap is not None and norm_tap.requires_grad)
    )


def _differentiable(*inputs: Any) -> Any:
    # The dispatcher leaves out last arguments that are their defaults.
    inputs = (*inputs, *(False, None)[len(inputs) - 12 :])
    x, weight, bias, lora_A, lora_B, tap, norm_tap, *settings = inputs
    if _differentiated(x, lora_B, tap, norm_tap):
        trained_B = lora_B if tap is None else None
        frozen = (weight, bias, lora_A, lora_B, *settings)
        made: list[Tensor] = []

        def run(*inputs: Any) -> tuple[Tensor, Tensor]:
            y, h = _op(*inputs)
            made.append(h)
            return y, h

        y = _Linear.apply(run, x, trained_B, tap, norm_tap, frozen)  # type: ignore[no-untyped-call]
        return y, made[0]
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, weight, bias, lora_A, lora_B, tap, norm_tap, *settings)


# Not `register_autograd`: what it puts around each call takes longer than a small layer.
LIBRARY.impl("linear", _differentiable, "Autograd")


def _has_tangent(t: Tensor | None) -> bool:
    if t is None:
        return False
    tangent: Tensor | None = forward_ad.unpack_dual(t).tangent  # type: ignore[no-untyped-call]
    return tangent is not None


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    tap: Tensor | None = None,
    norm_tap: Tensor | None = None,
    dropout_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    mean_loss: bool = False,
    records: int = 0,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b + s h B^T with h = dropout(x) A^T; saves h alone for backward.

    Gradients: dx = g W + s dropout^T(u A) with u = g B; dB = s g^T h. W, b and A are frozen and
    get none. With `tap`, B gets none either: the tap receives G_i = s g_i^T h_i.

    Args:
        x: (n, ..., d_in); the first dimension is the record when `tap` is given.
        weight: (d_out, d_in), frozen, of x's dtype, or bf16 beside an fp32 x, or int8 beside a
            `weight_scale`; None where another module makes the base product (a quantised layer,
            say): y is then s h B^T and dx is s dropout^T(u A).
        bias: (d_out,), frozen, or None.
        lora_A: (r, d_in), frozen.
        lora_B: (d_out, r), trained.
        tap: zeros (n, d_out, r) of any float type, a leaf expanded from one element: its gradient
            is G, made in x's dtype.
        norm_tap: fp64 (2, n), a leaf beside the tap: its gradient is |G_i|^2, and 1 for each
            call, which `clip_accumulate` takes as its `squares`.
        dropout_state: int64 (5,), key and counter of the LoRA dropout mask, laid out as in
            `chacha20`; None for no dropout. Element k of row m of x is kept when 16-bit half-word
            k % 32 of block m ceil(d_in / 32) + k // 32 is at least round(65536 p). The mask
            is made again in backward.
        cu_seqlens: int32 (n + 1,), where x packs n records of many lengths into its rows: see
            `per_sample_grad`. None: the first dimension of x is the record.
        scaling: s = alpha / r.
        dropout_p: p, honoured to 1 / 65536; of no effect without a `dropout_state`.
        mean_loss: the loss is a mean over records: G is multiplied by n.
        records: how many a batch is expected to have. A backend that has two ways to round chooses
            by that and not by x's size, so that no record's gradient depends on how many others
            there are. 0: nobody minds.
        weight_scale: (d_out, 1) of any float type, frozen: W is that times an int8 `weight`.

    Returns:
        y: (n, ..., d_out) of x's dtype.

    Raises:
        ConfigError: shapes, dtypes or devices that do not fit together.
        UnsupportedError: a tensor with a tangent (forward mode); in backward, a gradient of the
            gradient.
    """
    tensors = (
        *(x, weight, bias, lora_A, lora_B, tap, norm_tap, dropout_state, cu_seqlens),
        weight_scale,
    )
    if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise UnsupportedError(
            "linear: no derivative in forward mode (dual numbers); accepted: backward()"
        )
    merge = merging_pays(x, weight, dropout_state is not None, records)
    settings = (dropout_state, cu_seqlens, scaling, dropout_p, mean_loss, merge, weight_scale)
    y: Tensor
    if not values_alone(tensors):
        # Beside a tap out of the graph: a hook on B has no summed gradient to see.
        lora_B = lora_B if tap is None else lora_B.detach()
        inputs = (x, weight, bias, lora_A, lora_B, tap, norm_tap, *settings)
        y = torch.ops.ffa.linear.default(*inputs)[0]
    elif _differentiated(x, lora_B, tap, norm_tap):
        trained_B = lora_B if tap is None else None
        frozen = (weight, bias, lora_A, lora_B, *settings)
        y = _apply(_op.implementation, x, trained_B, tap, norm_tap, frozen)
    else:
        inputs = (x, weight, bias, lora_A, lora_B, tap, norm_tap, *settings)
        # W, b and A may ask for a gradient, and get none.
        with torch.no_grad():
            y = _op.implementation(*inputs)[0]
    return y
