"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ffa_kernels.cli import main


def command(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "ffa_kernels.cli"]
    return subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, timeout=120
    )


def test_doctor_tells_the_truth_as_json() -> None:
    done = command("doctor", "--json")
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    import torch

    from ffa_kernels.backends import native

    assert findings["torch"] == torch.__version__
    assert findings["backends"]["reference"]["available"] is True
    for kind in ("cpu", "cuda"):
        assert findings["backends"][kind]["available"] == native.available(kind)
    for name, backend in findings["backends"].items():
        assert backend["available"] or backend["reason"], name
        assert backend["available"] or findings["missing"][name], name
    assert len(findings["openmp"]) <= 1
    assert findings["threads"] >= 1 and findings["cpu"]["model"]


def test_doctor_names_a_missing_library_and_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from pathlib import Path\n"
        "from ffa_kernels.backends import native\n"
        "native.DIRECTORY = Path('/nonexistent')\n"
        "from ffa_kernels.cli import main\n"
        "import sys; raise SystemExit(main(sys.argv[1:]))\n"
    )
    findings = json.loads(command("doctor", "--json", code=code).stdout)
    assert findings["backends"]["cpu"]["available"] is False
    assert "never built" in findings["backends"]["cpu"]["reason"]
    assert "reference backend" in findings["missing"]["cpu"]
    assert findings["cpu"]["isa"] is None
    text = command("doctor", code=code).stdout
    assert "backend cpu: not available: never built" in text and "without cpu: " in text
    monkeypatch.setenv("FFA_CPU_LIBRARY", "/nonexistent.so")
    text = command("doctor").stdout
    assert "FFA_CPU_LIBRARY names /nonexistent.so, which does not exist" in text
    monkeypatch.setenv("FFA_CPU_ISA", "avx-512")
    assert "FFA_CPU_ISA is 'avx-512'; accepted: baseline, avx2" in command("doctor").stdout


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[federation]\nrouns = 3\n", "did you mean 'rounds'"),
        ("[federation", "not TOML"),
        (None, "cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str | None, named: str
) -> None:
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_text(content)
    assert main(["federate", str(path), "--out", str(tmp_path / "out")]) == 2
    printed = capfd.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith("ffa-kernels: error: ")
    assert named in printed.err and not printed.out
    assert not (tmp_path / "out").exists()


def test_an_unlabelled_row_is_one_line_and_exit_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "secret words"}\n')
    (tmp_path / "config.toml").write_text(
        "federation = {rounds = 1, local_steps = 1}\n"
        "privacy = {target_epsilon = 1.0, target_delta = 1e-5}\n"
        "train = {batch_size = 1, lr = 0.1}\n"
        'data = {source = "files"}\n'
        'site = [{name = "a", train = "a.jsonl"}]\n'
    )
    arguments = ["federate", str(tmp_path / "config.toml"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert "a.jsonl, line 1: no label" in error and error.count("\n") == 1
    assert "secret" not in error
    assert not (tmp_path / "out").exists()


def test_an_unknown_command_is_exit_code_2() -> None:
    assert command("fedrate").returncode == 2
    assert command().returncode == 2


def test_importing_the_package_imports_no_federation() -> None:
    code = (
        "import sys, ffa_kernels\n"
        "bad = [m for m in sys.modules if m.startswith(('ffa_kernels.federated', 'transformers',"
        " 'triton', 'opacus', 'rich', 'matplotlib'))]\n"
        "print(bad)\n"
    )
    assert command(code=code).stdout.strip() == "[]"


def test_a_folder_with_brackets_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ffa_kernels.federated import config, driver

    keys = ("accuracy", "accuracy_without_adapters", "baseline_accuracy")
    monkeypatch.setattr(config, "load", lambda path: None)
    monkeypatch.setattr(driver, "run", lambda *_: dict.fromkeys(keys, 0.5))
    assert main(["federate", "c.toml", "--out", "o[b]ut"]) == 0
    assert "o[b]ut" in capsys.readouterr().out
