"""Runs the benchmarks and writes what they found: `python bench/run.py --out DIR [--suite full]`.

DIR gets bench.json (environment and a row for each measurement), bench.md (tables) and plots.
`ffa-kernels bench` is the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import measure
import tables
import torch

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """pytest's exit code; what could be measured is written in any case."""
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    parser.add_argument("--suite", choices=("quick", "full"), default="quick")
    parser.add_argument("--only", metavar="EXPRESSION", help="as pytest's -k")
    parser.add_argument("--rounds", type=int, help="of each measurement")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [
            *(sys.executable, "-m", "pytest", str(HERE), "-q", "--benchmark-disable-gc"),
            *("-p", "no:xdist", "-p", "no:cacheprovider", "--timeout=0", "-W", "ignore"),
            *("--device", chosen.device, "--suite", chosen.suite, f"--benchmark-json={raw}"),
            *("--benchmark-columns=median,iqr,rounds", "--rootdir", str(HERE.parent)),
            *(("-k", chosen.only) if chosen.only else ()),
            *(("--rounds", str(chosen.rounds)) if chosen.rounds else ()),
        ]
        # Within a test run: as a worker of that it would measure nothing.
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        status = subprocess.run(command, env=env).returncode
        found = json.loads(raw.read_text(encoding="utf-8")) if raw.exists() else {"benchmarks": []}
    result: dict[str, Any] = {
        "environment": measure.environment(torch.device(chosen.device)),
        "suite": chosen.suite,
        # Neither host nor path, which pytest-benchmark notes as well; and what failed has no row.
        "rows": [row for bench in found["benchmarks"] if "op" in (row := bench["extra_info"])],
    }
    text = json.dumps(result, indent=1) + "\n"
    (chosen.out / "bench.json").write_text(text, encoding="utf-8")
    (chosen.out / "bench.md").write_text(tables.markdown(result), encoding="utf-8")
    tables.plots(result, chosen.out)
    print(tables.markdown(result))
    return status


if __name__ == "__main__":
    sys.exit(main())
