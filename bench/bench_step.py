"""Whole training steps, ours and the peers', each in turns with the frozen model's own passes."""

from __future__ import annotations

from functools import cache
from typing import Any

import measure
import models
import pytest
import subjects
import torch

ROUNDS = {"quick": 6, "full": 8}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = torch.device(metafunc.config.getoption("--device"))
    suite = metafunc.config.getoption("--suite")
    settings = models.settings(device, suite)
    metafunc.parametrize("setting", settings, ids=[s.name for s in settings], scope="module")
    metafunc.parametrize("subject", subjects.names(suite))


@cache
def frozen(setting: models.Setting, device: torch.device) -> Any:
    model = setting.build().to(device)
    return model, subjects.floor(setting, models.sharing(model), device)


def bench_step(
    race: Any, setting: models.Setting, subject: str, device: torch.device, pytestconfig: Any
) -> None:
    small = setting.n * setting.length <= 128
    if "torch.compile" in subject and not small:
        pytest.skip("compiled where Python is what shows")
    model, floor = frozen(setting, device)
    own = models.sharing(model)
    step = subjects.make(subject, setting, own, device)
    step(0)
    peak = measure.peak_bytes(lambda: step(0), device)
    race(
        step, floor, rounds=ROUNDS[pytestconfig.getoption("--suite")] * (8 if small else 1),
        warmup=1, op="step", subject=subject, model=setting.name, private=_private(subject),
        n=setting.n, length=setting.length, r=setting.r, peak_bytes=peak,
        floor_peak_bytes=_floor_peak(setting, device), against=subjects.FLOOR,
        model_bytes=measure.resident_bytes(own), frozen_bytes=measure.resident_bytes(model),
    )  # fmt: skip


@cache
def _floor_peak(setting: models.Setting, device: torch.device) -> int:
    return measure.peak_bytes(lambda: frozen(setting, device)[1](0), device)


def _private(subject: str) -> bool:
    return "not private" not in subject
