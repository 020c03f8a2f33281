"""The compiled kernels' place in the package build; everything else stands in pyproject.toml.

The libraries load through ctypes and know neither Python nor torch, so a wheel that has them fits
every Python 3 of its platform, and one without them fits everywhere.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def _build_kernels(out: Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("ffa_csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report: dict[str, Any] = module.build(out)
    return report


class BuildPy(build_py):
    """Python files, then the libraries beside them: in the source tree for an editable install."""

    compiled = False

    def run(self) -> None:
        super().run()
        base = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        report = _build_kernels(base / "ffa_kernels" / "_lib")
        self.compiled = any(entry["built"] for entry in report.values())

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        if not self.editable_mode:
            library = Path(self.build_lib) / "ffa_kernels" / "_lib"
            outputs += [str(path) for path in library.glob("*") if path.suffix != ".tmp"]
        return outputs


class BdistWheel(bdist_wheel):
    """py3-none-<platform> with compiled libraries, py3-none-any without."""

    def run(self) -> None:
        self.run_command("build_py")
        compiled = self.get_finalized_command("build_py").compiled
        self.root_is_pure = not compiled
        # `install` asks this to choose between purelib and platlib; the wheel's root is the latter.
        self.distribution.has_ext_modules = lambda: compiled
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", "any" if self.root_is_pure else platform


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
