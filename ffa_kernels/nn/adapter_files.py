"""Adapters in PEFT's files, both ways: adapter_config.json and adapter_model.safetensors.

PEFT itself is not needed: the layout is its LoRA's. Tensors keep their bits and names.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError, shown
from ffa_kernels.files import write_atomic
from ffa_kernels.nn.adapter import Adapter, owned_parameters
from ffa_kernels.nn.conversion import (
    ADAPTABLE,
    can_adapt,
    check_replaceable,
    ends_in,
    make_adapter,
    put_in,
)
from ffa_kernels.nn.frozen import frozen_weights, plain_state
from ffa_kernels.nn.linear import check_adapter, is_conv1d, scaling_of
from ffa_kernels.nn.patterns import Pattern
from ffa_kernels.nn.peft import lora_layers

M = TypeVar("M", bound=nn.Module)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# What a LoRA configuration may say that changes nothing in how its tensors are used, or is read.
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "modules_to_save", "init_lora_weights", "bias"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
}
# Others ("pissa", "olora", "loftq", ...) rewrite W, which the file does not hold.
_INITS_OF_A = (True, False, "gaussian", "orthogonal", "eva")


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the adapter of a converted model as PEFT would, for `PeftModel.from_pretrained`.

    Saved are A and B of every adapted layer and all other modules that are trained, whole, with
    tensors that share their last parts of a name (as PEFT looks for them). Dropout, which only
    training uses, is the largest of any layer.

    The weights are written beside and renamed; the configuration comes last, and an old one that
    differs goes first. So a crash leaves the old adapter, the new one, or none that loads.

    Args:
        model: converted, or a PEFT model taken over.
        directory: made if it is not there; other files in it stay.

    Raises:
        ConfigError: no adapted layer, one under several names, or something trained that PEFT's
            LoRA files cannot hold.
        PrivacyError: what `state_dict()` of a private model refuses. Nothing is written then.
    """
    from safetensors.torch import save

    # Whoever looks at a model before it is saved looks at this one, as at its state_dict.
    for module in model.modules():
        for hook in module._state_dict_pre_hooks.values():
            hook(module, "", False)
    root, theirs = _base_of(model)
    if theirs.get("layer_replication"):
        raise ConfigError(
            f"model is PEFT's with layer_replication {theirs['layer_replication']}, whose layers "
            "no plain model has; accepted: model.save_pretrained()"
        )
    layers = _adapters(root, "a model that convert() adapted")
    names = _places(root)
    for layer in layers.values():
        if len(names[layer]) > 1:
            raise ConfigError(
                f"model: {' and '.join(map(repr, names[layer]))} are one adapted layer, of which "
                "PEFT would adapt the first name and leave the others plain; accepted: a layer of "
                "one name"
            )
    saved = _saved_by_owner(root, layers)
    config = {**_config(root, layers, saved), **_provenance(root, theirs)}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.frozen_A()
        tensors[f"{name}.lora_B.weight"] = layer.trained_B()
    for name, module in saved.items():
        tensors.update({f"{name}.{key}": value for key, value in plain_state(module).items()})
    # Copies: safetensors takes no two tensors of one memory, which tied weights are.
    kept = {_PREFIX + k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    weights = save(kept, metadata={"format": "pt"})

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    old = folder / CONFIG
    if old.exists() and old.read_bytes() != text:
        old.unlink()
    write_atomic(folder / WEIGHTS, weights)
    write_atomic(old, text)


def load_adapter(model: M, directory: str | os.PathLike[str]) -> M:
    """Reads an adapter that PEFT or `save_adapter` wrote onto `model`.

    A plain model is converted: only the adapter's B and the modules in the file are trained from
    then on. A converted model (or PEFT's, taken over) takes the values over; its ranks and
    scalings must be the file's.

    Args:
        model: changed and returned.
        directory: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ConfigError: files that are missing or damaged, a method other than LoRA with a fixed W,
            or tensors that do not fit the model; the model is then unchanged.
    """
    folder = Path(directory)
    config = _read_config(folder)
    tensors = _read_tensors(folder / WEIGHTS)
    root, _ = _base_of(model)
    pairs, others = _split(tensors)
    if any(isinstance(m, Adapter) for m in root.modules()):
        _fill(root, config, pairs, others)
    else:
        _convert_to(root, config, pairs, others)
    return model


def _base_of(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The model inside compile's and PEFT's wrappers, and PEFT's configuration of its adapter."""
    inner: Any = model
    while isinstance(getattr(inner, "_orig_mod", None), nn.Module):
        inner = inner._orig_mod
    kind = getattr(sys.modules.get("peft.peft_model"), "PeftModel", None)
    if kind is not None and isinstance(inner, kind):
        inner = inner.base_model
    tuner = getattr(sys.modules.get("peft.tuners.lora.model"), "LoraModel", None)
    configs = getattr(inner, "peft_config", None)
    if tuner is not None and isinstance(inner, tuner):
        inner = inner.model
    one = next(iter(configs.values())) if isinstance(configs, dict) and len(configs) == 1 else None
    return inner, {} if one is None else one.to_dict()


def _adapters(root: nn.Module, accepted: str) -> dict[str, Adapter]:
    layers = {n: m for n, m in root.named_modules() if isinstance(m, Adapter)}
    if not layers:
        kind = "holds PEFT's own LoRA layers" if lora_layers(root) else "has no adapted layer"
        raise ConfigError(f"model {kind}; accepted: {accepted}")
    if "" in layers:
        raise ConfigError(f"model is itself an adapted layer; accepted: {accepted}")
    for name, layer in layers.items():
        held = getattr(layer, "lora_A", None)
        if isinstance(held, nn.ModuleDict) and len(held) != 1:
            raise ConfigError(
                f"model: layer {name!r} holds the adapters {', '.join(held)}; accepted: one"
            )
    return layers


def _places(root: nn.Module) -> dict[nn.Module, list[str]]:
    """The names of each module, one for every place that holds it: PEFT, which sees a module once,
    puts an adapter into the first of them. A place inside a module of many names is one place."""
    found: dict[nn.Module, list[str]] = {}
    for name, parent in root.named_modules():
        for last, child in parent._modules.items():
            if child is not None:
                found.setdefault(child, []).append(f"{name}.{last}".lstrip("."))
    return found


def _check_places(root: nn.Module, layers: Iterable[nn.Module], adapted: Container[str]) -> None:
    """Raises ConfigError where the file adapts a layer under some of its names alone."""
    names = _places(root)
    for layer in layers:
        plain = [name for name in names[layer] if name not in adapted]
        if plain and len(names[layer]) > 1:
            raise ConfigError(
                f"directory: {' and '.join(map(repr, names[layer]))} are one layer in the model, "
                f"of which the adapter leaves {plain[0]!r} plain; accepted: a model that has them "
                "apart, or an adapter of all these names"
            )


def _wrapped_by_peft(root: nn.Module) -> dict[str, Any]:
    """PEFT's wrappers of modules that are trained whole, by the name of what they wrap."""
    kind = getattr(sys.modules.get("peft.utils.other"), "ModulesToSaveWrapper", None)
    if kind is None:
        return {}
    return {n: m for n, m in root.named_modules() if isinstance(m, kind)}


def _inside(name: str, outer: Iterable[str]) -> bool:
    return any(name == o or name.startswith(o + ".") for o in outer)


def _wanted_by_peft(names: Iterable[str], asked: Iterable[str]) -> list[str]:
    """The names that PEFT's modules_to_save picks: those that end in one asked for, even within
    a part of a name."""
    ends = tuple(asked)
    return [name for name in names if name and name.endswith(ends)] if ends else []


def _saved_by_owner(root: nn.Module, layers: dict[str, Adapter]) -> dict[str, nn.Module]:
    """The modules to be saved whole: those that own a trained tensor which is no adapter's."""
    wrappers = _wrapped_by_peft(root)
    names = {
        name: module
        for name, module in root.named_modules(remove_duplicate=False)
        if not any(name.startswith(w + ".") for w in wrappers)
    }
    trained = {
        id(p): f"{name}.{local}".lstrip(".")
        for name, layer, local, p in owned_parameters(root)
        if p.requires_grad
        and not (isinstance(layer, Adapter) and local == "lora_B")
        and not _inside(name, wrappers)
    }
    # Every module that owns the tensor: a tied one that PEFT restored alone would be tied no more.
    owners = {
        name
        for name, module in names.items()
        if any(id(p) in trained for p in module.parameters(recurse=False))
    }
    owned = {id(p) for n in owners for p in names[n].parameters(recurse=False)}
    lost = [trained[i] for i in trained if i not in owned]
    saved = {
        name: wrappers[name].modules_to_save[next(iter(wrappers[name].modules_to_save))]
        if name in wrappers
        else names[name]
        for name in _wanted_by_peft(names, owners | set(wrappers))
    }
    if "" in owners or lost:
        lost += [n for n, p in root.named_parameters(recurse=False) if id(p) in trained]
        raise ConfigError(
            f"model trains {', '.join(sorted(set(lost)))}, which PEFT's LoRA files cannot hold; "
            "accepted: adapters, and parameters of modules inside the model"
        )
    for name in saved:
        if any(_inside(other, [name]) for other in [*layers, *(set(saved) - {name})]):
            raise ConfigError(
                f"model: PEFT would keep module {name!r} whole, but parts of it are adapted or "
                "kept by themselves; accepted: trained parameters in modules that hold no adapter"
            )
    return saved


def _config(
    root: nn.Module, layers: dict[str, Adapter], saved: dict[str, nn.Module]
) -> dict[str, Any]:
    """The entries that PEFT needs to build exactly these layers."""
    settings = {name: layer.adapter_settings() for name, layer in layers.items()}
    rslora = all(of_layer[2] for of_layer in settings.values())
    ranks = {name: r for name, (r, _, _) in settings.items()}
    alphas = {
        name: _alpha(name, layer.adapter_scaling(), *settings[name], rslora)
        for name, layer in layers.items()
    }
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    targets, excluded = _targets(root, set(layers), set(saved))
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": max(layer.adapter_dropout() for layer in layers.values()),
        "use_rslora": rslora,
        # Anchored: PEFT takes a key for a regular expression that may begin at any part.
        "rank_pattern": {f"^{re.escape(n)}": v for n, v in ranks.items() if v != r},
        "alpha_pattern": {f"^{re.escape(n)}": v for n, v in alphas.items() if v != alpha},
        "target_modules": targets,
        "exclude_modules": excluded or None,
        "modules_to_save": sorted(saved) or None,
        "fan_in_fan_out": any(
            is_conv1d(getattr(layer, "base_layer", layer))
            or getattr(layer, "fan_in_fan_out", False)
            for layer in layers.values()
        ),
        "bias": "none",
        "use_dora": False,
        "lora_bias": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
    }


def _alpha(
    name: str, scaling: float, r: int, alpha: float, rslora: bool, rslora_of_all: bool
) -> float:
    """The alpha from which PEFT makes this layer's scaling, to the bit; whole where it can be."""
    by_product = scaling * (math.sqrt(r) if rslora_of_all else r)
    near = (by_product, math.nextafter(by_product, 0.0), math.nextafter(by_product, math.inf))
    for candidate in (alpha, *near):
        if scaling_of(r, candidate, rslora_of_all) == scaling:
            return int(candidate) if candidate == int(candidate) else candidate
    raise ConfigError(
        f"model: layer {name!r} has the scaling {scaling!r} with rank {r}, which no alpha gives "
        f"with use_rslora={rslora_of_all}; accepted: one kind of scaling for all layers"
    )


def _targets(root: nn.Module, adapted: set[str], saved: set[str]) -> tuple[list[str], list[str]]:
    """target_modules and exclude_modules by which PEFT finds exactly the adapted layers."""
    # Parts of adapted layers are no modules of the plain model that PEFT will look at.
    names = [
        n
        for n, _ in root.named_modules()
        if n in adapted or not (_inside(n, adapted) or _inside(n, saved))
    ]
    short = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    if {n for n in names if ends_in(n, short)} == adapted:
        return short, []
    full = sorted(adapted)
    excluded = sorted(n for n in names if ends_in(n, full) and n not in adapted)
    hidden = [n for n in full if ends_in(n, excluded)]
    if hidden:
        raise ConfigError(
            f"model: no list of names tells PEFT to adapt {hidden[0]!r} and not {excluded[0]!r}; "
            "accepted: an adapter on both, or on neither"
        )
    return full, excluded


def _provenance(root: nn.Module, theirs: dict[str, Any]) -> dict[str, Any]:
    """What says whose adapter it is; of PEFT's own configuration also how W was made."""
    path = getattr(root, "name_or_path", None)
    kept = {
        "base_model_name_or_path": path if isinstance(path, str) and path else None,
        "auto_mapping": {
            "base_model_class": type(root).__name__,
            "parent_library": type(root).__module__,
        },
    }
    for key in ("task_type", "base_model_name_or_path", "revision", "init_lora_weights"):
        value = theirs.get(key)
        if value is not None:
            kept[key] = getattr(value, "value", value)
    if kept.get("task_type") is not None:
        # PEFT names a class only where the task does not.
        del kept["auto_mapping"]
    return kept


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        several = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        raise ConfigError(
            f"directory: {folder} has no {CONFIG}"
            + (f", but the adapters {', '.join(several)} inside" if several else "")
            + "; accepted: the folder of one adapter"
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"directory: {path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"directory: {path} holds {type(config).__name__}; accepted: an object")
    method = config.get("peft_type")
    if method != "LORA":
        raise ConfigError(f"directory: {path} has peft_type {shown(method)}; accepted: 'LORA'")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"directory: {path} has bias {shown(config['bias'])}; accepted: 'none'")
    init = config.get("init_lora_weights", True)
    if not any(init is known or init == known for known in _INITS_OF_A):
        raise ConfigError(
            f"directory: {path} has init_lora_weights {shown(init)}, which rewrites the base "
            f"model's weights; accepted: {', '.join(map(repr, _INITS_OF_A))}"
        )
    for key, value in config.items():
        if key not in _READ and value:
            raise ConfigError(
                f"directory: {path} has {shown(key, str)} {shown(value)}, which is more than a "
                "frozen W with s B A; accepted: plain LoRA"
            )
    settings = (config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0))
    try:
        check_adapter(*settings, "kaiming")
    except ConfigError as error:
        raise ConfigError(f"directory: {path}: {error}") from error
    for key, (accepted, fits) in _FORMS.items():
        if config.get(key) is not None and not fits(config[key]):
            raise ConfigError(
                f"directory: {path} has {key} {shown(config[key])}; accepted: {accepted}"
            )
    for key in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"):
        patterns = config.get(key) or {}
        if isinstance(patterns, list):
            continue
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            try:
                _pattern(pattern)
            except ValueError as error:
                raise ConfigError(
                    f"directory: {path} has {key} {shown(pattern)}, no regular expression ({error})"
                ) from error
    return config


_pattern = functools.lru_cache(maxsize=4096)(Pattern)


def _are(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


_NAMES = ("a text or a list of texts", lambda v: isinstance(v, str) or _are(str, v))
_OBJECT = ("an object", lambda v: isinstance(v, dict))
# What is accepted beside null, in words and as a test.
_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "rank_pattern": _OBJECT,
    "alpha_pattern": _OBJECT,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "modules_to_save": ("a list of names", lambda v: _are(str, v)),
    "layers_to_transform": (
        "an integer or a list of integers",
        lambda v: type(v) is int or _are(int, v),
    ),
}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except FileNotFoundError as error:
        old = path.with_suffix(".bin")
        raise ConfigError(
            f"directory: {path.parent} has no {path.name}"
            + (f", only {old.name}, a pickle" if old.exists() else "")
            + f"; accepted: a folder with {path.name}"
        ) from error
    except Exception as error:  # of a dtype that safetensors knows and torch does not, KeyError
        raise ConfigError(
            f"directory: {path} is damaged or cut short ({shown(error, str)}); accepted: a whole "
            "safetensors file"
        ) from error


_Pairs = dict[str, tuple[Tensor, Tensor]]
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def _split(tensors: dict[str, Tensor]) -> tuple[_Pairs, dict[str, Tensor]]:
    """(A, B) by the layer's name, and all other tensors by theirs."""
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise ConfigError(
                f"directory: tensor {shown(key)}; accepted: names that begin {_PREFIX}"
            )
        name = key.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match:
            found.setdefault(match[1], {})[match[2]] = tensor
        elif re.search(r"(^|\.)lora_", name):
            raise ConfigError(
                f"directory: tensor {shown(key)}; accepted: lora_A.weight and lora_B.weight of "
                "linear layers (one adapter, no DoRA, no embedding)"
            )
        else:
            others[name] = tensor
    pairs: _Pairs = {}
    for name, parts in found.items():
        if parts.keys() != {"A", "B"}:
            missing = "A" if "A" not in parts else "B"
            raise ConfigError(f"directory: lora_{missing} of layer {shown(name)} is missing")
        A, B = parts["A"], parts["B"]
        if not {A.dtype, B.dtype} <= _FLOATS:
            raise ConfigError(
                f"directory: layer {shown(name)} has {A.dtype} and {B.dtype}; accepted: float "
                "types of 16 bits or more"
            )
        pairs[name] = A, B
    if not pairs:
        raise ConfigError("directory: no lora_A and lora_B; accepted: a LoRA adapter")
    return pairs, others


def _of_pattern(config: dict[str, Any], which: str, name: str, default: Any) -> Any:
    # A pattern may begin at any part of the name.
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    for key, value in (config.get(which) or {}).items():
        if _pattern(key).covers(name, starts):
            return value
    return default


def _settings(config: dict[str, Any], name: str, A: Tensor) -> tuple[int, float, bool]:
    """(r, alpha, rslora) of one layer, as PEFT finds them, with A's rank."""
    r = _of_pattern(config, "rank_pattern", name, config["r"])
    alpha = _of_pattern(config, "alpha_pattern", name, config["lora_alpha"])
    check_adapter(r, alpha, 0.0, "kaiming")
    if A.dim() != 2 or A.shape[0] != r:
        raise ConfigError(
            f"directory: lora_A of layer {name!r} is {shown(tuple(A.shape))}, but {CONFIG} gives "
            f"the rank {r}; accepted: ({r}, d_in)"
        )
    return r, float(alpha), bool(config.get("use_rslora"))


def _check_shapes(name: str, A: Tensor, B: Tensor, d_in: int, d_out: int) -> None:
    if A.shape[1] != d_in or tuple(B.shape) != (d_out, A.shape[0]):
        raise ConfigError(
            f"directory: layer {name!r} has lora_A {shown(tuple(A.shape))} and lora_B "
            f"{shown(tuple(B.shape))}; accepted by the model: (r, {d_in}) and ({d_out}, r)"
        )


def _is_target(config: dict[str, Any], name: str) -> bool:
    """Whether PEFT's target_modules, and what limits them, pick the module."""
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        if _pattern(excluded).covers(name):
            return False
    elif ends_in(name, excluded):
        return False
    if any(f".{saved}." in f".{name}." for saved in config.get("modules_to_save") or []):
        return False
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return _pattern(targets).covers(name)
    if name in targets:
        return True
    if not ends_in(name, targets):
        return False
    only = config.get("layers_to_transform")
    if only is None or only == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    before = [rf"(?:^|.*?\.){re.escape(pattern)}" for pattern in patterns] or [r".*?\.[^.]*"]
    for start in before:
        match = re.match(rf"{start}\.(\d+)\.", name)
        if match:
            return int(match[1]) in ([only] if isinstance(only, int) else only)
    return False


def _missing(config: dict[str, Any], names: Iterable[str], have: set[str]) -> None:
    lacking = sorted(n for n in names if n not in have and n and _is_target(config, n))
    if lacking:
        raise ConfigError(
            f"directory: tensors of {', '.join(lacking[:3])} are missing, which target_modules "
            "of its configuration names; accepted: a whole adapter"
        )


def _fit_others(expected: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Raises ConfigError unless each expected tensor is among the others, and no more."""
    lacking = sorted(expected.keys() - others.keys())
    if lacking:
        raise ConfigError(
            f"directory: {', '.join(lacking[:3])} is missing, which the adapter or the model "
            "trains beside LoRA; accepted: a whole adapter"
        )
    for name, tensor in others.items():
        if name not in expected:
            raise ConfigError(
                f"directory: tensor {shown(name)} is neither LoRA's nor in modules_to_save, or the "
                "model has none of that name"
            )
        if tensor.shape != expected[name].shape:
            raise ConfigError(
                f"directory: tensor {name!r} is {shown(tuple(tensor.shape))}; accepted by the "
                f"model: {tuple(expected[name].shape)}"
            )
        _check_exact(name, tensor, expected[name])


def _check_exact(name: str, tensor: Tensor, place: Tensor) -> None:
    try:
        fits = torch.promote_types(tensor.dtype, place.dtype) == place.dtype
    except RuntimeError:  # some have no common type at all
        fits = False
    if not fits:
        raise ConfigError(
            f"directory: {name} is {tensor.dtype}, which the model's {place.dtype} would round; "
            f"accepted: a model whose own is {tensor.dtype} or wider"
        )


def _fill(
    root: nn.Module, config: dict[str, Any], pairs: _Pairs, others: dict[str, Tensor]
) -> None:
    """Puts the values into a model that is converted already."""
    layers = _adapters(root, "a plain or converted model")
    unknown, lacking = sorted(pairs.keys() - layers.keys()), sorted(layers.keys() - pairs.keys())
    if unknown or lacking:
        raise ConfigError(
            "directory and model do not fit: "
            + (f"the model has no adapted layer {shown(unknown[0])}; " if unknown else "")
            + (f"the file has nothing for {', '.join(lacking[:3])}; " if lacking else "")
            + "accepted: the same layers in both"
        )
    _check_places(root, layers.values(), pairs)
    _missing(config, (n for n, _ in root.named_modules() if not _inside(n, layers)), set(pairs))
    for name, (A, B) in pairs.items():
        layer = layers[name]
        r, alpha, rslora = _settings(config, name, A)
        held_A, held_B = layer.frozen_A(), layer.trained_B()
        if tuple(held_A.shape) != tuple(A.shape) or tuple(held_B.shape) != tuple(B.shape):
            raise ConfigError(
                f"directory: layer {name!r} has lora_A {shown(tuple(A.shape))} and lora_B "
                f"{shown(tuple(B.shape))}; accepted by the model: {tuple(held_A.shape)} and "
                f"{tuple(held_B.shape)}"
            )
        if scaling_of(r, alpha, rslora) != layer.adapter_scaling():
            raise ConfigError(
                f"directory: layer {name!r} is scaled by {scaling_of(r, alpha, rslora):g}; "
                f"accepted by the model: {layer.adapter_scaling():g}"
            )
        _check_exact(f"lora_A of {name}", A, held_A)
        _check_exact(f"lora_B of {name}", B, held_B)
    saved = _saved_by_owner(root, layers)
    wrapped = _wrapped_by_peft(root)
    plain = [n for n, _ in root.named_modules() if not any(n.startswith(w + ".") for w in wrapped)]
    for name in _wanted_by_peft(plain, config.get("modules_to_save") or []):
        saved.setdefault(name, root.get_submodule(name))
    places = {f"{n}.{k}": v for n, m in saved.items() for k, v in plain_state(m).items()}
    _fit_others(places, others)
    frozen = frozen_weights(root)
    for name in sorted(others.keys() & frozen.keys()):
        if not frozen[name].holds(others[name]):
            raise ConfigError(
                f"directory: tensor {name!r} is not what the model keeps in "
                f"{frozen[name].stored.dtype}; accepted: that weight up to its rounding, or a "
                "model converted with this module in modules_to_save"
            )
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            layers[name].frozen_A().copy_(A)
            layers[name].trained_B().copy_(B)
        for name, tensor in others.items():
            # state_dict's tensors are the parameters' own memory; those of frozen layers, made for
            # the comparison above, are not, and what is stored stays.
            places[name].copy_(tensor)


def _convert_to(
    root: nn.Module, config: dict[str, Any], pairs: _Pairs, others: dict[str, Tensor]
) -> None:
    """Converts a plain model into the one that the file was made from."""
    if lora_layers(root):
        raise ConfigError(
            "model holds PEFT's own LoRA layers; accepted: a plain model, or convert(model) first"
        )
    modules = dict(root.named_modules(remove_duplicate=False))
    found: dict[nn.Module, str] = {}
    for name, (A, B) in pairs.items():
        module: Any = modules.get(name)
        if module is None or name == "":
            raise ConfigError(f"directory: layer {shown(name)} is in the file and not in the model")
        if not can_adapt(module):
            raise ConfigError(
                f"directory: layer {name!r} is {type(module).__name__} in the model; accepted: "
                f"{ADAPTABLE}"
            )
        check_replaceable(name, module)
        _settings(config, name, A)
        conv = is_conv1d(module)
        d_in = module.weight.shape[0] if conv else module.in_features
        _check_shapes(name, A, B, d_in, module.nf if conv else module.out_features)
        first = found.setdefault(module, name)
        same = zip(pairs[first], (A, B), strict=True)
        if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in same):
            raise ConfigError(
                f"directory: {first!r} and {name!r} are one layer in the model, with different "
                "tensors in the file; accepted: the model that the adapter was made for"
            )
    _check_places(root, found, pairs)
    _missing(config, (n for n, m in modules.items() if m not in found), set(pairs))
    wanted = _wanted_by_peft(modules, config.get("modules_to_save") or [])
    for name in wanted:
        if any(_inside(other, [name]) for other in pairs):
            raise ConfigError(f"directory: module {name!r} is adapted and in modules_to_save")
    places = {f"{n}.{k}": v for n in wanted for k, v in modules[n].state_dict().items()}
    _fit_others(places, others)

    # Nothing below fails: what is changed here is not taken back.
    adapted: dict[nn.Module, Adapter] = {}
    for old, name in found.items():
        A, B = pairs[name]
        r, alpha, rslora = _settings(config, name, A)
        dropout = float(config.get("lora_dropout") or 0.0)
        new: Any = make_adapter(old, r, alpha, init="kaiming", dropout=dropout, rslora=rslora)
        new.init = "file"
        for part, tensor in (("lora_A", A), ("lora_B", B)):
            held = getattr(new, part)
            # As wide as the file's: its bits stay.
            dtype = torch.promote_types(tensor.dtype, held.dtype)
            held.data = tensor.to(device=held.device, dtype=dtype, copy=True)
        adapted[old] = new
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    put_in(root, adapted)
    for new in adapted.values():
        new.trained_B().requires_grad_(True)
    with torch.no_grad():
        for name, tensor in others.items():
            places[name].copy_(tensor)
    for name in wanted:
        modules[name].requires_grad_(True)
