"""How the cost of a private step grows with records, tokens, rank and depth; full suite alone.

One model after another differs in one size from the middle of the sweep. Beside each step stand
the frozen model's own passes on the same batch, multiplied as the step multiplies. Opacus' ghost
clipping, whose norms take products of tokens with tokens, shows what growth with T^2 looks like.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import models
import pytest
import subjects
import torch

from ffa_kernels.memory import keep_freed_memory

MIDDLE = models.Setting(
    "RoBERTa-like 256 x 2, all", lambda: models.roberta(256, 2, 8), False, 8, 128, 32,
    models.ALL_ROBERTA, models.ROBERTA_EMBEDDING,
)  # fmt: skip
SWEEPS = {"n": (4, 8, 16, 32), "T": (64, 128, 256, 512), "r": (16, 32, 48, 64),
          "depth": (1, 2, 4, 8)}  # fmt: skip


def at(knob: str, value: int) -> models.Setting:
    """The middle of the sweep, but for one size."""
    if knob == "depth":
        return replace(MIDDLE, build=lambda: models.roberta(256, value, 8))
    return replace(MIDDLE, **{{"n": "n", "T": "length", "r": "r"}[knob]: value})


@pytest.fixture(autouse=True)
def kept_memory() -> None:
    """Pages that are faulted in anew in every step, or not, as a size has it, take more time than
    what grows here. It holds for the process: conftest puts this file last."""
    keep_freed_memory()


@pytest.mark.parametrize("subject", [subjects.OURS, "Opacus, hooks", "Opacus, ghost"])
@pytest.mark.parametrize("knob,value", [(k, v) for k, values in SWEEPS.items() for v in values])
def bench_growth(
    race: Any, knob: str, value: int, subject: str, device: torch.device, pytestconfig: Any
) -> None:
    if pytestconfig.getoption("--suite") != "full":
        pytest.skip("full suite alone")
    if subject not in subjects.names("full"):
        pytest.skip("not installed")
    setting = at(knob, value)
    model = setting.build().to(device)
    ours = subject == subjects.OURS
    make_floor = subjects.floor_by_ours if ours else subjects.floor
    floor = make_floor(setting, models.sharing(model), device)
    race(
        subjects.make(subject, setting, models.sharing(model), device), floor,
        rounds=40 if ours else 16, warmup=2,
        op="growth", subject=subject, model=setting.name, knob=knob, value=value,
        against=subjects.FLOOR_BY_OURS if ours else subjects.FLOOR,
    )  # fmt: skip
