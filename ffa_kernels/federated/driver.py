"""Runs a whole federation in one process: data, model, sites, server, evaluation, report."""

from __future__ import annotations

import json
import logging
import math
import random
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from ffa_kernels.errors import ConfigError, shown
from ffa_kernels.federated import basis, data, report, rounds, wire
from ffa_kernels.federated.basis import Bases
from ffa_kernels.federated.build import build, derive_A
from ffa_kernels.federated.config import Config, SiteFiles, site_of
from ffa_kernels.federated.data import Records
from ffa_kernels.federated.server import Rules, Server, Share
from ffa_kernels.federated.site import (
    Site,
    check_records,
    copy_sharing_frozen,
    load_trained,
    tokenize,
)
from ffa_kernels.files import write_atomic

_log = logging.getLogger(__name__)
_EVAL_BATCH = 64
STATE = "server.safetensors"
# What a run that goes on may have anew; it is one training, and of one account, by all the rest.
_MAY_CHANGE = {
    "federation": (
        *("name", "rounds", "sites_per_round", "min_updates", "attempts", "max_update_norm"),
        *("server_lr", "server_momentum", "server_tau", "eval_records_per_site"),
    ),
    # The weights in the folder are what counts, and have a fingerprint.
    "model": ("kind",),
    "privacy": ("target_epsilon", "max_grad_norm", "new_ledger"),
    "train": (
        *("batch_size", "sample_rate", "max_physical_batch_size"),
        *("lr", "head_lr", "lr_decay", "weight_decay"),
    ),
    "data": ("path", "min_records"),
}


def run(
    config: Config,
    out: Path,
    console: Console | None = None,
    resume: bool = False,
    records: Mapping[str, tuple[Records, Records]] | None = None,
) -> dict[str, Any]:
    """Run the federation and write its report, its final tensors and each site's files into `out`.

    A site that fails is absent from the round, with its reason in the report.

    Args:
        config: a checked configuration.
        out: made if missing. A ledger that is there already goes on counting.
        console: where progress is shown; nowhere by default.
        resume: go on after the last whole round of the run that was begun in `out`.
        records: (training, held-out) of every site, in place of the configuration's.

    Returns:
        The content of report.json.

    Raises:
        ConfigError: data, model and configuration do not fit together; nothing has been trained
            then.
        PrivacyError: a site's budget is spent.
        FederationError: a round had too few valid updates in all its attempts.
    """
    began = time.monotonic()
    console = console or Console(quiet=True)
    records = load_records(config) if records is None else records
    rounds.check_counts(config, len(records))
    model, tokenizer = build(config)
    out.mkdir(parents=True, exist_ok=True)
    counts = {name: len(train) for name, (train, _) in records.items()}
    server = make_server(config, model, secrets.token_hex(8), counts)
    notes = restored(config, server, out, records) if resume else {}
    with ExitStack() as open_sites:
        sites = {}
        for name in sorted(records):
            own, entry = model, site_of(config, name)
            if entry is not None and entry.has_less:
                own, _ = build(config, entry)
            site = Site(
                *(name, records[name][0], own, tokenizer, config, server.run),
                folder=out / "sites" / name,
                ledger=None if entry is None else entry.ledger,
            )
            sites[name] = open_sites.enter_context(closing(site))
        tests = {name: records[name][1] for name in sites}
        result = Run(config, model, tokenizer, sites, tests, server, out, notes, console).go(began)
    write_trained(config, server, out)
    report.write(out, config.federation.name, result)
    return result


class Run:
    """One run's parts and its account of bytes."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        tokenizer: Any,
        sites: Mapping[str, Site],
        tests: Mapping[str, Records],
        server: Server,
        out: Path,
        notes: Mapping[str, Any],
        console: Console,
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.sites, self.tests, self.console = sites, tests, console
        self.server, self.out = server, out
        # Nothing is folded into it: what is frozen it shares with `model`, until that folds.
        self.base = model if server.bases is None else copy_sharing_frozen(model)
        self._folded = 0
        self.samples = {name: _sample(config, name, test) for name, test in tests.items()}
        self.rounds: list[dict[str, Any]] = list(notes.get("rounds", []))
        sizes = notes.get("sizes", {})
        self.up, self.down = (
            {name: wire.Size(**sizes.get(way, {}).get(name, {})) for name in sites}
            for way in ("up", "down")
        )

    def go(self, began: float) -> dict[str, Any]:
        """All rounds that are left and the final evaluation; the content of report.json.

        Args:
            began: what time.monotonic() said at the start of the whole run.
        """
        self.console.print(_plan(self.config, self.sites), highlight=False, markup=False)
        if self.server.frozen:
            # A resumed run has the A that it began with.
            for name, A in wire.frozen_A(self.model).items():
                A.copy_(self.server.frozen[name])
        self._load()
        # In place of an older run's, and for one that is cut off in its first round.
        self._keep()
        with _progress(self.config, len(self.sites), len(self.rounds), self.console) as show:
            step, note = show
            for round_ in range(len(self.rounds) + 1, self.config.federation.rounds + 1):
                self.rounds.append(self._round(round_, step, note))
                self._keep()
            note("final evaluation")
            right = self._correct(self.tests)
            load_trained(self.base, self.server.tensors)
            with adapters_off(self.base):
                bare = self._correct(self.tests, self.base)
        tested = _total(self.tests)
        up, down = _sum(self.up.values()), _sum(self.down.values())
        return {
            "method": self.config.federation.method,
            "accuracy": sum(right.values()) / tested,
            "accuracy_without_adapters": sum(bare.values()) / tested,
            "baseline_accuracy": data.majority_accuracy(data.pool(self.tests)),
            "epsilon": _finite(max(site.epsilon() for site in self.sites.values())),
            "delta": self.config.privacy.target_delta,
            "seconds": time.monotonic() - began,
            "bytes_up": up.total,
            "bytes_down": down.total,
            "adapter_bytes_up": up.adapter,
            "head_bytes_up": up.head,
            "header_bytes_up": up.header,
            "frozen_bytes_down": down.frozen,
            "rounds": self.rounds,
            "sites": {
                name: {
                    "accuracy": right[name] / len(self.tests[name]),
                    "baseline_accuracy": data.majority_accuracy(self.tests[name]),
                    "epsilon": _finite(site.epsilon()),
                    "noise_multiplier": site.noise_multiplier,
                    "sample_rate": site.sample_rate,
                    "train_records": site.records,
                    "test_records": len(self.tests[name]),
                    "bytes_up": self.up[name].total,
                    "bytes_down": self.down[name].total,
                    "frozen_bytes_down": self.down[name].frozen,
                }
                for name, site in self.sites.items()
            },
            "adapter_norms": {
                name: float(tensor.double().norm())
                for name, tensor in self.server.tensors.items()
                if wire.is_B(name)
            },
            "environment": report.environment(),
        }

    def _keep(self) -> None:
        """Writes what a resumed run goes on with."""
        sizes = {
            way: {name: asdict(size) for name, size in of_sites.items()}
            for way, of_sites in (("up", self.up), ("down", self.down))
        }
        notes = {"rounds": self.rounds, "sizes": sizes, **begun_with(self.config, self.sites)}
        write_atomic(self.out / STATE, self.server.state(notes))

    def _round(
        self, round_: int, step: Callable[[], None], note: Callable[[str], None]
    ) -> dict[str, Any]:
        ask = partial(self._ask, round_, step, note)
        held = rounds.hold(self.config, self.server, round_, list(self.sites), ask)
        note(f"round {round_}, evaluation")
        self._load()
        right = self._correct(self.samples)
        for name in self.sites:
            self.up[name] += held.up[name]
            self.down[name] += held.down[name]
        entry = {"accuracy": sum(right.values()) / _total(self.samples), **held.entry()}
        for name, site in self.sites.items():
            entry["sites"][name] |= {
                "accuracy": right[name] / len(self.samples[name]),
                "epsilon": _finite(site.epsilon()),
            }
        self.console.print(_line(entry), highlight=False, markup=False)
        return entry

    def _ask(
        self,
        round_: int,
        step: Callable[[], None],
        note: Callable[[str], None],
        _attempt: int,
        messages: Mapping[str, bytes],
        lacking: rounds.Lacking,
    ) -> Iterator[tuple[str, bytes | Exception]]:
        """One site after the other, in this process."""
        for name, message in messages.items():
            note(f"round {round_}, {name}")
            own = partial(lacking, name)
            try:
                yield name, self.sites[name].run_round(round_, message, step, own, own)
            except Exception as error:
                yield name, error

    def _load(self) -> None:
        """Makes the model that of the server's."""
        bases = self.server.bases
        while bases is not None and self._folded < bases.number:
            bases.fold(self.model, self._folded + 1, bases.closed[self._folded])
            self._folded += 1
        load_trained(self.model, self.server.tensors)

    def _correct(
        self, records: Mapping[str, Records], model: nn.Module | None = None
    ) -> dict[str, int]:
        return {
            name: count_correct(model or self.model, self.tokenizer, of_site, self.config)
            for name, of_site in records.items()
        }


def make_server(
    config: Config, model: nn.Module, run_id: str, counts: Mapping[str, int] | None = None
) -> Server:
    """The configuration's server for the model that all sites begin with.

    Args:
        model: as built; an A that is sent is made in it here.
        run_id: the run's identifier.
        counts: training records of each site, for weights = "records".

    Raises:
        ConfigError: weights from counts that are not known here.
    """
    federation = config.federation
    weights: dict[str, float] | None = None
    if federation.weights == "records":
        if counts is None:
            raise ConfigError(
                "[federation] weights: got 'records', which a server does not know; accepted: "
                "'equal' or 'declared'"
            )
        weights = {name: float(count) for name, count in counts.items()}
    elif federation.weights == "declared":
        weights = {site.name: float(site.weight or 0.0) for site in config.sites}
    rules = Rules(
        min_updates=federation.min_updates,
        method=federation.method,
        policy=federation.weights,
        weights=weights,
        codec=federation.codec,
        max_update_norm=federation.max_update_norm,
        aggregation=federation.aggregation,
        optimizer=federation.server_optimizer,
        lr=federation.server_lr,
        momentum=federation.server_momentum,
        tau=federation.server_tau,
    )
    if config.sends_A:
        derive_A(model)
    A = wire.frozen_A(model) if config.sends_A else None
    tensors = wire.trained_tensors(model)
    shares = {site.name: _share(config, model, site) for site in config.sites if site.has_less}
    bases = Bases.of(config, model)
    return Server(tensors, wire.fingerprint(model), run_id, rules, shares, A, bases)


def _share(config: Config, model: nn.Module, site: SiteFiles) -> Share:
    targets = site.target_modules or config.model.target_modules
    layers = [name.removesuffix(".lora_B") for name in wire.trained_tensors(model)]
    ranks = {
        f"{layer}.lora_B": site.r or config.model.r
        for layer in layers
        if any(layer == target or layer.endswith(f".{target}") for target in targets)
    }
    return Share(ranks, wire.fingerprint(model, ranks))


def begun_with(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """What a run that goes on must still have, as notes of the server's state.

    Args:
        names: of all sites.
    """
    tables = asdict(config)
    kept = {
        f"[{table}] {key}": value
        for table, free in _MAY_CHANGE.items()
        for key, value in tables[table].items()
        if key not in free
    }
    return {"sites": sorted(names), "settings": kept}


def restored(config: Config, server: Server, out: Path, names: Iterable[str]) -> dict[str, Any]:
    """Gives `server` the state that a run has left in `out`; its notes.

    Args:
        names: of all sites.

    Raises:
        ConfigError: there is none, or one of another model, other settings or other sites.
    """
    path = out / STATE
    if not path.is_file():
        raise ConfigError(f"--resume: {path} is not there; accepted: the folder of a run begun")
    return server.restore(path.read_bytes(), partial(_check_begun, begun_with(config, names)))


def _check_begun(wanted: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Raises ConfigError unless a run with these notes may go on with what is wanted."""
    # As JSON gives it back: lists, and no tuples.
    now = json.loads(json.dumps(wanted))
    if (begun := notes.get("sites", now["sites"])) != now["sites"]:
        raise ConfigError(
            f"--resume: got the sites {', '.join(now['sites'])}; accepted: {', '.join(begun)}, "
            "with which the run began"
        )
    for key, value in notes.get("settings", {}).items():
        if (given := now["settings"].get(key, value)) != value:
            raise ConfigError(
                f"{key}: got {shown(given)} with --resume; accepted: {shown(value)}, with which "
                "the run began"
            )


def write_trained(config: Config, server: Server, out: Path) -> None:
    """What a run ends with: its trained tensors; all of it for PEFT, where B may be folded."""
    write_atomic(out / "trained.safetensors", trained_file(server, config.federation.rounds))
    if server.bases is not None:
        basis.save(config, server.bases, server.tensors, out / "adapter")


def trained_file(server: Server, rounds: int) -> bytes:
    """The trained tensors in full precision, as a message to any site after the last round."""
    return wire.encode(
        replace(server.header("global", rounds, "any"), codec="fp32"), server.tensors
    )


def load_records(config: Config) -> dict[str, tuple[Records, Records]]:
    """(training, held-out) records of every site, checked against the configuration.

    Raises:
        ConfigError: unreadable records, a label out of range, a site with too few records.
    """
    source, seed = config.data, config.federation.seed
    held_out: dict[str, Records] = {}
    if source.path is not None:
        records = data.load_demo(source.path)
    else:
        records = {site.name: data.load_file(site.train) for site in config.sites}
        held_out = {site.name: data.load_file(site.test) for site in config.sites if site.test}
    if source.sites is not None:
        pooled = data.pool(records)
        if source.dirichlet_alpha is None:
            records = data.split_iid(pooled, source.sites, seed)
        else:
            least = math.ceil(source.min_records / (1.0 - source.test_fraction))
            settings = (source.sites, source.dirichlet_alpha, seed, least)
            records = data.split_dirichlet(pooled, *settings)
    result = {}
    for name, all_of_it in data.split_natural(records).items():
        train, test = all_of_it, held_out.get(name)
        if test is None:
            train, test = data.train_test_split(all_of_it, source.test_fraction, seed)
        _check_labels(name, train, test, config.model.classes)
        check_records(name, len(train), config)
        result[name] = (train, test)
    return result


@torch.no_grad()
def count_correct(model: nn.Module, tokenizer: Any, records: Records, config: Config) -> int:
    """How many of `records` the model labels right."""
    model.eval()
    # Texts of like length together: less padding.
    order = sorted(range(len(records)), key=lambda i: len(records.texts[i]))
    right = 0
    for start in range(0, len(order), _EVAL_BATCH):
        batch = records.take(order[start : start + _EVAL_BATCH])
        inputs = tokenize(tokenizer, batch.texts, config)
        logits: Tensor = model(**inputs).logits
        right += int((logits.argmax(dim=-1) == torch.tensor(batch.labels)).sum())
    return right


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model with every trained lora_B at zero; they come back afterwards."""
    held = {name: p for name, p in wire.trained_tensors(model).items() if wire.is_B(name)}
    values = {name: p.detach().clone() for name, p in held.items()}
    with torch.no_grad():
        for parameter in held.values():
            parameter.zero_()
        try:
            yield
        finally:
            for name, parameter in held.items():
                parameter.copy_(values[name])


def _check_labels(name: str, train: Records, test: Records, classes: int) -> None:
    if not len(test):
        raise ConfigError(f"site {name!r}: got no held-out record; accepted: at least one")
    for labels in (train.labels, test.labels):
        if labels and max(labels) >= classes:
            raise ConfigError(
                f"site {name!r}: got label {max(labels)}; accepted: 0 to {classes - 1} "
                f"([model] classes = {classes})"
            )


def _total(records: Mapping[str, Records]) -> int:
    return sum(map(len, records.values()))


def _sum(sizes: Iterable[wire.Size]) -> wire.Size:
    return sum(sizes, wire.Size())


def _sample(config: Config, name: str, test: Records) -> Records:
    rng = random.Random(f"evaluation {config.federation.seed} {name}")
    count = min(config.federation.eval_records_per_site, len(test))
    return test.take(rng.sample(range(len(test)), count))


def _finite(value: float) -> float | None:
    """JSON knows no infinity: None is "no bound"."""
    return value if math.isfinite(value) else None


def _plan(config: Config, sites: Mapping[str, Site]) -> str:
    federation = config.federation
    noise = ", ".join(f"{name} {site.noise_multiplier:.3f}" for name, site in sites.items())
    return (
        f"{federation.name}: {len(sites)} sites, {federation.rounds} rounds of "
        f"{federation.local_steps} steps, "
        f"method {federation.method}; noise multipliers for epsilon "
        f"{config.privacy.target_epsilon:g}: {noise}"
    )


def _line(entry: dict[str, Any]) -> str:
    epsilons = [site["epsilon"] for site in entry["sites"].values()]
    spent = "no bound" if None in epsilons else f"{max(epsilons):.3f}"
    return (
        f"round {entry['round']}: accuracy {entry['accuracy']:.3f}, epsilon {spent}, "
        f"{sum(site['bytes_up'] for site in entry['sites'].values()) / 1000:.1f} kB up, "
        f"{entry['seconds']:.1f} s"
        + "".join(f", {how} {r['site']}" for how in ("refused", "absent") for r in entry[how])
    )


@contextmanager
def _progress(
    config: Config, sites: int, done: int, console: Console
) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """(advance by a step, show a note)."""
    federation = config.federation
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("steps"), TimeElapsedColumn()),
    )
    with Progress(*columns, console=console) as progress:
        per_round = federation.sites_per_round or sites
        total = federation.rounds * per_round * federation.local_steps
        completed = done * per_round * federation.local_steps
        task = progress.add_task("starting", total=total, completed=completed)
        yield (
            lambda: progress.advance(task),
            lambda text: progress.update(task, description=text),
        )
