"""What a data set's owner has released, over all runs: written before each release.

A file of JSON lines. The first names the format, others bind the account to a data set, a delta
and an accountant, all others charge steps. Each has a checksum over itself and the line before it,
and is on the disk before the step's result exists: a crash can only count a step too many.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffa_kernels.errors import ConfigError, LedgerError
from ffa_kernels.privacy.accounting import check_accountant, epsilon

_FORMAT = 2
_FIRST = {"format": _FORMAT}
_BINDING = {"data": str, "delta": float, "accountant": str}
_CHARGE = {"noise_multiplier": float, "sample_rate": float, "steps": int, "private": bool}


_ENCODER = json.JSONEncoder(sort_keys=True)


def _checksum(previous: str, record: dict[str, Any]) -> str:
    text = previous + _ENCODER.encode(record)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _line(record: dict[str, Any], previous: str) -> bytes:
    checksum = _checksum(previous, record)
    return _ENCODER.encode({**record, "checksum": checksum}).encode() + b"\n"


def _makes_sense(noise_multiplier: float, sample_rate: float, steps: int) -> bool:
    return (
        isinstance(steps, int)
        and isinstance(noise_multiplier, (int, float))
        and isinstance(sample_rate, (int, float))
        and math.isfinite(noise_multiplier)
        and noise_multiplier >= 0
        and 0 < sample_rate <= 1
        and steps >= 1
    )


@dataclass
class Account:
    """What a ledger says.

    Attributes:
        charged: steps by (noise multiplier, sample rate).
        private: whether every step's noise was secret.
        bound: what the account is of: "data", "delta", "accountant", as far as they are bound.
        checksums: of each line; a later state of the same ledger begins with these.
    """

    charged: dict[tuple[float, float], int] = field(default_factory=dict)
    private: bool = True
    bound: dict[str, Any] = field(default_factory=dict)
    checksums: list[str] = field(default_factory=list)
    last_charge: dict[str, Any] | None = None

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """(noise multiplier, sample rate, steps) of everything charged."""
        # Another thread may charge meanwhile.
        return [(*key, steps) for key, steps in list(self.charged.items())]

    @property
    def steps(self) -> int:
        """How many steps were charged."""
        return sum(list(self.charged.values()))

    def epsilon(self, delta: float | None = None, accountant: str | None = None) -> float:
        """Epsilon of everything charged; infinity if a step's noise was not secret.

        Args:
            delta: in (0, 1); what the account is bound to by default.
            accountant: "prv" or "rdp"; what it is bound to, or "prv".

        Raises:
            ConfigError: an argument that is not accepted, or no delta given nor bound.
        """
        delta = self.bound.get("delta") if delta is None else delta
        if delta is None:
            raise ConfigError("delta is None, and the ledger is bound to none; accepted: a number")
        accountant = accountant or self.bound.get("accountant", "prv")
        value = epsilon(self.history, delta, accountant)
        return value if self.private else math.inf

    def check_extends(self, checksum: str, path: str | os.PathLike[str] | None) -> None:
        """Raises LedgerError, which names `path`, unless a line has that checksum."""
        if checksum not in self.checksums:
            raise LedgerError(
                f"ledger {path}: no line has the checksum {checksum!r}: lines were taken off its "
                "end, or it is another ledger"
            )

    def _add(self, record: dict[str, Any], checksum: str) -> None:
        if "steps" in record:
            key = (record["noise_multiplier"], record["sample_rate"])
            self.charged[key] = self.charged.get(key, 0) + record["steps"]
            self.private = self.private and record["private"]
            self.last_charge = record
        elif record != _FIRST:
            self.bound.update(record)
        self.checksums.append(checksum)


def read_account(path: str | os.PathLike[str]) -> Account:
    """The account in a ledger's file, which is neither locked nor changed.

    A torn last line is left out, as a process that is about to write it would look.

    Raises:
        LedgerError: it cannot be read, or is damaged in any other way.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise LedgerError(f"ledger {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise LedgerError(f"ledger {str(path)!r}: cannot be read ({error})") from error
    return _parse(Path(path), content)[0]


def _parse(path: Path, content: bytes) -> tuple[Account, bytes, bool]:
    """(account, torn last line, whether the last whole line lacks its newline)."""
    whole, _, torn = content.rpartition(b"\n")
    unended = _is_whole(torn)
    if unended:
        # Complete but for its newline: to be read as it stands, or found to be damaged.
        whole, torn = content, b""
    account = Account()
    previous = ""
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        where = f"ledger {path}, line {number}"
        try:
            record = json.loads(line)
            checksum = record.pop("checksum")
            fits = checksum == _checksum(previous, record)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise LedgerError(f"{where}: not a ledger line") from error
        if not fits:
            raise LedgerError(f"{where}: its checksum does not fit: changed, or out of order")
        if (number == 1) != (record == _FIRST):
            accepted = f"format {_FORMAT}" if number == 1 else "the format on line 1 alone"
            raise LedgerError(f"{where}: {str(record)[:80]}; accepted: {accepted}")
        if number > 1 and not _is_known(record):
            raise LedgerError(f"{where}: {str(record)[:80]}; accepted: a charge or a binding")
        if not account.bound.keys().isdisjoint(record):
            raise LedgerError(f"{where}: {str(record)[:80]}, but {account.bound} is bound before")
        account._add(record, checksum)
        previous = checksum
    return account, torn, unended


def _is_whole(line: bytes) -> bool:
    """Whether a line that lacks its newline holds an object to its end."""
    try:
        json.JSONDecoder().raw_decode(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _is_known(record: dict[str, Any]) -> bool:
    if record.keys() == _CHARGE.keys():
        typed = all(type(record[name]) is kind for name, kind in _CHARGE.items())
        return typed and _makes_sense(*(record[name] for name in list(_CHARGE)[:3]))
    if not record or any(type(value) is not _BINDING.get(name) for name, value in record.items()):
        return False
    try:
        _check_binding(**record)
    except ConfigError:
        return False
    return True


def _check_binding(
    data: str | None = None, delta: float | None = None, accountant: str | None = None
) -> None:
    if data is not None and not (isinstance(data, str) and data):
        raise ConfigError(f"data is {data!r}; accepted: a name")
    if delta is not None and not (isinstance(delta, float) and 0 < delta < 1):
        raise ConfigError(f"delta is {delta!r}; accepted: a number in (0, 1)")
    if accountant is not None:
        check_accountant(accountant)


class Ledger:
    """An append-only account of private steps; in memory only when `path` is None.

    Args:
        path: the file; made if it does not exist, continued if it does.

    Raises:
        LedgerError: the file is held by another ledger, cannot be opened, or is damaged other than
            by a torn last line. A torn last line is replaced by a second copy of the last charge:
            the safe side, since what it said is lost.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        # Absolute: the process may change its folder.
        self.path = None if path is None else Path(path).absolute()
        if "\0" in str(path):
            raise LedgerError(f"ledger {str(path)!r}: no path has a NUL in it")
        self._account = Account()
        self._pid = os.getpid()
        self._file: int | None = None
        self._size = 0
        # Why no line can be added any more.
        self._failed: str | None = None
        self._lock = threading.Lock()
        if self.path is not None:
            self._open(self.path)

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
            self._file = os.open(path, flags, 0o600)
        except OSError as error:
            raise LedgerError(f"ledger {path}: cannot be opened ({error.strerror})") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            self._file = None
            raise LedgerError(
                f"ledger {path}: another process, or another Ledger of this one, holds it"
            ) from error
        try:
            self._read(path)
        except BaseException:
            self.close()
            raise
        # A file that is new must survive a crash as its lines do.
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _read(self, path: Path) -> None:
        assert self._file is not None
        content = path.read_bytes()
        account, torn, unended = _parse(path, content)
        if torn and not account.checksums and not _line(dict(_FIRST), "").startswith(torn):
            raise LedgerError(f"ledger {path}, line 1: not a ledger line")
        self._account, self._size = account, len(content)
        if unended:
            self._put(b"\n")
            self._failed = None
        if torn:
            self._size -= len(torn)
            os.ftruncate(self._file, self._size)
        if not account.checksums:
            self._append(dict(_FIRST))
        elif torn and account.last_charge is not None:
            self._append({**account.last_charge, "steps": 1})

    def _put(self, octets: bytes) -> None:
        """`octets` at the end of the file and on the disk, or no part of them in the account.

        The ledger counts as failed until the caller, who has something to do after it, says
        otherwise: an interrupt may come between any two lines, and what is on the disk then is for
        the next to open it to see.
        """
        assert self.path is not None and self._file is not None
        if self._failed is not None:
            raise LedgerError(f"ledger {self.path}: {self._failed}; open it anew")
        here, there = os.fstat(self._file), None
        with contextlib.suppress(OSError):
            there = os.stat(self.path)
        if there is None or (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            # What is written to a file without a name is kept nowhere.
            raise LedgerError(f"ledger {self.path}: the file was moved, deleted or replaced")
        if here.st_size != self._size:
            raise LedgerError(
                f"ledger {self.path}: has {here.st_size} bytes, where this process left "
                f"{self._size}: something else has written to it"
            )
        self._failed = "a write to it failed"
        try:
            written = 0
            while written < len(octets):
                written += os.write(self._file, octets[written:])
            os.fsync(self._file)
        except OSError as error:
            raise LedgerError(
                f"ledger {self.path}: cannot be written ({error.strerror})"
            ) from error
        self._size += len(octets)

    def _append(self, record: dict[str, Any]) -> None:
        if os.getpid() != self._pid:
            raise LedgerError("ledger: opened by another process; open it anew after a fork")
        # Each line names the one before: those of two threads must not be made at once.
        with self._lock:
            checksums = self._account.checksums
            checksum = _checksum(checksums[-1] if checksums else "", record)
            if self.path is not None:
                if self._file is None:
                    raise LedgerError(f"ledger {self.path}: closed; open it anew")
                self._put(_line(record, checksums[-1] if checksums else ""))
            self._account._add(record, checksum)
            self._failed = None

    def charge(
        self, noise_multiplier: float, sample_rate: float, steps: int = 1, private: bool = True
    ) -> None:
        """Counts `steps` steps, on disk before it returns; call it before the release.

        Args:
            noise_multiplier: sigma in units of the clipping bound; 0 is no privacy.
            sample_rate: Poisson rate, 1 where nothing is claimed from sampling.
            steps: how many.
            private: False for noise that could be repeated (a test's seed).

        Raises:
            LedgerError: values that make no sense, a ledger that is closed or was opened by
                another process, or a file that could not be written or is not as it was left.
        """
        if not _makes_sense(noise_multiplier, sample_rate, steps):
            raise LedgerError(
                f"ledger: {(noise_multiplier, sample_rate, steps)} given; accepted: noise >= 0, "
                "0 < sample rate <= 1, 1 step or more"
            )
        self._append(
            {
                "noise_multiplier": float(noise_multiplier),
                "sample_rate": float(sample_rate),
                "steps": int(steps),
                "private": bool(private),
            }
        )

    def bind(
        self,
        *,
        data: str | None = None,
        delta: float | None = None,
        accountant: str | None = None,
    ) -> None:
        """Fixes for good what the account is of, as far as that is given and not fixed yet.

        Args:
            data: the name or fingerprint of the records.
            delta: of the (epsilon, delta) that is promised of them, in (0, 1).
            accountant: what counts it, "prv" or "rdp".

        Raises:
            LedgerError: it is bound to another already; nothing has been bound then.
            ConfigError: an argument that is not accepted.
        """
        _check_binding(data, delta, accountant)
        given = {"data": data, "delta": delta, "accountant": accountant}
        given = {what: value for what, value in given.items() if value is not None}
        accepted = {"data": "the same records, named by data_id= if they come in another form"}
        for what, value in given.items():
            held = self.bound.get(what, value)
            if held != value:
                raise LedgerError(
                    f"ledger {self.path or 'in memory'}: its {what} is {held!r}, but {value!r} was "
                    f"given; accepted: {accepted.get(what, repr(held))}, or another ledger for "
                    "another promise"
                )
        new = {what: value for what, value in given.items() if what not in self.bound}
        if new:
            self._append(new)

    @property
    def bound(self) -> dict[str, Any]:
        """What the account is bound to, of "data", "delta" and "accountant"."""
        return dict(self._account.bound)

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """(noise multiplier, sample rate, steps) of everything charged."""
        return self._account.history

    @property
    def steps(self) -> int:
        """How many steps were charged."""
        return self._account.steps

    @property
    def private(self) -> bool:
        """Whether every step's noise was secret."""
        return self._account.private

    @property
    def checksum(self) -> str:
        """Of the last line: a later state of this ledger has it, too. In memory of none, ""."""
        return self._account.checksums[-1] if self._account.checksums else ""

    def check_extends(self, checksum: str) -> None:
        """Raises LedgerError unless this is a later state of the ledger with that `checksum`."""
        self._account.check_extends(checksum, self.path)

    def epsilon(self, delta: float | None = None, accountant: str | None = None) -> float:
        """Epsilon of everything charged; see `Account.epsilon`."""
        return self._account.epsilon(delta, accountant)

    def close(self) -> None:
        """Gives the file's lock back; charging afterwards is an error."""
        if self._file is not None:
            if os.getpid() == self._pid:
                # Closing alone would leave the lock with forked children, data workers say.
                fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        raise LedgerError("ledger: two copies would each count half; share the one there is")

    def __reduce__(self) -> tuple[Any, ...]:
        raise LedgerError("ledger: cannot be pickled; open its file instead")
