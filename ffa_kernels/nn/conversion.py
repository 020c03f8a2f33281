"""convert() adapts a model's layers in place; merge() gives plain layers back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from torch import nn

from ffa_kernels.errors import ConfigError
from ffa_kernels.nn import opacus
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.nn.frozen import Shrinker, check_base_dtype, plain_layers, rename_ties
from ffa_kernels.nn.linear import (
    OWN_WEIGHT,
    FFALinear,
    check_adapter,
    is_conv1d,
    more_than_weights,
    owns_weight,
)
from ffa_kernels.nn.peft import lora_layers, take_over
from ffa_kernels.nn.product import as_before, is_linear, multiply_faster
from ffa_kernels.nn.recorded import plain_again
from ffa_kernels.nn.wrapped import WRAPPED, FFAWrapped, can_wrap, is_plain_linear

M = TypeVar("M", bound=nn.Module)

# What a layer takes over from the one in whose place it stands.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

ADAPTABLE = f"torch.nn.Linear, Conv1D of transformers, {WRAPPED}"


def ends_in(name: str, suffixes: Iterable[str]) -> bool:
    """Whether one of `suffixes` is the name of a module, or its last parts."""
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def _names(argument: str, value: object, modules: dict[str, nn.Module]) -> list[str]:
    """`value` as a list of names, each of which the model has as a suffix of a module's name."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{argument} is {value!r}; accepted: a list of module names")
    for name in value:
        if not isinstance(name, str) or not any(ends_in(full, [name]) for full in modules):
            known = sorted({full.rsplit(".", 1)[-1] for full in modules if full})
            near = get_close_matches(str(name), known, n=3, cutoff=0.4)
            raise ConfigError(
                f"{argument} names {name!r}, which the model does not have; "
                + (f"did you mean {', '.join(near)}?" if near else f"accepted: {', '.join(known)}")
            )
    return list(value)


def convert(
    model: M,
    r: int = 8,
    alpha: float = 16.0,
    *,
    target_modules: Sequence[str] | None = None,
    init: str = "orthogonal",
    seed: int = 0,
    dropout: float = 0.0,
    rslora: bool = False,
    modules_to_save: Sequence[str] = (),
    base_dtype: str | None = None,
) -> M:
    """Adapts the named linear layers of `model` in place and freezes all else.

    A layer's hooks and attributes go on to the one that takes its place. On a processor whose fp32
    products this library makes faster than PyTorch, the frozen nn.Linear layers that are not
    adapted become `FrozenFp32Linear`, a subclass of nn.Linear.

    A PEFT LoRA model needs no further arguments but `base_dtype`: its own layers are taken over as
    they stand, with its ranks, scalings, dropout, names and `modules_to_save`; A is frozen from
    then on.

    Args:
        model: any module; changed and returned.
        r, alpha, init, seed, dropout, rslora: as in `FFALinear`; A depends on the layer's name too.
        target_modules: names, or last parts of names, of the layers to adapt: nn.Linear,
            transformers' Conv1D, quantised layers and others that `FFAWrapped` takes.
        modules_to_save: names, or last parts of names, of modules that stay trained whole,
            a classification head say.
        base_dtype: of the frozen matrices of every nn.Linear, Conv1D and nn.Embedding: "bf16",
            or "int8", with a scale for each row. What shares a weight with something trained
            keeps its own, as do norms and biases, A, B and activations. What is multiplied with
            either is rounded to bf16 where that has instructions (`FrozenLinear`). None: nothing
            changes.

    Returns:
        `model`, of which only the lora_B and the parameters of `modules_to_save` are trained.

    Raises:
        ConfigError: an argument that is not accepted, a model that is already converted, or a
            PEFT layer that cannot be taken over; the model is then unchanged.
    """
    opacus.register()
    check_base_dtype(base_dtype)
    theirs = lora_layers(model)
    if theirs and not any(isinstance(layer, Adapter) for layer in theirs.values()):
        given = (r, alpha, target_modules, init, seed, dropout, rslora, tuple(modules_to_save))
        if given != (8, 16.0, None, "orthogonal", 0, 0.0, False, ()):
            raise ConfigError(
                "model is a PEFT model, whose layers keep their own settings; accepted: "
                "convert(model) with no other argument than base_dtype"
            )
        take_over(model, theirs)
        shrunk: dict[nn.Module, nn.Module] = {}
        if base_dtype is not None:
            adapters = [layer for layer in model.modules() if isinstance(layer, Adapter)]
            inner = {id(m) for layer in adapters for m in layer.inner_modules()}
            trained = {id(p) for p in model.parameters() if p.requires_grad}
            frozen = (m for m in model.modules() if id(m) not in inner and not _holds(m, trained))
            shrunk = Shrinker(base_dtype).layers(frozen)
        put_in(model, shrunk)
        _multiply_faster(model)
        return model
    check_adapter(r, alpha, dropout, init)
    # With every name of a layer that has several: all of them must become the one new layer.
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if isinstance(module, Adapter):
            raise ConfigError(
                f"model: already converted (layer {name!r}); accepted: a model without adapted "
                "layers, which merge() gives back"
            )
    if target_modules is None:
        raise ConfigError(
            "target_modules is None; accepted: a list of module names (only a PEFT model does "
            "without: it says itself which layers are adapted)"
        )
    targets = _names("target_modules", target_modules, modules)
    saved = _names("modules_to_save", modules_to_save, modules)
    if not targets:
        raise ConfigError("target_modules is empty; accepted: at least one name")
    saved_parameters = {
        id(p) for name, m in modules.items() if ends_in(name, saved) for p in m.parameters()
    }
    options = {"init": init, "seed": seed, "dropout": dropout, "rslora": rslora}
    adapted: dict[nn.Module, Adapter] = {}
    smaller: dict[nn.Module, nn.Module] = {}
    if base_dtype is not None:
        smaller = Shrinker(base_dtype).layers(
            m for m in model.modules() if not _holds(m, saved_parameters)
        )
    was_trained = {id(p): p.requires_grad for p in model.parameters()}
    try:
        for name, module in modules.items():
            if not ends_in(name, targets):
                continue
            if any(id(p) in saved_parameters for p in module.parameters()):
                raise ConfigError(
                    f"layer {name!r} is named by target_modules and by modules_to_save, or shares "
                    "a weight between them; accepted: one of them"
                )
            if not can_adapt(module):
                made = is_linear(module) and not owns_weight(module)
                raise ConfigError(
                    f"target_modules names {name!r}, which is {type(module).__name__}; accepted: "
                    f"{ADAPTABLE}{OWN_WEIGHT if made else ''}"
                )
            check_replaceable(name, module)
            if name == "":
                raise ConfigError(
                    "target_modules names the model itself; accepted: layers inside it "
                    "(FFALinear.from_linear() adapts a layer alone)"
                )
            if module not in adapted:
                base = smaller.pop(module, module)
                adapted[module] = make_adapter(base, r, alpha, layer=name, **options)
    except BaseException:
        for p in model.parameters():
            p.requires_grad_(was_trained[id(p)])
        raise
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    put_in(model, {**smaller, **adapted})
    for name, module in modules.items():
        if ends_in(name, saved):
            for parameter in module.parameters():
                parameter.requires_grad_(True)
    _multiply_faster(model)
    return model


def _multiply_faster(model: nn.Module) -> None:
    """The layers that no adapter holds: what it does with one inside is its own affair."""
    adapters = [layer for layer in model.modules() if isinstance(layer, Adapter)]
    held = {id(inside) for layer in adapters for inside in layer.modules()}
    multiply_faster(module for module in model.modules() if id(module) not in held)


def _holds(module: nn.Module, parameters: set[int]) -> bool:
    return any(id(p) in parameters for p in module.parameters(recurse=False))


def _call_the_layers(model: nn.Module) -> None:
    """In evaluation nn.TransformerEncoderLayer reads its linear layers' weights and leaves their
    forward, and so an adapter, out: not where it takes its activation for one it does not know."""
    for module in model.modules():
        if any(isinstance(layer, Adapter) for layer in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                # It hands its layers nested tensors for the same purpose.
                module.use_nested_tensor = False


def can_adapt(module: nn.Module) -> bool:
    """Whether `make_adapter` takes `module`."""
    return can_wrap(module) or is_conv1d(module)


def _is_plain(module: nn.Module) -> bool:
    """Whether the adapter takes the place of `module`, and does not hold it."""
    return is_plain_linear(module) or is_conv1d(module)


def check_replaceable(name: str, module: nn.Module) -> None:
    """Raises ConfigError where an adapter of a layer that `can_adapt` would leave out a part."""
    more = more_than_weights(module) if _is_plain(module) else None
    if more is not None:
        raise ConfigError(f"layer {name!r} {more}")


def make_adapter(module: nn.Module, r: int, alpha: float, **options: Any) -> Adapter:
    """The adapter of a layer that `can_adapt`; options as in `FFALinear`."""
    make: Callable[..., Adapter] = FFALinear.from_linear if _is_plain(module) else FFAWrapped
    return make(module, r, alpha, **options)


def put_in(model: nn.Module, adapted: Mapping[nn.Module, nn.Module]) -> None:
    """Puts each new layer where its old one was, under every name that had it, with its hooks, and
    with what else was set on it, where the new one does not hold it whole."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in adapted:
            _replace(model, name, adapted[module])
    for old, new in adapted.items():
        for name in _HOOKS:
            setattr(new, name, getattr(old, name))
        if old not in new.modules():
            for name, value in vars(old).items():
                if not hasattr(new, name):
                    setattr(new, name, value)
    rename_ties(model)
    _call_the_layers(model)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def merge(model: M) -> M:
    """Replaces every adapted layer of `model` in place by a plain one with weight W + s B A.

    Heads and other trained layers that an engine made record are plain layers again too, and so
    are frozen ones that were made faster, or smaller by `base_dtype`: these have the dtype that
    they had, and the values that they computed with.

    Returns:
        `model`.

    Raises:
        ConfigError: the model has no adapted layer, or is itself one (use `merged_layer()`).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {name: m for name, m in modules.items() if isinstance(m, Adapter)}
    if not layers or "" in layers:
        raise ConfigError("model: accepted: a module that holds adapted layers")
    plain = {layer: layer.merged_layer() for layer in set(layers.values())}
    for name, layer in layers.items():
        _replace(model, name, plain[layer])
    put_in(model, plain_layers(model.modules()))
    for module in model.modules():
        plain_again(module)
        as_before(module)
    return model
