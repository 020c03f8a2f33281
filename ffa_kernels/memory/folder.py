"""A transformers model from its folder's config.json alone: shapes on the meta device, no weights.

Nothing is read from the network, and no code of the folder's own is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffa_kernels.errors import ConfigError
from ffa_kernels.nn.conversion import can_adapt, convert


def from_folder(
    folder: Path, rank: int, target_modules: Sequence[str] | None, dtype: str
) -> nn.Module:
    """The converted model of `folder` on the meta device.

    Args:
        folder: with a config.json whose "architectures" names a class of transformers.
        rank: of the adapters.
        target_modules: as in `convert`; None for the linear layers of all numbered blocks.
        dtype: of the weights, "float32" say.

    Raises:
        ConfigError: no such folder, or a config that names no class of transformers.
    """
    import transformers

    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"MODEL is {folder}; accepted: a local folder with a config.json")
    try:
        found = json.loads(path.read_text())
        name = found["architectures"][0]
    except (ValueError, KeyError, TypeError, IndexError):
        raise ConfigError(
            f"MODEL is {folder}, whose config.json names no architecture; accepted: one with "
            '"architectures": ["BertForSequenceClassification"], say'
        ) from None
    made: Any = getattr(transformers, str(name), None)
    if getattr(made, "config_class", None) is None:
        raise ConfigError(
            f"MODEL's config.json names {name!r}; accepted: a model class of transformers "
            f"{transformers.__version__}"
        )
    config = made.config_class.from_pretrained(str(folder), local_files_only=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device("meta"):
            model: nn.Module = made(config)
    finally:
        torch.set_default_dtype(before)
    heads = [n for n in ("classifier", "score") if isinstance(getattr(model, n, None), nn.Module)]
    targets = block_layers(model) if target_modules is None else list(target_modules)
    # Only A's shape matters: the one that is made fastest.
    return convert(model, rank, target_modules=targets, init="kaiming", modules_to_save=heads)


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
