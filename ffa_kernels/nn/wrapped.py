"""FFAWrapped: an adapter around a layer that keeps its weight in a form of its own.

The layer's own forward makes the base product, and autograd its input gradient; the op adds
s dropout(x) A^T B^T. Where the layer is a `FrozenLinear` the op makes all of it, from what is
stored there, and that layer's forward and hooks are not called. What such a layer must have is the
protocol `FrozenBase`; bitsandbytes' Linear4bit and Linear8bitLt and torchao's weight-only tensors
are known here and need not.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError
from ffa_kernels.nn.frozen import FrozenConv1D, FrozenLinear
from ffa_kernels.nn.linear import OwnAdapter, check_adapter, owns_weight, plain_layer
from ffa_kernels.nn.product import is_linear

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
    # A container of modules may have one of that name.
    if not isinstance(weight, Tensor):
        return None
    plain = type(weight.data) is Tensor and weight.is_floating_point()
    # bitsandbytes packs into parameters of its own types.
    return None if plain and type(weight) in (nn.Parameter, Tensor) else weight


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether `layer` is nn.Linear itself with a weight that is an ordinary matrix."""
    return is_linear(layer) and owns_weight(layer) and _quantised_weight(layer) is None


def can_wrap(layer: nn.Module) -> bool:
    """Whether `FFAWrapped` takes `layer`. Not a subclass of nn.Linear with an ordinary weight: it
    may be one whose weight is used without its forward, as nn.MultiheadAttention's out_proj."""
    if isinstance(layer, FrozenBase):
        return hasattr(layer, "in_features") and hasattr(layer, "out_features")
    weight = _quantised_weight(layer)
    return isinstance(layer, nn.Linear) and (
        is_linear(layer) and owns_weight(layer) if weight is None else _is_known(weight)
    )


def _is_known(weight: Any) -> bool:
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        return True
    # torchao's; with activations quantised as well, its product has no gradient to speak of.
    return callable(getattr(weight, "dequantize", None)) and _activations(weight) is None


def _activations(weight: Any) -> Any:
    """How torchao quantises the input as well, if it does."""
    for name in ("act_quant_kwargs", "activation_quantization"):
        how = getattr(weight, name, None)
        if how is not None:
            return how
    return None


def mixes_records(layer: nn.Module) -> str | None:
    """Why the forward of a quantised layer, frozen or not, makes one record depend on others.

    No record's gradient is then its own, and clipping bounds nothing.
    """
    weight = _quantised_weight(layer)
    kind = type(weight).__name__
    threshold = getattr(getattr(layer, "state", None), "threshold", 0.0)
    if kind == "Int8Params" and threshold > 0:
        return (
            f"has llm_int8_threshold {threshold:g}: a column that is an outlier in one record is "
            "computed in another precision for all; accepted: llm_int8_threshold=0.0"
        )
    granularity = type(getattr(_activations(weight), "granularity", None)).__name__
    if granularity == "PerTensor":
        return (
            "quantises its input by one scale for the whole batch; accepted: weight-only "
            "quantisation, or a scale for each row"
        )
    return None


def prepare(layer: Any) -> None:
    """Keeps a layer differentiable: on some CPUs bitsandbytes repacks a 4-bit weight at the first
    forward without gradients, for a product that has none from then on."""
    if type(_quantised_weight(layer)).__name__ != "Params4bit":
        return
    layer.support_avx512bf16_for_cpu = False
    weight = layer.weight
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        weight.data, weight.quant_state = _unpacked(weight.data, weight.quant_state)


def _unpacked(data: Tensor, quant_state: Any) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    unpacked: tuple[Tensor, Any] = _convert_weight_packed_for_cpu_inverse(data, quant_state)
    return unpacked


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
        return _dequantized_4bit(weight)
    if kind == "Int8Params":
        return _dequantized_int8(layer, weight)
    made = weight.dequantize()
    return made


def _dequantized_4bit(weight: Any) -> Tensor:
    made: Tensor
    if weight.quant_state is None:
        # Quantised only when moved to a device.
        made = weight.data
        return made
    from bitsandbytes.functional import dequantize_4bit

    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        data, state = _unpacked(data, copy.deepcopy(state))
    made = dequantize_4bit(data.reshape(-1, 1), state)
    return made


def _dequantized_int8(layer: Any, weight: Any) -> Tensor:
    """bitsandbytes' int8: rows scaled by their largest value, which is 127. The first forward
    moves the scales from the weight to the layer's state."""
    made: Tensor = weight.data.float()
    scales: Tensor
    if weight.data.dtype != torch.int8:
        return made
    scales = weight.SCB if weight.SCB is not None else layer.state.SCB
    return made * (scales.view(-1, 1) / 127.0)


def multiplied(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """The weight (d_out, d_in) that the op takes as it is stored, and its scale (d_out, 1) if it
    has one; twice None for a layer that makes its product itself."""
    return (layer.stored, layer.scale) if isinstance(layer, FrozenLinear) else (None, None)


def unwrapped(weight: Tensor, base_layer: Any, training: bool) -> nn.Module:
    """The plain layer of W, (d_out, d_in), and `base_layer`'s bias, frozen: nn.Linear, or Conv1D
    where there was one."""
    conv1d = isinstance(base_layer, FrozenConv1D)
    if conv1d:
        weight = weight.t().contiguous()
    bias = getattr(base_layer, "bias", None)
    return plain_layer(nn.Parameter(weight, requires_grad=False), bias, training, conv1d)


class FFAWrapped(OwnAdapter):
    """y = base_layer(x) + s dropout(x) A^T B^T, of which only B is trained.

    Parameters: those of `base_layer`, frozen; `lora_A` (r, d_in), frozen; `lora_B` (d_out, r),
    zero at the start. A and B are fp32, whatever the layer's own type.

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
        prepare(base)
        weight = dequantized(base_layer)
        super().__init__()
        self.base_layer = base
        self._make(weight, torch.float32, r, alpha, init, seed, layer, dropout, rslora)
        # Last: what was refused is left as it was.
        base_layer.requires_grad_(False)
        self.train(base_layer.training)

    @property
    def weight(self) -> Any:
        """The base layer's, in whatever form: models look at its type and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's."""
        return self.base_layer.bias

    def frozen_weight(self) -> Tensor | None:
        return multiplied(self.base_layer)[0]

    def frozen_scale(self) -> Tensor | None:
        return multiplied(self.base_layer)[1]

    def frozen_bias(self) -> Tensor | None:
        bias: Tensor | None = None if self.frozen_weight() is None else self.bias
        return bias

    def base_forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y

    def base_weight(self) -> Tensor:
        return dequantized(self.base_layer)

    def merged_layer(self) -> nn.Module:
        """A plain layer, no longer quantised, with weight W + s B A and the layer's bias."""
        return unwrapped(self.merged_weight(), self.base_layer, self.training)
