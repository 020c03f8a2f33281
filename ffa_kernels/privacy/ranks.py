"""Processes that make one private step together: a sum over their records, one noise, one charge.

Each rank clips its own records and sums them on the integer grid; the sums are added exactly, so
that the step has the bits of one process with all the records. Rank 0 leads: its ledger is
charged, and its key makes the noise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ffa_kernels.errors import ConfigError, PrivacyError

T = TypeVar("T")


class Ranks:
    """A process group in which every rank calls the same methods in the same order.

    Args:
        process_group: as torch.distributed has it; its own timeout bounds every wait.

    Raises:
        ConfigError: not a process group, or one that this process is no member of.
    """

    def __init__(self, process_group: object) -> None:
        kind: Any = getattr(dist, "ProcessGroup", None) if dist.is_available() else None
        if kind is None or not isinstance(process_group, kind):
            raise ConfigError(
                f"process_group is {process_group!r}; accepted: None, or a group of "
                "torch.distributed that this process belongs to (torch.distributed.group.WORLD "
                "after init_process_group)"
            )
        self._group: Any = process_group
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._leader = dist.get_global_rank(self._group, 0)
        self._pid = os.getpid()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def together(self, action: Callable[[], T]) -> list[T]:
        """What `action` returned on each rank; on all ranks an error if it failed on any."""
        error: Exception | None = None
        mine: tuple[bool, Any]
        try:
            mine = (True, action())
        except Exception as raised:
            error, mine = raised, (False, f"{type(raised).__name__}: {raised}")
        outcomes: list[Any] = [None] * self.size
        self._check_process()
        dist.all_gather_object(outcomes, mine, group=self._group)
        if error is not None:
            raise error
        for rank, (succeeded, value) in enumerate(outcomes):
            if not succeeded:
                raise PrivacyError(f"process_group: rank {rank} failed: {value}")
        return [value for _, value in outcomes]

    def led(self, action: Callable[[], T]) -> T:
        """What `action` returned on rank 0, where alone it runs."""
        made: list[T | None] = self.together(lambda: action() if self.leads else None)
        value: Any = made[0]
        return value  # type: ignore[no-any-return]

    def add(self, sums: Sequence[Tensor], step: int, failed: bool) -> None:
        """Adds the ranks' sums, in place; integers to the same bits in any order.

        Args:
            sums: the same shapes and dtypes on each rank.
            step: how many steps this rank has made; the same on each.
            failed: this rank has nothing to add, and all must stop.

        Raises:
            PrivacyError: a rank failed, or is at another step.
        """
        self._check_process()
        state = torch.tensor([int(failed), step], dtype=torch.int64, device=sums[0].device)
        for dtype in {torch.int64, *(t.dtype for t in sums)}:
            mine = [t for t in sums if t.dtype == dtype]
            if dtype == torch.int64:
                mine.append(state)
            flat = torch.cat([t.reshape(-1) for t in mine])
            dist.all_reduce(flat, group=self._group)
            for total, part in zip(mine, torch.split(flat, [t.numel() for t in mine]), strict=True):
                total.copy_(part.view(total.shape))
        failures, steps = state.tolist()
        if failures and not failed:
            raise PrivacyError(
                f"process_group: {failures} of {self.size} ranks refused the step; their own "
                "errors say why. Nothing was released"
            )
        if not failures and steps != step * self.size:
            raise PrivacyError(
                f"process_group: rank {self.rank} is at step {step}, others are not; accepted: the "
                "same number of draws on every rank"
            )

    def check_bound(self, bound: float, device: torch.device) -> None:
        """Raises PrivacyError, on all ranks or none, unless each has clipped at this bound."""
        self._check_process()
        ends = torch.tensor([bound, -bound], dtype=torch.float64, device=device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._group)
        most, least = ends[0].item(), -ends[1].item()
        if least != most:
            raise PrivacyError(
                f"process_group: records were clipped at {least!r} on one rank and at {most!r} on "
                "another; accepted: the same state_dict on every rank"
            )

    def charged(self, charge: Callable[[], None], device: torch.device) -> None:
        """Runs `charge` on rank 0; no rank returns before it is known to have succeeded there."""
        self._check_process()
        error: BaseException | None = None
        if self.leads:
            try:
                charge()
            # Whatever it was, the others must hear of it: they wait.
            except BaseException as raised:
                error = raised
        flag = torch.tensor([int(error is None)], device=device)
        dist.broadcast(flag, src=self._leader, group=self._group)
        if error is not None:
            raise error
        if not flag.item():
            raise PrivacyError(
                "process_group: rank 0 could not charge the ledger; its own error says why. "
                "Nothing was released"
            )

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise PrivacyError(
                "process_group: joined by another process, whose noise this one would draw again; "
                "accepted: make_private in the process that trains"
            )


def agree(ranks: Ranks, facts: Sequence[dict[str, Any]]) -> None:
    """Raises ConfigError unless every rank gave equal facts, and names the first that differ."""
    for name, mine in facts[ranks.rank].items():
        for rank, theirs in enumerate(facts):
            if theirs.get(name) != mine:
                raise ConfigError(
                    f"process_group: {name} is {mine!r} on rank {ranks.rank}, and "
                    f"{theirs.get(name)!r} on rank {rank}; accepted: the same on every rank"
                )
