"""What a data set's owner has released, over all runs: written before each release.

One JSON line a logical step, each with a checksum over itself and the line before it, flushed to
the disk before the step's result exists. A crash can therefore only count a step too many.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from ffa_kernels.errors import LedgerError
from ffa_kernels.privacy.accounting import epsilon, merged

_FORMAT = 1


def _checksum(previous: str, record: dict[str, Any]) -> str:
    text = previous + json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Ledger:
    """An append-only account of private steps; in memory only when `path` is None.

    Args:
        path: the file; made if it does not exist, continued if it does.

    Raises:
        LedgerError: another process holds the file, or it is damaged other than by a torn last
            line. A torn last line is replaced by a second copy of the line before it: the
            safe side, since what it said is lost.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._steps: list[tuple[float, float, int]] = []
        self._private = True
        self._last = ""
        self._pid = os.getpid()
        self._file: Any = None
        if self.path is not None:
            self._open(self.path)

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115  held open for its lock
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise LedgerError(f"ledger {path}: another process holds it") from error
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
        self._file.seek(0)
        content: bytes = self._file.read()
        whole, _, torn = content.rpartition(b"\n")
        unended = b"}" in torn
        if unended:
            # Complete but for its newline: to be read as it stands, or found to be damaged.
            whole, torn = content, b""
        lines = whole.split(b"\n") if whole else []
        last: dict[str, Any] | None = None
        for number, line in enumerate(lines, start=1):
            last = self._parse(path, number, line)
            self._apply(last)
        if unended:
            self._file.write(b"\n")
            self._file.flush()
        if not lines and not torn:
            self._write({"format": _FORMAT})
            return
        if torn:
            self._file.truncate(len(content) - len(torn))
            if not lines:
                self._write({"format": _FORMAT})
            elif last is not None and "steps" in last:
                again = {k: last[k] for k in ("noise_multiplier", "sample_rate", "private")}
                self._append({**again, "steps": 1})

    def _parse(self, path: Path, number: int, line: bytes) -> dict[str, Any]:
        where = f"ledger {path}, line {number}"
        try:
            record = json.loads(line)
            checksum = record.pop("checksum")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise LedgerError(f"{where}: not a ledger line") from error
        if checksum != _checksum(self._last, record):
            raise LedgerError(f"{where}: its checksum does not fit: changed, or out of order")
        if number == 1 and record != {"format": _FORMAT}:
            raise LedgerError(f"{where}: {record}; accepted: format {_FORMAT}")
        self._last = checksum
        return dict(record)

    def _apply(self, record: dict[str, Any]) -> None:
        if "steps" in record:
            self._steps = merged(
                [
                    *self._steps,
                    (record["noise_multiplier"], record["sample_rate"], record["steps"]),
                ]
            )
            self._private = self._private and record["private"]

    def _write(self, record: dict[str, Any]) -> None:
        checksum = _checksum(self._last, record)
        line = json.dumps({**record, "checksum": checksum}, sort_keys=True) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last = checksum

    def _append(self, record: dict[str, Any]) -> None:
        if os.getpid() != self._pid:
            raise LedgerError("ledger: opened by another process; open it anew after a fork")
        if self._file is not None:
            self._write(record)
        self._apply(record)

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
            LedgerError: values that make no sense, or a ledger opened by another process.
        """
        if not (
            math.isfinite(noise_multiplier)
            and noise_multiplier >= 0
            and 0 < sample_rate <= 1
            and steps >= 1
        ):
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

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """(noise multiplier, sample rate, steps) of everything charged."""
        return list(self._steps)

    @property
    def steps(self) -> int:
        """How many steps were charged."""
        return sum(steps for _, _, steps in self._steps)

    @property
    def private(self) -> bool:
        """Whether every step's noise was secret."""
        return self._private

    def epsilon(self, delta: float, accountant: str = "prv") -> float:
        """Epsilon of everything charged, at `delta`; infinity if a step's noise was not secret."""
        return epsilon(self._steps, delta, accountant) if self._private else math.inf

    def close(self) -> None:
        """Gives the file's lock back; charging afterwards is an error."""
        if self._file is not None and not self._file.closed:
            if os.getpid() == self._pid:
                # Closing alone would leave the lock with forked children, data workers say.
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        raise LedgerError("ledger: two copies would each count half; share the one there is")

    def __reduce__(self) -> tuple[Any, ...]:
        raise LedgerError("ledger: cannot be pickled; open its file instead")
