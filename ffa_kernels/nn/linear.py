"""FFALinear: a linear layer with a frozen weight, a frozen A and a trained B."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError, shown
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.nn.init import INITS, frozen_A, pissa_A
from ffa_kernels.nn.product import is_linear, parameter
from ffa_kernels.nn.record_taps import tapping


def check_adapter(r: object, alpha: object, dropout: object, init: object) -> None:
    """Raises ConfigError unless these are an adapter's possible settings."""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ConfigError(f"r is {shown(r)}; accepted: an integer of 1 or more, the rank")
    # Not infinity: an integer below it may be too large for a float.
    if not isinstance(alpha, (int, float)) or not 0 < alpha <= sys.float_info.max:
        raise ConfigError(f"alpha is {shown(alpha)}; accepted: a positive number")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ConfigError(f"dropout is {shown(dropout)}; accepted: 0 <= dropout < 1")
    if init not in INITS:
        raise ConfigError(f"init is {init!r}; accepted: {', '.join(INITS)}")


def scaling_of(r: int, alpha: float, rslora: bool) -> float:
    """s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    return alpha / math.sqrt(r) if rslora else alpha / r


# What an error accepts of a layer that has none.
OWN_WEIGHT = ", and with a weight of its own: pruning or a normalisation made permanent first"


def is_conv1d(layer: nn.Module) -> bool:
    """Whether `layer` is transformers' Conv1D (GPT-2): a linear layer with weight (d_in, d_out)."""
    # By name: a model that has one has imported it, and nobody else needs transformers.
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(layer).__mro__
    )


def owns_weight(layer: nn.Module) -> bool:
    """Not so where pruning or a normalisation makes the weight anew from another parameter."""
    return layer._parameters.get("weight") is not None


def plain_layer(
    weight: nn.Parameter, bias: nn.Parameter | None, training: bool, fan_in_fan_out: bool
) -> nn.Module:
    """nn.Linear of this weight (d_out, d_in), or a Conv1D of transformers of (d_in, d_out)."""
    plain: Any
    if fan_in_fan_out:
        from transformers.pytorch_utils import Conv1D

        make: Any = Conv1D
        plain = make(0, 0)
        plain.nx, plain.nf = weight.shape
    else:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight, plain.bias = weight, bias
    result: nn.Module = plain.train(training)
    return result


def more_than_weights(layer: nn.Module) -> str | None:
    """What a layer is beside its weight, its bias and its class' forward, if anything: what
    computes in its place would leave it out."""
    if "forward" in vars(layer):
        return (
            "has a forward of its own, set on the instance; accepted: a layer with its class' "
            "forward (accelerate.hooks.remove_hook_from_module takes accelerate's off)"
        )
    parameters = [name for name in layer._parameters if name not in ("weight", "bias")]
    # A bias that is pruned is made anew from another parameter.
    made = [name for name in ("bias",) if name in vars(layer)]
    more = [*parameters, *made, *layer._buffers, *layer._modules]
    if more:
        return (
            f"has {', '.join(more)} beside a weight and a bias of its own; accepted: a layer with "
            "these alone (pruning made permanent first)"
        )
    return None


class OwnAdapter(Adapter):
    """An adapter that holds `lora_A` and `lora_B` itself; another base's, PEFT's lie elsewhere."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def _make(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        r: int,
        alpha: float,
        init: str,
        seed: int,
        layer: str,
        dropout: float,
        rslora: bool,
    ) -> None:
        """A from its recipe and B of zeros, for a layer of weight (d_out, d_in)."""
        self.out_features, self.in_features = weight.shape
        self.r, self.alpha, self.rslora = r, float(alpha), rslora
        self.scaling = scaling_of(r, alpha, rslora)
        self.init, self.dropout = init, float(dropout)
        if init == "pissa":
            A = pissa_A(weight, r)
        else:
            A = frozen_A(init, seed, layer, r, self.in_features)
        like: dict[str, Any] = {"device": weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(A.to(**like), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **like))

    def frozen_A(self) -> Tensor:
        found: Tensor = parameter(self, "lora_A")
        return found

    def trained_B(self) -> nn.Parameter:
        found: nn.Parameter = parameter(self, "lora_B")
        return found

    def adapter_settings(self) -> tuple[int, float, bool]:
        return self.r, self.alpha, self.rslora

    def adapter_scaling(self) -> float:
        return self.scaling

    def adapter_dropout(self) -> float:
        return self.dropout

    # As nn.Linear names it.
    def forward(self, input: Tensor) -> Tensor:
        """x (n, ..., d_in) to y (n, ..., d_out); or (d_in,) to (d_out,), which is no batch to train
        privately on."""
        if input.dim() == 1 and not tapping(self, self.record_taps):
            return self.adapted_forward(input.unsqueeze(0)).squeeze(0)
        return self.adapted_forward(input)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"alpha={self.alpha:g}, scaling={self.scaling:g}, init={self.init}, "
            f"dropout={self.dropout:g}"
        )


class FFALinear(OwnAdapter):
    """y = x W^T + b + s dropout(x) A^T B^T, of which only B is trained.

    Parameters: `weight` (d_out, d_in), or (d_in, d_out) where a Conv1D was adapted, `bias`
    (d_out,) or None and `lora_A` (r, d_in), frozen; `lora_B` (d_out, r), zero at the start.
    FFA-LoRA, arXiv 2403.12313.

    Args:
        in_features: d_in; `out_features`: d_out.
        r: rank.
        alpha: the adapter is scaled by s = alpha / r.
        bias: whether there is a (frozen) bias.
        init: how A is made: "orthogonal", "kaiming", "gaussian", or "pissa" (from W's SVD).
        seed: A's public seed.
        layer: the name that, with the seed, decides A.
        dropout: LoRA dropout probability, on the adapter's input in training.
        rslora: s = alpha / sqrt(r) (rank-stabilised LoRA, arXiv 2312.03732).
        device, dtype: of the parameters.

    Raises:
        ConfigError: an argument that is not accepted.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 16.0,
        *,
        bias: bool = True,
        init: str = "orthogonal",
        seed: int = 0,
        layer: str = "",
        dropout: float = 0.0,
        rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_adapter(r, alpha, dropout, init)
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        super().__init__()
        self._adopt(linear, r, alpha, init, seed, layer, dropout, rslora)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        alpha: float = 16.0,
        *,
        init: str = "orthogonal",
        seed: int = 0,
        layer: str = "",
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> FFALinear:
        """Adapts `linear`: its weight and bias are taken over, not copied, and frozen.

        Raises:
            ConfigError: `linear` is neither nn.Linear nor transformers' Conv1D, or more than that,
                or an argument is not accepted.
        """
        check_adapter(r, alpha, dropout, init)
        plain = type(linear).forward is nn.Linear.forward or is_linear(linear) or is_conv1d(linear)
        if not plain or not owns_weight(linear):
            raise ConfigError(
                f"linear is {type(linear).__name__}; accepted: torch.nn.Linear, or Conv1D of "
                f"transformers, with no other forward{OWN_WEIGHT}"
            )
        more = more_than_weights(linear)
        if more is not None:
            raise ConfigError(f"linear {more}")
        adapted = cls.__new__(cls)
        nn.Module.__init__(adapted)
        adapted._adopt(linear, r, alpha, init, seed, layer, dropout, rslora)
        adapted.train(linear.training)
        return adapted

    def _adopt(
        self,
        linear: Any,
        r: int,
        alpha: float,
        init: str,
        seed: int,
        layer: str,
        dropout: float,
        rslora: bool,
    ) -> None:
        self.fan_in_fan_out = is_conv1d(linear)
        weight = linear.weight.t() if self.fan_in_fan_out else linear.weight
        self.weight = linear.weight
        self.bias = linear.bias
        self._make(weight, weight.dtype, r, alpha, init, seed, layer, dropout, rslora)
        # Last: what was refused is left as it was.
        linear.requires_grad_(False)

    def frozen_weight(self) -> Tensor:
        weight: Tensor = parameter(self, "weight")
        return weight.t() if self.fan_in_fan_out else weight

    def frozen_bias(self) -> Tensor | None:
        bias: Tensor | None = parameter(self, "bias")
        return bias

    @torch.no_grad()
    def rebase(self, A: Tensor, B: Tensor | None = None, closed_A: Tensor | None = None) -> None:
        """Folds an adapter into the weight, W + s B A, and begins anew: B = 0, and another A.

        The layer computes what it did, up to W's rounding: the sum is made in fp64 and rounded once
        to W's dtype. `lora_B` stays the Parameter that it was; `weight` and `lora_A` become new
        ones, so that nothing which shared the old ones, or was made from them, changes or is
        taken for theirs. A private model is made private again afterwards: its guard, and an
        optimizer's moments, are of the old ones.

        Args:
            A: the next A, (r, d_in), rounded to `lora_A`'s dtype.
            B, closed_A: what is folded, (d_out, q) and (q, d_in) of any rank q and float dtype; by
                default the layer's own.

        Raises:
            ConfigError: a shape or dtype that does not fit; the layer is then unchanged.
        """
        B = self.lora_B if B is None else B
        closed_A = self.lora_A if closed_A is None else closed_A
        d_out, d_in, q = self.out_features, self.in_features, closed_A.shape[0]
        for name, tensor, shape in (
            ("A", A, (self.r, d_in)),
            ("B", B, (d_out, q)),
            ("closed_A", closed_A, (q, d_in)),
        ):
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise ConfigError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}; accepted: a float type, "
                    f"{shape}"
                )
        weight = self.frozen_weight()
        like: dict[str, Any] = {"device": weight.device, "dtype": torch.float64}
        folded = weight.double() + self.scaling * (B.to(**like) @ closed_A.to(**like))
        if self.fan_in_fan_out:
            folded = folded.t().contiguous()
        self.weight = nn.Parameter(folded.to(weight.dtype), requires_grad=False)
        self.lora_A = nn.Parameter(
            A.to(self.lora_A.device, self.lora_A.dtype, copy=True), requires_grad=False
        )
        self.lora_B.zero_()

    def merged_layer(self) -> nn.Module:
        """A plain layer of the kind that was adapted, with weight W + s B A and this bias."""
        weight = self.merged_weight()
        if self.fan_in_fan_out:
            weight = weight.t().contiguous()
        merged = nn.Parameter(weight, requires_grad=False)
        return plain_layer(merged, self.bias, self.training, self.fan_in_fan_out)
