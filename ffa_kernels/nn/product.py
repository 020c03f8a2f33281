"""x W^T with a frozen W, differentiable in x; and nn.Linear by way of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ffa_kernels.backends import compose, cpu
from ffa_kernels.ops.base_product import base_product

# A smaller matrix is multiplied in less time than the way to our product takes.
_LEAST_NUMEL = 1 << 16


def parameter(layer: nn.Module, name: str) -> Any:
    """`layer.<name>`, in a quarter of the time where it is a parameter of the layer's."""
    found = layer._parameters.get(name)
    return getattr(layer, name) if found is None else found


class Product(torch.autograd.Function):
    """x W^T + b, whose backward needs W alone: no x and no W in floats waits for it.

    Takes x (..., d_in), W as it is stored, its scale (d_out, 1) or None, and b (d_out,) or None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor | None, bias: Any) -> Tensor:
        ctx.save_for_backward(stored.t(), None if scale is None else scale.t())
        with _without_casts(x):
            bias = None if bias is None else bias.to(x.dtype)
            y = _product(x, stored, bias, scale)
        if torch.compiler.is_compiling() or not y._is_view():
            return y
        # A view is not changed in place, as an activation may do.
        unviewed: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return unviewed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        transposed, scale = ctx.saved_tensors
        (g,) = grads
        with _without_casts(g):
            dx = _product(g, transposed, None, scale)
        return dx, None, None, None


# What `apply` does for functorch before it calls this takes as long as a small layer's product.
_apply: Any = super(torch.autograd.Function, Product).apply

# What fp32 rows are multiplied with here. Read once: a compiler can not ask the library.
_MULTIPLIED = frozenset(filter(cpu.multiplies, (torch.float32, torch.bfloat16, torch.int8)))


def _is_an_op(x: Tensor, weight: Tensor) -> bool:
    """Whether the graph that is compiled is to have the CPU library's product. One that is exported
    has PyTorch's own operators: it may be run where this library is not."""
    return (
        torch.compiler.is_compiling()
        and not compose.is_exporting()
        and type(x) in cpu.PLAIN
        and type(weight) in cpu.PLAIN
        and x.is_cpu
        and x.dtype == torch.float32
        and weight.dtype in _MULTIPLIED
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and x.shape[-1] == weight.shape[1]
        and (weight.dtype != torch.float32 or _takes_fp32(x, weight))
    )


def _takes_fp32(x: Tensor, weight: Tensor) -> bool:
    # Slow to import, and there where something is compiled.
    from torch.fx.experimental import symbolic_shapes

    # Of a size that depends on values nothing is known while a graph is made. torch 2.6 must know.
    known: Any = getattr(symbolic_shapes, "guard_or_false", bool)
    return bool(known(compose.takes_fp32(x, weight)))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    by = base_product if _is_an_op(x, weight) else compose.base_product
    return by(x, weight, bias, scale)


def _without_casts(x: Tensor) -> AbstractContextManager[object]:
    if torch._C._is_any_autocast_enabled():
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A frozen nn.Linear in a graph that is compiled."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    fits = bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1])
    if trained or not fits or not _is_an_op(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    y: Tensor = Product.apply(x, weight, None, bias)  # type: ignore[no-untyped-call]
    return y


class FrozenFp32Linear(nn.Linear):
    """nn.Linear that is frozen and not adapted, by the CPU library's product in place of PyTorch's.

    A layer gets this class by `multiply_faster` and its own back by `as_before`: the object, its
    parameters and their names stay. Where anything but values and an input gradient is asked for,
    or the layer is trained after all, it computes as nn.Linear does.
    """

    # As nn.Linear names it.
    def forward(self, input: Tensor) -> Tensor:
        """x (..., d_in) to y (..., d_out)."""
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        records = torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            return _compiled(input, weight, bias)
        if (
            not cpu.has_product(input, weight, bias)
            or weight.dtype != input.dtype
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or not (self.training or records or math.prod(input.shape[:-1]) >= cpu.LEAST_ROWS)
        ):
            return F.linear(input, weight, bias)
        if records and input.requires_grad:
            y: Tensor = _apply(input, weight, None, bias)
            return y
        return cpu.product(input, weight, bias)


def is_linear(layer: nn.Module) -> bool:
    """Whether `layer` is nn.Linear itself, made faster or not; not so a subclass of others."""
    return type(layer) in (nn.Linear, FrozenFp32Linear)


def multiply_faster(modules: Iterable[nn.Module]) -> None:
    """Makes each frozen nn.Linear of fp32 among `modules` a `FrozenFp32Linear`, where the CPU
    library's product is the faster one."""
    for module in modules:
        weight = module._parameters.get("weight")
        if (
            compose.FUSES_FP32
            and type(module) is nn.Linear
            and type(weight) is nn.Parameter
            and type(weight.data) is Tensor
            and weight.dtype == torch.float32
            and weight.is_cpu
            and weight.numel() >= _LEAST_NUMEL
            and not any(p.requires_grad for p in module.parameters())
        ):
            module.__class__ = FrozenFp32Linear


def as_before(module: nn.Module) -> None:
    """Undoes `multiply_faster`; any other module is left as it is."""
    if type(module) is FrozenFp32Linear:
        plain: Any = nn.Linear
        module.__class__ = plain
