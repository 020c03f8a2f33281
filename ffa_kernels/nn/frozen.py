"""Frozen matrices in fewer bytes: bf16, or int8 with a scale for each row.

W never changes, so it needs no master copy. Activations, A and what is trained stay in the dtype
that they had; nothing is packed or kept beside the weights themselves.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError
from ffa_kernels.nn.linear import is_conv1d, more_than_weights, plain_layer
from ffa_kernels.nn.product import Product, is_linear

BASE_DTYPES = ("bf16", "int8")


def check_base_dtype(value: object) -> None:
    """Raises ConfigError unless `value` is None or one of BASE_DTYPES."""
    if value is not None and value not in BASE_DTYPES:
        accepted = ", ".join(map(repr, BASE_DTYPES))
        raise ConfigError(f"base_dtype is {value!r}; accepted: {accepted}, or None to change none")


class _Frozen(nn.Module):
    """A frozen matrix W, in bf16, or in int8 with a scale for each row.

    Attributes:
        stored: bf16 or int8 (rows, columns).
        scale: fp32 (rows, 1) beside int8, so that W = scale * stored; None beside bf16.
    """

    # Empty, of the dtype that W had: what casts a model casts it too.
    like: Tensor

    def __init__(
        self, stored: nn.Parameter, scale: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.stored, self.scale = stored, scale
        self.register_buffer("like", stored.new_empty(0, dtype=dtype), persistent=False)

    def dequantized(self) -> Tensor:
        """W, (rows, columns), in the dtype that it had."""
        wide = self.stored if self.scale is None else self.stored * self.scale
        return wide.to(self.like.dtype)

    @property
    def weight(self) -> Tensor:
        """W made anew, for models that read it instead of calling the layer."""
        return self.dequantized()

    def holds(self, weight: Tensor) -> bool:
        """Whether `weight`, of the form that `self.weight` has, is W but for its rounding here."""
        W = self.dequantized().double()
        step = W.abs() / 256 if self.scale is None else self.scale
        return bool(((weight.to(W) - W).abs() <= step).all())

    def plain(self, weight: nn.Parameter) -> nn.Module:
        """A layer of the class that was there before, with this weight."""
        raise NotImplementedError


class FrozenLinear(_Frozen):
    """y = x W^T + b in x's dtype; a `FrozenBase`, which the adapters take as it is.

    The CPU library serves fp32 rows in what is neither traced nor exported, from W as it is stored.
    With instructions for bf16 it rounds x to that, and an int8 W times its scale; without, nothing.
    Elsewhere a bf16 W is multiplied in bf16, where the device has instructions for it: x, b and y
    are rounded then; and an int8 W in x's dtype, from a W that is kept nowhere.

    Args:
        stored, scale, dtype: W, (d_out, d_in), and the dtype that it had.
        bias: (d_out,) or None.
    """

    def __init__(
        self,
        stored: nn.Parameter,
        scale: nn.Parameter | None,
        dtype: torch.dtype,
        bias: nn.Parameter | None,
    ) -> None:
        super().__init__(stored, scale, dtype)
        self.out_features, self.in_features = stored.shape
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:
        """x (n, ..., d_in) to y (n, ..., d_out)."""
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.is_floating_point():
            input = input.to(torch.get_autocast_dtype(device))
        y: Tensor = Product.apply(  # type: ignore[no-untyped-call]
            input, self.stored, self.scale, self.bias
        )
        return y

    def plain(self, weight: nn.Parameter) -> nn.Module:
        return plain_layer(weight, self.bias, self.training, fan_in_fan_out=False)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, stored={self.stored.dtype}"


class FrozenConv1D(FrozenLinear):
    """A FrozenLinear where Conv1D of transformers was, whose own weight is (d_in, d_out)."""

    @property
    def weight(self) -> Tensor:
        """W^T made anew, as Conv1D has it."""
        return self.dequantized().t().contiguous()

    def holds(self, weight: Tensor) -> bool:
        return super().holds(weight.t())

    def plain(self, weight: nn.Parameter) -> nn.Module:
        return plain_layer(weight, self.bias, self.training, fan_in_fan_out=True)


class FrozenEmbedding(_Frozen):
    """Rows of W, in the dtype that it had.

    Args:
        stored, scale, dtype: W, (num_embeddings, embedding_dim), and the dtype that it had.
        padding_idx: as nn.Embedding has it; of no effect on what is frozen.
    """

    def __init__(
        self,
        stored: nn.Parameter,
        scale: nn.Parameter | None,
        dtype: torch.dtype,
        padding_idx: int | None,
    ) -> None:
        super().__init__(stored, scale, dtype)
        self.num_embeddings, self.embedding_dim = stored.shape
        self.padding_idx = padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Indices (...) to rows (..., embedding_dim)."""
        rows = F.embedding(input, self.stored)
        if self.scale is not None:
            rows = rows * F.embedding(input, self.scale)
        return rows.to(self.like.dtype)

    def plain(self, weight: nn.Parameter) -> nn.Module:
        rows, width = weight.shape
        made = nn.Embedding(rows, width, padding_idx=self.padding_idx, device="meta")
        made.weight = weight
        return made.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, stored={self.stored.dtype}"


def plain_layers(modules: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
    """What takes the place of each frozen layer among `modules`: one of the class that was there,
    with W in its old dtype. Weights that were tied are one again."""
    weights: dict[int, nn.Parameter] = {}
    found: dict[nn.Module, nn.Module] = {}
    for module in modules:
        if isinstance(module, _Frozen):
            key = id(module.stored)
            if key not in weights:
                weights[key] = nn.Parameter(module.weight, requires_grad=False)
            found[module] = module.plain(weights[key])
    return found


def frozen_weights(model: nn.Module) -> dict[str, _Frozen]:
    """Each frozen layer of `model`, by the name that its weight had."""
    return {
        f"{name}.weight".lstrip("."): module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _Frozen)
    }


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` with W made anew, as it was called before, for what is stored of it."""
    state = dict(model.state_dict())
    for name, layer in frozen_weights(model).items():
        state[name] = layer.weight
        for held in ("stored", "scale"):
            state.pop(name.removesuffix("weight") + held, None)
    return state


class _Ties(dict[str, str]):
    """Names of tied weights, and what stood in their place `before`."""

    def __init__(self, names: dict[str, str], before: dict[str, str]) -> None:
        super().__init__(names)
        self.before = before

    def __reduce__(self) -> tuple[Any, ...]:
        return _Ties, (dict(self), self.before)


def rename_ties(model: nn.Module) -> None:
    """Tells transformers, which knows tied weights by name, what their names are now: of frozen
    layers those of what is stored, and without any frozen layer those that there were."""
    for module in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            # Not by getattr: PEFT's wrappers answer with what lies inside them.
            names = inspect.getattr_static(module, attribute, None)
            if isinstance(names, dict):
                before = names.before if isinstance(names, _Ties) else names
                now = _renamed(before, module)
                if now != names:
                    setattr(module, attribute, before if now == before else _Ties(now, before))


def _renamed(ties: dict[str, str], model: nn.Module) -> dict[str, str]:
    """`ties`, as {pattern of names: pattern of names}, with those of frozen layers spelled out."""
    frozen = {n: m for n, m in model.named_modules() if isinstance(m, _Frozen)}

    def found(pattern: str) -> list[str]:
        # An adapter holds its layer inside.
        outer = {name: f"{name.removesuffix('.base_layer')}.weight" for name in frozen}
        return [name for name, weight in outer.items() if re.match(pattern, weight)]

    renamed: dict[str, str] = {}
    for target, source in ties.items():
        both = found(target), found(source)
        # A pattern of whole modules covers any name in them.
        if not target.endswith("weight") or both == ([], []):
            renamed[target] = source
            continue
        for one, other in itertools.product(*both):
            if frozen[one].stored is frozen[other].stored:
                renamed[f"{one}.stored"] = f"{other}.stored"
                if frozen[one].scale is not None:
                    renamed[f"{one}.scale"] = f"{other}.scale"
    return renamed


class Shrinker:
    """Makes the smaller layers. Weights that were tied, or one weight of many layers, stay one."""

    def __init__(self, base_dtype: str) -> None:
        self._int8 = base_dtype == "int8"
        self._made: dict[tuple[int, bool], tuple[nn.Parameter, nn.Parameter | None]] = {}

    def layers(self, modules: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
        """What takes the place of each nn.Linear, Conv1D and nn.Embedding among `modules`.

        Of these classes alone, not of subclasses, whose forward may do otherwise, nor of layers
        that are more than their weights; and only where the weight is an ordinary matrix of more
        bytes, and finite.
        """
        found: dict[nn.Module, nn.Module] = {}
        for module in modules:
            conv1d, embedding = is_conv1d(module), type(module) is nn.Embedding
            layer: Any = module
            if not (is_linear(module) or conv1d or embedding) or not self._takes(layer):
                continue
            weight, made = layer.weight, nn.Module()
            stored, scale = self._smaller(weight, transposed=conv1d)
            if embedding:
                made = FrozenEmbedding(stored, scale, weight.dtype, layer.padding_idx)
            else:
                make = FrozenConv1D if conv1d else FrozenLinear
                made = make(stored, scale, weight.dtype, layer.bias)
            found[module] = made.train(module.training)
        return found

    def _takes(self, layer: Any) -> bool:
        weight = layer.weight
        if (
            more_than_weights(layer) is not None
            or type(weight) is not nn.Parameter
            or type(weight.data) is not Tensor
        ):
            return False
        if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse):
            return False
        # From fp16 to bf16 there is nothing to gain, and fp64 is for tests.
        wanted = weight.is_floating_point() if self._int8 else weight.dtype == torch.float32
        return wanted and bool(weight.isfinite().all())

    def _smaller(
        self, weight: Tensor, transposed: bool = False
    ) -> tuple[nn.Parameter, nn.Parameter | None]:
        key = (id(weight), transposed)
        if key not in self._made:
            rows = weight.detach().t().contiguous() if transposed else weight.detach()
            scale = None
            if self._int8:
                largest = rows.abs().amax(dim=1, keepdim=True).float()
                steps = torch.where(largest > 0, largest / 127.0, torch.ones_like(largest))
                made = (rows.float() / steps).round_().clamp_(-127, 127).to(torch.int8)
                scale = nn.Parameter(steps, requires_grad=False)
            else:
                made = rows.to(torch.bfloat16)
            self._made[key] = (nn.Parameter(made, requires_grad=False), scale)
        return self._made[key]
