"""The benchmarks run, and what they write says what was measured."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ffa_kernels import cli
from ffa_kernels.backends.dispatch import OPS

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(out, only):
    command = [sys.executable, str(BENCH / "run.py"), "--device", "cpu", "--rounds", "2"]
    return subprocess.run(
        [*command, "--out", str(out), "--only", only], capture_output=True, text=True, timeout=240
    )


def test_a_run_writes_rows_tables_and_plots(tmp_path):
    steps = "bench_step and MiniLM and (PEFT or bf16 and private)"
    done = run(tmp_path, f"(bench_clip_accumulate and cpu) or ({steps})")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    steps = [row for row in found["rows"] if row["op"] == "step"]
    smaller, peft = "ffa_kernels, private, bf16 base", "PEFT, B alone (not private)"
    assert [row["subject"] for row in steps] == [peft, smaller]
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["ratio"] > 0 and row["rounds"] == 2
    halved = [row["model_bytes"] / row["frozen_bytes"] for row in steps]
    assert 1.0 < halved[0] < 1.1 and 0.5 < halved[1] < 0.55
    for row in steps[:1]:
        # A training step holds about what the frozen passes hold, and takes longer.
        assert row["peak_bytes"] > 0.9 * row["floor_peak_bytes"] > 0 and row["ratio"] > 0.9
    (clip,) = (row for row in found["rows"] if row["op"] == "clip_accumulate")
    assert clip["bytes"] > 16 * 64 * 1024 * 8 * 4 and clip["flops"] > 0
    # Above 1 where a large cache holds it: the ceiling is that of a copy in memory.
    bandwidth, rate = clip["ceilings"]
    least = max(clip["bytes"] / bandwidth, clip["flops"] / rate)
    assert clip["of_ceiling"] == pytest.approx(least / clip["seconds"])
    assert {"steps.png", "memory.png", "roofline.png"} <= {p.name for p in tmp_path.iterdir()}
    text = (tmp_path / "bench.md").read_text()
    assert f"| {smaller} | {halved[1]:.3f} |" in text
    assert "PEFT, B alone" in text and "clip_accumulate" in text and found["suite"] == "quick"
    # What is committed names the processor, and neither host nor folder.
    assert found["environment"]["device"] and str(tmp_path) not in json.dumps(found)


def test_both_sides_of_a_cold_race_find_the_caches_swept(tmp_path):
    (tmp_path / "test_order.py").write_text(
        "import pytest\n"
        "seen = []\n"
        "@pytest.fixture\n"
        "def sweep():\n"
        "    return lambda: seen.append('sweep')\n"
        "@pytest.mark.parametrize('cold', [False, True])\n"
        "def test_order(race, cold):\n"
        "    seen.clear()\n"
        "    race(lambda i: seen.append(i), lambda i: seen.append('floor'), rounds=2, warmup=1,\n"
        "         cold=cold)\n"
        "    swept = ['sweep'] if cold else []\n"
        "    assert seen == [s for i in range(3) for s in (*swept, 'floor', *swept, i)]\n"
    )
    # As a worker of a test run it would time nothing.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--device", "cpu", str(tmp_path)],
        capture_output=True, text=True, timeout=240, cwd=tmp_path,
        env={**env, "PYTHONPATH": f"{BENCH}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def test_a_failing_benchmark_is_an_exit_code(tmp_path):
    done = run(tmp_path, "no_such_benchmark")
    assert done.returncode != 0
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == []


def test_the_command_runs_the_checkouts_benchmarks(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        subprocess, "run", lambda c: seen.append(c) or subprocess.CompletedProcess(c, 5)
    )
    assert cli.main(["bench", "--out", str(tmp_path), "--suite", "full", "--device", "cpu"]) == 5
    (command,) = seen
    assert Path(command[1]) == BENCH / "run.py" and command[-2:] == ["--device", "cpu"]
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "ffa_kernels" / "cli.py"))
    assert cli.main(["bench", "--out", str(tmp_path)]) == 2
    assert "clone the repository" in capsys.readouterr().err and len(seen) == 1


def test_every_op_has_a_benchmark():
    for op in set(OPS) - {"linear_backward"}:
        assert f'OP = "{op}"' in (BENCH / f"bench_{op}.py").read_text(), op
    assert '"linear_backward"' in (BENCH / "bench_linear.py").read_text()


def test_a_line_is_the_least_squares_line():
    tables = load("tables")
    a, b, fit = tables.line([(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)])
    assert (a, b, fit) == (pytest.approx(3.0), pytest.approx(2.0), pytest.approx(1.0))
    assert tables.line([(1.0, 0.0), (2.0, 4.0), (3.0, 0.0)])[2] == pytest.approx(0.0)


def test_growth_is_what_a_step_takes_over_its_floor():
    tables = load("tables")
    rows = [
        {"op": "growth", "subject": "s", "knob": "T", "value": t, "seconds": 0.01 * t + 0.002 * t,
         "ratio": 1.2}
        for t in (1, 2, 4)
    ]  # fmt: skip
    assert tables.sweeps(rows) == {("s", "T"): [(t, pytest.approx(2.0 * t)) for t in (1, 2, 4)]}
    assert "| s | T |" in tables.growth(rows) and "1.000 |" in tables.growth(rows)


def test_a_floor_is_the_longer_of_bytes_and_operations():
    roofline = load("roofline")
    work = roofline.frozen_linear(10, 20, 30, 4)
    assert work.flops == 2 * 10 * 20 * 30
    assert work.bytes == 4 * (10 * 30 + 10 * 20 + 20 * 30)
    assert work.floor(bandwidth=1.0, rate=1e9) == work.bytes
    assert work.floor(bandwidth=1e9, rate=1.0) == work.flops
