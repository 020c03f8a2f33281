"""The parsers fed with mutated inputs, each in a process of its own, whose memory is measured.

`python fuzz_child.py PARSER COUNT SEED FOLDER` prints what it saw as one JSON object. Case i is
made from (PARSER, SEED, i) alone; one that breaks a promise is saved in FOLDER and named.
"""

import copy
import json
import os
import random
import re
import signal
import struct
import sys
import time
import tomllib
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from memory_child import status
from torch import nn

import ffa_kernels as ffa
from ffa_kernels.errors import ConfigError, FFAError, LedgerError, WireError
from ffa_kernels.federated import config, data, wire
from ffa_kernels.memory.planning import parse_memory
from ffa_kernels.nn.adapter_files import CONFIG, WEIGHTS
from ffa_kernels.privacy import Ledger
from ffa_kernels.privacy import ledger as ledger_module
from ffa_kernels.privacy.keys import SecretStream

SLOW_S = 1.0
# Of processor time: others may be using this machine.
CLOCK = time.process_time

# An input is one file or two; what follows them (a way to read them) is not mutated.
Case = tuple[bytes, ...]


class Raw(str):
    """A piece of JSON or TOML as it stands."""


class Pairs(list):
    """An object's keys and values, in which a key may come twice."""


class TooSlow(BaseException):
    """Nothing that a parser could take for an error of its own."""


# What a value may turn into.

DEPTHS = (2, 40, 320, 3000, 100_000)
TEXTS = (
    *("", " ", "\0", "a\0b", "../..", "/", "x" * 300, "y" * 20_000, "é\u2028\U0001f600", "\n"),
    *("(", "[", "]", "\\", "\\1", ".*", "*", "a{99999999999}", "(?i)query", "(?P<x>q)(?P<x>q)"),
    # Backtracking would take longer than anyone waits.
    *("(.*)*x", "(a|a|.)*x", "((.+)+)+x", ".*" * 30 + "x", "(" * 150 + "." + ")*" * 150),
    *("query", "lora_A", "0", "-1", "nan", "true", "minilm", "files", "natural", "LORA"),
)  # fmt: skip
NUMBERS = (
    *("0", "1", "-1", "2", "0.5", "-0.0", "1e-320", "1e308", "1e400", "-1e400"),
    *("2147483648", "9223372036854775808", "18446744073709551616", "9" * 400, "9" * 5000),
)
JSON_NUMBERS = (*NUMBERS, "NaN", "Infinity", "-Infinity")
TOML_NUMBERS = (
    *(*NUMBERS, "nan", "inf", "-inf", "0x" + "f" * 300, "0x" + "f" * 6000, "1_000"),
    *("1979-05-27T07:32:00Z", "1979-05-27", "07:32:00"),
)


def nested(rng: random.Random, toml: bool) -> Raw:
    depth = rng.choice((*DEPTHS, rng.randrange(150, 350), rng.randrange(850, 1100)))
    opened, closed = rng.choice([("[", "]"), ("{a=", "}") if toml else ('{"a":', "}")])
    # Left open, it is refused only after all of it was read.
    return Raw(opened * depth + "1" + closed * (depth if rng.random() < 0.7 else 0))


def odd_value(rng: random.Random, toml: bool = False) -> object:
    kind = rng.randrange(6)
    if kind == 0:
        return Raw(rng.choice(TOML_NUMBERS if toml else JSON_NUMBERS))
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return nested(rng, toml)
    if kind == 3:
        return rng.choice([True, False, [], Pairs(), [[]], [""], [1], [True], Pairs([("", 0)])])
    if kind == 4:
        return [odd_value(rng, toml) for _ in range(rng.randrange(3))]
    return Raw("true") if toml else Raw(rng.choice(["null", '"\\ud800"', "[null]", '{"a": null}']))


def mutate_tree(rng: random.Random, tree: object, toml: bool = False) -> object:
    """The tree with one of its values or keys changed; `tree` itself may be changed too."""
    places: list[tuple[list, int]] = []
    unseen = [tree]
    while unseen:
        node = unseen.pop()
        if isinstance(node, list):
            places += [(node, i) for i in range(len(node))]
            unseen += [item[1] if isinstance(node, Pairs) else item for item in node]
    if len(places) > 200:
        # One of these may stand for thousands.
        return tree
    if not places or rng.random() < 0.01:
        return odd_value(rng, toml)
    held, i = rng.choice(places)
    keyed = isinstance(held, Pairs)
    key, value = held[i] if keyed else (None, held[i])
    kind, small = rng.randrange(8), len(str(held[i])) < 200
    if kind == 0:
        del held[i]
    elif kind == 1:
        # Twice, or often.
        again = (key, "again") if keyed and rng.random() < 0.5 else held[i]
        held[i:i] = [again] * rng.choice((1, 1, 1, 2, 200, 4000) if small else (1, 2))
    elif kind == 2 and keyed:
        held[i] = rng.choice((*TEXTS, key + "x", key[:-1])), value
    elif kind == 3:
        other, j = rng.choice(places)
        stolen = copy.deepcopy(other[j][1] if isinstance(other, Pairs) else other[j])
        held[i] = (key, stolen) if keyed else stolen
    elif kind == 4:
        wrapped = rng.choice([[value], [value, value], Pairs([(key or "a", value)])])
        held[i] = (key, wrapped) if keyed else wrapped
    elif kind == 5 and keyed:
        many = rng.choice((2, 200, 4000)) if small else 2
        held[i:i] = [(f"{key}{n}", value) for n in range(many)]
    else:
        value = odd_value(rng, toml)
        held[i] = (key, value) if keyed else value
    return tree


def json_tree(text: bytes) -> object:
    return json.loads(text, object_pairs_hook=Pairs)


def as_json(node: object) -> str:
    if isinstance(node, Raw):
        return node
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{json.dumps(k)}:{as_json(v)}" for k, v in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(as_json, node)) + "]"
    return json.dumps(node)


def toml_tree(node: object) -> object:
    if isinstance(node, dict):
        return Pairs((k, toml_tree(v)) for k, v in node.items())
    return [toml_tree(v) for v in node] if isinstance(node, list) else node


def as_toml_value(node: object) -> str:
    if isinstance(node, Raw):
        return node
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{json.dumps(k)}={as_toml_value(v)}" for k, v in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(as_toml_value, node)) + "]"
    return json.dumps(node, ensure_ascii=False)


def as_toml(node: object) -> str:
    """The document, its tables under headings."""
    if not isinstance(node, Pairs):
        return as_toml_value(node)
    lines, tables = [], []
    for key, value in node:
        name = json.dumps(key, ensure_ascii=False)
        several = isinstance(value, list) and not isinstance(value, Pairs) and value
        listed = several and all(isinstance(v, Pairs) for v in value)
        if isinstance(value, Pairs) or listed:
            heading = f"[[{name}]]" if listed else f"[{name}]"
            for table in value if listed else [value]:
                tables.append(heading)
                tables += [f"{json.dumps(k)} = {as_toml_value(v)}" for k, v in table]
        else:
            lines.append(f"{name} = {as_toml_value(value)}")
    return "\n".join([*lines, *tables]) + "\n"


# Mutations that know nothing of what they change.

TOKENS = [
    *(b"NaN", b"Infinity", b"-1e999", b"9" * 5000, b"\xff\xfe", b"\xc3(", b"\0" * 64),
    *(b'"', b"\\", b"\\u0000", b"\\ud800", b"\n", b"\r", b"#", b"[", b"}", b",", b"x" * 30_000),
    *(b"[" * 3000, b'{"a":' * 3000, b"a." * 2000 + b"b=1\n", b"[[a]]\n" * 2000, b'"""', b"'''"),
]  # fmt: skip


def mutate_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """`data` with one mutation; `other` is another valid input of the same kind."""
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.choice((1, 2, 8, 64, 1000)))
    kind = rng.randrange(9)
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + rng.randbytes(rng.choice((1, 4, 50))) + data[to:]
    if kind == 2:
        return data[:at] + data[to:]
    if kind == 3:
        return data[:to] + data[at:to] * rng.choice((1, 1, 3, 50)) + data[to:]
    if kind == 4:
        return data[:at]
    if kind == 5:
        return data[:at] + other[rng.randrange(len(other) + 1) :]
    if kind == 6:
        return data[:at] + rng.choice(TOKENS) + data[at:]
    if kind == 7:
        numbers = list(re.finditer(rb"-?\d[\d.e+-]*", data[:20_000]))
        if numbers:
            found = rng.choice(numbers)
            number = rng.choice((*JSON_NUMBERS, *TOML_NUMBERS)).encode()
            return data[: found.start()] + number + data[found.end() :]
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[i], lines[j] = lines[j], rng.choice((lines[i], lines[j]))
    return b"\n".join(lines)


@dataclass
class Parser:
    """Valid inputs, how to change one with knowledge of its form, and what it must hold to.

    Attributes:
        seeds: valid inputs, of which those with equal `tail` may be spliced.
        errors: what may be raised.
        read: parses a case; asserts what must hold when it is accepted or refused.
        knowing: mutations of one part of a case, by its place.
        allowed: whether a case is to be run.
    """

    seeds: list[Case]
    errors: type[FFAError]
    read: Callable[[Case], None]
    knowing: list[Callable[[random.Random, bytes], bytes]]
    allowed: Callable[[Case], bool] = field(default=lambda case: True)

    def case(self, rng: random.Random) -> Case:
        while True:
            case, kind = list(rng.choice(self.seeds)), rng.random()
            part = rng.randrange(len(self.knowing))
            if kind < 0.6:
                case[part] = self.knowing[part](rng, case[part])
            if kind > 0.5:
                for _ in range(rng.choice((1, 1, 1, 2, 4))):
                    case[part] = mutate_bytes(rng, case[part], rng.choice(self.seeds)[part])
            if self.allowed(tuple(case)):
                return tuple(case)


# The federation's configuration.


def toml_knowing(rng: random.Random, text: bytes) -> bytes:
    tree = toml_tree(tomllib.loads(text.decode()))
    if rng.random() < 0.05:
        # Dotted keys nest without a bracket.
        return text + b"\n" + b".".join([b"a"] * rng.choice((30, 800, 5000))) + b" = 1\n"
    for _ in range(rng.choice((1, 1, 2))):
        tree = mutate_tree(rng, tree, toml=True)
    return (as_toml_value if rng.random() < 0.02 else as_toml)(tree).encode("utf-8", "replace")


def toml_parser(folder: Path) -> Parser:
    for name in ("north.jsonl", "south.csv", "south-test.csv", "vader.tar.gz"):
        (folder / name).touch()
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    site = '[[site]]\nname = "{0}"\ntrain = "{1}"\n'
    sites = site.format("north", "north.jsonl") + site.format("south", "south.csv")
    basis = "[federation]\nrounds = 3\nlocal_steps = 2\n[privacy]\ntarget_epsilon = 6\n"
    basis += "target_delta = 1e-5\n"
    texts = [
        f"{basis}[train]\nbatch_size = 16\nlr = 0.1\n[data]\nsource = 'files'\n{sites}"
        "test = 'south-test.csv'\nledger = 'south.ledger'\nr = 2\nmax_physical_batch_size = 8\n"
        "[pilot]\nrecords = 'file'\npath = 'north.jsonl'\nseeds = [3]\nr = [2, 4]\nlr = [0.1, 1]\n",
        f"{basis}max_grad_norm = 0.5\nnew_ledger = true\n[model]\nkind = 'base'\nr = 4\nalpha = 8\n"
        "target_modules = ['query']\nmodules_to_save = []\n[train]\nsample_rate = 0.1\nlr = 1e-3\n"
        "optimizer = 'sgd'\nmomentum = 0.9\n[data]\nsource = 'files'\nsplit = 'dirichlet'\n"
        f"sites = 3\ndirichlet_alpha = 0.3\n{sites}",
        f"{basis}[model]\nprompts = [['a good one', 'fine'], ['a bad one']]\n[train]\n"
        "batch_size = 8\nlr = 0.1\n[data]\npath = 'vader.tar.gz'\n",
    ]
    path = folder / "config.toml"

    def read(case: Case) -> None:
        path.write_bytes(case[0])
        made = config.load(path)
        assert isinstance(made, config.Config) and made.federation.rounds >= 1
        assert all(Path(site.train).is_file() for site in made.sites)

    return Parser([(text.encode(),) for text in texts], ConfigError, read, [toml_knowing])


# A site's records.


def records_parser(folder: Path) -> Parser:
    def read(case: Case) -> None:
        path = folder / f"records.{case[1].decode()}"
        path.write_bytes(case[0])
        records = data.load_file(path)
        assert len(records) == len(records.texts) == len(records.labels)
        assert all(text.strip() for text in records.texts) and min(records.labels, default=0) >= 0

    def knowing(rng: random.Random, text: bytes) -> bytes:
        lines = text.split(b"\n")
        i = rng.randrange(len(lines) - 1)
        if lines[i].startswith(b"{"):
            lines[i] = as_json(mutate_tree(rng, json_tree(lines[i]))).encode("utf-8", "replace")
        else:
            cells = [*lines[i].split(b","), as_json(odd_value(rng)).encode("utf-8", "replace")]
            lines[i] = b",".join(rng.sample(cells, rng.randrange(1, len(cells) + 1)))
        return b"\n".join(lines)

    rows = [("Worth every minute.", 1), ('Dull; "dull", dull.', 0), ("Gr\u00fc\u00dfe", 2)]
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    table = 'text,label\nfine,1\n"so, ""so""\nand so",0\n'
    return Parser(
        [(lines.encode(), b"jsonl"), (table.encode(), b"csv")], ConfigError, read, [knowing]
    )


# The ledger.


def ledger_knowing(rng: random.Random, text: bytes) -> bytes:
    lines = text.split(b"\n")
    i = rng.randrange(len(lines) - 1)
    kind = rng.randrange(6)
    if kind == 0:
        del lines[i]
    elif kind == 1:
        lines[i:i] = [rng.choice(lines)] * rng.choice((1, 1, 2, 300))
    else:
        lines[i] = as_json(mutate_tree(rng, json_tree(lines[i]))).encode("utf-8", "replace")
    return b"\n".join(lines)


ONE_CHECKSUM = SimpleNamespace(hexdigest=lambda: "0" * 64, digest=lambda: bytes(32))


def ledger_parser(folder: Path) -> Parser:
    # What is written is read at once, and needs no disk.
    mock.patch.object(os, "fsync", lambda handle: None).start()
    path = folder / "ledger.jsonl"

    def any_checksum(case: Case) -> object:
        """Where every checksum fits, changed lines are looked at more closely."""
        blind = SimpleNamespace(sha256=lambda *_: ONE_CHECKSUM)
        return mock.patch.object(ledger_module, "hashlib", blind if case[1] else hashes)

    hashes = ledger_module.hashlib
    seeds = []
    for blind in (b"", b"blind"):
        for charges in ([], [(1.0, 0.1)], [(1.1, 0.25, 40), (0.0, 1.0, 2, False), (2.5, 0.01)]):
            path.unlink(missing_ok=True)
            with any_checksum((b"", blind)):
                ledger = Ledger(path)
                if charges:
                    ledger.bind(data="records", delta=1e-5, accountant="rdp")
                for charge in charges:
                    ledger.charge(*charge)
                ledger.close()
            seeds.append((path.read_bytes(), blind))

    def read(case: Case) -> None:
        path.write_bytes(case[0])
        with any_checksum(case):
            try:
                ledger = Ledger(path)
            except LedgerError:
                assert path.read_bytes() == case[0], "a refused ledger was changed"
                raise
            history, steps = ledger.history, ledger.steps
            ledger.close()
            assert steps == sum(count for _, _, count in history) >= 0
            assert all(noise >= 0 and 0 < rate <= 1 for noise, rate, _ in history)
            again = Ledger(path)
            again.close()
            assert again.history == history, "a ledger says something else when read again"

    return Parser(seeds, LedgerError, read, [ledger_knowing])


# Safetensors: messages and adapters.


BYTES_OF = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1, "U8": 1, "I8": 1, "U16": 2,
            "I16": 2, "F16": 2, "BF16": 2, "F64": 8, "C64": 8, "U64": 8, "I64": 8}  # fmt: skip
DTYPES = [*BYTES_OF, "F4", "F6_E2M3", "U32", "I32"]


def safetensors_knowing(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, payload = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(8)
    if kind == 0:
        lie = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1))
        return lie.to_bytes(8, "little") + data[8:]
    if kind == 1:
        return data[: 8 + length] + rng.choice((payload[:-1], payload[:-4], payload + b"\0" * 4))
    if kind == 2 and payload:
        at = rng.randrange(len(payload) // 4) * 4
        word = struct.pack("<f", rng.choice((torch.nan, torch.inf, -torch.inf, 3e38, 1e-45)))
        payload = payload[:at] + word + payload[at + 4 :]
    elif kind == 3:
        # A dtype that some reader knows, with room as if it were right.
        dtype = rng.choice(DTYPES)
        header = re.sub(rb'"F32"', b'"%s"' % dtype.encode(), header, count=rng.choice((0, 1)))
        if rng.random() < 0.5:
            return restored(header, payload)
    else:
        header = as_json(mutate_tree(rng, json_tree(header))).encode("utf-8", "replace")
    return len(header).to_bytes(8, "little") + header + payload


def restored(header: bytes, payload: bytes) -> bytes:
    """The file with each tensor's place as its dtype and shape have it, and bytes to fill them."""
    tree, end = json.loads(header), 0
    for name, entry in tree.items():
        if name != "__metadata__":
            size = BYTES_OF.get(entry["dtype"], 4)
            for extent in entry["shape"]:
                size *= extent
            entry["data_offsets"] = [end, end + size]
            end += size
    header = json.dumps(tree).encode()
    return len(header).to_bytes(8, "little") + header + (payload * 8)[:end].ljust(end, b"\0")


def wire_parser(folder: Path) -> Parser:
    like = {
        "layer.0.query.lora_B": torch.arange(24, dtype=torch.float32).reshape(8, 3) / 7,
        "layer.0.value.lora_B": torch.full((5, 3), -1e-30),
        "classifier.weight": torch.ones(2, 8),
        "classifier.bias": torch.zeros(2),
    }
    headers, seeds, shapes = {}, [], {}
    for codec in wire.CODECS:
        header = wire.Header(
            *("update", "1f"), round=3, site="north", base="b" * 64, recipe="a" * 64, codec=codec
        )
        headers[codec.encode()] = header
        for more in (0.0, 1.0):
            tensors = {name: tensor + more for name, tensor in like.items()}
            message = wire.encode(header, tensors, SecretStream("rounding", 0))
            seeds.append((message, codec.encode()))
        shapes[codec.encode()] = like
    # An A that is sent, whose header says its digest.
    kind = wire.FROZEN.encode()
    A = {f"layer.0.{name}.lora_A": torch.eye(3, 8) for name in ("query", "value")}
    sent = wire.Header(wire.FROZEN, "1f", 0, "north", base="b" * 64, recipe=wire.digest(A))
    headers[kind], shapes[kind] = replace(sent, recipe="unknown"), A
    seeds.append((wire.encode(sent, A), kind))
    sizes = {codec: wire.measure(message) for message, codec in seeds}

    def read(case: Case) -> None:
        data, codec = case
        try:
            size = wire.measure(data)
            assert size.total == len(data)
            assert min(size.adapter, size.head, size.header, size.frozen) >= 0
        except WireError:
            size = None
        received = wire.decode(data, headers[codec], shapes[codec])
        assert size is not None
        assert replace(size, header=0) == replace(sizes[codec], header=0)
        assert list(received) == list(shapes[codec])
        for name, tensor in received.items():
            assert tensor.shape == shapes[codec][name].shape and tensor.dtype == torch.float32
            assert tensor.isfinite().all()

    return Parser(seeds, WireError, read, [safetensors_knowing])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 3)


class Net(nn.Module):
    """Blocks, one layer of which runs twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block.query(x)
        return self.head(self.norm(self.blocks[1].value(self.blocks[0].query(x))))


def json_knowing(rng: random.Random, text: bytes) -> bytes:
    tree = json_tree(text)
    for _ in range(rng.choice((1, 1, 2))):
        tree = mutate_tree(rng, tree)
    return as_json(tree).encode("utf-8", "replace")


def state_of(model: nn.Module) -> list[object]:
    """Of which modules and tensors a model consists, each tensor with its count of changes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state: list[object] = [
        (n, id(t), t.data_ptr(), t._version, t.requires_grad) for n, t in tensors
    ]
    return state + [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)]


def adapter_parser(folder: Path) -> Parser:
    def converted(**options: object) -> nn.Module:
        torch.manual_seed(0)
        return ffa.convert(Net(), **{"r": 2, "target_modules": ["query", "value"], **options})

    def of_two_ranks() -> nn.Module:
        model = Net().requires_grad_(False)
        for r, block in enumerate(model.blocks, start=1):
            block.value = ffa.FFALinear.from_linear(block.value, r=r)
        return model

    makers = [
        lambda: converted(modules_to_save=["head"]),
        of_two_ranks,
        lambda: converted(modules_to_save=["norm"]),
    ]
    seeds: list[Case] = []
    for make in makers:
        ffa.save_adapter(make(), folder)
        text, weights = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
        more = {**json.loads(text), "layers_to_transform": [0, 1], "layers_pattern": "blocks"}
        regex = {
            **json.loads(text),
            "target_modules": rf".*blocks\.\d+\.({'|'.join(more['target_modules'])})",
            "exclude_modules": "head.*",
            "alpha_pattern": {r"blocks\.0\.query": 16},
        }
        for tail in (b"", b"plain"):
            seeds.append((text, weights, str(len(seeds)).encode(), tail))
        for variant in (more, regex):
            seeds.append((json.dumps(variant).encode(), weights, b"", b"plain"))
    plain = Net()
    ready = [make() for make in makers]

    def read(case: Case) -> None:
        nonlocal plain
        (folder / CONFIG).write_bytes(case[0])
        (folder / WEIGHTS).write_bytes(case[1])
        model = plain if case[3] else ready[int(case[2]) // 4]
        before = state_of(model)
        try:
            ffa.load_adapter(model, folder)
        except ConfigError:
            assert state_of(model) == before, "a refused adapter has changed the model"
            raise
        if model is plain:
            plain = Net()
        model.double().eval()(torch.zeros(1, 4).double())
        if not case[3]:
            ready[int(case[2]) // 4] = makers[int(case[2]) // 4]()

    return Parser(seeds, ConfigError, read, [json_knowing, safetensors_knowing])


# What `ffa-kernels plan` is given.


def text_knowing(rng: random.Random, text: bytes) -> bytes:
    parts = re.split(rb"([:,=])", text)
    i = rng.randrange(len(parts))
    odd = odd_value(rng)
    parts[i] = rng.choice((as_json(odd), str(odd), "", *TEXTS)).encode("utf-8", "replace")
    return b"".join(parts)


def memory_parser(folder: Path) -> Parser:
    def read(case: Case) -> None:
        assert parse_memory(case[0].decode("utf-8", "surrogateescape")) > 0

    seeds = [(given,) for given in (b"4GiB", b"500 MB", b"1.5tb", b"1000", b" 3 kib ")]
    return Parser(seeds, ConfigError, read, [text_knowing])


def plan_parser(folder: Path) -> Parser:
    from ffa_kernels.memory.folder import from_folder

    bert = "hidden_size=8,intermediate_size=8,num_attention_heads=2,num_hidden_layers=1"
    llama = f"{bert},num_key_value_heads=1,vocab_size=16"
    seeds = [
        (f"{kind}:{sizes}".encode(), b"") for kind, sizes in (("bert", bert), ("llama", llama))
    ]
    for cls, sizes in (("BertForSequenceClassification", bert), ("LlamaForCausalLM", llama)):
        given = {name: int(size) for name, size in (part.split("=") for part in sizes.split(","))}
        seeds.append((json.dumps({"architectures": [cls], **given}).encode(), b"folder"))
    where = folder / "model"
    where.mkdir()

    def read(case: Case) -> None:
        path = Path(os.fsdecode(case[0]))
        if case[1]:
            path = where
            (path / "config.json").write_bytes(case[0])
        model = from_folder(path, 2, None, "float32")
        assert all(p.is_meta for p in model.parameters())

    def allowed(case: Case) -> bool:
        # A model of many layers takes as long as it has layers.
        numbers = re.findall(rb"(?:layer|expert|depth|block)\w*\W{1,4}(\d+)", case[0])
        return all(int(number[:9]) <= 8 for number in numbers)

    def knowing(rng: random.Random, text: bytes) -> bytes:
        return json_knowing(rng, text) if text.startswith(b"{") else text_knowing(rng, text)

    return Parser(seeds, ConfigError, read, [knowing], allowed)


PARSERS: dict[str, Callable[[Path], Parser]] = {
    "config": toml_parser,
    "records": records_parser,
    "ledger": ledger_parser,
    "adapter": adapter_parser,
    "wire": wire_parser,
    "memory": memory_parser,
    "plan": plan_parser,
}


def too_slow(number: int, frame: object) -> None:
    raise TooSlow(f"over {SLOW_S} s")


def main(name: str, count: int, seed: int, folder: Path) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parser = PARSERS[name](folder)
    for valid in parser.seeds:
        parser.read(valid)
    before = status("VmRSS")
    # Linux forgets the old peak.
    Path("/proc/self/clear_refs").write_text("5")
    seen = {"inputs": count, "accepted": 0, "refused": 0, "slowest_ms": 0.0}
    signal.signal(signal.SIGPROF, too_slow)
    for index in range(count):
        case = parser.case(random.Random(f"{name} {seed} {index}"))
        broken, begun = None, CLOCK()
        signal.setitimer(signal.ITIMER_PROF, SLOW_S)
        try:
            parser.read(case)
            seen["accepted"] += 1
        except parser.errors as error:
            seen["refused"] += 1
            if len(str(error)) > 10_000:
                broken = f"an error of {len(str(error))} letters"
        except BaseException as error:
            broken = f"{type(error).__name__}: {str(error)[:500]}"
            traceback.print_exc(limit=-6)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        milliseconds = 1000 * (CLOCK() - begun)
        if milliseconds > 1000 * SLOW_S:
            broken = broken or f"{milliseconds:.0f} ms"
        if milliseconds > seen["slowest_ms"]:
            seen["slowest_ms"], seen["slowest"] = round(milliseconds, 1), index
        if broken:
            kept = [folder / f"case-{index}-{part}" for part in range(len(case))]
            for path, part in zip(kept, case, strict=True):
                path.write_bytes(part)
            print(
                f"parser {name}, seed {seed}, case {index}: {broken}\n"
                f"its input is saved: {' '.join(map(str, kept))}",
                file=sys.stderr,
            )
            return 1
    seen["peak_mib"] = round((status("VmHWM") - before) / 2**20, 1)
    print(json.dumps(seen))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
