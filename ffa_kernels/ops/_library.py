"""The `ffa` operator library: how an op's schema, implementation and fake are registered."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from typing import Any

import torch

from ffa_kernels.backends.dispatch import kernel
from ffa_kernels.errors import ConfigError

# `Library.define` and not `custom_op`: half the overhead a call, which small models feel.
LIBRARY: Any = torch.library.Library("ffa", "DEF")  # type: ignore[no-untyped-call]
# Asked at each call, when a model's own work has long thrown torch's tables out of the cache.
_is_compiling = torch.compiler.is_compiling
_autocasts = torch._C._is_any_autocast_enabled
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_profiles = torch._C._autograd._profiler_enabled
_traces = torch._C._get_tracing_state
_PLAIN = frozenset(
    (torch.Tensor, torch.nn.Parameter, type(None), float, int, bool, str, torch.dtype)
)


def define(
    schema: str,
    check: Callable[..., object],
    chosen_by: Callable[..., Sequence[torch.Tensor]],
    fake: Callable[..., Any],
) -> Any:
    """Registers `ffa::<name>` of `schema` for every device.

    Args:
        schema: of the op, as PyTorch writes it.
        check: given the op's arguments, raises ConfigError unless they fit together.
        chosen_by: given the op's arguments, the tensors whose device and dtypes decide the
            backend; its function of the op's name is then called with the arguments.
        fake: given the op's arguments, its outputs without values.

    Returns:
        The callable op. Where no gradient is recorded it runs the implementation on plain tensors
        without the dispatcher, whose way into Python takes longer than a small layer; one that
        writes to its inputs is for `call_in_place`. Its attribute `implementation` is for callers
        that see to all of this themselves.
    """
    name = schema.split("(", 1)[0]

    def implementation(*arguments: Any) -> Any:
        check(*arguments)
        chosen = chosen_by(*arguments)
        function = kernel(name, *chosen)
        if _autocasts():
            # Which casts there are is the caller's affair: here the dtypes are those of the inputs.
            with torch.autocast(chosen[0].device.type, enabled=False):
                return function(*arguments)
        return function(*arguments)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffa::{name}", fake, lib=LIBRARY)
    registered = getattr(torch.ops.ffa, name).default
    writes = "!" in schema

    def op(*arguments: Any) -> Any:
        direct = not writes and not torch.is_grad_enabled() and values_alone(arguments)
        return (implementation if direct else registered)(*arguments)

    op.implementation = implementation  # type: ignore[attr-defined]
    return op


def call_in_place(op: Any, arguments: tuple[Any, ...], written: list[torch.Tensor]) -> Any:
    """Calls an op that writes to its inputs, without the dispatcher where it may be.

    Args:
        op: what `define` returned.
        arguments: of the op.
        written: the tensors among them that it writes to, below autograd: their versions are
            counted here.
    """
    torch.autograd.graph.increment_version(written)
    flat = chain.from_iterable([a if type(a) is list else (a,) for a in arguments])
    with torch.no_grad():
        return (op.implementation if values_alone(flat) else op)(*arguments)


def values_alone(arguments: Iterable[object]) -> bool:
    """Whether nobody asks for more than values: no compiler, mode, transform, subclass, profile or
    trace."""
    return not (
        _is_compiling()
        or _modes()
        or _transforms()
        or _profiles()
        or _traces() is not None
        or not _PLAIN.issuperset(map(type, arguments))
    )


def by_first(first: torch.Tensor, *_: object) -> tuple[torch.Tensor]:
    """`chosen_by` for an op that its first tensor decides."""
    return (first,)


def require(condition: bool, message: Callable[[], str]) -> None:
    """Raises ConfigError with `message()` unless `condition`."""
    if not condition:
        raise ConfigError(message())


def require_each(hold: list[bool], message: Callable[[int], str]) -> None:
    """Raises ConfigError with `message(k)` for the first k where `hold` is False."""
    if not all(hold):
        raise ConfigError(message(hold.index(False)))


def require_same(found: list[Any], wanted: list[Any], message: Callable[[int], str]) -> None:
    """Raises ConfigError with `message(k)` for the first k where two lists of a length differ."""
    if found != wanted:
        require_each([a == b for a, b in zip(found, wanted, strict=True)], message)


_DEVICE = operator.attrgetter("device")


def check_devices(
    op: str, wanted: torch.Tensor, named: dict[str, torch.Tensor | list[torch.Tensor]]
) -> None:
    """All on the device of `wanted`: a kernel is given addresses, and none says where it leads."""
    device = wanted.device
    for name, given in named.items():
        tensors = given if isinstance(given, list) else [given]
        if not {device}.issuperset(map(_DEVICE, tensors)):
            k = [t.device == device for t in tensors].index(False)
            place = f"{name}[{k}]" if given is tensors else name
            raise ConfigError(
                f"{op}: {place} is on {tensors[k].device}; accepted: {device}, with the others"
            )


def check_rng_state(op: str, argument: str, state: torch.Tensor) -> None:
    """The layout of `rng_state`: int64 (5,), a 256-bit key as four words, then the step."""
    require(
        # Words that lie at one address could not be counted on by themselves.
        state.dtype == torch.int64 and tuple(state.shape) == (5,) and state.stride(0) != 0,
        lambda: (
            f"{op}: {argument} is {state.dtype} {tuple(state.shape)}; accepted: int64 (5,), of "
            "its own elements"
        ),
    )


def check_offsets(op: str, cu_seqlens: torch.Tensor, rows: int, device: torch.device) -> None:
    """`cu_seqlens`: int32 (n + 1,), not falling, within the rows. Values are read on a CPU only:
    on a GPU that would wait for the device, and the kernels clamp them instead."""
    require(
        cu_seqlens.dtype == torch.int32
        and cu_seqlens.dim() == 1
        and cu_seqlens.shape[0] >= 1
        and cu_seqlens.device == device,
        lambda: (
            f"{op}: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} on "
            f"{cu_seqlens.device}; accepted: int32 (n + 1,) on {device}"
        ),
    )
    if type(cu_seqlens) is torch.Tensor and cu_seqlens.device.type == "cpu":
        offsets = cu_seqlens.tolist()
        require(
            offsets[0] >= 0 and offsets[-1] <= rows and all(a <= b for a, b in pairwise(offsets)),
            lambda: (
                f"{op}: cu_seqlens is {offsets}; accepted: numbers that do not fall, from 0 to "
                f"{rows}, the number of rows"
            ),
        )
