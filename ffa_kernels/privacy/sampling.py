"""Poisson sampling from the cryptographic generator, and the loader that announces its batches.

A *logical batch* is one draw, and one release. It is cut into *physical* batches that fit in
memory; a draw is never truncated, and an empty one still makes a step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, Sampler

from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.ops import chacha20
from ffa_kernels.privacy.keys import SecretStream


@dataclass(frozen=True)
class Piece:
    """One physical batch: `records` rows, of which the first `kept` are no padding."""

    records: int
    kept: int
    first: bool
    last: bool


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
            words = chacha20(self.stream.state, 0, 0, math.ceil(self.records / 8))
            self.stream.state[4] += 1
            uniforms = words.numpy().astype("<i4", copy=False).reshape(-1).view("<u8")
            chosen = (uniforms[: self.records] >> np.uint64(11)) < np.uint64(threshold)
            yield np.flatnonzero(chosen).tolist()


class _PhysicalBatches(Sampler[list[int]]):
    """Cuts logical batches into physical ones, and notes a Piece for each."""

    def __init__(
        self, logical: Any, physical_size: int | None, pad: bool, records: int
    ) -> None:
        self.logical, self.records = logical, records
        self.physical_size, self.pad = physical_size, pad
        self.pieces: deque[Piece] = deque()

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
            # An empty draw is one row of padding: models seldom take a batch of none.
            drawn = max(len(indices), 1)
            count = math.ceil(drawn / (self.physical_size or drawn))
            size = math.ceil(drawn / count)
            if self.pad and self.physical_size is not None:
                size = self.physical_size
            for k in range(count):
                part = list(indices[k * size : (k + 1) * size])
                rows = size if self.pad else max(len(part), 1)
                pieces.append(Piece(rows, len(part), k == 0, k == count - 1))
                # Padding repeats record 0, a valid input; its gradient is left out by selection.
                yield part + [0] * (rows - len(part))


class PrivateDataLoader(DataLoader[Any]):
    """Yields what the given loader would, in physical batches, each announced to the engine.

    Its length is in logical batches. Data set, collation and workers are the given loader's.

    Args:
        loader: any DataLoader over a data set with a length.
        logical: the sampler of logical batches.
        physical_size: the most rows of a physical batch, None for one of the draw's size.
        announce: called with the Piece just before its batch is yielded.
        pad: pad every physical batch to `physical_size`; otherwise a draw is cut evenly.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        logical: Any,
        physical_size: int | None,
        announce: Callable[[Piece], None],
        pad: bool = True,
    ) -> None:
        dataset: Any = loader.dataset
        self._physical = _PhysicalBatches(logical, physical_size, pad, len(dataset))
        self._announce = announce
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
        batches = super().__iter__()
        pieces = self._physical.pieces
        for batch in batches:
            self._announce(pieces.popleft())
            yield batch


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
    return loader, records
