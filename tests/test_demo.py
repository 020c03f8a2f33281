"""The demo's bars, on the real model and data: what `make demo` promises."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ffa_kernels.cli import main
from ffa_kernels.federated import config as configuration
from ffa_kernels.federated import wire
from ffa_kernels.federated.build import build

DEMO = Path(__file__).parents[1] / "ffa_kernels" / "federated" / "demo.toml"


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_demo_holds_its_bars(tmp_path: Path) -> None:
    assert main(["federate", str(DEMO), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["accuracy"] >= 0.79
    assert report["accuracy_without_adapters"] <= report["accuracy"] - 0.01
    assert report["accuracy_without_adapters"] > report["baseline_accuracy"]
    assert all(site["epsilon"] <= 6 for site in report["sites"].values())
    assert len(report["sites"]) == 4 and len(report["rounds"]) >= 1
    assert report["adapter_norms"] and all(norm > 0 for norm in report["adapter_norms"].values())
    for name in ("report.md", "report.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_the_demo_sends_half_of_what_lora_sends() -> None:
    config = configuration.load(DEMO)
    sizes = {}
    for method in ("ffa", "lora"):
        model, _ = build(replace(config, federation=replace(config.federation, method=method)))
        prints = wire.fingerprint(model)
        header = wire.Header("update", "run", 1, "site", prints.base, prints.recipe)
        sizes[method] = wire.measure(wire.encode(header, wire.trained_tensors(model)))
    assert 2 * sizes["ffa"].adapter == sizes["lora"].adapter > 0
    assert sizes["ffa"].head == sizes["lora"].head > 0
