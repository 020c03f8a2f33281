"""Flower as the carrier: the same B as the driver's, in its simulation and on machines apart."""

from __future__ import annotations

import functools
import importlib.util
import io
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_federated import document, settled, tiny_bert  # noqa: F401

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from ffa_kernels.errors import ConfigError, FederationError
from ffa_kernels.federated import driver, flower, wire
from ffa_kernels.federated.build import build
from ffa_kernels.federated.config import Config
from ffa_kernels.federated.site import Site
from ffa_kernels.privacy import Ledger
from ffa_kernels.privacy.ledger import read_account

EXAMPLE = Path(__file__).parents[1] / "examples" / "flower"
SEED = 5
SITES = ("east", "north", "south")
pytestmark = pytest.mark.filterwarnings("ignore:.*noise and sampling can be repeated")


# Adam's moments must survive from one round to the next.
ADAM: dict[str, dict[str, Any]] = {
    "train": {"optimizer": "adam", "lr": 0.05},
    "privacy": {"new_ledger": True},
}


@pytest.fixture
def config(document: dict[str, Any], tmp_path: Path) -> Config:  # noqa: F811
    return settled(document, tmp_path, **ADAM)


def with_ledgers(config: Config, folder: Path) -> Config:
    """The same with ledgers of its own, as if nothing had been trained yet."""
    sites = [replace(s, ledger=str(folder / f"{s.name}.ledger.jsonl")) for s in config.sites]
    return replace(config, sites=tuple(sites))


def in_process(config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with monkeypatch.context() as patched:
        patched.setattr(driver, "Site", functools.partial(Site, seed=SEED))
        return driver.run(with_ledgers(config, out), out)


def updates(sites: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What each site has sent, by (site, round)."""
    return {
        (path.parent.name, path.stem[-4:]): load_file(path)
        for path in sites.glob("*/update-*.safetensors")
    }


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def assert_same(a: Path, b: Path, updates_sent: int) -> None:
    """Every update of every round, and the model in the end."""
    mine, others = updates(a / "sites"), updates(b / "sites")
    assert mine.keys() == others.keys() and len(mine) == updates_sent
    for key in mine:
        assert largest_difference(mine[key], others[key]) <= 1e-6, key
        assert any(t.abs().max() > 1e-3 for name, t in mine[key].items() if wire.is_B(name))
    final = [load_file(out / "trained.safetensors") for out in (a, b)]
    assert largest_difference(*final) <= 1e-6


# One end at a time.


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower sets in a process that runs an app, and asks for to make a message."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


Answer = Callable[[Message], Message]


class FakeGrid(Grid):
    """Nodes that answer at once, in this process; one that returns None is silent."""

    def __init__(self, nodes: dict[int, Callable[[Message], Message | None]]) -> None:
        self.nodes, self.registered = nodes, dict.fromkeys(nodes, "")
        self.replies: dict[str, Message] = {}
        self.seen: list[tuple[int, Message]] = []
        self.count = 0

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.registered[node]) for node in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = []
        for message in messages:
            self.count += 1
            self.seen.append((message.metadata.dst_node_id, message))
            message.metadata.__dict__["_message_id"] = str(self.count)
            sent.append(str(self.count))
            try:
                reply = self.nodes[message.metadata.dst_node_id](message)
            except Exception as error:
                reply = Message(Error(code=0, reason=str(error)), reply_to=message)
            if reply is not None:
                self.replies[str(self.count)] = reply
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(m) for m in list(message_ids) if m in self.replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def record(**values: Any) -> RecordDict:
    return RecordDict({"ffa": ConfigRecord(values)})


def carried(message: Message) -> dict[str, Any]:
    found: Any = message.content.get("ffa", {})
    return found


def says(site: Any, update: Any = b"an update") -> Answer:
    """A node that says so."""

    def answer(message: Message) -> Message:
        values = {"query": {"site": site}, "train": {"update": update}}
        return Message(record(**values[message.metadata.message_type]), reply_to=message)

    return answer


def silent_in_rounds(site: str) -> Callable[[Message], Message | None]:
    return lambda m: says(site)(m) if m.metadata.message_type == "query" else None


def broken(message: Message) -> Message:
    raise RuntimeError("ValueError")


def test_only_known_sites_are_admitted_and_each_once(caplog: pytest.LogCaptureFixture) -> None:
    grid = FakeGrid(
        {
            **{1: says("north"), 2: says("north", b"another node's"), 3: says("stranger")},
            **{4: says(7), 5: broken, 6: says("east"), 7: says("south")},
        }
    )
    grid.registered[1], grid.registered[6] = "north", "west"
    nodes = flower._Nodes(grid, list(SITES), timeout=1.0)
    nodes.wait(0.2, least=2)
    answers = nodes.ask("5e" * 8, 1, dict.fromkeys(SITES, b"the model"))
    assert answers["north"] == answers["south"] == b"an update"
    assert isinstance(answers["east"], FederationError)
    assert str(answers["east"]) == "is not there"
    for reason in (
        *("'north' is there already", "got 'stranger'", "site: got int", "failed: ValueError"),
        "'east' of a node registered as 'west'",
    ):
        assert reason in caplog.text, reason
    greeted = grid.count
    nodes.greet()
    assert grid.count == greeted, "who was refused is not asked again"
    del grid.nodes[1]
    answers = nodes.ask("5e" * 8, 2, {"north": b"the model"})
    assert answers == {"north": b"another node's"}, "the name was free again"


def test_too_few_sites_are_an_error() -> None:
    nodes = flower._Nodes(FakeGrid({1: says("north")}), list(SITES), timeout=1.0)
    with pytest.raises(ConfigError, match=r"1 of 3 sites came within 0.1 s; accepted: 2 or more"):
        nodes.wait(0.1, least=2)


def test_who_does_not_answer_is_absent() -> None:
    grid = FakeGrid({1: says("north"), 2: silent_in_rounds("east"), 3: says("south", "text")})
    nodes = flower._Nodes(grid, list(SITES), timeout=1.0)
    nodes.wait(5.0, least=3)
    grid.nodes[1] = broken
    answers = nodes.ask("5e" * 8, 1, dict.fromkeys(SITES, b"the model"))
    assert {name: str(answer) for name, answer in answers.items()} == {
        "north": "failed: ValueError",
        "east": "has not answered within 1 s",
        "south": "update: got str, accepted: bytes",
    }


class OneNode:
    """A site's ClientApp, called as a node of its own machine calls it."""

    def __init__(self, document: dict[str, Any], folder: Path) -> None:  # noqa: F811
        self.file = folder / "federation.toml"
        self.file.write_text(as_toml(document))
        self.out = folder / "north"
        self.node_config: dict[str, Any] = {
            "site": "north", "config": str(self.file), "out": str(self.out)
        }  # fmt: skip
        self.app = flower.client_app()

    def __call__(self, kind: str, **values: Any) -> Message:
        message = Message(record(**values), 1, kind)
        message.metadata.__dict__["_message_id"] = "1"
        return self.app(message, Context(1, 1, self.node_config, RecordDict(), {}))


@pytest.fixture
def node(document: dict[str, Any], tmp_path: Path) -> Iterator[OneNode]:  # noqa: F811
    for name in ("east", "south"):  # whose files are on other machines
        for path in tmp_path.glob(f"{name}*.jsonl"):
            path.unlink()
    yield OneNode(document, tmp_path)
    flower._model.cache_clear()
    flower._records.cache_clear()


def as_toml(document: dict[str, Any]) -> str:  # noqa: F811
    """Enough of TOML for the tests' configurations."""
    lines = []
    for table, content in document.items():
        for values in content if isinstance(content, list) else [content]:
            lines.append(f"[[{table}]]" if isinstance(content, list) else f"[{table}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def test_nothing_but_name_and_update_leaves_a_node(node: OneNode, tmp_path: Path) -> None:
    assert node("query").content == record(site="north")
    config, names = flower._load_for_server(str(node.file))
    assert names == list(SITES)
    server = driver.make_server(config, build(config)[0], "5e" * 8)
    asked = {"run": server.run, "round": 1, "message": server.message(1, "north")}
    reply = node("train", **asked)
    (sent,) = node.out.glob("update-*")
    assert reply.content == record(update=sent.read_bytes())
    assert server.aggregate(1, names, [("north", sent.read_bytes())]).averaged
    steps = config.federation.local_steps
    ledger = tmp_path / "north.jsonl.ledger.jsonl"
    assert read_account(ledger).steps == steps and read_account(ledger).private
    # The same is sent again, and not charged again.
    assert node("train", **asked).content == reply.content
    node("train", **asked | {"round": 2, "message": server.message(2, "north")})
    account = read_account(ledger)
    assert account.steps == 2 * steps and len(account.history) == 1, "one noise for all rounds"
    assert account.epsilon() <= config.privacy.target_epsilon


def test_a_failure_stays_at_the_site(node: OneNode) -> None:
    for values in (
        {"run": "../../escape", "round": 1, "message": b""},
        {"run": "5e" * 8, "round": 1, "message": b"nonsense"},
    ):
        assert node("train", **values).content == record(failed="WireError")
    log = (node.out / "errors.log").read_text()
    assert "accepted are 16 hexadecimal digits" in log and "truncated, or not safetensors" in log
    assert not list(node.out.glob("update-*"))


def test_a_node_config_that_lacks_something_is_named(node: OneNode) -> None:
    for key in ("site", "config", "out"):
        given = node.node_config.pop(key)
        with pytest.raises(ConfigError, match=f"--node-config {key}: got None; accepted"):
            node("query")
        node.node_config[key] = given
    node.node_config["train"] = "elsewhere.jsonl"
    with pytest.raises(ConfigError, match=r"north: train: got 'elsewhere.jsonl', which is no file"):
        node("query")


def fleet(config: Config, out: Path) -> FakeGrid:
    """A node for each site, in this process."""
    app = flower.client_app(config, out, seed=SEED)

    def node(k: int) -> Answer:
        return lambda m: app(m, Context(1, k, {"partition-id": k}, RecordDict(), {}))

    return FakeGrid({k: node(k) for k in range(len(SITES))})


def serve_with(grid: Grid, file: Path, out: Path, resume: bool) -> None:
    given = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    own = {"config": str(file), "out": str(out), "wait": 5.0, "timeout": 5.0, "resume": resume}
    assert own.keys() == given.keys()
    flower.server_app()(grid, Context(1, 0, {}, RecordDict(), own))


def here_and_there(
    document: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[dict[str, Any], Any, Path, Path]:
    """The report of a run in process, and a grid, a file and a folder to make the same in."""
    document = {**document, **{k: document[k] | v for k, v in ADAM.items()}}
    document["federation"] |= {"min_updates": 3, "attempts": 2}
    config = settled(document, tmp_path)
    expected = in_process(config, tmp_path / "here", monkeypatch)
    out, file = tmp_path / "there", tmp_path / "federation.toml"
    file.write_text(as_toml(document))
    return expected, fleet(with_ledgers(config, out), out), file, out


def test_the_server_goes_on_after_a_round_that_failed(
    document: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, grid, file, out = here_and_there(document, tmp_path, monkeypatch)
    serve = functools.partial(serve_with, grid, file, out)
    south = grid.nodes[2]
    grid.nodes[2] = lambda m: broken(m) if m.metadata.group_id == "2" else south(m)
    with pytest.raises(FederationError, match="round 2: got 2 valid updates in 2 attempts"):
        serve(resume=False)
    assert caplog.text.count("round 2: site 'south' is absent: failed: ValueError") == 2
    assert not (out / "report.json").exists()
    grid.nodes[2] = south
    serve(resume=True)
    assert_same(tmp_path / "here", out, updates_sent=6)
    result = json.loads((out / "report.json").read_text())
    assert [entry["round"] for entry in result["rounds"]] == [1, 2]
    kept = sum(path.stat().st_size for path in out.glob("sites/*/update-*"))
    assert result["bytes_up"] == kept
    assert not {"accuracy", "epsilon"} & result.keys()
    flower._model.cache_clear()
    flower._records.cache_clear()


def test_A_goes_to_the_nodes_that_lack_it(
    document: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    document["model"]["init"] = "pissa"
    document["site"][0] |= {"r": 1}
    expected, grid, file, out = here_and_there(document, tmp_path, monkeypatch)
    spoilt: list[int] = []

    def elsewhere(node: Callable[[Message], Message | None]) -> Callable[[Message], Message | None]:
        """A node of a machine that makes no SVD; the first A that comes to south's is cut off."""

        def answer(message: Message) -> Message | None:
            if "frozen" in carried(message) and node is south and not spoilt:
                spoilt.append(1)
                carried(message)["frozen"] = carried(message)["frozen"][:-1]
            flower._model.cache_clear()
            with monkeypatch.context() as patched:
                patched.setattr(torch.linalg, "svd", None)
                return node(message)

        return answer

    south = grid.nodes[2]
    grid.nodes = {k: elsewhere(node) for k, node in grid.nodes.items()}
    serve_with(grid, file, out, resume=False)
    assert_same(tmp_path / "here", out, updates_sent=6)
    assert caplog.text.count("'south' is absent: failed: WireError") == 1
    assert [k for k, m in grid.seen if "frozen" in carried(m)] == [0, 1, 2, 2]
    result = json.loads((out / "report.json").read_text())
    first, second = (entry["sites"] for entry in result["rounds"])
    once = {name: of_site["frozen_bytes_down"] for name, of_site in expected["sites"].items()}
    assert once == {"east": 2048, "north": 2048, "south": 512}
    found = {name: of_site["frozen_bytes_down"] for name, of_site in first.items()}
    assert found == {**once, "south": 2 * 512}
    assert not any(of_site["frozen_bytes_down"] for of_site in second.values())
    assert result["frozen_bytes_down"] == sum(found.values())
    sent = [value for _, m in grid.seen for value in carried(m).values()]
    # And the byte that was cut off.
    assert result["bytes_down"] == sum(len(v) for v in sent if isinstance(v, bytes)) + 1
    flower._model.cache_clear()
    flower._records.cache_clear()


def test_what_opened_a_basis_goes_to_the_nodes_that_lack_it(
    document: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document["federation"] |= {"rounds": 4, "rebasis_every": 1}
    document["site"][0] |= {"r": 1}
    honest = Site.run_round

    def absent(self: Site, round_: int, *arguments: Any, **more: Any) -> bytes:
        if self.name == "south" and round_ in (2, 3):
            raise OSError("the disk is full")
        return honest(self, round_, *arguments, **more)

    monkeypatch.setattr(Site, "run_round", absent)
    document = {**document, **{k: document[k] | v for k, v in ADAM.items()}}
    config = settled(document, tmp_path)
    expected = in_process(config, tmp_path / "here", monkeypatch)
    out, file = tmp_path / "there", tmp_path / "federation.toml"
    file.write_text(as_toml(document))
    grid = fleet(with_ledgers(config, out), out)
    serve_with(grid, file, out, resume=False)
    assert_same(tmp_path / "here", out, updates_sent=10)
    weights = "adapter/adapter_model.safetensors"
    assert largest_difference(*(load_file(o / weights) for o in (tmp_path / "here", out))) <= 1e-6
    told = [k for _, m in grid.seen for k in sorted(carried(m)) if k.startswith("basis-")]
    # In round 3, in which south broke off before it kept them, and in round 4.
    assert told == ["basis-1", "basis-1", "basis-2"]
    result = json.loads((out / "report.json").read_text())
    assert result["frozen_bytes_down"] == 0
    sent = [value for _, m in grid.seen for value in carried(m).values()]
    assert result["bytes_down"] == sum(len(v) for v in sent if isinstance(v, bytes))
    # In process nothing was asked for that was not taken.
    assert expected["bytes_down"] < result["bytes_down"]
    flower._model.cache_clear()
    flower._records.cache_clear()


def test_only_the_example_s_code_travels(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    app = app_folder(tmp_path)
    (app / "north.jsonl").write_text("a record")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app))) as archive:
        names = {n for n in archive.namelist() if not n.startswith(".info/")}
    assert names == {"app.py", "pyproject.toml"}
    assert flower._load_for_server(str(app / "federation.toml"))[1] == ["north", "south"]


def test_without_flower_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    spec = importlib.util.spec_from_file_location("flower_again", flower.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ConfigError, match=r"pip install 'ffa-kernels\[flower\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# Flower's simulation.


class Spoiler(Console):
    """Holds a site's ledger, as another process would, from the end of the first round on."""

    def __init__(self, ledger: Path) -> None:
        super().__init__(quiet=True)
        self.path, self.ledger = ledger, None

    def print(self, *objects: Any, **options: Any) -> None:
        if objects and str(objects[0]).startswith("round 1:"):
            self.ledger = Ledger(self.path)
        super().print(*objects, **options)


@pytest.mark.parametrize(
    ("init", "rebasis_every"),
    [
        ("orthogonal", 0),
        pytest.param("orthogonal", 1, marks=pytest.mark.full),
        pytest.param("pissa", 0, marks=pytest.mark.full),
    ],
)
def test_the_simulation_trains_the_same_B(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    init: str,
    rebasis_every: int,
) -> None:
    federation = replace(config.federation, rebasis_every=rebasis_every)
    config = replace(config, model=replace(config.model, init=init), federation=federation)
    honest = Site.run_round

    def failing(self: Site, round_: int, *arguments: Any) -> bytes:
        if (self.name, round_) == ("south", 2):
            raise OSError("the disk is full")
        return honest(self, round_, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Site, "run_round", failing)
        expected = in_process(config, tmp_path / "here", monkeypatch)
    out = tmp_path / "there"
    spoiler = Spoiler(out / "south.ledger.jsonl")
    own = with_ledgers(config, out)
    monkeypatch.setenv("FFA_TEST", str(tmp_path))
    result = flower.run_simulation(own, out, spoiler, processes=1, seed=SEED)
    assert spoiler.ledger is not None
    spoiler.ledger.close()
    assert_same(tmp_path / "here", out, updates_sent=5)
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(result))
    assert [entry["absent"] for entry in result["rounds"]] == [
        [],
        [{"site": "south", "reason": "failed: LedgerError"}],
    ]
    assert "holds it" in (out / "sites" / "south" / "errors.log").read_text()
    varying = ("seconds", "rounds")
    assert {k: v for k, v in result.items() if k not in varying} == {
        k: v for k, v in expected.items() if k not in varying
    }
    for mine, driven in zip(result["rounds"], expected["rounds"], strict=True):
        assert mine["sites"] == driven["sites"] and mine["accuracy"] == driven["accuracy"]
    end = time.monotonic() + 10.0  # for those that are about to end
    while left := processes_with(f"FFA_TEST={tmp_path}"):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def processes_with(variable: str) -> list[int]:
    """Those that were started with NAME=value in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


# On machines apart.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_certificates(folder: Path) -> None:
    """ca.crt, server.crt and server.key for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def certificate(subject: str, key: Any, signer: Any, ca: bool) -> x509.Certificate:
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("ca"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .sign(signer, hashes.SHA256())
        )

    ca, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    (folder / "ca.crt").write_bytes(pem(certificate("ca", ca, ca, True)))
    (folder / "server.crt").write_bytes(pem(certificate("server", server, ca, False)))
    (folder / "server.key").write_bytes(private(server, "TraditionalOpenSSL"))


def pem(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return bytes(certificate.public_bytes(Encoding.PEM))


def private(key: Any, form: str) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return bytes(key.private_bytes(Encoding.PEM, getattr(PrivateFormat, form), NoEncryption()))


def make_node_key(folder: Path, name: str) -> None:
    """NAME.key and NAME.pub, as ssh-keygen -t ecdsa -b 384 makes them."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = ec.generate_private_key(ec.SECP384R1())
    (folder / f"{name}.key").write_bytes(private(key, "OpenSSH"))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public)


class Deployment:
    """A SuperLink with TLS and node authentication, and what is started beside it."""

    def __init__(self, folder: Path, processes: ExitStack) -> None:
        self.folder, self.processes = folder, processes
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "PYTHONPATH": str(EXAMPLE.parents[1]),
            "PYTHONWARNINGS": "ignore",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        make_certificates(folder)
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self.address}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )
        processes.callback(self._end_all)
        self.start(
            "superlink",
            *("flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", str(folder / "ca.crt")),
            *("--ssl-certfile", str(folder / "server.crt")),
            *("--ssl-keyfile", str(folder / "server.key")),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        )
        self.until("the SuperLink listens", self._listens)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def flwr(self, *arguments: str) -> str:
        done = subprocess.run(
            ["flwr", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def register(self, name: str) -> None:
        make_node_key(self.folder, name)
        self.flwr("supernode", "register", str(self.folder / f"{name}.pub"), "--name", name)

    def node(self, name: str, key: str, node_config: str) -> subprocess.Popen[bytes]:
        return self.start(
            name,
            *("flower-supernode", "--superlink", self.address, "--port", str(free_port())),
            *("--root-certificates", str(self.folder / "ca.crt")),
            *("--auth-supernode-private-key", str(self.folder / f"{key}.key")),
            *("--node-config", node_config),
        )

    def until(self, what: str, true: Callable[[], bool], seconds: float = 150.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                logs = "".join(
                    f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}\n"
                    for p in sorted(self.folder.glob("*.log"))
                )
                pytest.fail(f"not within {seconds:g} s: {what}\n{logs}")
            time.sleep(0.2)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def mine(self) -> list[int]:
        """Processes of this deployment, by the environment that only they have."""
        return processes_with(f"FLWR_HOME={self.environment['FLWR_HOME']}")

    def _end_all(self) -> None:
        for last in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.mine():
                try:
                    os.kill(pid, last)
                except ProcessLookupError:
                    continue
            end = time.monotonic() + 8.0
            while self.mine() and time.monotonic() < end:
                time.sleep(0.1)


@contextmanager
def deployment(folder: Path) -> Iterator[Deployment]:
    folder.mkdir()
    with ExitStack() as processes:
        yield Deployment(folder, processes)


def app_folder(folder: Path) -> Path:
    """The example's app, with noise that repeats."""
    app = folder / "app"
    shutil.copytree(EXAMPLE, app)
    code = (app / "app.py").read_text()
    assert "client_app()" in code
    (app / "app.py").write_text(code.replace("client_app()", f"client_app(seed={SEED})"))
    return app


@pytest.mark.full
@pytest.mark.parametrize(
    ("init", "rebasis_every"), [("orthogonal", 0), ("orthogonal", 1), ("pissa", 0)]
)
def test_machines_apart_train_the_same_B(
    document: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    init: str,
    rebasis_every: int,
) -> None:
    document["model"]["init"] = init
    document["federation"]["rebasis_every"] = rebasis_every
    config = settled(document, tmp_path, **ADAM)
    in_process(config, tmp_path / "here", monkeypatch)
    out = tmp_path / "there"
    file = tmp_path / "federation.toml"
    file.write_text(as_toml({**document, **{k: document[k] | v for k, v in ADAM.items()}}))
    with deployment(tmp_path / "flower") as flower_:
        for name in SITES:
            flower_.register(name)
            flower_.node(
                *(name, name),
                f'site="{name}" config="{file}" out="{out / "sites" / name}" '
                f'ledger="{out / name}.ledger.jsonl"',
            )
        make_node_key(flower_.folder, "stranger")
        stranger = flower_.node("stranger", "stranger", f'site="north" config="{file}" out="."')
        flower_.flwr(
            *("run", str(app_folder(tmp_path)), "--run-config"),
            f'config="{file}" out="{out}" wait=120.0 timeout=120.0',
        )
        flower_.until("a report", (out / "report.json").exists)
        assert stranger.poll() not in (None, 0)
        assert "Failed to activate SuperNode" in flower_.log("stranger")
        assert "No SuperNode found with the given public key" in flower_.log("superlink")
    assert not flower_.mine(), "every process has ended"
    assert_same(tmp_path / "here", out, updates_sent=6)
    result = json.loads((out / "report.json").read_text())
    assert [entry["absent"] for entry in result["rounds"]] == [[], []]
    kept = sum(path.stat().st_size for path in out.glob("sites/*/update-*"))
    assert result["bytes_up"] == kept and result["bytes_down"] > 0
    frozen = [wire.measure(path.read_bytes()) for path in out.glob("sites/*/frozen-*")]
    assert len(frozen) == (3 if init == "pissa" else 0)
    assert result["frozen_bytes_down"] == sum(size.frozen for size in frozen)
    assert not list(out.rglob("report.md"))
    assert len(list(out.glob("sites/*/basis-*"))) == 3 * rebasis_every
    if rebasis_every:
        weights = "adapter/adapter_model.safetensors"
        both = [load_file(o / weights) for o in (tmp_path / "here", out)]
        assert largest_difference(*both) <= 1e-6
