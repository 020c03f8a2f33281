"""The server: sends the trained tensors to sites, checks what comes back, and averages it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError, WireError
from ffa_kernels.federated.basis import Bases, basis_of, opens
from ffa_kernels.federated.wire import (
    FROZEN,
    Fingerprint,
    Header,
    decode,
    digest,
    encode,
    is_B,
    moves,
    part_of,
)
from ffa_kernels.privacy.keys import SecretStream

_log = logging.getLogger(__name__)

_STATE = "ffa-kernels server/1"


@dataclass(frozen=True)
class Rules:
    """How a server takes updates.

    Attributes:
        min_updates: valid updates below which a round changes nothing.
        method: the federation's, which says what moves in a round; see `wire.moves`.
        policy: what sites are told of the weights, in every message: "equal", or another.
        weights: by site, positive, of any sum; equal by default. Weights taken from what sites say
            of their records would publish that.
        codec: how values are stored in messages, as `codecs` has it.
        max_update_norm: an update whose change is longer is refused; none by default.
        aggregation: "mean", or against liars "median" or "trimmed_mean" of each number (Flower's;
            a fifth of the sites is cut at each end), which take no weights.
        optimizer: "none" (the average is the new model), "momentum" (FedAvgM) or "adam" (FedAdam,
            Reddi et al. 2021), on the average's change as a gradient.
        lr, momentum, tau: of that optimizer; tau is Adam's epsilon.
    """

    min_updates: int = 1
    method: str = "ffa"
    policy: str = "equal"
    weights: Mapping[str, float] | None = None
    codec: str = "fp32"
    max_update_norm: float | None = None
    aggregation: str = "mean"
    optimizer: str = "none"
    lr: float = 1.0
    momentum: float = 0.9
    tau: float = 1e-3


@dataclass(frozen=True)
class Share:
    """What a site has whose rank is lower, or whose adapted layers are fewer.

    Attributes:
        ranks: of each B that it has, by name: it has the first so many columns.
        fingerprint: of its model.
    """

    ranks: Mapping[str, int]
    fingerprint: Fingerprint


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
    """Federated averaging.

    Args:
        tensors: the trained tensors at the start, any float dtype.
        fingerprint: of the frozen rest of the model.
        run: the run's identifier.
        rules: how it takes updates.
        shares: what a site has that has less than all.
        frozen: where sites cannot derive A: the A that is sent, of any float dtype that fp32
            holds, and of which `fingerprint` is.
        bases: where B is folded into the base again and again; none by default.

    Raises:
        ConfigError: rules that ask for Flower, which is not installed.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        fingerprint: Fingerprint,
        run: str,
        rules: Rules | None = None,
        shares: Mapping[str, Share] | None = None,
        frozen: Mapping[str, Tensor] | None = None,
        bases: Bases | None = None,
    ) -> None:
        self.tensors = {
            name: t.detach().to("cpu", torch.float32, copy=True) for name, t in tensors.items()
        }
        self.frozen = {name: A.detach().to("cpu", copy=True) for name, A in (frozen or {}).items()}
        self.run, self.rules = run, rules or Rules()
        self._fingerprint, self._shares = fingerprint, dict(shares or {})
        self.bases = bases
        self._every = 0 if bases is None else bases.every
        # Of each basis but the first: the message that opens it.
        self._openings: list[bytes] = []
        self._rounding = SecretStream("rounding")
        # Their values are the tensors' own memory.
        self._params = [nn.Parameter(t, requires_grad=False) for t in self.tensors.values()]
        self._optimizer = _optimizer(self._params, self.rules)
        if self.rules.aggregation != "mean":
            _robust(self.rules.aggregation)

    def message(self, round_: int, site: str) -> bytes:
        """The encoded global tensors with which `site` begins round `round_`."""
        self._reach(round_)
        if opens(self._every, round_):
            return self._openings[basis_of(self._every, round_) - 1]
        return encode(self.header("global", round_, site), self._of(site), self._rounding)

    def frozen_message(self, site: str) -> bytes:
        """The encoded A of `site`, its first rows of its layers; the same for the whole run.

        Raises:
            WireError: A holds NaN or infinity.
        """
        share = self._shares.get(site)
        A = self.frozen if share is None else part_of(self.frozen, share.ranks)
        return encode(self.header(FROZEN, 0, site), A)

    def opening_message(self, number: int) -> bytes:
        """The message that opened basis `number`, from 1, for a site that has missed it."""
        return self._openings[number - 1]

    def _reach(self, round_: int) -> None:
        """Closes the basis that is over when `round_` begins, unless that is done."""
        if self.bases is None or basis_of(self._every, round_) <= self.bases.number:
            return
        # One at a time: no round is left out.
        number = self.bases.number + 1
        header = self.bases.opening(number, self.run, self.rules.policy, self.rules.codec)
        # A server that was restarted rounds to the same B: some sites may have folded it. What
        # rounds may be public, as what is rounded is.
        key = hashlib.sha256(f"{self.run} basis {number}".encode()).digest()
        stream = SecretStream("rounding of a closed B", int.from_bytes(key, "big"))
        self._open(number, self.run, encode(header, self.tensors, stream))
        for param, name in zip(self._params, self.tensors, strict=True):
            if is_B(name):
                param.zero_()
                if self._optimizer is not None:
                    # Its moments are of another A, in whose columns the next B has no part.
                    self._optimizer.state.pop(param, None)

    def _open(self, number: int, run: str, message: bytes) -> None:
        """Begins basis `number` with what its message says, as sites do."""
        assert self.bases is not None
        header = self.bases.opening(number, run, self.rules.policy, self.rules.codec)
        self.bases.close(decode(message, header, self.tensors))
        self._openings.append(message)

    def _of(self, site: str) -> dict[str, Tensor]:
        """The part of the global tensors that a site has."""
        share = self._shares.get(site)
        if share is None:
            return self.tensors
        return {
            name: t[:, : share.ranks[name]] if name in share.ranks else t
            for name, t in self.tensors.items()
            if name in share.ranks or not is_B(name)
        }

    def aggregate(
        self, round_: int, asked: Collection[str], updates: Iterable[tuple[str, bytes]]
    ) -> Outcome:
        """Average what the sites sent; a message that does not fit is refused and the rest goes on.

        Args:
            round_: the round under way.
            asked: the sites drawn for it; a message from any other is refused.
            updates: (sender, message), in any order; the average does not depend on it.
        """
        self._reach(round_)
        accepted: dict[str, dict[str, Tensor]] = {}
        norms: dict[str, float] = {}
        refused: list[tuple[str, str]] = []
        for site, data in updates:
            try:
                if site not in asked:
                    raise WireError("site: was not asked in this round")
                if site in accepted:
                    raise WireError("site: has answered already")
                own = {n: t for n, t in self._of(site).items() if self._moves(n, round_)}
                tensors = decode(data, self.header("update", round_, site), own)
                norm, most = _distance(tensors, own), self.rules.max_update_norm
                if most is not None and norm > most:
                    raise WireError(f"norm: got {norm:.4g}, accepted: at most {most:g}")
                accepted[site], norms[site] = tensors, norm
            except WireError as error:
                refused.append((site, str(error)))
                _log.warning("round %d: update of %r refused: %s", round_, site, error)
        averaged = len(accepted) >= self.rules.min_updates
        if averaged:
            moving = [name for name in self.tensors if self._moves(name, round_)]
            self._move({name: self._combined(name, accepted) for name in moving})
        else:
            _log.warning(
                "round %d: %d valid updates, %d needed: the model stays as it was",
                *(round_, len(accepted), self.rules.min_updates),
            )
        return Outcome(dict(sorted(norms.items())), refused, averaged)

    def _moves(self, name: str, round_: int) -> bool:
        return moves(name, self.rules.method, round_)

    def state(self, notes: Mapping[str, Any]) -> bytes:
        """All that the server must know after a restart, and `notes`, which JSON can hold."""
        held = {f"tensor.{name}": t for name, t in self.tensors.items()}
        held |= {f"frozen.{name}": A for name, A in self.frozen.items()}
        if self._optimizer is not None:
            for k, values in self._optimizer.state_dict()["state"].items():
                held |= {f"optimizer.{k}.{key}": value for key, value in values.items()}
        for number, message in enumerate(self._openings, start=1):
            held[f"opening.{number}"] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        told = {"format": _STATE, "run": self.run, "notes": json.dumps(notes)}
        told["rebasis_every"] = str(self._every)
        told |= {"base": self._fingerprint.base, "recipe": self._fingerprint.recipe}
        return safetensors.save({key: t.clone() for key, t in held.items()}, metadata=told)

    def restore(
        self, data: bytes, check: Callable[[dict[str, Any]], None] = lambda notes: None
    ) -> dict[str, Any]:
        """Takes over what `state` gave, the run's identifier and an A that is sent included.

        Args:
            check: called with the notes before anything is changed; may raise ConfigError.

        Returns:
            The notes.

        Raises:
            ConfigError: it is no such state, or one of another model; nothing is changed then.
        """
        try:
            held = safetensors.load(data)
            told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            notes = dict(json.loads(told["notes"]))
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"state of the server is damaged: {error}") from error
        check(notes)
        frozen = {
            key.removeprefix("frozen."): A for key, A in held.items() if key.startswith("frozen.")
        }
        prints = Fingerprint(told.get("base"), told.get("recipe"))
        # An A that is sent is the run's, whatever bits this process has made of the weights.
        recipe = digest(frozen) if self.frozen else self._fingerprint.recipe
        expected = Fingerprint(self._fingerprint.base, recipe)
        if told.get("format") != _STATE or prints != expected:
            raise ConfigError(
                f"state of the server is of format {told.get('format')!r} and of another base or "
                f"A; accepted: {_STATE!r}, of this configuration's model"
            )
        tensors = {
            key.removeprefix("tensor."): t for key, t in held.items() if key.startswith("tensor.")
        }
        if _forms(tensors) != _forms(self.tensors) or _forms(frozen) != _forms(self.frozen):
            raise ConfigError(
                "state of the server has other tensors; accepted: those of this configuration"
            )
        if (every := told.get("rebasis_every", "0")) != str(self._every):
            raise ConfigError(
                f"[federation] rebasis_every: got {self._every}; accepted by the state of the "
                f"server: {every}, with which the run began"
            )
        try:
            for number in range(1, 1 + sum(key.startswith("opening.") for key in held)):
                self._open(number, told["run"], held[f"opening.{number}"].numpy().tobytes())
        except (WireError, KeyError) as error:
            raise ConfigError(f"state of the server is damaged: {error}") from error
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in held.items():
            if key.startswith("optimizer."):
                _, k, name = key.split(".", 2)
                moments.setdefault(int(k), {})[name] = tensor
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)
        if self._optimizer is not None and moments:
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.frozen:
            self.frozen, self._fingerprint = frozen, prints
            for site, share in self._shares.items():
                part = digest(part_of(frozen, share.ranks))
                own = replace(share.fingerprint, recipe=part)
                self._shares[site] = replace(share, fingerprint=own)
        self.run = told["run"]
        return notes

    def header(self, kind: str, round_: int, site: str) -> Header:
        """What a message of this kind, to or from `site`, must say of itself."""
        share, rules = self._shares.get(site), self.rules
        prints = self._fingerprint if share is None else share.fingerprint
        if self.bases is not None and (number := basis_of(self._every, round_)):
            prints = self.bases.prints[number]
            if share is not None:
                recipe = digest(part_of(self.bases.A(number), share.ranks))
                prints = replace(prints, recipe=recipe)
        codec = "fp32" if kind == FROZEN else rules.codec
        return Header(
            *(kind, self.run, round_, site, prints.base, prints.recipe), rules.policy, codec
        )

    def _combined(self, name: str, updates: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Of all sites one tensor; in the order of their names, whoever came first.

        Each column of a B is averaged over the sites that have it; one that none has stays.
        """
        old = self.tensors[name]
        given = [(site, updates[site][name]) for site in sorted(updates) if name in updates[site]]
        if self.rules.aggregation != "mean":
            combined: Tensor = _robust(self.rules.aggregation)([t for _, t in given])
            return combined
        weights = self.rules.weights or dict.fromkeys(updates, 1.0)
        # By a power of two, which changes no bit of the average: sums of huge ones are finite then.
        _, exponent = math.frexp(max(weights.values()))
        total = torch.zeros_like(old, dtype=torch.float64)
        mass = torch.zeros_like(total)
        # In fp64, rounded once.
        for site, tensor in given:
            weight = math.ldexp(weights[site], -exponent)
            part = tuple(slice(size) for size in tensor.shape)
            total[part] += weight * tensor.double()
            mass[part] += weight
        return torch.where(mass > 0, total / mass, old.double()).float()

    def _move(self, average: Mapping[str, Tensor]) -> None:
        if self._optimizer is None:
            for name, tensor in average.items():
                self.tensors[name].copy_(tensor)
            return
        for param, (name, old) in zip(self._params, self.tensors.items(), strict=True):
            param.grad = old - average[name] if name in average else None
        self._optimizer.step()


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _distance(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    squares = [
        float((tensors[name].double() - other.double()).square().sum())
        for name, other in others.items()
    ]
    return math.sqrt(sum(squares))


def _optimizer(params: Sequence[nn.Parameter], rules: Rules) -> torch.optim.Optimizer | None:
    if rules.optimizer == "momentum":
        return torch.optim.SGD(params, lr=rules.lr, momentum=rules.momentum)
    if rules.optimizer == "adam":
        betas = (rules.momentum, 0.99)
        return torch.optim.Adam(params, lr=rules.lr, betas=betas, eps=rules.tau)
    return None


def _robust(aggregation: str) -> Any:
    """Flower's function of that name, on a list of tensors."""
    try:
        from flwr.server.strategy import aggregate as flower
    except ImportError as error:
        raise ConfigError(
            f"[federation] aggregation: got {aggregation!r}, which is Flower's, and Flower is not "
            "installed; accepted: 'mean', or `pip install 'ffa-kernels[flower]'`"
        ) from error

    def combined(tensors: Sequence[Tensor]) -> Tensor:
        results: Any = [([t.numpy()], 1) for t in tensors]
        if aggregation == "median":
            found = flower.aggregate_median(results)
        else:
            found = flower.aggregate_trimmed_avg(results, 0.2)
        return torch.from_numpy(found[0]).float()

    return combined
