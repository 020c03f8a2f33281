"""FFAWrapped: an adapter around a layer that keeps its weight in a form of its own.

The layer's own forward makes the base product, and autograd its input gradient; the op adds
s dropout(x) A^T B^T. What such a layer must have is the protocol `FrozenBase`; bitsandbytes'
Linear4bit and Linear8bitLt and torchao's weight-only tensors are known here and need not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.nn.linear import check_adapter, make_A, scaling_of

# After torch.nn.Linear, in what an error accepts.
WRAPPED = (
    "Linear4bit or Linear8bitLt of bitsandbytes, weight-only layers of torchao, "
    "or a FrozenBase: forward(x) and dequantized(), in_features and out_features"
)


@runtime_checkable
class FrozenBase(Protocol):
    """A linear layer y = x W^T + b of any make, to be adapted with its weight left as it is.

    Beside the two methods it has `in_features` and `out_features`, as nn.Linear has.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (n, ..., d_in) to y (n, ..., d_out), differentiable in x."""
        ...

    def dequantized(self) -> Tensor:
        """W, (d_out, d_in), in a float type: for merging, and for the init "pissa"."""
        ...


def _quantised_weight(layer: nn.Module) -> Any:
    """A weight that is a tensor of a type of its own, as torchao's and bitsandbytes' are."""
    weight: Any = getattr(layer, "weight", None)
    plain = weight is None or (type(weight.data) is Tensor and weight.is_floating_point())
    # bitsandbytes packs into uint8 parameters of its own types.
    return None if plain and type(weight) in (nn.Parameter, Tensor) else weight


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether `layer` is nn.Linear itself with a weight that is an ordinary matrix."""
    return type(layer) is nn.Linear and _quantised_weight(layer) is None


def can_wrap(layer: nn.Module) -> bool:
    """Whether `FFAWrapped` takes `layer`. Not a subclass of nn.Linear with an ordinary weight: it
    may be one whose weight is used without its forward, as nn.MultiheadAttention's out_proj."""
    if isinstance(layer, FrozenBase):
        return hasattr(layer, "in_features") and hasattr(layer, "out_features")
    weight = _quantised_weight(layer)
    return isinstance(layer, nn.Linear) and (
        type(layer) is nn.Linear if weight is None else _is_known(weight)
    )


def _is_known(weight: Any) -> bool:
    return type(weight).__name__ in ("Params4bit", "Int8Params") or callable(
        getattr(weight, "dequantize", None)
    )


def dequantized(layer: Any) -> Tensor:
    """W, (d_out, d_in), in a float type, of a layer that can be wrapped."""
    made: Tensor
    if isinstance(layer, FrozenBase):
        made = layer.dequantized()
        return made
    weight = _quantised_weight(layer)
    if weight is None:
        made = layer.weight
        return made
    kind = type(weight).__name__
    if kind == "Params4bit":
        import bitsandbytes.functional

        made = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        return made.view(layer.out_features, layer.in_features)
    if kind == "Int8Params":
        return _dequantized_int8(layer, weight)
    made = weight.dequantize()
    return made


def _dequantized_int8(layer: Any, weight: Any) -> Tensor:
    """bitsandbytes' int8: rows scaled by their largest value, which is 127. A weight that was
    never on a device that quantises is still a float."""
    packed = weight.data if layer.state.CB is None else layer.state.CB
    scale = weight.SCB if weight.SCB is not None else layer.state.SCB
    made: Tensor = packed.float()
    return made if scale is None else made * (scale.view(-1, 1) / 127.0)


class FFAWrapped(Adapter):
    """y = base_layer(x) + s dropout(x) A^T B^T, of which only B is trained.

    Parameters: those of `base_layer`, frozen; `lora_A` (r, d_in), frozen; `lora_B` (d_out, r),
    zero at the start. A and B are fp32, or of the layer's own type where its weight is a float.

    Args:
        base_layer: a layer that `dequantized` knows, or a `FrozenBase`.
        r, alpha, init, seed, layer, dropout, rslora: as `FFALinear` has them.

    Raises:
        ConfigError: `base_layer` is none of these, or an argument is not accepted.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        alpha: float = 16.0,
        *,
        init: str = "orthogonal",
        seed: int = 0,
        layer: str = "",
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        check_adapter(r, alpha, dropout, init)
        base: Any = base_layer
        if not can_wrap(base_layer):
            raise ConfigError(
                f"base_layer is {type(base_layer).__name__}; accepted: torch.nn.Linear, {WRAPPED}"
            )
        weight = dequantized(base_layer)
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.alpha, self.rslora = r, float(alpha), rslora
        self.scaling = scaling_of(r, alpha, rslora)
        self.init, self.dropout = init, float(dropout)
        base_layer.requires_grad_(False)
        A = make_A(init, seed, layer, r, weight)
        like: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(A.to(**like), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **like))
        self.train(base_layer.training)

    def frozen_A(self) -> Tensor:
        return self.lora_A

    def trained_B(self) -> nn.Parameter:
        return self.lora_B

    def frozen_weight(self) -> None:
        return None

    def frozen_bias(self) -> None:
        return None

    def base_forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y

    def base_weight(self) -> Tensor:
        return dequantized(self.base_layer)

    def adapter_settings(self) -> tuple[int, float, bool]:
        return self.r, self.alpha, self.rslora

    def adapter_scaling(self) -> float:
        return self.scaling

    def adapter_dropout(self) -> float:
        return self.dropout

    def inner_modules(self) -> Iterator[nn.Module]:
        return iter(())

    def forward(self, x: Tensor) -> Tensor:
        """x (n, ..., d_in) to y (n, ..., d_out)."""
        return self.adapted_forward(x)

    def merged_layer(self) -> nn.Linear:
        """A plain nn.Linear, no longer quantised, with weight W + s B A and the layer's bias."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        bias: Any = getattr(self.base_layer, "bias", None)
        plain.bias = bias
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"r={self.r}, alpha={self.alpha:g}, scaling={self.scaling:g}, init={self.init}, "
            f"dropout={self.dropout:g}"
        )
