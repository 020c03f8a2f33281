"""The `ffa` operator library: how an op's schema, implementation and fake are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ffa_kernels.errors import ConfigError

# `Library.define` and not `custom_op`: half the overhead a call, which small models feel.
LIBRARY: Any = torch.library.Library("ffa", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers `ffa::<name>` of `schema` for every device; returns the callable op."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffa::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.ffa, name).default


def require(condition: bool, message: Callable[[], str]) -> None:
    """Raises ConfigError with `message()` unless `condition`."""
    if not condition:
        raise ConfigError(message())


def check_rng_state(op: str, argument: str, state: torch.Tensor) -> None:
    """The layout of `rng_state`: int64 (5,), a 256-bit key as four words, then the step."""
    require(
        state.dtype == torch.int64 and tuple(state.shape) == (5,),
        lambda: f"{op}: {argument} is {state.dtype} {tuple(state.shape)}; accepted: int64 (5,)",
    )
