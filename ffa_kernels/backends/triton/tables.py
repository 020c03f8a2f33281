"""One launch for many tensors: their addresses, sizes and scalars in one table on the device.

A table is int64: a header of `HEADER` words, then a column of `count` words for each of `COLUMNS`,
fp64 numbers as their bits. It is made by one copy out of pinned memory and kept by its content, so
that a step like the last one copies nothing, and nothing here waits for the device.

The header's first words count the programs that arrived. They belong to the tensors that the
table's kernels write, so that two calls that may run at once never share them.
"""

from __future__ import annotations

import itertools
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from ffa_kernels.backends.triton.aot import jit
from ffa_kernels.errors import ConfigError

HEADER = tl.constexpr(4)
NORMS_ARRIVED = tl.constexpr(0)
TILES_ARRIVED = tl.constexpr(1)
EXPECTED_BATCH_SIZE = tl.constexpr(2)

# Each in words after the header, times the number of tensors.
FIRST_TILE = tl.constexpr(0)
FIRST_CHUNK = tl.constexpr(1)
CHUNKS = tl.constexpr(2)
CHUNK = tl.constexpr(3)  # elements of one, a multiple of TILE
INDEX = tl.constexpr(4)  # the tensor's place in the caller's lists
NUMEL = tl.constexpr(5)
GRAD_SAMPLE = tl.constexpr(6)  # addresses from here on, 0 for none
SUM = tl.constexpr(7)
PARAM = tl.constexpr(8)
EXP_AVG = tl.constexpr(9)
EXP_AVG_SQ = tl.constexpr(10)
SQUARES = tl.constexpr(11)
STEP = tl.constexpr(12)
TENSOR_ID = tl.constexpr(13)
BOUND = tl.constexpr(14)  # fp64 from here on
INVERSE_GRID = tl.constexpr(15)
NOISE = tl.constexpr(16)  # standard deviation in units of the grid

# Elements of a tensor that one program clips, sums and updates.
TILE = 1024
# A norm is summed in chunks of so many elements, or of as many as make `MOST_CHUNKS`: by the
# tensor's size alone, so that a record's norm has the same bits in whatever company.
SMALLEST_CHUNK = 16 * TILE
MOST_CHUNKS = 512

_KEPT_TABLES = 256
_RESERVE = 1 << 20

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True)
class Content:
    """What a call says of its K tensors: each field has K entries, or none.

    Addresses are of contiguous tensors; `dtypes` are what one launch has in common.
    """

    numels: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    bounds: tuple[float, ...]
    inverse_grids: tuple[float, ...]
    grad_samples: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()
    sums: tuple[int, ...] = ()
    params: tuple[int, ...] = ()
    exp_avgs: tuple[int, ...] = ()
    exp_avg_sqs: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    tensor_ids: tuple[int, ...] = ()
    noises: tuple[float, ...] = ()
    expected_batch_size: float = 1.0


@dataclass(frozen=True)
class Launch:
    """A range of tiles, and of chunks, whose tensors are of one dtype and alignment."""

    dtype: torch.dtype
    aligned: bool
    first_tile: int
    tiles: int
    first_chunk: int
    chunks: int


@dataclass(frozen=True)
class Plan:
    """The table of `count` tensors, and the launches that walk all of it."""

    table: Tensor
    count: int
    launches: tuple[Launch, ...]

    @property
    def tiles(self) -> int:
        return sum(launch.tiles for launch in self.launches)

    @property
    def chunks(self) -> int:
        return sum(launch.chunks for launch in self.launches)


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([t.data_ptr() for t in tensors])


def _bits(values: Sequence[float]) -> list[int]:
    return list(struct.unpack(f"<{len(values)}q", struct.pack(f"<{len(values)}d", *values)))


def _lay_out(content: Content) -> tuple[list[int], tuple[Launch, ...]]:
    """The table's words, and the launches."""
    numels, count = content.numels, len(content.numels)
    none = (0,) * count
    wide = [
        column or none
        for column in (
            *(content.grad_samples, content.sums, content.params),
            *(content.exp_avgs, content.exp_avg_sqs),
        )
    ]
    given = [
        *(numels, *wide, content.squares or none, content.steps or none),
        *(content.tensor_ids or none, _bits(content.bounds), _bits(content.inverse_grids)),
        _bits(content.noises) or none,
    ]

    def kind(k: int) -> tuple[str, bool]:
        # 16 bytes at a time, wherever every row of a tensor begins at a multiple of that.
        aligned = all(column[k] % 16 == 0 for column in (numels, *wide))
        return str(content.dtypes[k]), aligned

    order = sorted(range(count), key=kind)
    first_tiles, first_chunks, chunks, lengths, launches = [], [], [], [], []
    tile = chunk = 0
    for (_, aligned), group in itertools.groupby(order, key=kind):
        first_tile, first_chunk = tile, chunk
        for k in group:
            first_tiles.append(tile)
            first_chunks.append(chunk)
            lengths.append(max(SMALLEST_CHUNK, TILE * -(-numels[k] // (TILE * MOST_CHUNKS))))
            # An empty tensor has one too: its program arrives, and touches nothing.
            chunks.append(max(1, -(-numels[k] // lengths[-1])))
            tile += max(1, -(-numels[k] // TILE))
            chunk += chunks[-1]
        launches.append(
            Launch(
                *(content.dtypes[k], aligned, first_tile, tile - first_tile),
                *(first_chunk, chunk - first_chunk),
            )
        )
    words = [0, 0, *_bits([content.expected_batch_size]), 0]
    words += [*first_tiles, *first_chunks, *chunks, *lengths, *order]
    for column in given:
        words += [column[k] for k in order]
    return words, tuple(launches)


class _Reserve:
    """Pinned memory for the tables of captured graphs, which read it at every replay.

    A capture may not allocate any: it is cut off a block that an earlier call has left here, and
    neither written again nor freed.
    """

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._used = 0
        self._captured: list[Tensor] = []

    def fill(self, words: int) -> None:
        """Outside a capture: sees to it that many tables of this size could follow."""
        if self._block is None or self._block.numel() - self._used < 16 * words:
            size = max(_RESERVE // 8, 64 * words)
            self._block = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)
            self._used = 0

    def cut(self, words: int) -> Tensor:
        if self._block is None or self._block.numel() - self._used < words:
            raise ConfigError(
                f"no pinned memory is left for a captured table of {8 * words} bytes; accepted: "
                "run one warm-up step before capture"
            )
        piece = self._block[self._used : self._used + words]
        self._used += -(-words // 2) * 2
        self._captured.append(piece)
        return piece


_reserve = _Reserve()
_plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()


def plan_of(content: Content, device: torch.device) -> Plan:
    """The table for `content`, made anew only where the current stream has none.

    Raises:
        ConfigError: a CUDA graph is being captured, and no step was run before.
    """
    count = len(content.numels)
    if device.type != "cuda":
        words, launches = _lay_out(content)
        return Plan(torch.tensor(words, device="cpu"), count, launches)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            # In the graph's own memory, and copied by it: of no use outside.
            words, launches = _lay_out(content)
            pinned = _reserve.cut(len(words))
            pinned.copy_(torch.tensor(words, device="cpu"))
            table = torch.empty(len(words), dtype=torch.int64, device=device)
            table.copy_(pinned, non_blocking=True)
            return Plan(table, count, launches)
        # Of one stream: on another, nothing says that the copy has ended.
        key = (device, torch.cuda.current_stream().cuda_stream, content)
        plan = _plans.get(key)
        if plan is None:
            words, launches = _lay_out(content)
            _reserve.fill(len(words))
            pinned = torch.tensor(words, device="cpu").pin_memory()
            plan = Plan(pinned.to(device, non_blocking=True), count, launches)
            _plans[key] = plan
            if len(_plans) > _KEPT_TABLES:
                _plans.popitem(last=False)
        else:
            _plans.move_to_end(key)
        return plan


@contextmanager
def whole(plan: Plan) -> Iterator[None]:
    """Around the launches of a plan: where one of them fails, the table is used no more.

    Its counters would stand where the programs that did run have left them, and the next call's
    last program would not be the last.
    """
    try:
        yield
    except BaseException:
        for key in [key for key, kept in _plans.items() if kept is plan]:
            del _plans[key]
        raise


@jit
def column(table, count, name: tl.constexpr):
    """Where a column begins."""
    return table + HEADER + name * count


@jit
def word(table, count, name: tl.constexpr, k):
    return tl.load(column(table, count, name) + k)


@jit
def real(table, count, name: tl.constexpr, k):
    return word(table, count, name, k).to(tl.float64, bitcast=True)


@jit
def pointer(table, count, name: tl.constexpr, k, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of tensor k in a column; ALIGNED: it is known to be a multiple of 16 bytes."""
    address = word(table, count, name, k).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@jit
def size(table, count, k, ALIGNED: tl.constexpr):
    """The number of elements of tensor k; ALIGNED: it is known to be a multiple of 16."""
    numel = word(table, count, NUMEL, k)
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    return numel


@jit
def owner(table, count, name: tl.constexpr, item):
    """The tensor that a tile or chunk belongs to: the last whose first one is not beyond it."""
    starts = column(table, count, name)
    found = 0
    for first in range(0, count, 128):
        k = first + tl.arange(0, 128)
        found += tl.sum((tl.load(starts + k, mask=k < count, other=item + 1) <= item).to(tl.int32))
    return found - 1


@jit
def arrives_last(counter, programs):
    """Whether all other programs have arrived; what they wrote before is then seen by `.cg` loads.

    Leaves the counter at 0 for the next launch.
    """
    # The barrier puts every thread's writes before the one thread's release.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last
