"""A transformers model from its config alone: shapes on the meta device, no weights.

Nothing is read from the network, and no code of the folder's own is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffa_kernels.errors import ConfigError, shown
from ffa_kernels.nn.conversion import can_adapt, convert

# Of a layer: A is made in earnest, and takes r d_in numbers.
_WIDEST = 1 << 20


def from_folder(
    folder: Path, rank: int, target_modules: Sequence[str] | None, dtype: str
) -> nn.Module:
    """The converted model of `folder` on the meta device.

    Args:
        folder: with a config.json whose "architectures" names a class of transformers; or no
            folder, but such a class or a model type with sizes that its config shall have, as in
            `llama:hidden_size=512,num_hidden_layers=4`.
        rank: of the adapters.
        target_modules: as in `convert`; None for the linear layers of all numbered blocks.
        dtype: of the weights, "float32" say.

    Raises:
        ConfigError: none of these, or a config that names no class of transformers.
    """
    # Unlike pathlib's, this takes a name that is too long for one of nothing.
    found = os.path.exists(folder)
    made, config = _in_folder(folder) if found else _by_name(str(folder))
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device("meta"):
            model: nn.Module = made(config)
    except Exception as error:  # whatever a model does not check
        raise _not_accepted(made, error) from error
    finally:
        torch.set_default_dtype(before)
    for name, module in model.named_modules():
        if can_adapt(module) and max(weight := tuple(module.weight.shape)) > _WIDEST:
            raise ConfigError(
                f"MODEL: {made.__name__}'s layer {name!r} has the weight {weight}; accepted: up to "
                f"{_WIDEST} in each direction"
            )
    heads = [n for n in ("classifier", "score") if isinstance(getattr(model, n, None), nn.Module)]
    targets = block_layers(model) if target_modules is None else list(target_modules)
    # Only A's shape matters: the one that is made fastest.
    return convert(model, rank, target_modules=targets, init="kaiming", modules_to_save=heads)


def _in_folder(folder: Path) -> tuple[Any, Any]:
    """A model class of transformers and its config."""
    import transformers

    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"MODEL is {folder}; accepted: a local folder with a config.json")
    try:
        found = json.loads(path.read_text())
        name = found["architectures"][0]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise ConfigError(
            f"MODEL is {folder}, whose config.json names no architecture; accepted: one with "
            '"architectures": ["BertForSequenceClassification"], say'
        ) from None
    made: Any = getattr(transformers, str(name), None)
    if getattr(made, "config_class", None) is None:
        raise ConfigError(
            f"MODEL's config.json names {shown(name)}; accepted: a model class of transformers "
            f"{transformers.__version__}"
        )
    try:
        return made, made.config_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a config does not check
        raise _not_accepted(made, error) from error


def _not_accepted(made: Any, error: Exception) -> ConfigError:
    return ConfigError(
        f"MODEL: {made.__name__} does not accept its config ({shown(error, str)}); accepted: sizes "
        "that fit together"
    )


def _by_name(given: str) -> tuple[Any, Any]:
    """The class and config of `type` or `type:size=value,...`."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    name, _, sizes = given.partition(":")
    # A type that fills masks is an encoder, which is trained to classify.
    of_type = {
        **auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        **{
            kind: cls
            for kind, cls in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.items()
            if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        },
    }
    cls = of_type.get(name, name)
    made: Any = getattr(transformers, cls if isinstance(cls, str) else cls[0], None)
    if getattr(made, "config_class", None) is None:
        near = get_close_matches(name, of_type, n=3)
        raise ConfigError(
            f"MODEL is {shown(given, str)}; accepted: a local folder with a config.json, or a "
            "model type or class of transformers with sizes, as in "
            "llama:hidden_size=512,num_hidden_layers=4"
            + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    known, values = made.config_class(), {}
    for part in filter(None, sizes.split(",")):
        size, _, value = part.partition("=")
        if not hasattr(known, size):
            near = get_close_matches(size, vars(known), n=3)
            raise ConfigError(
                f"MODEL gives {shown(size)}, which {type(known).__name__} does not have"
                + (f"; did you mean {', '.join(near)}?" if near else "")
            )
        try:
            values[size] = json.loads(value)
        except (ValueError, RecursionError):
            raise ConfigError(
                f"MODEL gives {shown(part)}; accepted: {size}= with a number, true or false"
            ) from None
    try:
        return made, made.config_class(**values)
    except Exception as error:  # whatever a config does not check
        raise _not_accepted(made, error) from error


def block_layers(model: nn.Module) -> list[str]:
    """The last names of all layers in numbered blocks that can be adapted."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if can_adapt(module) and any(part.isdigit() for part in name.split(".")[:-1])
    }
    if not names:
        raise ConfigError(
            f"--target-modules is not given, and {type(model).__name__} has no numbered blocks "
            "with linear layers; accepted: names of the layers to adapt"
        )
    return sorted(names)
