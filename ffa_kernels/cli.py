"""The command line: `ffa-kernels doctor` and `ffa-kernels federate`.

A mistake of the user's is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ffa_kernels.errors import FFAError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (the process' own by default); returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return int(arguments.command(arguments))
    except FFAError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; try: pip install 'ffa-kernels[demo]'")
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("ffa-kernels: stopped; what was released stays in the ledgers", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ffa-kernels", description="Private federated fine-tuning with FFA-LoRA."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="say what works on this machine, and what not")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(command=_doctor)
    federate = commands.add_parser("federate", help="run a federation in this process")
    federate.add_argument("config", type=Path, metavar="CONFIG.toml")
    federate.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    federate.set_defaults(command=_federate)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from ffa_kernels import doctor

    findings = doctor.examine()
    print(json.dumps(findings, indent=1) if arguments.json else doctor.describe(findings))
    return 0


def _federate(arguments: argparse.Namespace) -> int:
    # Its notes on a new head and its own progress bars would tear ours apart.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from rich.console import Console

    from ffa_kernels.federated import config, driver

    settings = config.load(arguments.config)
    console = Console()
    result = driver.run(settings, arguments.out, console)
    console.print(
        f"accuracy {result['accuracy']:.4f} "
        f"({result['accuracy_without_adapters']:.4f} without adapters, "
        f"{result['baseline_accuracy']:.4f} majority class); "
        f"report in {arguments.out / 'report.md'}",
        highlight=False,
    )
    return 0


def _fail(message: str) -> int:
    print(f"ffa-kernels: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
