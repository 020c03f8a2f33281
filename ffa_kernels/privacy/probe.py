"""A probe for coupled records: change one record, and see whether another's gradient moves.

Clipping bounds what a record adds to the sum through its own gradient. A loss that divides by the
batch's number of tokens, a norm over the batch or a router with a capacity let it move the others'
gradients as well, and no bound holds. Some layers are known for that and refused by name; this
finds the rest, with two records at a time, before anything of the batch is released.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffa_kernels.errors import CoupledError, PrivacyError
from ffa_kernels.nn.record_taps import RecordTaps
from ffa_kernels.privacy.keys import generators_kept

# Of the gradient's norm. Rows of one shape are computed alike, so that truth is near 0; a coupling
# through a count of tokens or records is near 1 here, with two records in the batch. In half
# precision a mask may send a row to another kernel of attention.
_TOLERANCE = 1e-3
_HALF_TOLERANCE = 0.1
# Two equal runs that differ by more than this tell nothing.
_STEADY = 1e-2
# How often a coupling is found before it is believed.
_REPEATS = 8
# Physical batches, of two records or more, that are probed: later ones may be of another kind.
_PROBED = (1, 2, 4, 8)
_IGNORED = -100

Holders = Sequence[tuple[nn.Parameter, Sequence[tuple[RecordTaps, str]]]]


class Probe:
    """Probes a model with records of its first batches.

    Args:
        module: as given to `make_private`.
        holders: each trained tensor, and where layers look for its taps.
        loss_scale: what losses are multiplied with before backward.
        per_layer: each tensor is clipped by itself.
    """

    def __init__(
        self, module: nn.Module, holders: Holders, loss_scale: float, per_layer: bool
    ) -> None:
        self._module = weakref.ref(module)
        self._holders, self._loss_scale, self._per_layer = holders, loss_scale, per_layer
        self._batches = 0
        self._seen: list[_Seen] = []
        # A forward of the probe's own is none of a batch.
        self._running = False
        self._concluded = self._warned = False
        self._why = "the model's forward was not seen (compiled, or called by parts)"
        self._hook = module.register_forward_hook(_saw_forward, with_kwargs=True)

    @property
    def done(self) -> bool:
        """Whether no batch that comes will be probed."""
        return self._batches >= _PROBED[-1]

    @property
    def concluded(self) -> bool:
        """Whether a probe has had a gradient to look at, and found no coupling."""
        return self._concluded

    def end(self) -> None:
        """The model is another step's from now on."""
        self._hook.remove()

    def saw(self, args: Any, kwargs: Any, output: Any, records: int, kept: int) -> None:
        """A forward for a batch of `records` rows, the first `kept` no padding, was made."""
        if self._running or self.done or kept < 2 or self._batches + 1 not in _PROBED:
            return
        if any(taps.cu_seqlens is not None for taps in self._taps()):
            self._why = "its rows are packed"
            return
        device = self._holders[0][0].device.type
        autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), device)
        picked = _unlike((args, kwargs), records, kept)
        outputs = list(_tensors(output))
        seen = _Seen(
            batch=_rows((args, kwargs), records, picked),
            records=len(picked),
            autocast=autocast,
            # A model's own forward may have begun it and ended it.
            narrowed=autocast[0] or any(taps.narrowed for taps in self._taps()),
            shapes=[tuple(t.shape) for t in outputs],
            used=[False] * len(outputs),
        )
        self._seen.append(seen)
        for k, tensor in enumerate(outputs):
            if tensor.requires_grad:
                # What is trained on is what a gradient comes to; a loss that is only shown is not.
                tensor.register_hook(_mark(seen.used, k))  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """A batch begins: what was seen of the last one, if that was not stepped, is forgotten."""
        self._seen.clear()

    def run(self, kept: int) -> None:
        """Probes what was seen of a physical batch with `kept` records.

        Raises:
            CoupledError: a record's gradient depends on another record.
        """
        every, self._seen = self._seen, []
        if self.done or kept < 2:
            return
        module, number = self._module(), self._batches + 1
        for seen in every:
            # Apart: a loss is made of outputs that got a gradient by its way.
            for scalars in seen.kinds if module is not None else ():
                self._attempt(
                    functools.partial(_loss_again, module, seen, scalars),
                    *(seen.batch, seen.records, "the model's loss, or one of its layers,"),
                    seen.narrowed,
                )
        self._count(number)

    def attempt(
        self,
        loss_of: Callable[[Any], Tensor | None],
        batch: Any,
        records: int,
        what: str,
        autocast: bool,
    ) -> None:
        """As `check` and `check_reduction`, for a mean loss and a batch whose turn it is; one that
        cannot be probed is let pass.

        Raises:
            CoupledError: a record's gradient depends on another record.
        """
        if not self.done and self._batches + 1 in _PROBED:
            picked = _unlike(batch, records, records)
            rows = _rows(batch, records, picked)
            self._attempt(loss_of, rows, len(picked), what, autocast)
            self.check_reduction(loss_of, rows, len(picked), autocast, times_records=True)

    def _attempt(
        self,
        loss_of: Callable[[Any], Tensor | None],
        batch: Any,
        records: int,
        what: str,
        autocast: bool,
    ) -> None:
        try:
            found = self.check(loss_of, batch, records, what, autocast)
            self._concluded = found or self._concluded
        except Exception as error:
            # Tokens taken for records, unless it was the probe that left some as they were.
            if isinstance(error, CoupledError) or (
                isinstance(error, PrivacyError) and _is_plain(batch)
            ):
                raise
            self._why = f"a batch of two was not taken ({type(error).__name__}: {error})"
        else:
            if not self._concluded:
                self._why = "two records have no gradient, or one that changes by itself"

    def _count(self, number: int) -> None:
        self._batches = number
        if self.done:
            self._hook.remove()
            self.warn_unless_concluded()

    def warn_unless_concluded(self) -> None:
        """Once, where no batch of those that came could be probed."""
        if self._batches and not self._concluded and not self._warned:
            self._warned = True
            warnings.warn(
                f"records could not be probed for dependence on each other: {self._why}; "
                "PrivacyEngine.check_loss probes a loss by itself",
                stacklevel=2,
            )

    def check(
        self,
        loss_of: Callable[[Any], Tensor | None],
        batch: Any,
        records: int,
        what: str,
        autocast: bool = False,
    ) -> bool:
        """Probes `loss_of` with the first rows of a batch of so many `records`, three at most.

        Returns:
            Whether there were steady gradients to compare.

        Raises:
            CoupledError: a record's gradient depends on another record, by way of `what`.
            PrivacyError: two records do not stay two records on their way to a trained layer.
        """
        pair = _rows(batch, records, [0, 1])
        base, again = self._gradients(loss_of, pair), self._gradients(loss_of, pair)
        third = [2] if records > 2 else []
        # (the batch with one of its two records changed, the record that is as it was)
        changed = [(_rows(batch, records, [0, k]), 0, False) for k in (*third, 0)]
        changed += [(_rows(batch, records, [k, 1]), 1, False) for k in (*third, 1)]
        # Not where nothing is known to be a label: it would be the same batch once more.
        changed += [(b, k, True) for k in (0, 1) if (b := _some_ignored(pair, 1 - k)) is not None]
        compared = False
        for other, kept, ignored in changed:
            if not _steady(base, again, kept):
                continue
            try:
                found = self._gradients(loss_of, other)
            except (RuntimeError, IndexError, ValueError):
                # Not every loss knows labels to leave out.
                continue
            share = self._moved(base, again, found, kept, autocast)
            if ignored and share is not None and not _parallel(base, found, kept):
                # A count of labels changes a gradient's length alone. This loss does not know that
                # label, and may read whatever lies there in memory.
                continue
            # What moved by chance says nothing of the rest either.
            compared = compared or share is None
            if share is not None and all(
                # Chance (a generator that other threads draw from, say) does not do so again and
                # again, and shows between equal runs as well.
                self._moved_again(base, loss_of, pair, other, kept, autocast)
                for _ in range(_REPEATS)
            ):
                raise CoupledError(
                    f"a record's gradient moved by {share:.2g} of its norm when another "
                    f"record of its batch was changed: {what} couples records (a mean over the "
                    "batch's tokens, as in transformers' causal-LM loss, or a norm over the "
                    "batch, say), so that no bound on a record's share would hold; accepted: a "
                    "mean or sum of losses of single records (ffa_kernels.causal_lm_loss is one)"
                )
        return compared

    def check_reduction(
        self,
        loss_of: Callable[[Any], Tensor | None],
        batch: Any,
        records: int,
        autocast: bool,
        times_records: bool = False,
    ) -> None:
        """Compares a batch of two records with one of three: no gradient may follow their number.

        A loss that cannot be made of both tells nothing.

        Args:
            times_records: what is trained on is this loss times the number of records.

        Raises:
            CoupledError: a sum is taken for a mean, or a mean for a sum.
        """
        pair, three = [0, 1], [0, 1, 2 if records > 2 else 0]
        try:
            two, again, more = (
                self._gradients(
                    *(loss_of, _rows(batch, records, rows), len(rows)),
                    len(rows) if times_records else 1,
                )
                for rows in (pair, pair, three)
            )
        except Exception:
            return
        if two.keys() != more.keys() or not _steady(two, again, 0):
            return
        norm, tolerance = _norm(g[0] for g in two.values()), self._tolerance(autocast)
        for ratio, given, taken in ((3 / 2, "sum", "mean"), (2 / 3, "mean", "sum")):
            # Nothing else grows just so; masks that are drawn anew, say, go anywhere.
            if _norm(more[k][0] - ratio * two[k][0] for k in two) <= tolerance * norm:
                raise CoupledError(
                    f"a record's gradient is {ratio:.3g} times as large in a batch of three as in "
                    f"one of two: the loss is a {given} over records and taken for a {taken}, so "
                    "that one record more moves the gradients of all others; accepted: "
                    'make_private(loss_reduction="mean") for a mean and "sum" for a sum, and from '
                    "PrivateTrainer's compute_loss a mean"
                )

    def _moved_again(
        self,
        base: _Gradients,
        loss_of: Callable[[Any], Tensor | None],
        pair: Any,
        other: Any,
        kept: int,
        autocast: bool,
    ) -> bool:
        """Whether it moves once more, however far, beside what another equal run differs by."""
        fresh, repeat = self._gradients(loss_of, pair), self._gradients(loss_of, other)
        if base.keys() != fresh.keys() or not math.isfinite(_norm(g[kept] for g in fresh.values())):
            return False
        return self._moved(base, fresh, repeat, kept, autocast) is not None

    def _moved(
        self,
        base: _Gradients,
        again: _Gradients,
        found: _Gradients,
        kept: int,
        autocast: bool,
    ) -> float | None:
        """By what share of its norm the gradient of record `kept` moved, if by too much."""
        tolerance = self._tolerance(autocast)
        if base.keys() != found.keys():
            return math.inf
        groups = [[k] for k in base] if self._per_layer else [list(base)]
        whole = _norm(g[kept] for g in base.values())
        for group in groups:
            # Of what had no gradient, and gets one by another record, by the whole gradient.
            norm = _norm(base[k][kept] for k in group) or whole
            moved = _norm(base[k][kept] - found[k][kept] for k in group)
            # What differs between two equal runs (atomic sums, say) is no coupling.
            noise = _norm(base[k][kept] - again[k][kept] for k in group)
            if norm > 0 and not moved <= tolerance * norm + 4 * noise:
                return moved / norm
        return None

    def _tolerance(self, autocast: bool) -> float:
        half = autocast or any(torch.finfo(p.dtype).bits < 32 for p in self._floats())
        return _HALF_TOLERANCE if half else _TOLERANCE

    def _floats(self) -> Iterator[Tensor]:
        module = self._module()
        return (p for p in module.parameters() if p.is_floating_point()) if module else iter(())

    def _taps(self) -> Iterator[RecordTaps]:
        return (taps for _, holders in self._holders for taps, _ in holders)

    def _gradients(
        self,
        loss_of: Callable[[Any], Tensor | None],
        batch: Any,
        records: int = 2,
        factor: int = 1,
    ) -> _Gradients:
        """The records' gradients of `factor` times the loss, (records, *shape), of each trained
        tensor that got one."""
        held = [(taps, dict(taps.taps), dict(taps.norm_taps)) for taps in self._taps()]
        leaves: list[Tensor] = []
        for parameter, holders in self._holders:
            zero = parameter.new_zeros(())
            tap = zero.expand(records, *parameter.shape).detach().requires_grad_()
            leaves.append(tap)
            for taps, name in holders:
                taps.taps[name] = tap
                taps.norm_taps.pop(name, None)
        devices = {p.device for p, _ in self._holders if p.device.type == "cuda"}
        self._running = True
        try:
            # Each run draws the same; a copy, since a loss may take its batch apart.
            with (
                generators_kept(),
                torch.random.fork_rng(devices=list(devices)),
                torch.enable_grad(),
            ):
                loss = loss_of(_map(batch, lambda tensor, _: tensor.clone()))
                if loss is not None and loss.requires_grad:
                    # Not autograd.grad: checkpoints of the older kind know only this.
                    (loss.sum() * (factor * self._loss_scale)).backward()  # type: ignore[no-untyped-call]
        finally:
            self._running = False
            for taps, values, norms in held:
                taps.taps, taps.norm_taps = values, norms
        return {k: leaf.grad for k, leaf in enumerate(leaves) if leaf.grad is not None}


_Gradients = dict[int, Tensor]


@dataclasses.dataclass
class _Seen:
    """Some records of a forward, and what of its outputs a gradient came to."""

    batch: Any
    records: int
    autocast: tuple[bool, torch.dtype, str]
    narrowed: bool
    shapes: list[tuple[int, ...]]
    used: list[bool]

    @property
    def kinds(self) -> set[bool]:
        """Of the outputs that a gradient came to: whether they are scalars."""
        return {
            math.prod(shape) == 1
            for shape, used in zip(self.shapes, self.used, strict=True)
            if used
        }


def _mark(used: list[bool], k: int) -> Callable[[Tensor], None]:
    def mark(_: Tensor) -> None:
        used[k] = True

    return mark


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


class _Terms(torch.autograd.Function):
    """The sum of w y + y^2 / 2 over the elements y of rows, with other weights along a row.

    Not linear, so that what mixes records in backward alone is seen as well. By hand, since logits
    may be most of what a step has in memory: the one temporary of their size is the gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        weighted = (rows @ _Terms.weights(rows)).sum()
        total: Tensor = weighted + torch.linalg.vector_norm(rows).square() / 2
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        gradient: Tensor = (rows + _Terms.weights(rows)).mul_(grads[0])
        return gradient

    @staticmethod
    def weights(rows: Tensor) -> Tensor:
        return torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype).cos_()


def _loss_again(module: Any, seen: _Seen, scalars: bool, batch: Any) -> Tensor | None:
    """A loss on the outputs of a forward like the one that was seen."""
    enabled, dtype, device = seen.autocast
    with torch.autocast(device, dtype=dtype, enabled=enabled):
        output = module(*batch[0], **batch[1])
    return _trained_on(list(_tensors(output)), seen, scalars)


def _trained_on(outputs: list[Tensor], seen: _Seen, scalars: bool) -> Tensor | None:
    """A loss on what the user's is made of: scalars themselves, or of rows terms of each alone."""
    if len(outputs) != len(seen.used):
        return None
    total: list[Tensor] = []
    for tensor, shape, used in zip(outputs, seen.shapes, seen.used, strict=True):
        if not used or (math.prod(shape) == 1) is not scalars:
            continue
        if scalars:
            total.append(tensor.float().sum())
            continue
        # Where the records lie: what is two now, and was not.
        changed = [d for d, (a, b) in enumerate(zip(tensor.shape, shape, strict=True)) if a != b]
        if not changed and 2 in shape:
            changed = [shape.index(2)]
        if len(changed) != 1 or tensor.shape[changed[0]] != 2:
            return None
        rows = tensor.movedim(changed[0], 0).reshape(2, -1).float()
        total.append(_Terms.apply(rows))  # type: ignore[no-untyped-call]
    return torch.stack([t.to(total[0].device) for t in total]).sum() if total else None


def _map(value: Any, change: Callable[[Tensor, str], Any], name: str = "") -> Any:
    """`value` with its tensors changed; `change` is told the key that a tensor has."""
    if isinstance(value, Tensor):
        return change(value, name)
    if isinstance(value, Mapping):
        mapped = {key: _map(item, change, str(key)) for key, item in value.items()}
        return mapped if type(value) is dict else type(value)(mapped)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, change, name) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, change, name) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _map(getattr(value, f.name), change, f.name)
                  for f in dataclasses.fields(value) if f.init}  # fmt: skip
        return dataclasses.replace(value, **fields)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in `value`, in its order."""
    found: list[Tensor] = []

    def note(tensor: Tensor, _: str) -> Tensor:
        found.append(tensor)
        return tensor

    _map(value, note)
    return iter(found)


def _is_plain(value: Any) -> bool:
    """Whether nothing in `value` can hold records that `_rows` does not see."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, str, bytes, bool, int, float))


def _rows(value: Any, records: int, wanted: Sequence[int]) -> Any:
    """A copy of `value` with the `wanted` rows of what has one for each record."""

    def taken(tensor: Tensor, _: str) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != records:
            return tensor.detach()
        return tensor.detach()[list(wanted)]

    def of_list(item: Any) -> Any:
        if isinstance(item, list) and len(item) == records:
            return [item[k] for k in wanted] if all(isinstance(v, Tensor) for v in item) else item
        return item

    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
        value = (tuple(map(of_list, value[0])), {k: of_list(v) for k, v in value[1].items()})
    return _map(of_list(value), taken)


def rows_of(batch: Any) -> int:
    """The first dimension of the batch's first tensor that has one; 0 without any."""
    return next((t.shape[0] for t in _tensors(batch) if t.dim()), 0)


def _unlike(batch: Any, records: int, kept: int) -> list[int]:
    """Up to three records of the first `kept`: the first, and those that differ most from it."""
    shares: list[Tensor] = []
    for tensor in _tensors(batch):
        if tensor.dim() and tensor.shape[0] == records and not tensor.is_complex():
            rows = tensor.detach()[:kept].reshape(kept, -1)
            shares.append((rows != rows[:1]).double().mean(dim=1).cpu())
    if not shares or kept < 3:
        return list(range(min(kept, 3)))
    # By all together, and by the smallest, which may be the labels.
    both = [torch.stack(shares).mean(dim=0), min(shares, key=lambda s: float(s.sum()))]
    picked = [0]
    for share in both:
        order = share.argsort(descending=True, stable=True).tolist()
        picked.append(next(k for k in order if k not in picked))
    return picked


def _some_ignored(batch: Any, row: int) -> Any | None:
    """`batch` with fewer tokens to predict in one of its two records; None where it has none."""
    found = False

    def fewer(tensor: Tensor, name: str) -> Tensor:
        nonlocal found
        if name != "labels" or tensor.dim() < 2 or tensor.is_floating_point():
            return tensor
        if tensor.is_cuda and not bool((tensor == _IGNORED).any()):
            # A loss that does not know it would end the process there.
            return tensor
        found = True
        changed = tensor.clone()
        changed[row, changed.shape[1] // 2 :] = _IGNORED
        return changed

    changed = _map(batch, fewer)
    return changed if found else None


def _steady(base: _Gradients, again: _Gradients, kept: int) -> bool:
    """Whether record `kept` has a gradient that two equal runs agree on."""
    if base.keys() != again.keys():
        return False
    norm = _norm(g[kept] for g in base.values())
    apart = _norm(base[k][kept] - again[k][kept] for k in base)
    return 0 < norm < math.inf and apart <= _STEADY * norm


def _parallel(base: _Gradients, found: _Gradients, kept: int) -> bool:
    """Whether record `kept` has the same gradient in both, but for its length."""
    if base.keys() != found.keys():
        return False
    pairs = [(base[k][kept].double(), found[k][kept].double()) for k in base]
    product = sum(float((a * b).sum()) for a, b in pairs)
    return product > 0.9 * _norm(a for a, _ in pairs) * _norm(b for _, b in pairs)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
