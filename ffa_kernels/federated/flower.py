"""A federation on Flower: its nodes carry our messages unread, and both ends check them as ever.

A node is a site. It answers a "query" with its name or, where A is sent, with whether it lacks that
of the run, or, where bases follow each other, with how many it has seen opened; and a "train" with
the bytes of its update or the type of the error that it met; nothing else leaves it. A node may run
each message in a process of its own, so the site is opened anew for each, and goes on where its
folder and its ledger say that it was.

Flower's telemetry, its update check and Ray's statistics are off, unless the environment says
otherwise.

Raises:
    ConfigError: on import: Flower is not installed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import re
import secrets
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from torch import nn

from ffa_kernels.errors import ConfigError, FederationError, WireError, shown
from ffa_kernels.federated import config as settings
from ffa_kernels.federated import driver, report, rounds, wire
from ffa_kernels.federated.basis import basis_of
from ffa_kernels.federated.build import build
from ffa_kernels.federated.config import Config, SiteFiles
from ffa_kernels.federated.data import Records
from ffa_kernels.federated.site import Site, frozen_file, openings_kept
from ffa_kernels.files import write_atomic
from ffa_kernels.privacy.ledger import read_account

# Read when flwr and ray are imported, and by the processes that they start.
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
for _variable, _value in _QUIET.items():
    os.environ.setdefault(_variable, _value)
try:
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ModuleNotFoundError as _error:
    raise ConfigError(
        f"{_error.name} is not installed; try: pip install 'ffa-kernels[flower]'"
    ) from _error

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

_RECORD = "ffa"
_FROZEN = "frozen"  # the query whether a site lacks A
_OPENED = "opened"  # the query how many messages that opened a basis it has
_WAYS = ("bytes_up", "bytes_down", "frozen_bytes_down")
# Of this form only: it becomes part of a file's name.
_RUN = re.compile(r"[0-9a-f]{16}")
_POLL_SECONDS = 0.5
_START_SECONDS = 600.0  # for processes of this machine to start


# A site.


def client_app(
    config: Config | None = None, out: Path | None = None, *, seed: int | None = None
) -> ClientApp:
    """A node's end of the federation.

    Args:
        config: of sites that are all on this machine, one for each node, in the order of their
            names. By default a node is what its `--node-config` says: `site`, the name; `config`,
            this machine's copy of the file; `out`, the site's own folder; and `train`, `test` and
            `ledger` where they are to replace what the copy says of the site.
        out: with `config`: the run's folder, of which each site has its own.
        seed: for tests: see `Site`.

    What an error says goes to errors.log in the site's folder, and its type alone to the server:
    its text may tell of records.
    """
    app = ClientApp()

    def here(context: Context) -> _Place:
        if config is None:
            return _place_of(context.node_config)
        name = sorted(_records(config))[int(context.node_config["partition-id"])]
        return _Place(name, config, Path(out or ".") / "sites" / name)

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        return _reply(message, {"site": here(context).name})

    @app.query(_FROZEN)
    def frozen(message: Message, context: Context) -> Message:
        file = frozen_file(here(context).folder, _run(message))
        return _reply(message, {"lacks_A": not file.exists()})

    @app.query(_OPENED)
    def opened(message: Message, context: Context) -> Message:
        return _reply(message, {"opened": openings_kept(here(context).folder, _run(message))})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        place = here(context)
        try:
            return _reply(message, {"update": _update(place, message, seed)})
        except Exception as error:
            place.folder.mkdir(parents=True, exist_ok=True)
            with (place.folder / "errors.log").open("a", encoding="utf-8") as log:
                log.write(traceback.format_exc() + "\n")
            return _reply(message, {"failed": type(error).__name__})

    return app


@dataclass(frozen=True)
class _Place:
    """Where a site is: its name, what it trains by, and its own folder."""

    name: str
    config: Config
    folder: Path


def _place_of(node: Mapping[str, Any]) -> _Place:
    """The place that a node's own configuration tells of."""
    for key in ("site", "config", "out"):
        if not isinstance(node.get(key), str):
            raise ConfigError(
                f"--node-config {key}: got {node.get(key)!r}; accepted: a text in quotes, such as "
                '\'site="north" config="federation.toml" out="north"\''
            )
    files = {key: str(node[key]) for key in ("train", "test", "ledger") if key in node}
    own = _load_for_site(node["config"], node["site"], files)
    return _Place(node["site"], own, Path(node["out"]))


def _update(place: _Place, message: Message, seed: int | None) -> bytes:
    run, round_ = _run(message), _field(message, "round", int)
    with closing(_open(place, run, seed)) as site:
        return site.run_round(
            round_,
            _field(message, "message", bytes),
            frozen=lambda: _field(message, "frozen", bytes),
            opening=lambda number: _field(message, f"basis-{number}", bytes),
        )


def _run(message: Message) -> str:
    run = _field(message, "run", str)
    if not _RUN.fullmatch(run):
        raise WireError("run: accepted are 16 hexadecimal digits")
    return run


def _open(place: _Place, run: str, seed: int | None) -> Site:
    config, own = place.config, settings.site_of(place.config, place.name)
    model, tokenizer = _model(config, own if own is not None and own.has_less else None)
    return Site(
        *(place.name, _records(config)[place.name][0], model, tokenizer, config, run),
        folder=place.folder,
        ledger=_ledger(place),
        seed=seed,
    )


def _ledger(place: _Place) -> str | None:
    own = settings.site_of(place.config, place.name)
    return None if own is None else own.ledger


@functools.lru_cache(maxsize=2)
def _model(config: Config, less: SiteFiles | None) -> tuple[nn.Module, Any]:
    """(model, tokenizer), kept for the next message where the process lives on."""
    return build(config, less)


@functools.lru_cache(maxsize=1)
def _records(config: Config) -> dict[str, tuple[Records, Records]]:
    return driver.load_records(config)


# The server.


def server_app() -> ServerApp:
    """The server's end of the federation, which has no records: accuracy is for sites to tell.

    The app's configuration (`[tool.flwr.app.config]`, or `flwr run --run-config`) says `config`,
    this machine's copy of the file, which lists the sites' names; `out`, the folder for
    trained.safetensors and report.json; `wait`, the seconds in which sites are to appear;
    `timeout`, those in which they are to answer in a round; and `resume`, true to go on after the
    last whole round of the run that was begun in `out`.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        given = context.run_config
        config, names = _load_for_server(str(given["config"]))
        out = Path(str(given["out"]))
        rounds.check_counts(config, len(names))
        nodes = _Nodes(grid, names, float(given["timeout"]))
        nodes.wait(float(given["wait"]), config.federation.min_updates)
        _federate(config, nodes, out, bool(given["resume"]))

    return app


def _federate(config: Config, nodes: _Nodes, out: Path, resume: bool) -> None:
    """All rounds, and their files in `out`."""
    began, federation = time.monotonic(), config.federation
    model, _ = build(config)
    server = driver.make_server(config, model, secrets.token_hex(8))
    told: list[dict[str, Any]] = []
    if resume:
        told = list(driver.restored(config, server, out, nodes.names)["rounds"])
    begun = driver.begun_with(config, nodes.names)
    out.mkdir(parents=True, exist_ok=True)
    # In place of an older run's, and for one that is cut off in its first round.
    write_atomic(out / driver.STATE, server.state({"rounds": told, **begun}))
    for round_ in range(len(told) + 1, federation.rounds + 1):
        ask = nodes.asking(config, server.run, round_)
        told.append(rounds.hold(config, server, round_, nodes.names, ask).entry())
        write_atomic(out / driver.STATE, server.state({"rounds": told, **begun}))
        _log.warning("round %d of %d is done", round_, federation.rounds)
    per_site = [site for entry in told for site in entry["sites"].values()]
    result = {
        "method": federation.method,
        "seconds": time.monotonic() - began,
        **{way: sum(site[way] for site in per_site) for way in _WAYS},
        "rounds": told,
        "adapter_norms": {
            name: float(tensor.double().norm())
            for name, tensor in server.tensors.items()
            if wire.is_B(name)
        },
        "environment": report.environment(),
    }
    driver.write_trained(config, server, out)
    write_atomic(out / "report.json", (json.dumps(result, indent=1) + "\n").encode())


class _Nodes:
    """The nodes of a grid, by the site that each says it is.

    Args:
        grid: Flower's.
        names: of the sites that there may be; any other is refused.
        timeout: seconds in which a site is to answer in a round; None for any number.
    """

    def __init__(self, grid: Grid, names: list[str], timeout: float | None) -> None:
        self.names, self.timeout = names, timeout
        self._grid = grid
        self._node: dict[str, int] = {}
        self._greeted: dict[int, str] = {}

    def wait(self, seconds: float, least: int) -> None:
        """Until every site is there.

        Raises:
            ConfigError: fewer than `least` have come in time.
        """
        end = time.monotonic() + seconds
        while len(self._node) < len(self.names) and time.monotonic() < end:
            self.greet()
            time.sleep(_POLL_SECONDS)
        if len(self._node) < least:
            raise ConfigError(
                f"{len(self._node)} of {len(self.names)} sites came within {seconds:g} s; "
                f"accepted: {least} or more"
            )
        for name in sorted(set(self.names) - set(self._node)):
            _log.warning("site %r has not come within %g s", name, seconds)

    def greet(self) -> None:
        """Asks new nodes who they are, and takes in who has answered; waits for none."""
        there = {info.node_id: info.name for info in self._grid.get_nodes()}
        # A name is free again when its node has gone.
        self._node = {name: node for name, node in self._node.items() if node in there}
        self._greeted = {node: sent for node, sent in self._greeted.items() if node in there}
        hellos = [
            Message(RecordDict(), node, "query") for node in there if node not in self._greeted
        ]
        if hellos:
            self._grid.push_messages(hellos)
        self._greeted |= {m.metadata.dst_node_id: m.metadata.message_id for m in hellos}
        sent = {hello: node for node, hello in self._greeted.items() if hello}
        for reply in self._grid.pull_messages(sent) if sent else []:
            node = sent[reply.metadata.reply_to_message_id]
            self._greeted[node] = ""
            try:
                self._admit(node, _field(reply, "site", str), there[node])
            except (FederationError, WireError) as error:
                _log.warning("a node is refused: %s", error)

    def _admit(self, node: int, name: str, registered: str) -> None:
        if name not in self.names:
            raise WireError(f"site: got {name[:64]!r}, accepted: {', '.join(self.names)}")
        if registered and registered != name:
            raise WireError(f"site: got {name!r} of a node registered as {registered[:64]!r}")
        if name in self._node:
            raise WireError(f"site: {name!r} is there already")
        self._node[name] = node

    def ask(
        self,
        run: str,
        round_: int,
        messages: Mapping[str, bytes],
        lacking: rounds.Lacking | None = None,
        sends_A: bool = False,
        opened: int = 0,
    ) -> dict[str, bytes | FederationError]:
        """Each site's update, or why it is absent.

        Args:
            lacking: what a site may lack, of those that say they do.
            sends_A: whether that is A.
            opened: of how many bases it is what opened them.
        """
        # Who has failed or was refused may say better now.
        admitted = set(self._node.values())
        self._greeted = {n: sent for n, sent in self._greeted.items() if sent or n in admitted}
        self.greet()
        group = str(round_)
        contents: dict[str, dict[str, Any]] = {
            name: {"run": run, "round": round_, "message": data} for name, data in messages.items()
        }
        failed: dict[str, bytes | FederationError] = {}
        asked = {name: {"run": run} for name in messages}

        def answers(query: str, key: str, form: type) -> Iterator[tuple[str, Any]]:
            for name, said in self._exchange(f"query.{query}", group, asked, key, form).items():
                if isinstance(said, FederationError):
                    failed[name] = said
                    contents.pop(name, None)
                elif name in contents:
                    yield name, said

        if lacking is not None and sends_A:
            for name, lacks in answers(_FROZEN, "lacks_A", bool):
                if lacks:
                    contents[name]["frozen"] = lacking(name)
        if lacking is not None and opened:
            for name, count in answers(_OPENED, "opened", int):
                for number in range(max(count, 0) + 1, opened + 1):
                    contents[name][f"basis-{number}"] = lacking(name, number)
        updates = self._exchange("train", group, contents, "update", bytes)
        return {name: failed[name] if name in failed else updates[name] for name in messages}

    def asking(self, config: Config, run: str, round_: int) -> rounds.Ask:
        """`ask` as `rounds.hold` calls it; before another attempt, who has gone may come back."""
        # A round's own message may open one more.
        opened = basis_of(config.federation.rebasis_every, round_ - 1)

        def ask(
            attempt: int, messages: Mapping[str, bytes], lacking: rounds.Lacking
        ) -> Iterable[tuple[str, bytes | Exception]]:
            if attempt > 1:
                self.wait(self.timeout or 0.0, least=0)
            return self.ask(run, round_, messages, lacking, config.sends_A, opened).items()

        return ask

    def _exchange(
        self,
        kind: str,
        group: str,
        contents: Mapping[str, Mapping[str, Any]],
        key: str,
        type_: type[_T],
    ) -> dict[str, _T | FederationError]:
        """What each site answers under `key` to a message of its own, or why it does not."""
        sent = {
            name: Message(
                *(_record(content), self._node[name], kind), ttl=self.timeout, group_id=group
            )
            for name, content in contents.items()
            if name in self._node
        }
        replies: Iterable[Message] = []
        if sent:
            replies = self._grid.send_and_receive(list(sent.values()), timeout=self.timeout)
        by_id = {reply.metadata.reply_to_message_id: reply for reply in replies}
        answers: dict[str, _T | FederationError] = {}
        for name in contents:
            try:
                if name not in sent:
                    raise FederationError("is not there")
                if (reply := by_id.get(sent[name].metadata.message_id)) is None:
                    raise FederationError(f"has not answered within {self.timeout:g} s")
                answers[name] = _field(reply, key, type_)
            except (FederationError, WireError) as error:
                answers[name] = FederationError(str(error))
        return answers


# Both on one machine.


def run_simulation(
    config: Config,
    out: Path,
    console: Console | None = None,
    resume: bool = False,
    *,
    processes: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """`driver.run` with every site a node of Flower's simulation.

    Args:
        processes: in which sites train at the same time; by default one a site, if there are as
            many cores.
        seed: for tests: see `Site`.
        config, out, console, resume: as in `driver.run`.

    Returns, Raises: as `driver.run`.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("ray is not installed; try: pip install 'ffa-kernels[flower]'")
    from flwr.simulation import run_simulation as simulate

    began = time.monotonic()
    console = console or Console(quiet=True)
    (model, tokenizer), records = _model(config, None), _records(config)
    names = sorted(records)
    rounds.check_counts(config, len(names))
    out.mkdir(parents=True, exist_ok=True)
    counts = {name: len(train) for name, (train, _) in records.items()}
    server = driver.make_server(config, model, secrets.token_hex(8), counts)
    notes = driver.restored(config, server, out, names) if resume else {}
    sites: dict[str, Any] = {}
    for name in names:
        # What forbids it to take part is found before anything starts.
        place = _Place(name, config, out / "sites" / name)
        with closing(_open(place, server.run, seed)) as site:
            sites[name] = _Remote(place, site)
    tests = {name: records[name][1] for name in names}
    run = _Simulated(config, model, tokenizer, sites, tests, server, out, notes, console)
    results: list[dict[str, Any]] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = _Nodes(grid, names, None)
        nodes.wait(_START_SECONDS, len(names))
        run.nodes = nodes
        results.append(run.go(began))

    cores = min(len(names), os.cpu_count() or 1) if processes is None else processes
    with _aside() as folder:
        ray = {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False}
        simulate(
            app,
            client_app(config, out, seed=seed),
            len(names),
            backend_config={
                "init_args": {**ray, "logging_level": "ERROR", "_temp_dir": folder},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    _model.cache_clear()
    _records.cache_clear()
    driver.write_trained(config, server, out)
    report.write(out, config.federation.name, results[0])
    return results[0]


class _Remote:
    """What the driver tells of a site that trains in another process of this machine."""

    def __init__(self, place: _Place, site: Site) -> None:
        self.records = site.records
        self.noise_multiplier, self.sample_rate = site.noise_multiplier, site.sample_rate
        self._place = place

    def epsilon(self) -> float:
        privacy = self._place.config.privacy
        ledger = _ledger(self._place) or self._place.folder / "ledger.jsonl"
        return read_account(ledger).epsilon(privacy.target_delta, privacy.accountant)


class _Simulated(driver.Run):
    """The driver's run, whose sites are nodes and are asked all at once."""

    nodes: _Nodes

    def _ask(
        self,
        round_: int,
        step: Callable[[], None],
        note: Callable[[str], None],
        attempt: int,
        messages: Mapping[str, bytes],
        lacking: rounds.Lacking,
    ) -> Iterator[tuple[str, bytes | Exception]]:
        note(f"round {round_}, {len(messages)} sites")
        ask = self.nodes.asking(self.config, self.server.run, round_)
        for name, answer in ask(attempt, messages, lacking):
            if isinstance(answer, bytes):
                for _ in range(self.config.federation.local_steps):
                    step()
            yield name, answer


@contextmanager
def _aside() -> Iterator[str]:
    """A folder for what Flower and Ray write, which goes in the end; Flower's log has errors only.

    Their part of the environment is as it was then, too.
    """
    before = {name: os.environ.get(name) for name in ("FLWR_HOME", "PYTHONPATH")}
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="ffa-", ignore_cleanup_errors=True) as folder:
        os.environ["FLWR_HOME"] = os.path.join(folder, "flwr")
        try:
            yield folder
        finally:
            logger.setLevel(level)
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


# Configurations and messages.


def _load_for_site(path: str, name: str, files: Mapping[str, str]) -> Config:
    """The configuration of one site, whatever files of others are not here."""
    raw, folder = _document(path)
    tables = [table for table in _sites(raw) if table.get("name") == name] or [{"name": name}]
    return _apart(settings.parse({**raw, "site": [{**tables[0], **files}]}, folder))


def _load_for_server(path: str) -> tuple[Config, list[str]]:
    """(the configuration without records, the names of its sites)."""
    raw, folder = _document(path)
    # The server has no records; what stands for their files here is never read.
    stands_in = str(Path(path).resolve())
    tables = [{**table, "train": stands_in} for table in _sites(raw)]
    for table in tables:
        table.pop("test", None)
    config = _apart(settings.parse({**raw, "site": tables}, folder))
    return config, sorted(site.name for site in config.sites)


def _apart(config: Config) -> Config:
    """The same, if each site has files of its own."""
    if config.data.source != "files" or config.data.split != "natural":
        raise ConfigError(
            f"[data] source, split: got {config.data.source!r} and {config.data.split!r}; accepted "
            "where sites are apart: 'files' and 'natural'"
        )
    return config


def _document(path: str) -> tuple[dict[str, Any], Path]:
    """(a configuration as it stands in its file, the file's folder)."""
    try:
        raw = settings.read_toml(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"config: {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config: {path} is not TOML in UTF-8: {shown(error, str)}") from error
    return raw, Path(path).parent


def _sites(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The [[site]] tables, as far as they are tables: the rest is for `parse` to refuse."""
    listed = raw.get("site", [])
    return [t for t in listed if isinstance(t, dict)] if isinstance(listed, list) else []


def _record(values: Mapping[str, Any]) -> RecordDict:
    return RecordDict({_RECORD: ConfigRecord(dict(values))})


def _reply(message: Message, values: Mapping[str, Any]) -> Message:
    return Message(_record(values), reply_to=message)


def _field(message: Message, key: str, kind: type[_T]) -> _T:
    """A value from the other end, of that type, or an error that may be shown."""
    if message.has_error():
        raise FederationError(f"failed: {shown(message.error.reason, str)}")
    record = message.content.get(_RECORD)
    if not isinstance(record, ConfigRecord):
        raise WireError(f"message: has no {_RECORD!r}")
    if "failed" in record:
        raise FederationError(f"failed: {shown(record['failed'], str)}")
    value = record.get(key)
    if not isinstance(value, kind):
        raise WireError(f"{key}: got {type(value).__name__}, accepted: {kind.__name__}")
    return value
