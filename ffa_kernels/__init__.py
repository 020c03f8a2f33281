"""Fused kernels, drop-in modules and a private training engine for FFA-LoRA (arXiv 2403.12313)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffa_kernels.losses import causal_lm_loss, chunked_causal_lm_loss
    from ffa_kernels.memory import fit_to_memory, plan
    from ffa_kernels.nn import (
        FFALinear,
        FFAWrapped,
        FrozenBase,
        convert,
        load_adapter,
        merge,
        packed,
        save_adapter,
    )
    from ffa_kernels.privacy import PrivacyEngine
    from ffa_kernels.trainer import PrivateTrainer

__version__ = "0.1.0"
__all__ = [
    "FFALinear",
    "FFAWrapped",
    "FrozenBase",
    "PrivacyEngine",
    "PrivateTrainer",
    "causal_lm_loss",
    "chunked_causal_lm_loss",
    "convert",
    "fit_to_memory",
    "load_adapter",
    "merge",
    "packed",
    "plan",
    "save_adapter",
]

_HOMES = {
    "FFALinear": "ffa_kernels.nn",
    "FFAWrapped": "ffa_kernels.nn",
    "FrozenBase": "ffa_kernels.nn",
    "convert": "ffa_kernels.nn",
    "load_adapter": "ffa_kernels.nn",
    "merge": "ffa_kernels.nn",
    "packed": "ffa_kernels.nn",
    "save_adapter": "ffa_kernels.nn",
    "PrivacyEngine": "ffa_kernels.privacy",
    "PrivateTrainer": "ffa_kernels.trainer",
    "causal_lm_loss": "ffa_kernels.losses",
    "chunked_causal_lm_loss": "ffa_kernels.losses",
    "fit_to_memory": "ffa_kernels.memory",
    "plan": "ffa_kernels.memory",
}
_SUBMODULES = ("federated", "losses", "memory", "nn", "ops", "privacy")


def __getattr__(name: str) -> Any:
    # Resolved at first use: `import ffa_kernels` alone stays a few milliseconds.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"ffa_kernels.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_SUBMODULES])
