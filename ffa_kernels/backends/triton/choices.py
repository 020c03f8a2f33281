"""Which way computes `linear` and its backward: a measured table, else a rule that is not.

`choices.json` is written by `bench/tune.py` on a machine with a GPU. Where it says nothing of a
compute capability, dtype and class of shapes, cuBLAS and an in-place `addmm_` are the default:
nobody has measured that it is the fastest there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ffa_kernels.errors import ConfigError

TABLE = Path(__file__).with_name("choices.json")
WAYS = ("addmm", "stacked", "split", "fused")

# Multiply-adds of the base product: under the first a launch's cost shows, over the second the
# whole GPU is busy for many waves of tiles.
SMALL, LARGE = 1 << 30, 1 << 36


class Config(NamedTuple):
    """Tile sizes in elements, and Triton's launch options."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Choice(NamedTuple):
    """A way of WAYS, and the tiles of its matrix product (None: the first that suits)."""

    way: str
    config: Config | None = None


DEFAULT = Choice("addmm")  # Not measured.

_forced: Choice | None = None


def shape_class(m: int, d_in: int, d_out: int, r: int) -> str:
    """The class under which a shape is measured and looked up: size, aspect and rank."""
    work = m * d_in * d_out
    size = "small" if work < SMALL else "large" if work >= LARGE else "medium"
    aspect = "wide" if d_out > 2 * d_in else "tall" if d_in > 2 * d_out else "square"
    rank = next((f"r<={limit}" for limit in (16, 64, 256) if r <= limit), "r>256")
    return f"{size} {aspect} {rank}"


def key_of(entry: dict[str, Any]) -> tuple[object, ...]:
    """What an entry of the table is looked up by."""
    return tuple(entry[name] for name in ("op", "cc", "dtype", "shape_class", "dropout"))


@functools.cache
def table() -> dict[tuple[object, ...], Choice]:
    """The measured choices, by (op, cc, dtype, shape class, dropout)."""
    entries = json.loads(TABLE.read_text(encoding="utf-8"))["entries"]
    return {
        key_of(e): Choice(e["way"], None if e["config"] is None else Config(**e["config"]))
        for e in entries
    }


@functools.lru_cache(maxsize=4096)
def _measured(
    op: str, cc: int, dtype: str, m: int, d_in: int, d_out: int, r: int, dropout: bool
) -> Choice:
    return table().get((op, cc, dtype, shape_class(m, d_in, d_out, r), dropout), DEFAULT)


def choose(
    op: str, cc: int, dtype: str, m: int, d_in: int, d_out: int, r: int, dropout: bool
) -> Choice:
    """The forced choice, else the measured one, else the default.

    Args:
        op: "linear" or "linear_backward".
        cc: compute capability as 10 * major + minor.
        dtype: as "bfloat16".
        m, d_in, d_out, r: rows of x, and the layer's sizes.
        dropout: whether the rank-r term has a dropout mask.
    """
    if _forced is not None:
        return _forced
    return _measured(op, cc, dtype, m, d_in, d_out, r, dropout)


@contextmanager
def force(way: str, config: Config | None = None) -> Iterator[None]:
    """Takes one way for `linear` and its backward inside the block, in every thread.

    Where it cannot serve a call (see `linear`), the next simpler one does.

    Raises:
        ConfigError: `way` is none of WAYS.
    """
    global _forced
    if way not in WAYS:
        raise ConfigError(f"force: way is {way!r}; accepted: {', '.join(WAYS)}")
    previous, _forced = _forced, Choice(way, config)
    try:
        yield
    finally:
        _forced = previous
