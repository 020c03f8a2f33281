"""Which records have an account on this machine: a second budget for the same is no accident.

A file of the user's, in which each ledger is noted with the records that it is of. It is named by
the environment variable FFA_LEDGERS, and lies in the user's state folder by default.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ffa_kernels.privacy.keys import generators_kept

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


def ledgers_of(data: str) -> list[Path]:
    """The ledgers that were noted for the records `data`, whether or not they still exist."""
    try:
        lines = registry_path().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found: dict[Path, None] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["data"] == data:
                found[Path(entry["ledger"])] = None
        except (ValueError, KeyError, TypeError, RecursionError):
            # Cut short by a crash: what it said is in the ledger itself.
            continue
    return list(found)


def note_ledger(data: str, ledger: Path) -> None:
    """Notes that `ledger` is the account of the records `data`."""
    path = registry_path()
    line = json.dumps({"data": data, "ledger": str(ledger.absolute())}) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            # One write: two processes' lines do not mix. It begins anew after a torn line.
            os.write(file, f"\n{line}".encode())
        finally:
            os.close(file)
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written ({error.strerror}): a second ledger for these records "
            "will not be noticed; FFA_LEDGERS names another file",
            stacklevel=2,
        )


def fingerprint(loader: DataLoader[Any]) -> str:
    """A digest of a loader's records: their number, and up to 256 of them, evenly spaced.

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
        sampler=[picked[0], *picked],
        collate_fn=_digest,
        generator=torch.Generator(),
        **workers,
    )
    with generators_kept():
        again, *digests = list(reader)
    if again != digests[0]:
        digests = [type(dataset).__qualname__]
    text = json.dumps([count, digests])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _digest(record: object) -> str:
    digest = hashlib.sha256()
    _feed(digest, record, 0)
    return digest.hexdigest()


def _feed(digest: Any, value: Any, depth: int) -> None:
    """What `value` holds, whatever the process; of an unknown type only its name."""
    digest.update(type(value).__qualname__.encode() + b"\0")
    if depth > _DEEPEST:
        return
    if isinstance(value, torch.Tensor):
        digest.update(repr((str(value.dtype), tuple(value.shape))).encode())
        octets = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(octets.numpy().tobytes())
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufcSU":
        digest.update(repr((str(value.dtype), value.shape)).encode() + value.tobytes())
    elif isinstance(value, (bytes, bytearray)):
        digest.update(value)
    elif isinstance(value, (str, bool, int, float, complex)):
        digest.update(repr(value).encode("utf-8", "surrogatepass"))
    elif isinstance(value, Mapping):
        for key, item in sorted(value.items(), key=lambda pair: repr(pair[0])):
            _feed(digest, key, depth + 1)
            _feed(digest, item, depth + 1)
    elif isinstance(value, Sequence):
        for item in value:
            _feed(digest, item, depth + 1)
    elif callable(getattr(value, "tobytes", None)):
        digest.update(value.tobytes())
    elif hasattr(value, "__dict__"):
        _feed(digest, vars(value), depth + 1)
    digest.update(b"\0")
