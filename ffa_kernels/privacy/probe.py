"""A probe for coupled records: change one record, and see whether another's gradient moves.

Clipping bounds what a record adds to the sum through its own gradient. A loss that divides by the
batch's number of tokens, a norm over the batch or a router with a capacity let it move the others'
gradients as well, and no bound holds. Some layers are known for that and refused by name; this
finds the rest, on two or three records of a first batch, before anything is released.
"""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffa_kernels.errors import PrivacyError
from ffa_kernels.nn.record_taps import RecordTaps

# Of the gradient's norm. Rows of one shape are computed alike, so that truth is near 0; a coupling
# through a count of tokens or records is near 1 here, with two records in the batch.
_TOLERANCE = 1e-3
_RECORDS = 3
_TRIES = 3
_IGNORED = -100

Holders = Sequence[tuple[nn.Parameter, Sequence[tuple[RecordTaps, str]]]]


class Probe:
    """Probes a model with the records of its first batch of two or more.

    Args:
        module: as given to `make_private`.
        holders: each trained tensor, and where layers look for its taps.
        loss_scale: what losses are multiplied with before backward.
    """

    def __init__(self, module: nn.Module, holders: Holders, loss_scale: float) -> None:
        self._module = weakref.ref(module)
        self._holders, self._loss_scale = holders, loss_scale
        self._tries = _TRIES
        self._seen: tuple[Any, int, tuple[bool, torch.dtype, str]] | None = None
        self._own_loss = False
        self._hook = module.register_forward_hook(_saw_forward, with_kwargs=True)

    @property
    def done(self) -> bool:
        """Whether there is nothing left to find out."""
        return self._tries == 0

    def saw(self, args: Any, kwargs: Any, output: Any, records: int, kept: int) -> None:
        """A forward for a batch of `records` rows, the first `kept` no padding, was made."""
        packed = any(taps.cu_seqlens is not None for taps in self._taps())
        if self.done or kept < 2 or packed:
            return
        device = self._holders[0][0].device.type
        autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), device)
        some = range(min(kept, _RECORDS))
        self._seen = _rows((args, kwargs), records, some), len(some), autocast
        self._own_loss = False
        loss = _loss(output)
        if loss is not None and loss.requires_grad:
            # The model's own loss matters only if it is the one that is trained on.
            loss.register_hook(self._used)  # type: ignore[no-untyped-call]

    def _used(self, _: Tensor) -> None:
        self._own_loss = True

    def run(self) -> None:
        """Probes what was seen since the last call.

        Raises:
            PrivacyError: a record's gradient depends on another record.
        """
        seen, self._seen = self._seen, None
        module = self._module()
        if self.done or seen is None or module is None:
            return
        batch, records, (enabled, dtype, device) = seen
        own_loss = self._own_loss

        def loss_of(batch: Any) -> Tensor | None:
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                output = module(*batch[0], **batch[1])
            return _loss(output) if own_loss else _surrogate(output, 2)

        what = (
            "the model's loss, or one of its layers," if own_loss else "one of the model's layers"
        )
        self.attempt(loss_of, batch, records, what)

    def attempt(
        self, loss_of: Callable[[Any], Tensor | None], batch: Any, records: int, what: str
    ) -> None:
        """As `check`, until it has once succeeded; a batch that cannot be probed is let pass.

        Raises:
            PrivacyError: a record's gradient depends on another record.
        """
        if self.done:
            return
        self._tries -= 1
        try:
            conclusive = self.check(loss_of, batch, records, what)
        except PrivacyError:
            raise
        except Exception as error:
            conclusive = False
            if self.done:
                warnings.warn(
                    "records could not be probed for dependence on each other: a batch of two was "
                    f"not taken ({type(error).__name__}: {error})",
                    stacklevel=2,
                )
        if conclusive:
            self._tries = 0
        if self.done:
            self._hook.remove()

    def check(
        self, loss_of: Callable[[Any], Tensor | None], batch: Any, records: int, what: str
    ) -> bool:
        """Probes `loss_of` with the first rows of a batch of so many `records`.

        Returns:
            Whether the records had a gradient to look at.

        Raises:
            PrivacyError: a record's gradient depends on another record, by way of `what`.
        """
        first = _rows(batch, records, [0, 1])
        others = [_rows(batch, records, [0, k]) for k in (2, 0) if k < records]
        others.append(_some_ignored(first))
        base, again = self._gradients(loss_of, first), self._gradients(loss_of, first)
        norm = _norm(base)
        if not 0 < norm < math.inf:
            return False
        # What differs between two equal runs (atomic sums, say) is no coupling.
        allowed = _TOLERANCE * norm + 4 * _distance(base, again)
        for other in others:
            try:
                moved = _distance(base, self._gradients(loss_of, other))
            except (RuntimeError, IndexError, ValueError):
                # Not every loss knows labels to leave out.
                continue
            if not moved <= allowed:
                raise PrivacyError(
                    f"a record's gradient moved by {moved / norm:.2g} of its norm when another "
                    f"record of its batch was changed: {what} couples records (a mean over the "
                    "batch's tokens, as in transformers' causal-LM loss, or a norm over the batch, "
                    "say), so that no bound on a record's share would hold; accepted: a mean or "
                    "sum of losses of single records (ffa_kernels.causal_lm_loss is one)"
                )
        return True

    def _taps(self) -> Iterator[RecordTaps]:
        return (taps for _, holders in self._holders for taps, _ in holders)

    def _gradients(self, loss_of: Callable[[Any], Tensor | None], batch: Any) -> list[Tensor]:
        """The first record's gradient of each trained tensor, fp64."""
        held = [(taps, dict(taps.taps), dict(taps.norm_taps)) for taps in self._taps()]
        leaves: list[Tensor] = []
        for parameter, holders in self._holders:
            tap = parameter.new_zeros(()).expand(2, *parameter.shape).detach().requires_grad_()
            leaves.append(tap)
            for taps, name in holders:
                taps.taps[name] = tap
                taps.norm_taps.pop(name, None)
        devices = {p.device for p, _ in self._holders if p.device.type == "cuda"}
        try:
            with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
                loss = loss_of(batch)
                if loss is not None and loss.requires_grad:
                    # Not autograd.grad: checkpoints of the older kind know only this.
                    (loss.sum() * self._loss_scale).backward()  # type: ignore[no-untyped-call]
        finally:
            for taps, values, norms in held:
                taps.taps, taps.norm_taps = values, norms
        return [leaf.grad[0].double() for leaf in leaves if leaf.grad is not None]


def _saw_forward(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Forward hook of a private model; a function of this module, and so no obstacle to copies."""
    if torch.compiler.is_compiling():
        return
    reference = getattr(module, "_private_step", None)
    step = None if reference is None else reference.step
    if step is None or step.probe is None or not module.training or not torch.is_grad_enabled():
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    piece = step.piece
    if piece is not None:
        step.probe.saw(args, kwargs, output, piece.records, piece.kept)


def _map(value: Any, change: Callable[[Tensor, str], Tensor], name: str = "") -> Any:
    """`value` with its tensors changed; `change` is told the key that a tensor has."""
    if isinstance(value, Tensor):
        return change(value, name)
    if isinstance(value, Mapping):
        return {key: _map(item, change, str(key)) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, change, name) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, change, name) for item in value)
    return value


def _rows(value: Any, records: int, wanted: Sequence[int]) -> Any:
    """A copy of `value` with the `wanted` rows of what has one for each record."""

    def taken(tensor: Tensor, _: str) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != records:
            return tensor
        return tensor.detach()[list(wanted)]

    return _map(value, taken)


def rows_of(batch: Any) -> int:
    """The first dimension of the batch's first tensor that has one; 0 without any."""
    found: list[int] = []

    def note(tensor: Tensor, _: str) -> Tensor:
        found.extend(tensor.shape[:1])
        return tensor

    _map(batch, note)
    return found[0] if found else 0


def _some_ignored(batch: Any) -> Any:
    """`batch` with fewer tokens to predict in its second record."""

    def fewer(tensor: Tensor, name: str) -> Tensor:
        if name != "labels" or tensor.dim() < 2 or tensor.is_floating_point():
            return tensor
        changed = tensor.clone()
        changed[1, changed.shape[1] // 2 :] = _IGNORED
        return changed

    return _map(batch, fewer)


def _loss(output: Any) -> Tensor | None:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def _surrogate(output: Any, records: int) -> Tensor | None:
    """A sum over records, each of whose terms depends on that record's outputs alone."""
    total: list[Tensor] = []

    def add(tensor: Tensor, name: str) -> Tensor:
        rows = tensor.dim() > 0 and tensor.shape[0] == records and name != "loss"
        if rows and tensor.requires_grad and tensor.is_floating_point():
            flat = tensor.reshape(records, -1).float()
            total.append((flat * torch.arange(flat.shape[1], device=flat.device).cos()).sum())
        return tensor

    with contextlib.suppress(TypeError):
        _map(output, add)
    return torch.stack([t.to(total[0].device) for t in total]).sum() if total else None


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    if len(a) != len(b):
        return math.inf
    return _norm(x - y for x, y in zip(a, b, strict=True))
