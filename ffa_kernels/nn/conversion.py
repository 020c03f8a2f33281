"""convert() adapts a model's layers in place; merge() gives plain layers back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TypeVar

from torch import nn

from ffa_kernels.errors import ConfigError
from ffa_kernels.nn.linear import FFALinear, check_adapter

M = TypeVar("M", bound=nn.Module)


def _matches(name: str, suffixes: Iterable[str]) -> bool:
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def _names(argument: str, value: object, modules: dict[str, nn.Module]) -> list[str]:
    """`value` as a list of names, each of which the model has as a suffix of a module's name."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{argument} is {value!r}; accepted: a list of module names")
    for name in value:
        if not isinstance(name, str) or not any(_matches(full, [name]) for full in modules):
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
    target_modules: Sequence[str],
    init: str = "orthogonal",
    seed: int = 0,
    dropout: float = 0.0,
    modules_to_save: Sequence[str] = (),
) -> M:
    """Adapts the named linear layers of `model` in place and freezes all else.

    Args:
        model: any module; changed and returned.
        r, alpha, init, seed, dropout: as in `FFALinear`; A depends on the layer's name too.
        target_modules: names, or last parts of names, of the nn.Linear layers to adapt.
        modules_to_save: names, or last parts of names, of modules that stay trained whole,
            a classification head say.

    Returns:
        `model`, of which only the lora_B and the parameters of `modules_to_save` are trained.

    Raises:
        ConfigError: an argument that is not accepted, or a model that is already converted;
            the model is then unchanged.
    """
    check_adapter(r, alpha, dropout, init)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, FFALinear):
            raise ConfigError(
                f"model: already converted (layer {name!r}); accepted: a model without FFALinear "
                "layers, which merge() gives back"
            )
    targets = _names("target_modules", target_modules, modules)
    saved = _names("modules_to_save", modules_to_save, modules)
    if not targets:
        raise ConfigError("target_modules is empty; accepted: at least one name")
    adapted: dict[str, FFALinear] = {}
    was_trained = {id(p): p.requires_grad for p in model.parameters()}
    try:
        for name, module in modules.items():
            if not _matches(name, targets):
                continue
            if any(_matches(name[: len(part)], saved) for part in _prefixes(name)):
                raise ConfigError(
                    f"layer {name!r} is named by target_modules and by modules_to_save; accepted: "
                    "one of them"
                )
            if type(module) is not nn.Linear:
                raise ConfigError(
                    f"target_modules names {name!r}, which is {type(module).__name__}; accepted: "
                    "torch.nn.Linear"
                )
            adapted[name] = FFALinear.from_linear(
                module, r, alpha, init=init, seed=seed, layer=name, dropout=dropout
            )
    except BaseException:
        for p in model.parameters():
            p.requires_grad_(was_trained[id(p)])
        raise
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in adapted.items():
        _replace(model, name, layer)
    for name, module in modules.items():
        if _matches(name, saved):
            for parameter in module.parameters():
                parameter.requires_grad_(True)
    return model


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def merge(model: M) -> M:
    """Replaces every FFALinear of `model` in place by an nn.Linear with weight W + s B A.

    Returns:
        `model`.

    Raises:
        ConfigError: the model has no FFALinear layer, or is itself one (use `merged()`).
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FFALinear)}
    if not layers or "" in layers:
        raise ConfigError("model: accepted: a module that holds FFALinear layers")
    plain = {name: layer.merged() for name, layer in layers.items()}
    for name, layer in plain.items():
        _replace(model, name, layer)
    return model
