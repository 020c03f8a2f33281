"""A round, whatever carries its messages: who is asked, again if too few answer, what was sent."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ffa_kernels.errors import ConfigError, FederationError, WireError
from ffa_kernels.federated import wire
from ffa_kernels.federated.config import Config
from ffa_kernels.federated.server import Outcome, Server
from ffa_kernels.federated.wire import Size

_log = logging.getLogger(__name__)


class Lacking(Protocol):
    """Makes a message that a site lacks, beside the round's, and counts it."""

    def __call__(self, site: str, basis: int = 0) -> bytes:
        """The one with the site's A, or the one that opened that basis."""


# (attempt from 1, message by site, what a site may lack) to each site's update, or the reason why
# there is none; in whatever order they come.
Ask = Callable[[int, Mapping[str, bytes], Lacking], Iterable[tuple[str, bytes | Exception]]]


@dataclass
class Held:
    """What became of a round.

    Attributes:
        outcome: of its last attempt, which was averaged.
        absent: (site, reason) of each update that did not come.
        up, down: what came from each site, and what was made for it, failed attempts included.
    """

    round: int
    up: dict[str, Size]
    down: dict[str, Size]
    attempts: int = 0
    seconds: float = 0.0
    absent: list[tuple[str, str]] = field(default_factory=list)
    outcome: Outcome = field(default_factory=lambda: Outcome({}, [], False))

    def entry(self) -> dict[str, Any]:
        """The round in a report."""
        refused = self.outcome.refused
        return {
            "round": self.round,
            "attempts": self.attempts,
            "absent": [{"site": site, "reason": why} for site, why in self.absent],
            "refused": [{"site": site, "reason": why} for site, why in refused],
            "seconds": self.seconds,
            "sites": {
                name: {
                    "update_norm": self.outcome.norms.get(name),
                    "bytes_up": self.up[name].total,
                    "bytes_down": self.down[name].total,
                    "frozen_bytes_down": self.down[name].frozen,
                }
                for name in self.up
            },
        }


def hold(config: Config, server: Server, round_: int, names: Sequence[str], ask: Ask) -> Held:
    """Asks the round's sites for updates until enough of them are valid, and averages those.

    A site whose update was valid is not asked again.

    Args:
        names: of all sites.
        ask: see `Ask`.

    Raises:
        FederationError: too few valid updates in all attempts that the configuration allows.
    """
    began, federation = time.monotonic(), config.federation
    held = Held(round_, up=dict.fromkeys(names, Size()), down=dict.fromkeys(names, Size()))
    asked = draw_sites(config, round_, names)
    updates: dict[str, bytes] = {}

    def lacking(site: str, basis: int = 0) -> bytes:
        message = server.opening_message(basis) if basis else server.frozen_message(site)
        held.down[site] += wire.measure(message)
        return message

    while held.attempts < federation.attempts:
        held.attempts += 1
        messages = {name: server.message(round_, name) for name in asked if name not in updates}
        for name, message in messages.items():
            held.down[name] += wire.measure(message)
        for name, answer in ask(held.attempts, messages, lacking):
            if isinstance(answer, bytes):
                updates[name] = answer
                held.up[name] += _measured(answer)
                continue
            known = isinstance(answer, FederationError)
            reason = str(answer) if known else f"{type(answer).__name__}: {answer}"
            held.absent.append((name, reason))
            _log.warning("round %d: site %r is absent: %s", round_, name, reason)
        held.outcome = server.aggregate(round_, asked, updates.items())
        held.seconds = time.monotonic() - began
        if held.outcome.averaged:
            return held
        updates = {name: updates[name] for name in held.outcome.norms}
    raise FederationError(
        f"round {round_}: got {len(held.outcome.norms)} valid updates in {held.attempts} attempts; "
        f"accepted: {federation.min_updates} or more. What was done is kept, and resume goes on"
    )


def _measured(answer: bytes) -> Size:
    try:
        return wire.measure(answer)
    except WireError:
        # No message at all, which the server will refuse; sent it was.
        return Size(header=len(answer))


def draw_sites(config: Config, round_: int, names: Iterable[str]) -> list[str]:
    """The sites asked in a round: a public draw, the same wherever it is made."""
    ordered = sorted(names)
    rng = random.Random(f"sites {config.federation.seed} {round_}")
    return sorted(rng.sample(ordered, config.federation.sites_per_round or len(ordered)))


def check_counts(config: Config, sites: int) -> None:
    """Raises ConfigError where the configuration asks for more sites than there are."""
    for key in ("sites_per_round", "min_updates"):
        count = getattr(config.federation, key)
        if count is not None and count > sites:
            raise ConfigError(
                f"[federation] {key}: got {count} for {sites} sites; accepted: 1 to {sites}"
            )
    if config.federation.min_updates > (config.federation.sites_per_round or sites):
        raise ConfigError(
            f"[federation] min_updates: got {config.federation.min_updates}; "
            f"accepted: 1 to sites_per_round ({config.federation.sites_per_round})"
        )
