"""A federation whose processes are killed at random while some of its sites lie; test_chaos.py.

`python tests/chaos_child.py FOLDER SPEC` runs what the JSON of a Spec says and prints what was seen
as JSON; it fails where a promise is broken. Server and sites are processes that talk over a local
socket. This one forks them, having all loaded and no threads: a restart costs milliseconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import statistics
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kill_child import Log
from safetensors import torch as safetensors
from test_federated import header_of, make_tiny_bert, sentences

from ffa_kernels.errors import FFAError
from ffa_kernels.federated import data, driver
from ffa_kernels.federated.build import build
from ffa_kernels.federated.config import Config, parse, site_of
from ffa_kernels.federated.data import Records
from ffa_kernels.federated.rounds import draw_sites
from ffa_kernels.federated.site import Site, load_trained
from ffa_kernels.files import write_atomic
from ffa_kernels.privacy import epsilon
from ffa_kernels.privacy.ledger import read_account

RUN = "c4" * 8
SOCKET = "server.sock"
GAVE_UP = 3
GRACE = 0.1  # seconds that a server waits for a site that is away, at its first attempt
# What a server says to each kind of lie.
REASONS = {
    "nan": r"holds NaN or infinity$",
    "scaled": r"^norm: got .*, accepted: at most",
    "stale": r"^round: got",
    "fingerprint": r"^(base|recipe): got",
    "truncated": r"^message: (truncated|not valid safetensors)",
    "other": r"^site: got",
    "duplicate": r"^site: has answered already$",
}


@dataclass(frozen=True)
class Spec:
    """How large a run is.

    Attributes:
        kills: of sites; `server_kills` come on top.
        calm: runs of the honest sites alone, without kills, that say what accuracy is to be met.
        seconds: for all of it.
    """

    seed: int
    honest: int
    liars: int
    rounds: int
    local_steps: int
    target_epsilon: float
    batch_size: int
    lr: float
    kills: int
    server_kills: int
    calm: int
    seconds: float


@dataclass(frozen=True)
class Parts:
    """What all processes of a run have before they are forked."""

    spec: Spec
    config: Config
    names: list[str]
    liars: list[str]
    model: torch.nn.Module
    tokenizer: Any
    records: dict[str, tuple[Records, Records]]

    @property
    def honest(self) -> list[str]:
        return [name for name in self.names if name not in self.liars]


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def kept(name: str, round_: int) -> Path:
    return Path("sites") / name / f"update-{RUN}-{round_:04d}.safetensors"


def event(events: int, what: str, round_: int) -> None:
    """Told to whoever kills."""
    os.write(events, f"{what} {round_}\n".encode())


# Frames: two lengths, JSON, and the message.


def send(connection: socket.socket, message: bytes = b"", **told: Any) -> None:
    head = json.dumps(told).encode()
    connection.sendall(struct.pack("<II", len(head), len(message)) + head + message)


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """ConnectionError when the other end is gone, in the middle of a frame or not."""

    def exactly(count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            part = connection.recv(count - len(parts))
            if not part:
                raise ConnectionError
            parts += part
        return parts

    head, message = struct.unpack("<II", exactly(8))
    return json.loads(exactly(head)), exactly(message)


# A site.


def site_process(parts: Parts, name: str, life: int, supervisor: int, events: int) -> None:
    def on_step(round_: int) -> None:
        log.write(trained=round_, noise=site.noise_multiplier, rate=site.sample_rate)
        event(events, f"{name}-stepped", round_)

    log, config = Log(Path(f"{name}.log")), parts.config
    entry = site_of(config, name)
    assert entry is not None
    rng = random.Random(f"{parts.spec.seed} {name} {life}")
    with closing(
        Site(
            *(name, parts.records[name][0], parts.model, parts.tokenizer, config, RUN),
            folder=Path("sites") / name,
            ledger=entry.ledger,
        )
    ) as site:
        log.write(opened=life)
        while True:
            with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(ConnectionError):
                connect(connection, supervisor)
                send(connection, site=name)
                while True:
                    asked, message = receive(connection)
                    round_ = asked["round"]
                    try:
                        update = site.run_round(round_, message, partial(on_step, round_))
                    except FFAError as error:
                        log.write(absent=round_, reason=str(error))
                        send(connection, absent=str(error))
                        continue
                    kind, sent = "honest", [update]
                    if name in parts.liars:
                        kind, sent = lie(parts, name, round_, life, rng, message, update)
                    for number, one in enumerate(sent, start=1):
                        # Before it leaves: what may have left is counted.
                        log.write(handed=round_, kind=kind, sha=sha(one))
                        send(connection, one, kind=kind, last=number == len(sent))


def connect(connection: socket.socket, supervisor: int) -> None:
    while True:
        if os.getppid() != supervisor:
            os._exit(0)
        try:
            return connection.connect(SOCKET)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.01)


def lie(
    parts: Parts,
    name: str,
    round_: int,
    life: int,
    rng: random.Random,
    message: bytes,
    update: bytes,
) -> tuple[str, list[bytes]]:
    """(kind, messages): the update that a real site has made, spoilt in the way that is due."""
    deck = list(REASONS)
    random.Random(f"{parts.spec.seed} {name}").shuffle(deck)
    kind = deck[(round_ + life) % len(deck)]
    tensors, header = safetensors.load(update), header_of(update)
    victim = rng.choice(parts.honest)
    match kind:
        case "nan":
            tensor = tensors[rng.choice(sorted(tensors))].view(-1)
            tensor[rng.randrange(len(tensor))] = rng.choice([torch.nan, torch.inf])
        case "scaled":
            old = safetensors.load(message)
            tensors = {key: old[key] + 1000 * (t - old[key]) for key, t in tensors.items()}
        case "stale":
            earlier = [path for k in range(1, round_) if (path := kept(name, k)).exists()]
            if earlier:
                return kind, [rng.choice(earlier).read_bytes()]
            header["round"] = "0"
        case "fingerprint":
            header[rng.choice(["base", "recipe"])] = f"{rng.getrandbits(256):064x}"
        case "truncated":
            return kind, [update[: rng.randrange(len(update))]]
        case "other":
            if kept(victim, round_).exists():
                return kind, [kept(victim, round_).read_bytes()]
            header["site"] = victim
        case "duplicate":
            return kind, [update, update]
    return kind, [safetensors.save(tensors, metadata=header)]


# The server.


class Line:
    """The sites that are connected to a server."""

    def __init__(self, supervisor: int) -> None:
        self.supervisor = supervisor
        Path(SOCKET).unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(SOCKET)
        self.listener.listen(64)
        self.sites: dict[str, socket.socket] = {}

    def gather(
        self, round_: int, asked: list[str], grace: float, message: Callable[[str], bytes]
    ) -> tuple[list[tuple[str, str, bytes]], dict[str, str]]:
        """([(site, kind, update)] in order of arrival, why each other site is absent)."""
        until = time.monotonic() + grace
        waiting, busy = set(asked), set[str]()
        arrived: list[tuple[str, str, bytes]] = []
        absent: dict[str, str] = {}

        def lost(name: str) -> None:
            self.sites.pop(name).close()
            if name in busy:
                busy.remove(name)
                absent[name] = "died"

        while busy or (waiting and time.monotonic() < until):
            if os.getppid() != self.supervisor:
                os._exit(0)
            for name in sorted(waiting & self.sites.keys()):
                waiting.remove(name)
                busy.add(name)
                try:
                    send(self.sites[name], message(name), round=round_)
                except ConnectionError:
                    lost(name)
            known = {connection: name for name, connection in self.sites.items()}
            for ready in select.select([self.listener, *known], [], [], 0.01)[0]:
                if ready is self.listener:
                    connection = self.listener.accept()[0]
                    try:
                        name = receive(connection)[0]["site"]
                    except ConnectionError:
                        connection.close()
                        continue
                    if name in self.sites:
                        lost(name)
                    self.sites[name] = connection
                    continue
                name = known[ready]
                if self.sites.get(name) is not ready:
                    continue
                try:
                    told, update = receive(ready)
                except ConnectionError:
                    lost(name)
                    continue
                if "absent" in told:
                    absent[name] = told["absent"]
                else:
                    arrived.append((name, told["kind"], update))
                if told.get("last", True):
                    busy.remove(name)
        return arrived, {**absent, **dict.fromkeys(waiting, "away")}


def server_process(parts: Parts, life: int, supervisor: int, events: int) -> None:
    """The driver's loop, over a line."""
    config, log, rounds = parts.config, Log(Path("server.log")), parts.spec.rounds
    server = driver.make_server(config, parts.model, RUN)
    notes: dict[str, Any] = {"rounds": []}
    if Path(driver.STATE).exists():
        notes = driver.restored(config, server, Path(), parts.names)
    line = Line(supervisor)
    for round_ in range(len(notes["rounds"]) + 1, rounds + 1):
        event(events, "began", round_)
        asked = draw_sites(config, round_, parts.names)
        attempts = 0
        updates: dict[str, bytes] = {}
        while True:
            attempts += 1
            arrived, absent = line.gather(
                round_,
                [name for name in asked if name not in updates],
                # At the very beginning all are to open first.
                20.0 if round_ == 1 and life == attempts == 1 else GRACE * attempts,
                lambda name, round_=round_: server.message(round_, name),
            )
            offered = [*updates.items(), *((site, update) for site, _, update in arrived)]
            outcome = server.aggregate(round_, asked, offered)
            first: dict[str, bytes] = {}
            for site, update in offered:
                first.setdefault(site, update)
            updates = {site: first[site] for site in outcome.norms}
            accepted = {site: sha(update) for site, update in updates.items()}
            log.write(
                round=round_,
                life=life,
                attempt=attempts,
                arrived=[(site, kind, sha(update)) for site, kind, update in arrived],
                absent=absent,
                refused=outcome.refused,
                accepted=accepted,
                norms=outcome.norms,
                averaged=outcome.averaged,
            )
            if outcome.averaged:
                break
            if attempts == config.federation.attempts:
                os._exit(GAVE_UP)
        event(events, "averaged", round_)
        notes["rounds"].append({"round": round_, "accepted": accepted})
        write_atomic(Path(driver.STATE), server.state(notes))
        event(events, "kept", round_)
    load_trained(parts.model, server.tensors)
    tests = {name: parts.records[name][1] for name in parts.honest}
    right = [
        driver.count_correct(parts.model, parts.tokenizer, of_site, config)
        for of_site in tests.values()
    ]
    log.write(accuracy=sum(right) / sum(map(len, tests.values())))
    event(events, "done", rounds)


# Who kills them.


class Processes:
    """The server ("server") and the sites, each alive or dead."""

    def __init__(self, parts: Parts, events: int) -> None:
        self.parts, self.events = parts, events
        self.pids: dict[str, int] = {}
        self.lives: Counter[str] = Counter()

    def start(self, name: str) -> None:
        self.lives[name] += 1
        supervisor, life = os.getpid(), self.lives[name]
        pid = os.fork()
        if pid:
            self.pids[name] = pid
            return
        try:
            if name == "server":
                server_process(self.parts, life, supervisor, self.events)
            else:
                site_process(self.parts, name, life, supervisor, self.events)
            os._exit(0)
        except BaseException:
            Path(f"{name}.crash").write_text(traceback.format_exc())
            os._exit(1)

    def kill(self, name: str) -> int:
        """Its exit status, as subprocess has it."""
        pid = self.pids.pop(name)
        os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def ended(self) -> dict[str, int]:
        """Statuses of those that ended by themselves."""
        found = {}
        for name, pid in list(self.pids.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self.pids[name]
                found[name] = os.waitstatus_to_exitcode(status)
        return found


@contextmanager
def processes(parts: Parts, events: int) -> Iterator[Processes]:
    them = Processes(parts, events)
    try:
        for name in ("server", *parts.names):
            them.start(name)
        yield them
    finally:
        for name in list(them.pids):
            them.kill(name)


@dataclass(frozen=True)
class Kill:
    """Of `victim`, a share of a round's usual time after an event of `round`."""

    victim: str
    round: int
    after: str
    share: float


def planned(parts: Parts, rng: random.Random) -> list[Kill]:
    spec, kills = parts.spec, []
    # The last round is left alone: a run that is over cannot be killed.
    for _ in range(spec.kills):
        round_ = rng.randrange(1, spec.rounds)
        victim = rng.choice(parts.names)
        # Much of a round is waiting for others: every other kill seeks the training.
        after, most = rng.choice([("began", 1.0), (f"{victim}-stepped", 0.1)])
        kills.append(Kill(victim, round_, after, rng.uniform(0.0, most)))
    for round_ in rng.sample(range(1, spec.rounds), spec.server_kills):
        # A state is written within a moment, which few kills would meet by chance.
        after, most = rng.choice([("began", 1.0), ("averaged", 0.03)])
        kills.append(Kill("server", round_, after, rng.uniform(0.0, most)))
    return kills


def federate(parts: Parts, kills: list[Kill], rng: random.Random, until: float) -> Counter[str]:
    """All rounds in the working directory; how often each process was killed."""
    reader, writer = os.pipe()
    done: Counter[str] = Counter()
    usual = 0.3
    starts: list[tuple[float, str]] = []
    due: list[tuple[float, Kill]] = []
    known: set[tuple[str, int]] = set()
    began, pending = time.monotonic(), b""
    with processes(parts, writer) as them:
        while True:
            now = time.monotonic()
            assert now < until, f"no end in time; the kills were {dict(done)}"
            for name, status in them.ended().items():
                crash = Path(f"{name}.crash")
                if name == "server" and status == 0:
                    os.close(reader)
                    os.close(writer)
                    return done
                if name == "server" and status == GAVE_UP:
                    starts.append((now, name))
                    continue
                raise AssertionError(f"{name} ended with {status}: {crash.read_text()}")
            for when, name in [start for start in starts if start[0] <= now]:
                starts.remove((when, name))
                them.start(name)
            for when, kill in [one for one in due if one[0] <= now]:
                victim = kill.victim
                if victim not in them.pids:
                    alive = sorted(them.pids.keys() - {"server"})
                    if victim == "server" or not alive:
                        continue
                    victim = rng.choice(alive)
                due.remove((when, kill))
                assert them.kill(victim) == -signal.SIGKILL, f"{victim} ended by itself"
                done[victim] += 1
                starts.append((time.monotonic() + rng.uniform(0.0, usual), victim))
            times = [when for when, _ in (*starts, *due)]
            wait = min([0.02, *(max(when - time.monotonic(), 0.0) for when in times)])
            if not select.select([reader], [], [], wait)[0]:
                continue
            *lines, pending = (pending + os.read(reader, 65536)).split(b"\n")
            now = time.monotonic()
            for line in lines:
                what, number = line.decode().split()
                round_ = int(number)
                if (what, round_) not in known:
                    known.add((what, round_))
                    due += [
                        (now + kill.share * usual, kill)
                        for kill in kills
                        if (kill.after, kill.round) == (what, round_)
                    ]
                if what == "began":
                    began = now
                elif what == "kept" and round_ > 1:
                    usual = 0.8 * usual + 0.2 * min(now - began, 1.0)


# What they leave.


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{name}.log").read_text().splitlines()]


def look(parts: Parts, killed: Counter[str]) -> dict[str, Any]:
    """What a run left in the working directory; raises AssertionError for a broken promise."""
    told = lines_of("server")
    attempts = [line for line in told if "round" in line]
    charged = {name: look_at_site(parts, name, killed[name], attempts) for name in parts.names}
    honest = [charged[name] for name in parts.honest]
    counted = look_at_server(parts)
    refused = look_at_refusals(parts, attempts)
    averaged = [line for line in attempts if line["averaged"]]
    return {
        "accuracy": next(line["accuracy"] for line in told if "accuracy" in line),
        "rounds": len(counted),
        "site_kills": sum(killed.values()) - killed["server"],
        "server_kills": killed["server"],
        "charged": sum(site["charged"] for site in honest),
        "trained": sum(site["trained"] for site in honest),
        "released": sum(site["released"] for site in honest),
        "sent_again": sum(site["sent_again"] for site in honest),
        "attempts_repeated": len(attempts) - len(averaged),
        "rounds_averaged_again": len(averaged) - len(counted),
        "rounds_short_of_sites": sum(
            not set(parts.honest) <= entry["accepted"].keys() for entry in counted
        ),
        "refused": refused,
        "largest_norm": max(n for line in attempts for n in line["norms"].values()),
    }


def look_at_site(
    parts: Parts, name: str, kills: int, attempts: list[dict[str, Any]]
) -> dict[str, int]:
    """Ledger against truth: what the site has trained and handed out, as it noted itself."""
    lines, privacy = lines_of(name), parts.config.privacy
    steps = parts.config.federation.local_steps
    trained = Counter(line["trained"] for line in lines if "trained" in line)
    handed = [line for line in lines if "handed" in line]
    arrived = {
        (line["round"], digest)
        for line in attempts
        for site, _, digest in line["arrived"]
        if site == name
    }
    assert arrived <= {(line["handed"], line["sha"]) for line in handed}
    if name in parts.honest:
        for round_, digest in {(line["handed"], line["sha"]) for line in handed}:
            assert digest == sha(kept(name, round_).read_bytes()), f"{name}, round {round_}"
    rounds = {line["handed"] for line in handed}
    assert all(trained[round_] >= steps for round_ in rounds)
    released = steps * len(rounds)
    entry = site_of(parts.config, name)
    assert entry is not None and entry.ledger is not None
    account = read_account(entry.ledger)
    total = trained.total()
    # With the noise that the ledger has of it: more, after steps that a kill has cost.
    made = Counter((line["noise"], line["rate"]) for line in lines if "trained" in line)
    charged = {row[:2]: row[2] for row in account.history}
    assert account.private and all(charged[key] >= count for key, count in made.items()), name
    assert account.steps >= total >= released, f"{name}: {account.steps}, {total}, {released}"
    # One that was charged when the kill came, and nothing besides.
    assert account.steps <= total + kills, f"{name}: {account.steps}, {total}, {kills} kills"
    spent = epsilon(
        [(*key, count) for key, count in made.items()], privacy.target_delta, privacy.accountant
    )
    told = account.epsilon(privacy.target_delta, privacy.accountant)
    assert spent <= told <= privacy.target_epsilon, f"{name}: {told} told, {spent} spent"
    return {
        "charged": account.steps,
        "trained": total,
        "released": released,
        "sent_again": len(handed) - len(rounds),
    }


def look_at_server(parts: Parts) -> list[dict[str, Any]]:
    """The rounds that count; one that was never killed ends with the same bits after them."""
    ended = driver.make_server(parts.config, parts.model, RUN)
    counted = driver.restored(parts.config, ended, Path(), parts.names)["rounds"]
    assert [entry["round"] for entry in counted] == list(range(1, parts.spec.rounds + 1))
    again = driver.make_server(parts.config, parts.model, RUN)
    for entry in counted:
        updates = {site: kept(site, entry["round"]).read_bytes() for site in entry["accepted"]}
        assert {site: sha(update) for site, update in updates.items()} == entry["accepted"]
        outcome = again.aggregate(entry["round"], parts.names, updates.items())
        assert outcome.averaged and not outcome.refused
    for name, tensor in ended.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), f"{name} is another"
    return counted


def look_at_refusals(parts: Parts, attempts: list[dict[str, Any]]) -> dict[str, int]:
    """How often each kind of lie was refused: each time, for its reason, and nobody else was."""
    seen: Counter[str] = Counter()
    for line in attempts:
        refused = list(map(tuple, line["refused"]))
        lies = []
        for site, kind in dict.fromkeys((site, kind) for site, kind, _ in line["arrived"]):
            copies = sum(other == site for other, _, _ in line["arrived"])
            if kind == "honest":
                assert site in line["accepted"] and copies == 1
                continue
            # The first of two is an update as any other.
            due = copies - 1 if kind == "duplicate" else copies
            lies += [(site, kind)] * due
            assert (site in line["accepted"]) == (kind == "duplicate"), f"{site}: {kind}"
        assert len(lies) == len(refused), f"{line}"
        for (site, kind), (from_, reason) in zip(sorted(lies), sorted(refused), strict=True):
            assert site == from_ and re.search(REASONS[kind], reason), f"{kind}: {reason}"
            seen[kind] += 1
    return dict(seen)


# All of it.


def prepared(spec: Spec, folder: Path, liars: int) -> Parts:
    """A run in `folder`; the records and the model are the same in every one."""
    names = [f"honest-{k}" for k in range(spec.honest)]
    liars_names = [f"liar-{k}" for k in range(liars)]
    folder.mkdir()
    for k, name in enumerate((*names, *liars_names)):
        lines = [json.dumps(row) + "\n" for row in sentences(220, seed=k)]
        (folder / f"{name}.jsonl").write_text("".join(lines[:160]))
        (folder / f"{name}-test.jsonl").write_text("".join(lines[160:]))
    document = {
        "federation": {
            "name": "chaos",
            "rounds": spec.rounds,
            "local_steps": spec.local_steps,
            "min_updates": spec.honest - 1,
            "attempts": 3,
            "max_update_norm": 3.0,
            "server_optimizer": "momentum",
            "server_momentum": 0.5,
        },
        "model": {"kind": "../tiny-bert", "r": 4, "max_length": 16},
        "privacy": {
            "target_epsilon": spec.target_epsilon,
            "target_delta": 1e-3,
            "accountant": "rdp",
        },
        "train": {"batch_size": spec.batch_size, "optimizer": "adam", "lr": spec.lr},
        "data": {"source": "files"},
        "site": [
            {"name": name, "train": f"{name}.jsonl", "test": f"{name}-test.jsonl"}
            for name in (*names, *liars_names)
        ],
    }
    config = parse(document, folder)
    model, tokenizer = build(config)
    records = driver.load_records(config)
    return Parts(spec, config, sorted(records), liars_names, model, tokenizer, records)


def run(spec: Spec, folder: Path, liars: int, kill: bool, until: float) -> dict[str, Any]:
    parts = prepared(spec, folder, liars)
    os.environ["FFA_LEDGERS"] = str(folder / "ledgers")
    # A socket's path is short.
    os.chdir(folder)
    rng = random.Random(f"kills {spec.seed}")
    began = time.monotonic()
    killed = federate(parts, planned(parts, rng) if kill else [], rng, until)
    seconds = time.monotonic() - began
    tests = data.pool({name: parts.records[name][1] for name in parts.honest})
    return {
        **look(parts, killed),
        "majority": data.majority_accuracy(tests),
        "seconds": round(seconds, 1),
    }


def warm(spec: Spec, folder: Path) -> None:
    """All is loaded and the noise solved for, once for all processes."""
    parts = prepared(spec, folder, 0)
    os.environ["FFA_LEDGERS"] = str(folder / "ledgers")
    name = parts.names[0]
    records, of_model = parts.records[name][0], (parts.model, parts.tokenizer)
    with closing(Site(name, records, *of_model, parts.config, RUN, folder / name)) as site:
        server = driver.make_server(parts.config, parts.model, RUN)
        server.aggregate(1, [name], [(name, site.run_round(1, server.message(1, name)))])
    shutil.rmtree(folder)


def main() -> None:
    folder, spec = Path(sys.argv[1]), Spec(**json.loads(sys.argv[2]))
    until = time.monotonic() + spec.seconds
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    (folder / "tiny-bert").mkdir()
    make_tiny_bert(folder / "tiny-bert")
    warm(spec, folder / "warm")
    print(f"ready: {asdict(spec)}", file=sys.stderr)
    calm = [run(spec, folder / f"calm-{k}", 0, False, until) for k in range(spec.calm)]
    assert all(not one["refused"] for one in calm)
    seen = run(spec, folder / "chaos", spec.liars, True, until)
    accuracies = [one["accuracy"] for one in calm]
    print(
        json.dumps(
            {
                **seen,
                "calm": accuracies,
                "calm_mean": statistics.mean(accuracies),
                "calm_seconds": [one["seconds"] for one in calm],
                "calm_charged": [one["charged"] for one in calm],
            }
        )
    )


if __name__ == "__main__":
    main()
