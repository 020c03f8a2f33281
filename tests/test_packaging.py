"""Distributions and installs of every kind, and what the loaded library does to a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "ffa_kernels", "bench", "tests", "examples")
SITE_PACKAGES = sysconfig.get_paths()["purelib"]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on PATH")


def _run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    env = os.environ | environment
    return _run(sys.executable, "-c", textwrap.dedent(code), cwd=cwd, env=env)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone holds, without anything built."""
    copy = tmp_path_factory.mktemp("source") / "ffa-kernels"
    unwanted = shutil.ignore_patterns("__pycache__", "_lib", "*.so", "*.egg-info")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "Makefile", "SECURITY.md"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "README.md").write_text("# ffa-kernels\n")
    return copy


@pytest.fixture(scope="module")
def build_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A build environment in which importing torch fails, as under build isolation."""
    poison = tmp_path_factory.mktemp("poison")
    (poison / "torch.py").write_text("raise RuntimeError('the build imported torch')\n")
    # The CUDA library takes long to compile and goes the same way into the wheel.
    env = os.environ | {"PYTHONPATH": str(poison), "NVCC": ""}
    if COMPILER is not None:
        # Nor is it the optimiser that is tested here, which takes most of the CPU library's time.
        quick = tmp_path_factory.mktemp("quick") / "g++"
        quick.write_text(f'#!/bin/sh\nexec "{COMPILER}" "$@" -O0\n')
        quick.chmod(0o755)
        env["CXX"] = str(quick)
    return env


@pytest.fixture(scope="module")
def no_compiler_env(
    build_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    env = build_env | {"PATH": str(tmp_path_factory.mktemp("empty-path"))}
    env.pop("CXX", None)
    return env


@pytest.fixture(scope="module")
def sdist(source: Path, build_env: dict[str, str]) -> Path:
    _run(sys.executable, "-m", "build", "--sdist", "--no-isolation", cwd=source, env=build_env)
    return next((source / "dist").glob("*.tar.gz"))


def _wheel(sdist: Path, out: Path, env: dict[str, str]) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    tree = out / sdist.name.removesuffix(".tar.gz")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=tree, env=env)
    return next((tree / "dist").glob("*.whl"))


def _environment(path: Path) -> Path:
    """A virtual environment that sees this one's packages behind its own; returns its python."""
    venv.create(path, with_pip=False, symlinks=True)
    python = path / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = _run(python, "-c", code, cwd=path).strip()
    (Path(own) / "outer.pth").write_text(SITE_PACKAGES + "\n")
    return python


def _install(python: Path, *what: str | Path, env: dict[str, str]) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    _run(*pip, "--no-deps", "--no-index", "--no-build-isolation", *what, cwd=python.parent, env=env)


def _doctor(python: Path) -> dict[str, Any]:
    command = python.parent / "ffa-kernels"
    return dict(json.loads(_run(command, "doctor", "--json", cwd=python.parent)))


def _describe(python: Path) -> dict[str, Any]:
    code = """
        import json
        from ffa_kernels.backends import native
        print(json.dumps(native.describe()))
    """
    return dict(json.loads(_run(python, "-c", textwrap.dedent(code), cwd=python.parent)))


def _doctor_finds_the_library_under(python: Path, folder: Path) -> None:
    """`doctor --json` says what is true: these installs have a CPU library, and it loads."""
    backends = _doctor(python)["backends"]
    cpu = backends["cpu"]
    assert cpu["available"] and cpu["openmp"] and cpu["reason"] == ""
    assert Path(cpu["path"]).is_relative_to(folder) and Path(cpu["path"]).exists()
    assert backends["reference"]["available"]
    # Built with NVCC="": there is none to find.
    assert not backends["cuda"]["available"] and backends["cuda"]["path"] is None


def _entries(tree: Any, key: str) -> list[dict[str, Any]]:
    """Every dictionary of a backend's state named `key`, wherever the report puts it."""
    if not isinstance(tree, dict):
        return []
    here = [tree[key]] if isinstance(tree.get(key), dict) and "available" in tree[key] else []
    return here + [entry for child in tree.values() for entry in _entries(child, key)]


def test_sdist_carries_all_sources_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*.*")
        if path.is_file() and not {"__pycache__", "_lib"} & set(path.parts)
    }
    assert wanted <= names, wanted - names
    assert {"LICENSE", "README.md", "SECURITY.md", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith(".so") or "/_lib/" in name]


@needs_compiler
def test_wheel_with_a_compiler_serves_every_python_of_the_platform(
    sdist: Path, tmp_path: Path, build_env: dict[str, str]
) -> None:
    wheel = _wheel(sdist, tmp_path, build_env)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"ffa_kernels-0.1.0-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"ffa_kernels/_lib/libffa_cpu.so", "ffa_kernels/_lib/build.json"} <= names
    assert not [name for name in names if name.startswith(("csrc", "tests"))]

    python = _environment(tmp_path / "env")
    _install(python, wheel, env=build_env)
    _doctor_finds_the_library_under(python, tmp_path)


@needs_compiler
def test_sdist_installs_with_its_library(
    sdist: Path, tmp_path: Path, build_env: dict[str, str]
) -> None:
    python = _environment(tmp_path / "env")
    _install(python, sdist, env=build_env)
    _doctor_finds_the_library_under(python, tmp_path)


def test_wheel_without_a_compiler_installs_and_doctor_says_why(
    sdist: Path, tmp_path: Path, no_compiler_env: dict[str, str], build_env: dict[str, str]
) -> None:
    wheel = _wheel(sdist, tmp_path, no_compiler_env)
    assert wheel.name == "ffa_kernels-0.1.0-py3-none-any.whl"
    python = _environment(tmp_path / "env")
    _install(python, wheel, env=build_env)
    described = _describe(python)
    reports = [described["cpu"], described["cuda"]]
    doctor = _doctor(python)
    seen = [_entries(doctor, kind) for kind in ("cpu", "cuda")]
    assert all(seen), f"doctor names no state of the compiled backends: {doctor}"
    for report in reports + [entry for entries in seen for entry in entries]:
        assert report["available"] is False
        assert report["path"] is None
        assert "no compiler found" in report["reason"]


@needs_compiler
def test_editable_install_builds_in_place(
    source: Path, tmp_path: Path, build_env: dict[str, str]
) -> None:
    python = _environment(tmp_path / "env")
    _install(python, "-e", source, env=build_env)
    assert (source / "ffa_kernels" / "_lib" / "libffa_cpu.so").exists()
    _doctor_finds_the_library_under(python, source)


def _needs_library() -> None:
    from ffa_kernels.backends import native

    state = native.describe()["cpu"]
    if not state["available"]:
        pytest.skip(state["reason"])


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CXX", f"{COMPILER} --not-a-flag", "not-a-flag"),
        ("CXX", "true", "libffa_cpu"),
        ("CXX", "echo", "libffa_cpu"),
        ("CXX", "'", "CXX is"),
        ("FFA_BUILD_JOBS", "many", "FFA_BUILD_JOBS has 'many'; accepted: whole numbers"),
        ("FFA_CUDA_ARCHS", "new", "FFA_CUDA_ARCHS has 'new'; accepted: whole numbers"),
    ],
)
@needs_compiler
def test_a_wish_that_no_compiler_can_meet_never_fails_the_install(
    source: Path, tmp_path: Path, build_env: dict[str, str], variable: str, value: str, reason: str
) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(source / "csrc")!r})
        import build
        from pathlib import Path
        report = build.build(Path({str(tmp_path / "out")!r}))
        kind = "cuda" if {variable!r} == "FFA_CUDA_ARCHS" else "cpu"
        assert not report[kind]["built"] and {reason!r} in report[kind]["reason"], report
    """
    wishes = {"NVCC": ""} | ({"NVCC": "echo compute_75", "CXX": ""} if "CUDA" in variable else {})
    _python(code, cwd=tmp_path, **build_env | wishes | {variable: value})


def test_one_openmp_runtime_in_the_process() -> None:
    _needs_library()
    runtimes = _python(
        """
        import re
        import torch
        from ffa_kernels.backends import cpu, native
        torch.set_num_threads(2)
        cpu.gaussian(torch.arange(5), 0, 1 << 18, torch.float32)
        assert native.describe()["cpu"]["openmp"]
        files = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
        named = re.compile(r"/lib(gomp|omp|iomp)[^/]*$")
        print("\\n".join(sorted(path for path in files if named.search(path))))
        """
    ).split()
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize("op", ["gaussian", "linear"])
def test_forked_child_of_a_threaded_parent_returns(op: str) -> None:
    _needs_library()
    _python(
        f"""
        import os, signal
        import torch
        from ffa_kernels.backends import cpu
        torch.set_num_threads(2)
        state, x, weight = torch.arange(5), torch.randn(512, 256), torch.randn(256, 256)
        lora_A, lora_B = torch.randn(8, 256), torch.randn(256, 8)
        def run():
            if {op!r} == "gaussian":
                return cpu.gaussian(state, 0, 1 << 20, torch.float32)
            return cpu.linear(
                x, weight, None, lora_A, lora_B, None, None, state, None, 1.0, 0.1, True
            )[0]
        expected = run()
        child = os.fork()
        if child == 0:
            signal.alarm(5)  # ends the child, with a status that says so
            os._exit(0 if torch.allclose(run(), expected, atol=1e-3) else 1)
        assert os.waitpid(child, 0)[1] == 0
        """
    )


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_a_bf16_product_without_instructions_for_it_is_refused(isa: str) -> None:
    _needs_library()
    _python(
        """
        import pytest, torch
        from ffa_kernels.backends import cpu, native
        from ffa_kernels.errors import NativeError
        assert not native.has_bf16_product()
        native.has_bf16_product = lambda: True
        with pytest.raises(NativeError, match="bf16_product"):
            cpu.product(torch.ones(1, 2), torch.ones(3, 2, dtype=torch.bfloat16), None)
        """,
        FFA_CPU_ISA=isa,
    )


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_copy_makes_the_same_words(isa: str) -> None:
    _needs_library()
    used = _python(
        """
        import torch
        from ffa_kernels.backends import cpu, native, reference
        state = torch.tensor([1, -2, 1 << 62, 4, 1 << 33])
        for blocks in (0, 1, 17, 100):
            words = cpu.chacha20(state, 7, 5, blocks)
            assert torch.equal(words, reference.chacha20(state, 7, 5, blocks))
        made = cpu.gaussian(state, 3, 1001, torch.float64)
        torch.testing.assert_close(
            made, reference.gaussian(state, 3, 1001, torch.float64), rtol=1e-13, atol=1e-14
        )
        used = native.describe()["cpu"]["isa"]
        assert native.has_bf16_product() == (used in ("avx512bf16", "amx"))
        print(used)
        """,
        FFA_CPU_ISA=isa,
    )
    if used.strip() != isa:
        pytest.skip(f"this machine runs {used.strip()}")
