"""Poisson sampling from the cryptographic generator, and the loader that announces its batches.

A *logical batch* is one draw, and one release. It is cut into *physical* batches that fit in
memory; a draw is never truncated, and an empty one still makes a step.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.ops import chacha20
from ffa_kernels.privacy.keys import SecretStream


@dataclass(frozen=True)
class Piece:
    """One physical batch: `records` rows, of which the first `kept` are no padding.

    `draw` numbers the loader's draws, over all its iterations.
    """

    records: int
    kept: int
    first: bool
    last: bool
    draw: int = 0


class PoissonSampler(Sampler[list[int]]):
    """Logical batches of record indices; each record is in each batch with one probability.

    Args:
        records: N.
        sample_rate: q in (0, 1], honoured to 2^-53.
        steps: batches an iteration.
        stream: the secret stream that is drawn from.
    """

    def __init__(self, records: int, sample_rate: float, steps: int, stream: SecretStream) -> None:
        self.records, self.sample_rate, self.steps = records, sample_rate, steps
        self.stream = stream

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        threshold = round(self.sample_rate * 2**53)
        for _ in range(self.steps):
            with self.stream.lock:
                words = chacha20(self.stream.state, 0, 0, math.ceil(self.records / 8))
                self.stream.state[4] += 1
            uniforms = words.numpy().astype("<i4", copy=False).reshape(-1).view("<u8")
            chosen = (uniforms[: self.records] >> np.uint64(11)) < np.uint64(threshold)
            yield np.flatnonzero(chosen).tolist()


class _PhysicalBatches(Sampler[list[int]]):
    """Cuts logical batches into physical ones, and notes a Piece for each."""

    def __init__(self, logical: Any, physical_size: int | None, pad: bool, records: int) -> None:
        self.logical, self.records = logical, records
        self.physical_size, self.pad = physical_size, pad
        self.pieces: deque[Piece] = deque()
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self.logical)

    def __iter__(self) -> Iterator[list[int]]:
        self.pieces = deque()
        return self._cut(self.pieces)

    def _cut(self, pieces: deque[Piece]) -> Iterator[list[int]]:
        for indices in self.logical:
            if len({int(i) % self.records for i in indices}) < len(indices):
                raise PrivacyError(
                    "the data_loader's sampler drew a record twice in one batch, which doubles "
                    "what that record can change; accepted: poisson_sampling=True, or a sampler "
                    "without replacement"
                )
            draw = next(self._numbers)
            drawn = max(len(indices), 1)
            count = math.ceil(drawn / (self.physical_size or drawn))
            size = math.ceil(drawn / count)
            if self.pad and self.physical_size is not None:
                size = self.physical_size
            for k in range(count):
                part = list(indices[k * size : (k + 1) * size])
                rows = size if self.pad else max(len(part), 1)
                pieces.append(Piece(rows, len(part), k == 0, k == count - 1, draw))
                # An empty draw is one row of padding, record 0: its gradient is left out by
                # selection, and models seldom take a batch of none.
                yield part or [0]


def _padded(batch: Any, have: int, rows: int) -> Any:
    """`batch` of `have` rows with its first row repeated to make `rows`.

    Done after collation, which may put records in another order: the padding is last for sure.
    """
    if rows == have:
        return batch
    if isinstance(batch, torch.Tensor):
        if batch.dim() == 0 or batch.shape[0] != have:
            return batch
        return torch.cat([batch, batch[:1].expand(rows - have, *batch.shape[1:])])
    if isinstance(batch, Mapping):
        padded = {key: _padded(value, have, rows) for key, value in batch.items()}
        return padded if type(batch) is dict else type(batch)(padded)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_padded(value, have, rows) for value in batch))
    if isinstance(batch, (tuple, list)):
        if len(batch) == have and not any(isinstance(v, (torch.Tensor, Mapping)) for v in batch):
            return [*batch, *[batch[0]] * (rows - have)]
        return type(batch)(_padded(value, have, rows) for value in batch)
    if batch is None or isinstance(batch, (str, bytes, int, float)):
        return batch
    raise ConfigError(
        f"data_loader collates to {type(batch).__name__}, which cannot be padded; accepted: "
        "tensors in tuples, lists and mappings, or pad_physical_batches=False"
    )


class PrivateDataLoader(DataLoader[Any]):
    """Yields what the given loader would, in physical batches, each announced to the engine.

    Its length is in logical batches. Data set, collation and workers are the given loader's.

    Args:
        loader: any DataLoader over a data set with a length.
        logical: the sampler of logical batches.
        physical_size: the most rows of a physical batch, None for one of the draw's size.
        announce: called with the Piece just before its batch is yielded; False leaves it out.
        pad: pad every physical batch to `physical_size`; otherwise a draw is cut evenly.
        restart: called when an iteration begins, with whether no other one is under way.
        finish: called when an iteration has come to its end.
        reseed: called before anything is drawn for a batch: orders, workers' seeds, augmentations.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        logical: Any,
        physical_size: int | None,
        announce: Callable[[Piece], bool | None],
        pad: bool = True,
        restart: Callable[[bool], None] = lambda alone: None,
        finish: Callable[[], None] = lambda: None,
        reseed: Callable[[], None] = lambda: None,
    ) -> None:
        dataset: Any = loader.dataset
        self._physical = _PhysicalBatches(logical, physical_size, pad, len(dataset))
        self._announce, self._restart, self._finish = announce, restart, finish
        self._reseed = reseed
        # One number, which a shallow copy of the loader has in common with it.
        self._under_way = [0]
        workers: dict[str, Any] = {}
        if loader.num_workers > 0:
            workers = {
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
            }
        super().__init__(
            loader.dataset,
            batch_sampler=self._physical,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            **workers,
        )

    def __iter__(self) -> Any:
        if self._under_way[0]:
            # One that nobody can go on with may wait for the collector.
            gc.collect()
        self._restart(self._under_way[0] == 0)
        self._under_way[0] += 1
        try:
            self._reseed()
            batches = super().__iter__()
            pieces = self._physical.pieces
            for batch in batches:
                piece = pieces.popleft()
                padded = _padded(batch, max(piece.kept, 1), piece.records)
                if self._announce(piece) is not False:
                    yield padded
                self._reseed()
        finally:
            self._under_way[0] -= 1
        self._finish()


def check_loader(loader: object, max_physical_batch_size: object) -> tuple[DataLoader[Any], int]:
    """The loader and its number of records.

    Raises:
        ConfigError: not a loader that records can be sampled from.
    """
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"data_loader is {type(loader).__name__}; accepted: torch.utils.data.DataLoader"
        )
    if isinstance(loader, PrivateDataLoader):
        raise ConfigError("data_loader is private already; accepted: the plain loader")
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise ConfigError(
            "data_loader's data set is a stream; accepted: one with a length, since records are "
            "sampled by their index"
        )
    if max_physical_batch_size is not None and (
        not isinstance(max_physical_batch_size, int) or max_physical_batch_size < 1
    ):
        raise ConfigError(
            f"max_physical_batch_size is {max_physical_batch_size!r}; accepted: None or an "
            "integer of 1 or more"
        )
    records = len(loader.dataset)
    if records == 0:
        raise ConfigError("data_loader holds no records; accepted: one or more")
    if _repeats(loader.dataset):
        raise ConfigError(
            "data_loader's data set (a Subset, or a ConcatDataset) has a record more than once, "
            "which multiplies what that record can change; accepted: each record once"
        )
    return loader, records


def _repeats(dataset: Any) -> bool:
    """Whether PyTorch's own ways to pick records pick one twice, as far as indices tell."""
    if isinstance(dataset, ConcatDataset):
        parts = dataset.datasets
        return len({id(part) for part in parts}) < len(parts) or any(map(_repeats, parts))
    if not isinstance(dataset, Subset):
        return False
    picked, inner = _whole_numbers(dataset.indices), dataset.dataset
    if picked is None:
        # Keys of a data set that has any.
        return len(set(dataset.indices)) < len(dataset.indices)
    while isinstance(inner, Subset) and (own := _whole_numbers(inner.indices)) is not None:
        picked, inner = own[picked], inner.dataset
    if hasattr(inner, "__len__"):
        # They may count from the end.
        picked = picked % len(inner)
    return np.unique(picked).size < picked.size or _repeats(inner)


def _whole_numbers(indices: Any) -> Any:
    """An array of them, or None."""
    found = np.asarray(indices)
    return found if found.ndim == 1 and found.dtype.kind in "iu" else None


def check_whole(loader: DataLoader[Any]) -> None:
    """Poisson sampling draws from the whole data set: a sampler that picks from it is refused.

    Raises:
        ConfigError: the loader's sampler is one that Poisson sampling would silently replace.
    """
    batches = loader.batch_sampler
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    if not isinstance(sampler, (SequentialSampler, RandomSampler)):
        raise ConfigError(
            f"data_loader's sampler is {type(sampler).__name__}, which Poisson sampling would "
            "replace: every record of the data set could be drawn; accepted: a loader over a "
            "torch.utils.data.Subset of the records to train on"
        )


def check_order(loader: DataLoader[Any]) -> None:
    """Without Poisson sampling, one record more must move the records after it by a place at most.

    Of what decides an order, that is known of the data set's own, and of a permutation which nobody
    can make again: under a public seed that of one record more has nothing in common with it.

    Raises:
        ConfigError: the loader's sampler is another.
    """
    batches, dataset = loader.batch_sampler, loader.dataset
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    permutes = (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(dataset)  # type: ignore[arg-type]
        and sampler.generator is None
    )
    if not permutes and type(sampler) is not SequentialSampler:
        seeded = ", with a generator of its own" if getattr(sampler, "generator", None) else ""
        raise ConfigError(
            f"data_loader's sampler is {type(sampler).__name__}{seeded}: one record more may "
            "change all of its batches, or a record come twice in one; accepted with "
            "poisson_sampling=False: shuffle=False, or shuffle=True without generator="
        )
