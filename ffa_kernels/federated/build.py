"""The model that every site begins with: a base with a head, adapted by the configured method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ffa_kernels.errors import ConfigError
from ffa_kernels.federated.config import Config, Model, SiteFiles
from ffa_kernels.nn import convert
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.nn.init import frozen_A, pissa_A
from ffa_kernels.nn.linear import FFALinear, OwnAdapter

# Of a text's logits, beside a longer one: more than any dtype's rounding.
_ROUNDING = 0.05


def build(config: Config, site: SiteFiles | None = None) -> tuple[nn.Module, Any]:
    """(adapted model, its tokenizer), the same in every process with the same configuration.

    An A that the server sends is zeros here: with it nothing can be trained (see `derive_A`).

    Args:
        site: a site whose rank or layers may be its own; the whole federation's by default.

    Raises:
        ConfigError: a model that cannot be loaded, or names that it does not have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.federation.seed)
        model, tokenizer = _base(config.model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                # Its masks come from torch's generator: one record more would shift all others'.
                # LoRA dropout (config.model.dropout) is keyed by the privacy engine.
                module.p = 0.0
        if config.federation.method == "ffa":
            _convert(model, config, site)
            if config.federation.rebasis_every:
                _check_foldable(model)
        else:
            _add_lora(model, config)
    return model, tokenizer


@torch.no_grad()
def derive_A(model: nn.Module) -> None:
    """Makes the A that the server sends, in place, from each adapted layer's weight.

    Raises:
        ConfigError: the rank is larger than a weight has singular vectors.
    """
    for layer in model.modules():
        if isinstance(layer, Adapter):
            A = layer.frozen_A()
            A.copy_(pissa_A(layer.base_weight(), len(A)))


def _base(config: Model) -> tuple[nn.Module, Any]:
    if config.kind == "minilm":
        from ffa_kernels.federated.models import build_minilm_classifier

        model, tokenizer = build_minilm_classifier(config.classes, prompts=config.prompts)
        if config.cached_layers:
            return _above_cached_layers(model, tokenizer, config)
        return model, tokenizer
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.kind, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(
            config.kind, num_labels=config.classes, local_files_only=True
        )
        moved = _moved_by_padding(model, tokenizer)
    except RuntimeError as error:
        held = AutoConfig.from_pretrained(config.kind, local_files_only=True).num_labels
        if held == config.classes:
            raise
        raise ConfigError(
            f"[model] classes: got {config.classes}, where the head in {config.kind} is of {held}; "
            f"accepted: {held}, or a folder without a head"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"[model] kind: {config.kind} does not load as a sequence classifier ({error}); "
            "accepted: a folder with config, weights and tokenizer"
        ) from error
    if not moved <= _ROUNDING:
        raise ConfigError(
            f"[model] kind: the logits that {config.kind} makes of a text move by {moved:.2g} of "
            "their norm when a longer one stands beside it, so that no bound on a record's share "
            "would hold; accepted: a model that leaves out padding by its attention_mask"
        )
    return model, tokenizer


@torch.no_grad()
def _moved_by_padding(model: Any, tokenizer: Any) -> float:
    """By what share of their norm a text's logits move when it is padded; the texts are public."""
    texts = ["good", "a text of some more words, so that the other one is padded beside it"]
    training = model.training
    model.eval()
    alone, beside = (
        model(**tokenizer(batch, padding=True, return_tensors="pt")).logits[0].double()
        for batch in (texts[:1], texts)
    )
    model.train(training)
    return float((alone - beside).norm() / alone.norm().clamp(min=1e-12))


def _above_cached_layers(model: Any, tokenizer: Any, config: Model) -> tuple[nn.Module, Any]:
    from ffa_kernels.federated.models import without_lower_layers

    try:
        upper, lower = without_lower_layers(model, tokenizer, config.cached_layers)
    except ConfigError as error:
        raise ConfigError(f"[model] cached_layers: {error}") from error
    # Many models of one process, the trials of a pilot say, share what is kept.
    return upper, _lower_layers.setdefault((config.cached_layers, config.max_length), lower)


_lower_layers: dict[tuple[int, int], Any] = {}


def _convert(model: nn.Module, config: Config, site: SiteFiles | None) -> None:
    adapter = config.model
    r = (site and site.r) or adapter.r
    convert(
        model,
        r=r,
        # One s = alpha / r for all.
        alpha=adapter.alpha * r / adapter.r,
        target_modules=(site and site.target_modules) or adapter.target_modules,
        # Any recipe: what is sent takes its place.
        init="kaiming" if config.sends_A else adapter.init,
        seed=config.federation.seed,
        dropout=adapter.dropout,
        modules_to_save=adapter.modules_to_save,
        base_dtype=None if adapter.base_dtype == "fp32" else adapter.base_dtype,
    )
    for name, layer in model.named_modules():
        if config.sends_A and isinstance(layer, OwnAdapter):
            layer.lora_A.zero_()
            layer.init = adapter.init
        elif r != adapter.r and isinstance(layer, OwnAdapter):
            A = frozen_A(adapter.init, config.federation.seed, name, adapter.r, layer.in_features)
            layer.lora_A.copy_(A[:r])


def _check_foldable(model: nn.Module) -> None:
    """Raises ConfigError unless s B A can be added to the weight of each adapted layer alone."""
    given = "[federation] rebasis_every: got a model whose layer"
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Adapter)}
    for name, layer in layers.items():
        weight = layer.frozen_weight()
        if weight is None or not isinstance(layer, FFALinear):
            raise ConfigError(
                f"{given} {name!r} keeps its weight in a form of its own, quantised say; accepted: "
                "0, or ordinary weights in fp32"
            )
        if weight.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"{given} {name!r} has a weight in {weight.dtype}, whose rounding would swallow "
                "small updates; accepted: 0, or weights in fp32"
            )
    places = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    held = Counter(tensor.data_ptr() for _, tensor in places)
    for name, layer in layers.items():
        if held[layer.base_weight().data_ptr()] > 1:
            raise ConfigError(
                f"{given} {name!r} shares its weight with another place; accepted: 0, or adapted "
                "layers with weights of their own"
            )


def _add_lora(model: nn.Module, config: Config) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    adapter = config.model
    if adapter.dropout:
        raise ConfigError(
            f"[model] dropout: got {adapter.dropout} with method = {config.federation.method!r}, "
            "whose masks are not secret; accepted: 0, or method = 'ffa'"
        )
    modules = dict(model.named_modules())
    for key in ("target_modules", "modules_to_save"):
        names: Sequence[str] = getattr(adapter, key)
        for name in names:
            if not any(_ends_with(full, name) for full in modules):
                raise ConfigError(f"[model] {key}: the model has no module {name!r}")
    saved = [m for n, m in modules.items() for s in adapter.modules_to_save if _ends_with(n, s)]
    settings = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        target_modules=list(adapter.target_modules),
    )
    try:
        inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise ConfigError(f"[model] target_modules: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for module in saved:
        module.requires_grad_(True)


def _ends_with(full: str, name: str) -> bool:
    return full == name or full.endswith("." + name)
