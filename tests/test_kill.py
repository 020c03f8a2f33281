"""kill -9 at random moments of a training loop, again and again, and what is left each time.

Epsilon reported is never below what was released, no noise counter comes twice, and the adapter on
disk is always a whole one: see kill_child.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.full)])
def test_what_a_killed_training_leaves(tmp_path, kills):
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill_child.py"), str(tmp_path), str(kills), "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=60 + 2 * kills,
    )
    assert process.returncode == 0, process.stderr
    seen = json.loads(process.stdout.splitlines()[-1])
    assert seen["kills"] == kills
    # Kills fell into training and not only before it.
    assert seen["charged"] >= seen["released"] > kills // 4
    assert seen["saved"] > kills // 20
