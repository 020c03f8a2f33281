"""What only a GPU can show: no wait for the device, CUDA graphs, private training on it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels import ops
from ffa_kernels.errors import PrivacyError
from ffa_kernels.privacy import PrivacyEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

N, TOKENS, WIDTH, R = 8, 16, 64, 4


def step_arguments(n=N):
    torch.manual_seed(0)
    shapes = [(WIDTH, R), (3 * WIDTH, R), (77, 3)]
    params = [torch.randn(s, device="cuda") for s in shapes]
    state = torch.tensor([1, 2, 3, 4, 0], device="cuda")
    hyper = torch.tensor([[1e-2, 0.0, 0.9, 0.999, 1e-8]] * 3, dtype=torch.float64, device="cuda")
    return {
        "grad_samples": [torch.randn(n, *s, device="cuda") for s in shapes],
        "stats": torch.zeros(2, dtype=torch.int64, device="cuda"),
        "keep": None,
        "params": params,
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "steps": [torch.zeros((), device="cuda") for _ in params],
        "rng_state": state,
        "hyper": hyper,
    }


SETTINGS = {
    "tensor_ids": [0, 1, 2],
    "max_grad_norm": [1.0],
    "noise_multiplier": 1.0,
    "expected_batch_size": 8.0,
    "optimizer": "adam",
}


def test_a_private_step_never_waits_for_the_device():
    arguments = step_arguments()
    ops.private_step(**arguments, **SETTINGS)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.private_step(**arguments, **SETTINGS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_of_the_step_draws_fresh_noise_and_equals_eager_steps():
    captured, eager = step_arguments(), step_arguments()
    ops.private_step(**copy.deepcopy(captured), **SETTINGS)  # a warm-up that changes nothing
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.private_step(**captured, **SETTINGS)
    for _ in range(100):
        graph.replay()
        ops.private_step(**eager, **SETTINGS)
    torch.cuda.synchronize()
    assert captured["rng_state"][4] == eager["rng_state"][4] == 100
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        for mine, theirs in zip(captured[name], eager[name], strict=True):
            assert torch.equal(mine, theirs)


def test_forward_and_backward_in_a_graph_equal_eager():
    torch.manual_seed(0)
    like = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(N, TOKENS, WIDTH, **like).requires_grad_()
    W, A = torch.randn(3 * WIDTH, WIDTH, **like), torch.randn(R, WIDTH, **like)
    B = torch.randn(3 * WIDTH, R, **like)
    tap = torch.zeros((), **like).expand(N, 3 * WIDTH, R).detach().requires_grad_()

    def run():
        y = ops.linear(x, W, None, A, B, tap=tap, scaling=2.0)
        return torch.autograd.grad(y.square().sum(), (x, tap))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    torch.cuda.synchronize()
    for mine, theirs in zip(results, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_a_model_trains_privately_and_a_captured_step_is_refused(dtype):
    torch.manual_seed(0)
    model = ffa.convert(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)),
        r=R,
        target_modules=["0"],
        modules_to_save=["2"],
    ).to("cuda", dtype)
    data = TensorDataset(torch.randn(64, TOKENS, WIDTH), torch.randint(3, (64,)))
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    model, optimizer, loader = PrivacyEngine(seed=0).make_private(
        module=model,
        optimizer=torch.optim.Adam([p for p in model.parameters() if p.requires_grad]),
        data_loader=DataLoader(data, batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        logits = model(x.to("cuda", dtype)).mean(1)
        nn.functional.cross_entropy(logits, y.to("cuda")).backward()
        optimizer.step()
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(a.isfinite().all() for a in after)
    x, y = next(iter(loader))
    nn.functional.cross_entropy(model(x.to("cuda", dtype)).mean(1), y.to("cuda")).backward()
    torch.cuda.synchronize()
    refused = pytest.raises(PrivacyError, match="captured in a CUDA graph")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
