"""The messages between server and sites: the trained tensors, with a header that must match.

Where A cannot be derived at every end to the same bits, one message more carries it, in fp32.

A message is a plain safetensors file. Its metadata is the header: protocol, kind, run, round, site,
the fingerprints of the frozen base and of the frozen A, how the average is weighted, and the codec
of the values. A reader says
beforehand what it expects and gets tensors that fit, or a WireError; nothing of an unexpected
message is handed on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from ffa_kernels.errors import WireError, shown
from ffa_kernels.federated import codecs
from ffa_kernels.federated.codecs import CODECS
from ffa_kernels.nn.adapter import Adapter
from ffa_kernels.privacy.keys import SecretStream

PROTOCOL = "ffa-kernels/1"
FROZEN = "frozen"

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}  # as safetensors' header
_LENGTH_BYTES = 8  # a safetensors file opens with the length of its JSON header, little-endian
_HEADER_FIXED = 4096  # allowance for the metadata; each tensor's entry is allowed for apart
_HEADER_PER_TENSOR = 256


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 in hexadecimal: of the frozen tensors and the adapters' scaling (`base`), and of the
    frozen A (`recipe`)."""

    base: str
    recipe: str


@dataclass(frozen=True)
class Header:
    """What a message says of itself.

    Attributes:
        kind: "global" from the server to a site, "update" from a site to the server, or "frozen":
            the A with which a site begins a run, from the server.
        run: the run's identifier.
        round: counted from 1; 0 is the state before the first, and that of "frozen".
        site: the addressee of a "global" or "frozen", the sender of an "update"; "any" of the
            "global" that opens a basis, which is one for all.
        base, recipe: see Fingerprint, and `basis` for those after the first; the recipe of
            "frozen" is of the A that it carries.
        weights: how the server weights sites, so that each knows: "equal", or another policy.
        codec: how values are stored, as `codecs` has it; "fp32" in "frozen", whose bits count.
    """

    kind: str
    run: str
    round: int
    site: str
    base: str
    recipe: str
    weights: str = "equal"
    codec: str = "fp32"


@dataclass(frozen=True)
class Size:
    """Bytes of messages: values of trained adapters, of saved modules (`head`), of an A that was
    sent (`frozen`), and all the rest (`header`)."""

    adapter: int = 0
    head: int = 0
    header: int = 0
    frozen: int = 0

    @property
    def total(self) -> int:
        """Bytes on the wire."""
        return self.adapter + self.head + self.header + self.frozen

    def __add__(self, other: Size) -> Size:
        return Size(
            self.adapter + other.adapter,
            self.head + other.head,
            self.header + other.header,
            self.frozen + other.frozen,
        )


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name: what an update consists of."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen_A(model: nn.Module) -> dict[str, Tensor]:
    """The A that are not trained, (r, d_in) each, by name; they share the model's memory."""
    return {n: t.detach() for n, t in _frozen(model).items() if is_adapter(n)}


def part_of(A: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """What a site has of `A` that has less: the first rows, of some layers.

    Args:
        ranks: the rank of each B that it has, by the B's name.
    """
    whose = {name: name.replace("lora_A", "lora_B") for name in A}
    return {name: A[name][: ranks[B]] for name, B in whose.items() if B in ranks}


def is_adapter(name: str) -> bool:
    """Whether a tensor of that name is an adapter's; every other trained tensor is head."""
    return any(part in ("lora_A", "lora_B") for part in name.split("."))


def is_B(name: str) -> bool:
    """Whether a tensor of that name is an adapter's B."""
    return "lora_B" in name.split(".")


def moves(name: str, method: str, round_: int) -> bool:
    """Whether a trained tensor is trained and sent in a round.

    Method "alternating" has each B in odd rounds and each A in even ones; the other, the same at
    all sites, makes averages exact. The head, and with other methods everything, always moves.
    """
    if method != "alternating" or not is_adapter(name):
        return True
    return is_B(name) == (round_ % 2 == 1)


def fingerprint(model: nn.Module, ranks: Mapping[str, int] | None = None) -> Fingerprint:
    """Digests of everything that is not trained: two ends with equal digests mean the same model.

    Names, shapes, dtypes and bytes all count, and the adapters' scaling; the order in which modules
    were registered does not.

    Args:
        ranks: of a site that has less: the rank of each B that it has, by the B's name.
    """
    A = frozen_A(model)
    base = {name: t for name, t in _frozen(model).items() if name not in A}
    # No tensor has it, and B means another change with another one.
    base["scaling"] = _scaling(model)
    return Fingerprint(digest(base), digest(A if ranks is None else part_of(A, ranks)))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of names, shapes, dtypes and bytes, in any order."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(repr((name, tuple(tensor.shape), str(tensor.dtype), flat.numel())).encode())
        found.update(flat.numpy().data)
    return found.hexdigest()


def encode(
    header: Header, tensors: Mapping[str, Tensor], stream: SecretStream | None = None
) -> bytes:
    """The message that carries `tensors` under `header`.

    Args:
        stream: of the random rounding that "int8" does; a new one by default.

    Raises:
        WireError: the codec is unknown, or a tensor holds NaN or infinity once stored.
    """
    if header.codec not in CODECS:
        raise WireError(f"codec: got {header.codec!r}, accepted: {', '.join(CODECS)}")
    stream = stream or SecretStream("rounding")
    held = {}
    for name, tensor in tensors.items():
        # A copy: safetensors refuses tensors that share storage.
        values = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        _check_finite(name, values)
        for key, part in codecs.stored(header.codec, name, values, stream).items():
            _check_finite(name, part)
            held[key] = part
    metadata = {key: str(value) for key, value in asdict(header).items()}
    return safetensors.save(held, metadata={"protocol": PROTOCOL, **metadata})


def decode(data: bytes, expected: Header, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a message that says exactly `expected` and has the names and shapes of `like`.

    The recipe of a "frozen" message is not known beforehand: in place of the one expected it must
    be the digest of its own tensors, in the dtypes of `like`.

    Returns:
        fp32 CPU tensors that share nothing with `data`, in the order of `like`.

    Raises:
        WireError: naming the first thing that does not fit. Size is judged before anything is
            parsed, and the tensors only after their names, shapes and dtypes.
    """
    if expected.codec not in CODECS:
        raise WireError(f"codec: got {expected.codec!r}, accepted: {', '.join(CODECS)}")
    due: dict[str, tuple[torch.dtype, list[int]]] = {}
    for name, tensor in like.items():
        due |= codecs.layout(expected.codec, name, tensor.shape)
    header_limit = _HEADER_FIXED + _HEADER_PER_TENSOR * len(due) + sum(map(len, due))
    payload = sum(dtype.itemsize * math.prod(shape) for dtype, shape in due.values())
    limit = _LENGTH_BYTES + header_limit + payload
    if len(data) > limit:
        raise WireError(f"size: got {len(data)} bytes, accepted are at most {limit}")
    entries, metadata = _parse(data, header_limit)
    if metadata.get("protocol") != PROTOCOL:
        raise WireError(f"protocol: got {_shown(metadata.get('protocol'))}, accepted: {PROTOCOL!r}")
    wanted = {key: str(value) for key, value in asdict(expected).items()}
    for key, value in wanted.items():
        if metadata.get(key) != value and (key, expected.kind) != ("recipe", FROZEN):
            raise WireError(f"{key}: got {_shown(metadata.get(key))}, expected {value!r}")
    if unknown := set(metadata) - set(wanted) - {"protocol"}:
        raise WireError(f"header: unknown entry {_shown(min(unknown))}")
    if unknown := set(entries) - set(due):
        raise WireError(f"tensors: unknown {_shown(min(unknown))}")
    for name, (dtype, shape) in due.items():
        entry = entries.get(name)
        if entry is None:
            raise WireError(f"tensors: {name} is missing")
        if entry.get("dtype") != _NAMES[dtype]:
            raise WireError(
                f"{name}: got dtype {_shown(entry.get('dtype'))}, expected {_NAMES[dtype]!r}"
            )
        if entry.get("shape") != shape:
            raise WireError(f"{name}: got shape {_shown(entry.get('shape'))}, expected {shape}")
    try:
        loaded = safetensors.load(data)
    except Exception as error:  # the parser's own exception is not a documented type
        raise WireError(f"message: not valid safetensors ({_shown(str(error))})") from error
    for name, tensor in loaded.items():
        _check_finite(name, tensor)
    tensors = {name: codecs.restored(expected.codec, name, loaded) for name in like}
    for name, tensor in tensors.items():
        # Finite scales may still give what is not.
        _check_finite(name, tensor)
    if expected.kind == FROZEN:
        own = digest({name: tensor.to(like[name].dtype) for name, tensor in tensors.items()})
        if metadata.get("recipe") != own:
            raise WireError(
                f"recipe: got {_shown(metadata.get('recipe'))}, expected that of its A, {own!r}"
            )
    return tensors


def measure(data: bytes) -> Size:
    """Bytes of an encoded message, counted on the message itself.

    Raises:
        WireError: it is no such message.
    """
    entries, metadata = _parse(data, len(data))
    adapter = head = frozen = 0
    for name, entry in entries.items():
        match entry.get("data_offsets"):
            case [int(start), int(end)] if 0 <= start <= end:
                count = end - start
            case _:
                raise WireError(f"{_shown(name)}: has no data_offsets")
        if metadata.get("kind") == FROZEN:
            frozen += count
        elif is_adapter(name):
            adapter += count
        else:
            head += count
    header = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    size = Size(adapter, head, header, frozen)
    if size.total != len(data):
        raise WireError(f"message: {size.total - header} bytes of tensors in {len(data) - header}")
    return size


def _parse(data: bytes, header_limit: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """(tensor entries, metadata) of a safetensors header."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < _LENGTH_BYTES or length > len(data) - _LENGTH_BYTES:
        raise WireError("message: truncated, or not safetensors")
    if length > header_limit:
        raise WireError(f"header: got {length} bytes, accepted are at most {header_limit}")
    try:
        entries = json.loads(
            data[_LENGTH_BYTES : _LENGTH_BYTES + length], object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        raise WireError("header: not valid JSON") from error
    metadata = entries.pop("__metadata__", {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise WireError("header: not that of a safetensors file")
    return entries, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two parsers read this header; a repeated key could mean one thing to each.
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key is repeated")
    return unique


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    # Not by name: a layer with two has its B under both.
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if not tensor.requires_grad}


def _scaling(model: nn.Module) -> Tensor:
    """The scalings that adapters have, each once: one, for alpha is of all; fp32.

    By layer they would tell a site that has fewer of them, or a lower rank, from the others.
    """
    found: set[float] = set()
    module: Any
    for module in model.modules():
        if isinstance(module, Adapter):
            found.add(module.adapter_scaling())
        elif hasattr(module, "lora_B"):
            found.update(module.scaling.values())  # PEFT's, by the adapter's name
    # After the rounding: alpha r' / r / r' may differ from alpha / r in fp64.
    each: Tensor = torch.tensor(sorted(found), dtype=torch.float32).unique()  # type: ignore[no-untyped-call]
    return each


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise WireError(f"{name}: holds NaN or infinity")


def _shown(value: object) -> str:
    """A stranger's value, made safe for a log line."""
    return shown(value, ascii)
