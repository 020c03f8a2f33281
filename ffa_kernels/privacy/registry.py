"""Which records have an account on this machine: a second budget for the same is no accident.

A file of the user's, in which each ledger is noted with the records that it is of. It is named by
the environment variable FFA_LEDGERS, and lies in the user's state folder by default.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ffa_kernels.errors import LedgerError
from ffa_kernels.privacy.keys import generators_kept
from ffa_kernels.privacy.ledger import Ledger, read_account

# Records that are read for a fingerprint: in all of a small set, evenly spaced in a large one.
_READ = 256
_DEEPEST = 32


def registry_path() -> Path:
    """Where ledgers are noted."""
    named = os.environ.get("FFA_LEDGERS")
    if named:
        return Path(named)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "ffa_kernels" / "ledgers.jsonl"


def _noted(names: Collection[str]) -> dict[Path, bool]:
    """The ledgers noted for records of one of these names, whether or not they still exist; for
    each whether it was begun beside others by an explicit word."""
    try:
        lines = registry_path().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[Path, bool] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["data"] in names:
                path = Path(entry["ledger"])
                found[path] = found.get(path, False) or bool(entry.get("new_ledger"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            # Cut short by a crash: what it said is in the ledger itself.
            continue
    return found


def _note(names: Collection[str], ledger: Path, new_ledger: bool) -> None:
    entry = {"ledger": str(ledger), **({"new_ledger": True} if new_ledger else {})}
    lines = [json.dumps({"data": name, **entry}) for name in names]
    file = os.open(registry_path(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        # It begins anew after a torn line.
        os.write(file, "".join(f"\n{line}\n" for line in lines).encode())
    finally:
        os.close(file)


@contextmanager
def _alone() -> Iterator[bool]:
    """One process at a time; whether the registry can be written."""
    path = registry_path().with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        warnings.warn(
            f"{path.parent} cannot be written ({error.strerror}): a second ledger for these "
            "records will not be noticed; FFA_LEDGERS names another file",
            stacklevel=2,
        )
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(lock)


def bind_ledger(
    ledger: Ledger,
    names: Sequence[str],
    delta: float | None,
    accountant: str,
    new_ledger: bool,
) -> None:
    """Binds a ledger to its records, unless they have another on this machine.

    Args:
        ledger: on disk, or in memory, which is bound to nothing and noted nowhere.
        names: of the records; the first is what the ledger is bound to.
        delta, accountant: as `Ledger.bind` has them.
        new_ledger: another account for these records is meant.

    Raises:
        LedgerError: these records have another ledger (one that is gone, too, and one that this
            is a copy of), or this is bound to something else; nothing has changed then.
    """
    with _alone() as writable:
        path = None if ledger.path is None else ledger.path.absolute()
        noted = _noted(names)
        bound = ledger.bound.get("data")
        if path is None or bound is None:
            # One that is noted and not bound was deleted, and begun anew.
            others = list(noted)
        elif bound != names[0] or noted.get(path):
            others = []
        else:
            # Those that were begun by a word are another account, and no copy.
            others = [
                other
                for other, by_word in noted.items()
                if other != path and not by_word and _is_twin(other, path, names[0])
            ]
        if others and not new_ledger:
            gone = "" if others[0].exists() and others[0] != path else ", which is gone"
            raise LedgerError(
                f"ledger is {path}, but these records have the ledger {others[0]}{gone}: what is "
                "released of them is the two together; accepted: that ledger, or new_ledger=True "
                "if the records are public or the other is accounted for"
            )
        if path is None:
            return
        ledger.bind(data=names[0], delta=delta, accountant=accountant)
        if writable and (path not in noted or (others and not noted[path])):
            _note(names, path, bool(others))


def _is_twin(other: Path, path: Path, name: str) -> bool:
    """Whether `other` is a ledger of the same records that `path` is a copy of, or its copy."""
    try:
        if other.samefile(path):
            return False
        return read_account(other).bound.get("data") == name
    except OSError:
        # Moved away: this is it.
        return False
    except LedgerError:
        return other.exists()


def fingerprint(loader: DataLoader[Any]) -> str:
    """A digest of a loader's records: their number, and 256 of them, evenly spaced. Up to 256 may
    be in any order; of more, another order picks others.

    It is computed from private records and covered by no epsilon: for this machine alone. Where
    reading a record twice gives two values (random augmentation), only number and type count.
    """
    dataset: Any = loader.dataset
    count = len(dataset)
    picked = sorted({k * count // min(count, _READ) for k in range(min(count, _READ))})
    workers: dict[str, Any] = {}
    if loader.num_workers:
        # There and not here: a data set may open files that a fork must not share.
        workers = {
            "num_workers": 1,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
        }
    reader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        sampler=[*picked, *picked],
        collate_fn=digest,
        generator=torch.Generator(),
        **workers,
    )
    with generators_kept():
        digests = list(reader)
    digests, again = digests[: len(picked)], digests[len(picked) :]
    if again != digests:
        digests = [type(dataset).__qualname__]
    # In whatever order they come.
    text = json.dumps([count, sorted(digests)])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def digest(record: object) -> str:
    """Hexadecimal, of what `record` holds: equal in any process for equal values."""
    made = hashlib.sha256()
    _feed(made, record, ())
    return made.hexdigest()


def _feed(digest: Any, value: Any, inside: tuple[int, ...]) -> None:
    """What `value` holds, whatever the process; of an unknown type only its name."""
    digest.update(type(value).__qualname__.encode() + b"\0")
    if len(inside) > _DEEPEST or id(value) in inside or isinstance(value, type):
        return
    inside = (*inside, id(value))
    if isinstance(value, torch.Tensor):
        digest.update(repr((str(value.dtype), tuple(value.shape))).encode())
        if value.layout != torch.strided:
            value = value.to_dense()
        whole = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (np.ndarray, np.generic)):
        digest.update(repr((str(value.dtype), value.shape)).encode())
        if value.dtype.hasobject:
            _feed(digest, value.tolist(), inside)
        else:
            digest.update(value.tobytes())
    elif isinstance(value, (bytes, bytearray)):
        digest.update(value)
    elif isinstance(value, Enum):
        digest.update(value.name.encode())
    elif isinstance(value, (str, bool, int, float, complex, Decimal, date, time, timedelta)):
        digest.update(repr(value).encode("utf-8", "surrogatepass"))
    elif isinstance(value, (Set, Mapping)):
        items = value.items() if isinstance(value, Mapping) else ((item, None) for item in value)
        for key, item in sorted(items, key=lambda pair: repr(pair[0])):
            _feed(digest, key, inside)
            _feed(digest, item, inside)
    elif isinstance(value, Sequence):
        for item in value:
            _feed(digest, item, inside)
    elif callable(getattr(value, "tobytes", None)):
        digest.update(value.tobytes())
    else:
        _feed(digest, _fields(value), inside)
    digest.update(b"\0")


def _fields(value: object) -> dict[str, Any]:
    """The attributes of an object of an unknown type."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}
