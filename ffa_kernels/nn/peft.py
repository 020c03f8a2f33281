"""Layers of a PEFT LoRA model, taken over as they stand.

Such a layer keeps its object, its names and all of PEFT's own methods: its class becomes a subclass
whose forward is this library's op. So saving, merging and unloading stay PEFT's.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from ffa_kernels.errors import ConfigError
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.nn.frozen import FrozenLinear
from ffa_kernels.nn.linear import is_conv1d, more_than_weights
from ffa_kernels.nn.record_taps import tapping
from ffa_kernels.nn.wrapped import (
    WRAPPED,
    can_wrap,
    dequantized,
    is_plain_linear,
    multiplied,
    prepare,
    unwrapped,
)

M = TypeVar("M", bound=nn.Module)


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The LoRA layers that PEFT has put into `model`, by name; none where PEFT is not imported."""
    module = sys.modules.get("peft.tuners.lora.layer")
    if module is None:
        return {}
    kind = module.LoraLayer
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}


class _TakenOver(Adapter):
    """What the subclasses add to PEFT's classes; `_theirs` is the class that was there."""

    _theirs: type[nn.Module]

    def _name(self) -> str:
        layer: Any = self
        name: str = next(iter(layer.lora_A))
        return name

    def frozen_A(self) -> Tensor:
        layer: Any = self
        weight: Tensor = layer.lora_A[self._name()].weight
        return weight

    def trained_B(self) -> nn.Parameter:
        layer: Any = self
        weight: nn.Parameter = layer.lora_B[self._name()].weight
        return weight

    def frozen_weight(self) -> Tensor | None:
        base: Any = self.base_layer
        if is_conv1d(base):
            transposed: Tensor = base.weight.t()
            return transposed
        return base.weight if is_plain_linear(base) else multiplied(base)[0]

    def frozen_scale(self) -> Tensor | None:
        return multiplied(self.base_layer)[1]

    def frozen_bias(self) -> Tensor | None:
        base: Any = self.base_layer
        bias: Tensor | None = base.bias
        return bias

    def base_forward(self, x: Tensor) -> Tensor:
        base: Any = self.base_layer
        y: Tensor = base(x)
        return y

    def base_weight(self) -> Tensor:
        weight = None if isinstance(self.base_layer, FrozenLinear) else self.frozen_weight()
        return dequantized(self.base_layer) if weight is None else weight

    def adapter_settings(self) -> tuple[int, float, bool]:
        layer: Any = self
        name = self._name()
        return layer.r[name], float(layer.lora_alpha[name]), bool(layer.use_rslora[name])

    def adapter_scaling(self) -> float:
        layer: Any = self
        return float(layer.scaling[self._name()])

    def adapter_dropout(self) -> float:
        layer: Any = self
        return float(getattr(layer.lora_dropout[self._name()], "p", 0.0))

    def _heard(self) -> bool:
        """Whether hooks sit on the modules inside (Opacus'), which only PEFT's forward calls."""
        return any(m._forward_hooks or m._forward_pre_hooks for m in self.inner_modules())

    def inner_modules(self) -> Iterator[nn.Module]:
        layer: Any = self
        for modules in (layer.lora_A, layer.lora_B):
            yield from modules.values()

    def merged_layer(self) -> nn.Module:
        """The plain layer inside, with weight W + s B A; no longer quantised."""
        layer: Any = self
        base: Any = self.base_layer
        if isinstance(base, FrozenLinear) or self.frozen_weight() is None:
            return unwrapped(self.merged_weight(), base, self.training)
        weight = self.base_weight() if layer.merged else self.merged_weight()
        if is_conv1d(base):
            weight = weight.t().contiguous()
        # A new layer and a new weight: others may share the old ones.
        plain: nn.Module = copy.copy(base)
        merged = nn.Parameter(weight, requires_grad=False)
        plain._parameters = {**plain._parameters, "weight": merged}
        return plain.train(self.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (n, ..., d_in) to y (n, ..., d_out); or (d_in,) to (d_out,), which is no batch to train
        privately on."""
        layer: Any = self
        if args or kwargs:
            raise ConfigError(
                f"adapted PEFT layer: forward was given {sorted(kwargs) or len(args)} beside x; "
                "accepted: x alone (no adapter_names: one adapter for the whole batch)"
            )
        if not layer.disable_adapters and layer.active_adapters != [self._name()]:
            raise ConfigError(
                f"adapted PEFT layer: the active adapters are {layer.active_adapters}; accepted: "
                f"[{self._name()!r}] alone, which was there at convert()"
            )
        heard = self._heard() and not tapping(self, self.record_taps)
        if layer.disable_adapters or layer.merged or heard:
            y: Tensor = self._theirs.forward(self, x)
            return y
        if x.dim() == 1 and not tapping(self, self.record_taps):
            return self.adapted_forward(x.unsqueeze(0)).squeeze(0)
        return self.adapted_forward(x)


def _classes() -> dict[type[nn.Module], type[_TakenOver]]:
    """PEFT's LoRA classes whose base is a linear layer, and what each becomes."""
    import peft.tuners.lora as lora

    named = ("Linear", "Linear8bitLt", "Linear4bit", "TorchaoLoraLinear")
    found = [c for c in (_theirs(lora, name) for name in named) if c is not None]
    here = globals()
    made: dict[type[nn.Module], type[_TakenOver]] = {}
    for theirs in found:
        # Under a name of this module, by which a pickle finds it again.
        name = f"FFAPeft{theirs.__name__}"
        if name not in here:
            here[name] = type(
                name, (_TakenOver, theirs), {"_theirs": theirs, "__module__": __name__}
            )
        made[theirs] = here[name]
    return made


def _theirs(lora: Any, name: str) -> type[nn.Module] | None:
    """A class of PEFT's; those of quantised layers are there only with their library."""
    found = getattr(lora, name, None)
    if found is None and name == "TorchaoLoraLinear":
        found = getattr(sys.modules.get("peft.tuners.lora.torchao"), name, None)
    return found


def __getattr__(name: str) -> Any:
    # A pickle may ask for a class before any model was taken over.
    if name.startswith("FFAPeft"):
        _classes()
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _refusal(layer: Any, known: dict[type[nn.Module], type[_TakenOver]]) -> str | None:
    """Why this LoRA layer cannot be taken over, if so."""
    adapters = [*layer.lora_A, *layer.lora_embedding_A]
    if len(adapters) != 1 or layer.active_adapters != adapters:
        return (
            f"holds the adapters {', '.join(adapters) or 'none'}, active "
            f"{', '.join(layer.active_adapters) or 'none'}; accepted: one, active"
        )
    if any(layer.use_dora.values()) or layer.lora_variant:
        return "is DoRA or another variant, whose trained magnitudes are no rank-r term"
    if any(layer.lora_bias.values()):
        return "has lora_bias, which is trained beside B; accepted: lora_bias=False"
    if layer.merged:
        return "is merged; accepted: unmerge_adapter() first"
    if type(layer) not in known:
        return f"is {type(layer).__name__}; accepted: {', '.join(c.__name__ for c in known)}"
    base = layer.base_layer
    if not can_wrap(base) and not is_conv1d(base):
        return (
            f"has the base layer {type(base).__name__}; accepted: torch.nn.Linear, Conv1D, "
            f"{WRAPPED}"
        )
    # A base that makes its product itself is called, and so is what was set on it.
    called = not is_plain_linear(base) and not is_conv1d(base)
    more = None if called else more_than_weights(base)
    if more is not None:
        return f"has a base layer that {more}"
    if "forward" in vars(layer):
        return more_than_weights(layer)
    return None


def take_over(model: M, layers: dict[str, nn.Module]) -> M:
    """Makes every LoRA layer of `layers` compute with this library's op, A frozen, B trained.

    What PEFT trains beside the adapters (`modules_to_save`) stays trained. Ranks, scalings,
    dropout and names are PEFT's.

    Raises:
        ConfigError: a layer that cannot be taken over, named, with the reason; or biases that
            PEFT trains. The model is then unchanged.
    """
    known = _classes()
    for name, layer in layers.items():
        reason = _refusal(layer, known)
        if reason is not None:
            raise ConfigError(f"model: PEFT's layer {name!r} {reason}")
        base: Any = layer.base_layer
        if any(p.requires_grad for p in base.parameters()):
            raise ConfigError(
                f"model: PEFT's layer {name!r} trains its base layer (bias={'all'!r} or "
                f"{'lora_only'!r}); accepted: bias='none'"
            )
    for layer in layers.values():
        layer.__class__ = known[type(layer)]
        taken: Any = layer
        prepare(taken.base_layer)
        taken.frozen_A().requires_grad_(False)
        taken.trained_B().requires_grad_(True)
    return model
