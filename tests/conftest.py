"""What every test runs under: no network, few threads, poisoned memory, one backend or each."""

import os

import hypothesis
import pytest
import torch

# Read by Triton when it is imported: without a GPU its kernels run as NumPy on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ffa_kernels.backends import compose, native
from ffa_kernels.backends.dispatch import use_backend

# transformers reads these when it is imported, which only tests do.
for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[variable] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))

# Derandomised: a red run must be red again for whoever looks into it.
hypothesis.settings.register_profile(
    "ffa",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    # The fixtures used with @given (the backend) do not change between examples.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("ffa")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty comes filled with NaN (integers: the largest), so that a hole is seen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def own_ledgers(tmp_path, monkeypatch):
    """No test meets another's ledgers, or the user's."""
    monkeypatch.setenv("FFA_LEDGERS", str(tmp_path.with_name(f"{tmp_path.name}-ledgers")))


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(THREADS)


@pytest.fixture
def one_thread(few_threads):
    """For tests of small models, which threads only slow; `few_threads` undoes it for the next."""
    torch.set_num_threads(1)


@pytest.fixture
def on_the_gpu(request, monkeypatch):
    """Makes a test's tensors on the GPU, and moves its module's constants there."""
    for name, value in vars(request.module).items():
        if isinstance(value, torch.Tensor):
            monkeypatch.setattr(request.module, name, value.cuda())
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


# "cuda" needs a device, or a library that runs its kernels on the CPU (tests/test_cuda.py).
BACKENDS = ["reference", "cpu", "triton", *(["cuda"] if native.available("cuda") else [])]
# "cpu" with fp32 products of its own, which it prefers on some processors and has on all.
OWN_PRODUCT = "cpu, own product"


def pytest_generate_tests(metafunc):
    """In a module that says MULTIPLIES, a backend with two ways to multiply comes in both."""
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "backend" in metafunc.fixturenames and "backend" not in given:
        own = [OWN_PRODUCT] if getattr(metafunc.module, "MULTIPLIES", False) else []
        metafunc.parametrize("backend", [*BACKENDS, *own], indirect=True)


def take_own_product(monkeypatch, own=True):
    """The CPU library's product for all fp32, or for none, whatever this processor prefers."""
    monkeypatch.setattr(compose, "FUSES_FP32", own)
    monkeypatch.setattr(compose, "BY_TILES", False)


@pytest.fixture
def backend(request, monkeypatch):
    """The name of a backend, forced for the whole test."""
    name = "cpu" if request.param == OWN_PRODUCT else request.param
    if name == "cpu":
        request.getfixturevalue("compiled")
        if getattr(request.module, "MULTIPLIES", False):
            take_own_product(monkeypatch, request.param == OWN_PRODUCT)
    if name == "triton":
        pytest.importorskip("triton")
    if name in ("triton", "cuda") and torch.cuda.is_available():
        request.getfixturevalue("on_the_gpu")
    with use_backend(name):
        yield name


@pytest.fixture(params=[False, True], ids=["PyTorch's product", "own product"])
def own_product(request, compiled, monkeypatch):
    """Whether the CPU library multiplies itself, as it prefers on some processors."""
    take_own_product(monkeypatch, request.param)
    return request.param


@pytest.fixture
def compiled():
    """Skips where the compiled CPU library is missing."""
    if not native.available("cpu"):
        pytest.skip(f"cpu backend: {native.describe()['cpu']['reason']}")
