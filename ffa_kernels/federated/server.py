"""The server: sends the trained tensors to sites, checks what comes back, and averages it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ffa_kernels.errors import WireError
from ffa_kernels.federated.wire import Fingerprint, Header, decode, encode

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a round.

    Attributes:
        norms: for each accepted update, the Euclidean norm of its change over all tensors.
        refused: why each refused message was refused, in order of arrival: (site, reason).
        averaged: False when too few updates were valid, and the tensors stayed as they were.
    """

    norms: dict[str, float]
    refused: list[tuple[str, str]]
    averaged: bool


class Server:
    """Plain federated averaging.

    Args:
        tensors: the trained tensors at the start, any float dtype.
        fingerprint: of the frozen rest of the model.
        run: the run's identifier.
        min_updates: valid updates below which a round changes nothing.
        weights: by site, positive, of any sum; equal by default. Weights taken from what sites say
            of their records would publish that.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        fingerprint: Fingerprint,
        run: str,
        min_updates: int = 1,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.tensors = {
            name: t.detach().to("cpu", torch.float32, copy=True) for name, t in tensors.items()
        }
        self._fingerprint = fingerprint
        self._run = run
        self._min_updates = min_updates
        self._weights = weights

    def message(self, round_: int, site: str) -> bytes:
        """The encoded global tensors with which `site` begins round `round_`."""
        return encode(self._header("global", round_, site), self.tensors)

    def aggregate(
        self, round_: int, asked: Collection[str], updates: Iterable[tuple[str, bytes]]
    ) -> Outcome:
        """Average what the sites sent; a message that does not fit is refused and the rest goes on.

        Args:
            round_: the round under way.
            asked: the sites drawn for it; a message from any other is refused.
            updates: (sender, message), in any order; the average does not depend on it.
        """
        accepted: dict[str, dict[str, Tensor]] = {}
        refused: list[tuple[str, str]] = []
        for site, data in updates:
            try:
                if site not in asked:
                    raise WireError("site: was not asked in this round")
                if site in accepted:
                    raise WireError("site: has answered already")
                accepted[site] = decode(data, self._header("update", round_, site), self.tensors)
            except WireError as error:
                refused.append((site, str(error)))
                _log.warning("round %d: update of %r refused: %s", round_, site, error)
        norms = {site: self._distance(accepted[site]) for site in sorted(accepted)}
        averaged = len(accepted) >= self._min_updates
        if averaged:
            self.tensors = {name: self._mean(name, accepted) for name in self.tensors}
        else:
            _log.warning(
                "round %d: %d valid updates, %d needed: the model stays as it was",
                *(round_, len(accepted), self._min_updates),
            )
        return Outcome(norms, refused, averaged)

    def _header(self, kind: str, round_: int, site: str) -> Header:
        prints = self._fingerprint
        return Header(kind, self._run, round_, site, prints.base, prints.recipe)

    def _distance(self, tensors: Mapping[str, Tensor]) -> float:
        squares = [
            float((tensors[name].double() - old.double()).square().sum())
            for name, old in self.tensors.items()
        ]
        return float(sum(squares) ** 0.5)

    def _mean(self, name: str, updates: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """In fp64, added up in the order of the sites' names, rounded once."""
        total, mass = torch.zeros_like(self.tensors[name], dtype=torch.float64), 0.0
        for site in sorted(updates):
            weight = 1.0 if self._weights is None else self._weights[site]
            total += weight * updates[site][name].double()
            mass += weight
        return (total / mass).float()
