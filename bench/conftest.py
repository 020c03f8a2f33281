"""Options and fixtures of the benchmarks: `pytest bench [--device D] [--suite quick|full]`.

Everything is timed in turns with its floor: a clock that drifts, or a neighbour who comes and goes,
meets both. Ratios are medians over rounds of the two times that stand side by side.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import measure
import roofline
import tables

from ffa_kernels.backends.dispatch import use_backend

# Larger than the last cache of any processor here.
SWEPT_BYTES = 1 << 27
# Rows, d_out, d_in and r of the layers whose ops are measured.
LAYERS = {
    "cuda": [(8192, 4096, 4096, 16), (8192, 14336, 4096, 16), (8192, 4096, 14336, 16),
             (512, 768, 768, 8)],
    "cpu": [(2048, 384, 384, 8), (2048, 1536, 384, 16), (128, 384, 384, 8)],
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", choices=("cpu", "cuda"), default=found)
    parser.addoption("--suite", choices=("quick", "full"), default="quick")
    parser.addoption("--rounds", type=int, default=None, help="of each measurement")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layer" in metafunc.fixturenames:
        layers = LAYERS[metafunc.config.getoption("--device")]
        metafunc.parametrize("layer", layers, ids=["x".join(map(str, s)) for s in layers])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # It changes how malloc works in this process.
    items.sort(key=lambda item: item.path.name == "bench_growth.py")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(params=["cpu", "triton", "cuda", "reference"])
def backend(
    request: Any, device: torch.device, dtype: torch.dtype, pytestconfig: pytest.Config
) -> Iterator[str]:
    """Each backend that serves the module's OP here, in use; the reference in the full suite."""
    if request.param not in measure.backends(request.module.OP, device, dtype):
        pytest.skip("not on this device")
    if request.param == "reference" and pytestconfig.getoption("--suite") != "full":
        pytest.skip("full suite alone")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes and operations a second that this machine reaches, measured in this run."""
    return roofline.ceilings(device, dtype)


@pytest.fixture(scope="session")
def sweep(device: torch.device) -> Callable[[], object]:
    """Fills the caches with other memory, as a model's passes do between two private updates."""
    other = torch.zeros(SWEPT_BYTES, dtype=torch.uint8, device=device)

    def write() -> None:
        other.add_(1)
        measure.wait(device)

    return write


@pytest.fixture
def race(
    benchmark: Any, device: torch.device, pytestconfig: pytest.Config, request: Any
) -> Callable[..., None]:
    """Times `run` in turns with `floor` and puts what is known into the row. Where it is to be
    `cold`, both find the caches swept."""

    def measured(
        run: Callable[[int], object],
        floor: Callable[[int], object] | None = None,
        *,
        work: roofline.Work | None = None,
        rounds: int = 30,
        warmup: int = 3,
        repeats: int = 1,
        cold: bool = False,
        **told: Any,
    ) -> None:
        rounds = pytestconfig.getoption("--rounds") or rounds
        turn, floors = itertools.count(), []
        prepare = request.getfixturevalue("sweep") if cold else lambda: None

        def many(f: Callable[[int], object], i: int) -> None:
            for k in range(repeats):
                f(i * repeats + k)
            measure.wait(device)

        def setup() -> tuple[tuple[int], dict[str, Any]]:
            i = next(turn)
            if floor is not None:
                prepare()
                floors.append(measure.seconds(lambda: many(floor, i)))
            prepare()
            return (i,), {}

        benchmark.pedantic(lambda i: many(run, i), setup=setup, rounds=rounds, warmup_rounds=warmup)
        info = benchmark.extra_info
        info.update(told, repeats=repeats)
        if benchmark.stats is None:  # --benchmark-disable
            return
        times = [t / repeats for t in benchmark.stats.stats.data]
        info["rounds"] = len(times)
        info["seconds"], info["spread"] = tables.median_and_spread(times)
        if floor is not None:
            beside = [t / repeats for t in floors[-len(times) :]]
            ratios = [t / f for t, f in zip(times, beside, strict=True)]
            info["ratio"], info["ratio_spread"] = tables.median_and_spread(ratios)
        if work is not None:
            bandwidth, rate = request.getfixturevalue("ceilings")
            info["bytes"], info["flops"] = work.bytes, work.flops
            info["of_ceiling"] = work.floor(bandwidth, rate) / info["seconds"]
            info["ceilings"] = [bandwidth, rate]

    return measured
