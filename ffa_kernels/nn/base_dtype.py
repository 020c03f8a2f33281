"""The frozen base in fewer bytes: its weights in bf16, or its matrices in int8.

W never changes, so it needs no master copy. What is trained, and A, stay as they are; nothing is
packed or kept beside the weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.nn.linear import is_conv1d

BASE_DTYPES = ("bf16", "int8")


def check_base_dtype(value: object) -> None:
    """Raises ConfigError unless `value` is None or one of BASE_DTYPES."""
    if value is not None and value not in BASE_DTYPES:
        accepted = ", ".join(map(repr, BASE_DTYPES))
        raise ConfigError(f"base_dtype is {value!r}; accepted: {accepted}, or None to change none")


def to_bf16(model: nn.Module) -> None:
    """Casts every frozen parameter of a converted model in place, but for the adapters' A.

    Every module that holds parameters itself then takes its inputs in their dtype, whatever dtype
    the module before it works in.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Adapter)]
    kept = {id(layer.frozen_A()) for layer in layers}
    for parameter in model.parameters():
        ordinary = type(parameter.data) is Tensor and type(parameter) is nn.Parameter
        frozen = not parameter.requires_grad and id(parameter) not in kept
        if ordinary and frozen and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    inner = {id(module) for layer in layers for module in layer.inner_modules()}
    for module in model.modules():
        if id(module) not in inner and any(True for _ in module.parameters(recurse=False)):
            take_own_dtype(module)


def take_own_dtype(module: nn.Module) -> None:
    """Makes `module` cast what it is given to the dtype of its own weight, from now on."""
    if _cast_inputs not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_cast_inputs)


def takes_own_dtype(module: nn.Module) -> bool:
    """Whether `take_own_dtype` was called on `module`."""
    return _cast_inputs in module._forward_pre_hooks.values()


def _cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        weight = next(p for p in module._parameters.values() if p is not None)
    if not weight.is_floating_point():
        return None
    dtype = weight.dtype
    if all(type(x) is not Tensor or x.dtype == dtype for x in inputs):
        return None
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )


class _Quantised:
    """Int8 matrices by the weight that they were made of, so that tied ones stay one."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, bool], tuple[nn.Parameter, nn.Parameter]] = {}

    def of(self, weight: Tensor, transposed: bool = False) -> tuple[nn.Parameter, nn.Parameter]:
        """(int8 (rows, columns), scale (rows, 1) of the weight's dtype)."""
        key = (id(weight), transposed)
        if key not in self.made:
            rows = (weight.t() if transposed else weight).detach()
            largest = rows.abs().amax(dim=1, keepdim=True).float()
            scale = torch.where(largest > 0, largest / 127.0, torch.ones_like(largest))
            q = (rows.float() / scale).round_().clamp_(-127, 127).to(torch.int8)
            frozen = (nn.Parameter(t, requires_grad=False) for t in (q, scale.to(weight.dtype)))
            self.made[key] = (next(frozen), next(frozen))
        return self.made[key]


def quantised(modules: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
    """What takes the place of each frozen nn.Linear, Conv1D and nn.Embedding among `modules`.

    Of these classes alone, not of subclasses, whose forward may do otherwise, and only where the
    weight is an ordinary matrix of finite floats.
    """
    quantiser = _Quantised()
    found: dict[nn.Module, nn.Module] = {}
    for module in modules:
        weight: Any = getattr(module, "weight", None)
        linear = type(module) is nn.Linear
        if not (linear or is_conv1d(module) or type(module) is nn.Embedding):
            continue
        if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            continue
        if not weight.is_floating_point() or not bool(weight.isfinite().all()):
            continue
        layer: Any = module
        if type(module) is nn.Embedding:
            if layer.max_norm is None and not layer.sparse:
                found[module] = Int8Embedding(*quantiser.of(weight), layer.padding_idx)
        else:
            made = Int8Linear(*quantiser.of(weight, transposed=not linear), layer.bias)
            found[module] = made.train(module.training)
    return found


class Int8Linear(nn.Module):
    """y = x W^T + b, W = scale * weight, made in x's dtype for each product and kept nowhere.

    A `FrozenBase`: the adapters take it as it is.

    Args:
        weight: int8 (d_out, d_in), frozen.
        scale: (d_out, 1), frozen, of a float type.
        bias: (d_out,) or None.
    """

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter, bias: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.scale, self.bias = weight, scale, bias

    def forward(self, x: Tensor) -> Tensor:
        """x (n, ..., d_in) to y (n, ..., d_out)."""
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _Product.apply(x, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantized(self) -> Tensor:
        """W, (d_out, d_in), of the scale's dtype."""
        return self.weight * self.scale

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Product(torch.autograd.Function):
    """x W^T, whose backward makes W again: neither x nor a W in floats waits for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight * scale.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        (g,) = grads
        with torch.autocast(g.device.type, enabled=False):
            return g @ (weight * scale.to(g.dtype)), None, None


class Int8Embedding(nn.Module):
    """Rows of scale * weight.

    Args:
        weight: int8 (num_embeddings, embedding_dim), frozen.
        scale: (num_embeddings, 1), frozen, of a float type.
        padding_idx: as nn.Embedding has it; of no effect on what is frozen.
    """

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter, padding_idx: int | None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight, self.scale, self.padding_idx = weight, scale, padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Indices (...) to rows (..., embedding_dim), of the scale's dtype."""
        return self.weight[input] * self.scale[input]

    def dequantized(self) -> Tensor:
        """The whole matrix, of the scale's dtype."""
        return self.weight * self.scale

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
