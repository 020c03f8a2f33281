"""The guard: trained tensors learn from records and move, everything else stays where it was.

At each release it looks only at what the host knows without waiting for a device: which tensors
the model holds, their storage and their version counters. Values are read when an epoch ends,
when model or optimizer are saved, and on request.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ffa_kernels.errors import PrivacyError
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.privacy.registry import digest

_ROW = 1024


def checksum(tensor: Tensor) -> Tensor | None:
    """int64 (): an exact sum over the bits of `tensor`, or None where they cannot be read.

    Rows of 8 KiB count with weights of their own. Where one element has changed the sum has;
    where many have, it is the same by chance alone. One read, no copy of the tensor.
    """
    total: Tensor | None = None
    for weight, part in enumerate(_parts(tensor)):
        part = torch.view_as_real(part) if part.is_complex() else part
        octets = part.contiguous().reshape(-1).view(torch.uint8)
        if octets.storage_offset() % 8:
            octets = octets.clone()
        words = octets[: octets.numel() // 8 * 8].view(torch.int64)
        whole = words.numel() // _ROW * _ROW
        rows = words[:whole].view(-1, _ROW).sum(dim=1)
        rows = torch.cat([rows, words[whole:], octets[words.numel() * 8 :].to(torch.int64)])
        weights = 2 * torch.arange(rows.numel(), device=rows.device) + 1
        own = (rows * weights).sum() * (2 * weight + 1)
        total = own if total is None else total + own
    return total


def _parts(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors that hold the values; those of torchao's types lie inside."""
    tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    return [] if tensor.is_meta or tensor.layout != torch.strided else [tensor]


def checksums(tensors: Iterable[Tensor]) -> list[int | None]:
    """`checksum` of each; the host waits once for each device."""
    sums = [checksum(t) for t in tensors]
    result: list[int | None] = [None] * len(sums)
    for device in {s.device for s in sums if s is not None}:
        there = [(k, s) for k, s in enumerate(sums) if s is not None and s.device == device]
        for (k, _), value in zip(there, torch.stack([s for _, s in there]).tolist(), strict=True):
            result[k] = int(value)
    return result


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Address and version: as long as both stay, no tracked operation has written."""
    # Almost all are of this kind, and each is looked at in every step.
    if type(tensor) is nn.Parameter and tensor.layout is torch.strided:
        address = tensor.data_ptr()
    else:
        parts = _parts(tensor)
        address = parts[0].data_ptr() if parts else 0
    return address, 0 if tensor.is_inference() else tensor._version


_VERSION, _REQUIRES_GRAD = operator.attrgetter("_version"), operator.attrgetter("requires_grad")


@dataclass
class _Watched:
    """One parameter at one place in the model."""

    name: str
    place: dict[str, nn.Parameter | None]
    local: str
    tensor: nn.Parameter
    # Of the trained tensors; None of a frozen one.
    index: int | None
    adapter: weakref.ref[Adapter] | None
    form: tuple[torch.dtype, torch.device, torch.Size]
    # Among all places: where its storage is noted.
    at: int
    value: int | None = None

    @property
    def layer(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass
class _Progress:
    """What is known of one trained tensor since its value was last read."""

    reached: bool = False
    # Steps with a known learning rate, and of those the ones where it was not 0.
    steps: int = 0
    due: int = 0
    # Written by someone else since: that it moved would prove nothing.
    written: bool = False
    places: list[_Watched] = field(default_factory=list)


class Guard:
    """Watches the parameters and buffers of one private model.

    Args:
        module: as given to `make_private`.
        trained: its trained tensors, by name, in their order.
        noised: whether steps carry noise, which moves every trained tensor.
    """

    def __init__(self, module: nn.Module, trained: dict[str, nn.Parameter], noised: bool) -> None:
        self._module = weakref.ref(module)
        self._noised = noised
        index = {id(p): k for k, p in enumerate(trained.values())}
        self._trained = list(trained.items())
        self._progress = [_Progress() for _ in self._trained]
        self._watched: list[_Watched] = []
        self._releases = 0
        self._records = False
        for layer, place, local, tensor, adapter in _places(module):
            watched = _Watched(
                name=f"{layer}.{local}".lstrip("."),
                place=place,
                local=local,
                tensor=tensor,
                index=index.get(id(tensor)),
                adapter=None if adapter is None else weakref.ref(adapter),
                form=(tensor.dtype, tensor.device, tensor.shape),
                at=len(self._watched),
            )
            self._watched.append(watched)
            if watched.index is not None:
                self._progress[watched.index].places.append(watched)
        # What `look` compares, a list of each: it reads little else, for in a step of a small model
        # all of this is out of the cache.
        self._places = [w.place for w in self._watched]
        self._locals = [w.local for w in self._watched]
        self._tensors = [w.tensor for w in self._watched]
        self._trains = [w.index is not None for w in self._watched]
        storages = [_storage(t) for t in self._tensors]
        self._addresses = [address for address, _ in storages]
        self._versions = [version for _, version in storages]
        self._plain = all(type(t) is nn.Parameter for t in self._tensors)
        values = self._values()
        for watched in self._watched:
            watched.value = values[id(watched.tensor)]
        self._buffers = _buffer_values(module)
        self._kept: weakref.WeakKeyDictionary[nn.Module, frozenset[str]]
        self._kept = weakref.WeakKeyDictionary((m, frozenset(_kept(m))) for m in module.modules())

    def _values(self) -> dict[int, int | None]:
        tensors = list({id(w.tensor): w.tensor for w in self._watched}.values())
        return dict(zip(map(id, tensors), checksums(tensors), strict=True))

    def trained_values(self) -> dict[str, int | None]:
        """A checksum of each trained tensor, by name: equal on processes that hold equal bits."""
        sums = checksums(p for _, p in self._trained)
        return {name: s for (name, _), s in zip(self._trained, sums, strict=True)}

    def frozen_values(self) -> dict[str, int | None]:
        """A checksum of each frozen parameter and buffer when this guard was made."""
        frozen = {w.name: w.value for w in self._watched if w.index is None}
        return {**frozen, **self._buffers}

    # At each release, on the host alone.

    def look(self) -> None:
        """Raises PrivacyError where the model no longer holds what was made private."""
        if self._is_untouched():
            return
        for watched in self._watched:
            now = watched.place.get(watched.local)
            if (
                now is not watched.tensor
                or now.requires_grad is not (watched.index is not None)
                or _storage(now) != self._noted(watched)
            ):
                self._explain(watched, now)

    def _is_untouched(self) -> bool:
        """What `look` asks of every parameter, in a fraction of the time; False where any is of
        another kind than nearly all are."""
        tensors = self._tensors
        now = map(dict.get, self._places, self._locals)
        if not self._plain or not all(map(operator.is_, now, tensors)):
            return False
        try:
            return (
                list(map(Tensor.data_ptr, tensors)) == self._addresses
                and list(map(_VERSION, tensors)) == self._versions
                and list(map(_REQUIRES_GRAD, tensors)) == self._trains
            )
        except RuntimeError:
            # Sparse tensors have no address, inference tensors count no versions.
            return False

    def _noted(self, watched: _Watched) -> tuple[int, int]:
        return self._addresses[watched.at], self._versions[watched.at]

    def _note(self, watched: _Watched, storage: tuple[int, int]) -> None:
        self._addresses[watched.at], self._versions[watched.at] = storage

    def _explain(self, watched: _Watched, now: nn.Parameter | None) -> None:
        """Raises unless what changed at this place was a harmless write."""
        where = f"layer {watched.layer!r}: {watched.local}"
        if now is not watched.tensor:
            raise PrivacyError(
                f"{where} is {'gone' if now is None else 'another tensor'} since make_private, "
                "so that the optimizer's would be trained for nothing; accepted: change the model "
                "(PEFT, convert, load_state_dict(assign=True)) first, then make its optimizer, "
                "then call make_private"
            )
        form = (now.dtype, now.device, now.shape)
        if form != watched.form:
            raise PrivacyError(
                f"{where} is {now.dtype} {tuple(now.shape)} on {now.device} since make_private, "
                f"and was {watched.form[0]} {tuple(watched.form[2])} on {watched.form[1]}; "
                "accepted: model.to(...) first, then make_private"
            )
        if watched.index is None:
            if now.requires_grad:
                raise PrivacyError(
                    f"{where} requires a gradient since make_private, where it was frozen; "
                    "accepted: make_private again after unfreezing"
                )
            if checksums([now])[0] != watched.value:
                raise PrivacyError(_moved(watched.name))
        else:
            if not now.requires_grad:
                raise PrivacyError(
                    f"{where} was trained when make_private was called, and requires no gradient "
                    "now; accepted: make_private again after freezing"
                )
            self._progress[watched.index].written = True
        self._note(watched, _storage(now))

    def released(
        self, reached: Iterable[int], records: bool, moving: Sequence[bool | None]
    ) -> None:
        """A step was made.

        Args:
            reached: which trained tensors got a gradient.
            records: whether it drew any record.
            moving: whether a tensor's learning rate is not 0; None where that is not known.

        Raises:
            PrivacyError: the optimizer has left a tensor alone that it should have moved.
        """
        self._releases += 1
        self._records = self._records or records
        for k in reached:
            self._progress[k].reached = True
        for (name, p), progress, moves in zip(self._trained, self._progress, moving, strict=True):
            progress.steps += moves is not None
            progress.due += bool(moves)
            now, first = _storage(p), progress.places[0]
            # Kernels that are given an address (bitsandbytes') count no version.
            if moves and now == self._noted(first) and checksums([p])[0] == first.value:
                raise PrivacyError(
                    f"{name}: did not move: the optimizer's step has written nothing to it; "
                    "accepted: an optimizer that updates every tensor it holds"
                )
            for watched in progress.places:
                self._note(watched, now)

    # Values, where waiting for them is no loss.

    @property
    def pending(self) -> bool:
        """Whether there was a release since the last check."""
        return self._releases > 0

    def check(self, saving: bool = False) -> None:
        """Reads values; with `saving`, what has been merged since training is left alone.

        Raises:
            PrivacyError: a frozen tensor or buffer moved, or a trained one did not,
                was reached by no record's gradient, or is not the model's any more. The layer is
                named.
        """
        module = self._module()
        if module is None:
            return
        merged = self._merged(module) if saving else set()
        if not saving:
            self.look()
            self._check_structure(module)
        values = self._values()
        for watched in self._watched:
            if id(watched) in merged:
                continue
            if watched.index is None and values[id(watched.tensor)] != watched.value:
                raise PrivacyError(_moved(watched.name))
        self._check_new(module, saving)
        for name, value in _buffer_values(module).items():
            # A table's first value, or that of a new shape, is what it must keep.
            if self._buffers.setdefault(name, value) != value:
                raise PrivacyError(
                    f"buffer {name} moved in private training: it would be saved with the model, "
                    "or change what later batches make of other records, but no noise covers what "
                    "it learned; accepted: no writes in forward"
                )
        for (name, _), progress in zip(self._trained, self._progress, strict=True):
            first = progress.places[0]
            if all(id(w) in merged for w in progress.places):
                continue
            if self._records and not progress.reached:
                raise PrivacyError(
                    f"{name}: no record's gradient has reached it, so it is not trained (noise "
                    "alone would move it): the model's forward does not use it, or an adapter is "
                    "merged or disabled; accepted: requires_grad_(False) before make_private if "
                    "that is meant"
                )
            written = progress.written or _storage(first.tensor) != self._noted(first)
            if written or first.value is None or values[id(first.tensor)] != first.value:
                continue
            if progress.due and self._noised:
                raise PrivacyError(
                    f"{name}: did not move in {progress.due} steps, in spite of noise: its updates "
                    "are smaller than its dtype can hold; accepted: a larger lr, or the trained "
                    "tensors in float32"
                )
            # A schedule may begin with 0, and be saved there; but not stay for an epoch.
            if progress.steps and not progress.due and not saving:
                raise PrivacyError(
                    f"{name}: did not move in {progress.steps} steps: its lr was 0 in all of them; "
                    "accepted: another lr, or requires_grad_(False) before make_private"
                )
        self._begin(values)

    def _begin(self, values: dict[int, int | None]) -> None:
        """From here on movement is counted anew."""
        self._releases = 0
        for progress in self._progress:
            progress.steps, progress.due, progress.written = 0, 0, False
            for watched in progress.places:
                watched.value = values[id(watched.tensor)]
                self._note(watched, _storage(watched.tensor))

    def _check_structure(self, module: nn.Module) -> None:
        present = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        for name, p in self._trained:
            if present.pop(id(p), None) is None:
                raise PrivacyError(
                    f"{name}: the optimizer holds it, but the model does not any more: it was "
                    "merged or replaced since make_private; accepted: make_private again"
                )
        if present:
            raise PrivacyError(
                f"{', '.join(list(present.values())[:3])}: trained, but not when make_private was "
                "called, so that no optimizer moves it; accepted: change the model (PEFT, "
                "convert) first, then make its optimizer, then call make_private"
            )

    def _check_new(self, module: nn.Module, saving: bool) -> None:
        """Nothing that a state_dict holds may have come since, to whatever place a layer has been
        put; but for layers that have come themselves, which may be there to be saved."""
        for name, layer in module.named_modules():
            known = self._kept.get(layer)
            if known is None and saving:
                continue
            for local in _kept(layer):
                if known is None or local not in known:
                    raise PrivacyError(
                        f"{name}.{local}".lstrip(".") + " was made since make_private: it would be "
                        "saved with the model, but no noise covers what it may have learned from "
                        "records; accepted: buffers and frozen parameters that are there, with "
                        "their values, before make_private"
                    )

    def _merged(self, module: nn.Module) -> set[int]:
        """Places that a merge has changed for good reason, or whose layer was replaced."""
        here = {id(layer) for layer in module.modules()}
        gone = set()
        for watched in self._watched:
            adapter = None if watched.adapter is None else watched.adapter()
            dropped = watched.adapter is not None and id(adapter) not in here
            now = watched.place.get(watched.local)
            if dropped or getattr(adapter, "merged", False) or now is not watched.tensor:
                gone.add(id(watched))
        return gone


def _moved(name: str) -> str:
    layer, _, local = name.rpartition(".")
    return (
        f"layer {layer!r}: {local} is frozen, and moved (a frozen tensor moved: what has learned "
        "from records without noise must not leave); accepted: writes to frozen tensors before "
        "make_private"
    )


def _places(
    module: nn.Module,
) -> Iterator[tuple[str, dict[str, nn.Parameter | None], str, nn.Parameter, Adapter | None]]:
    """(layer, its parameters, name there, parameter, the adapter around it) of every parameter."""
    inside: dict[int, Adapter] = {}
    for layer in module.modules():
        if isinstance(layer, Adapter):
            inside.update((id(inner), layer) for inner in layer.modules())
    for name, layer in module.named_modules():
        place: Any = layer._parameters
        for local, parameter in place.items():
            if parameter is not None:
                yield name, place, local, parameter, inside.get(id(layer))


def _kept(layer: nn.Module) -> Iterator[str]:
    """The layer's own parameters and buffers that a state_dict holds."""
    for local, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        if tensor is not None and local not in layer._non_persistent_buffers_set:
            yield local


def _buffer_values(module: nn.Module) -> dict[str, int | None]:
    """A checksum of every buffer, and extra state, by name.

    Those that no state_dict holds also by shape: a table may grow with the longest record, and
    holds the same then, but an average of records or a queue of them keeps its size.
    """
    found: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        for local, buffer in layer._buffers.items():
            if buffer is not None:
                kept = local not in layer._non_persistent_buffers_set
                shape = "" if kept else f" {tuple(buffer.shape)}"
                found[f"{name}.{local}".lstrip(".") + shape] = buffer
    extra = {
        f"{name}._extra_state".lstrip("."): int(digest(layer.get_extra_state())[:15], 16)
        for name, layer in module.named_modules()
        if type(layer).get_extra_state is not nn.Module.get_extra_state
    }
    return {**dict(zip(found, checksums(found.values()), strict=True)), **extra}
