"""Records of many lengths packed into rows: each is still its own sample, clipped by itself."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import ffa_kernels as ffa
from ffa_kernels import ops
from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.privacy import PrivacyEngine

pytestmark = pytest.mark.usefixtures("one_thread")

MULTIPLIES = True
WIDTH, LENGTHS = 6, (3, 1, 4, 0, 2)


def model_of(seed=0):
    torch.manual_seed(seed)
    model = ffa.convert(
        nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 2)),
        r=2,
        target_modules=["0", "2"],
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def records():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(length, WIDTH, generator=generator) for length in LENGTHS]


def collate(batch):
    lengths = torch.tensor([0, *(len(x) for x in batch)], dtype=torch.int32)
    return torch.cat(batch), lengths.cumsum(0, dtype=torch.int32)


def private(model, C, lr=1.0):
    loader = DataLoader(records(), batch_size=len(LENGTHS), collate_fn=collate, shuffle=False)
    return PrivacyEngine(seed=1).make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=C,
        poisson_sampling=False,
        loss_reduction="sum",
    )


def record_loss(y):
    return (y.square() + y).sum()


@pytest.mark.parametrize("C", [0.3, 100.0])
@pytest.mark.filterwarnings("ignore")
def test_each_packed_record_is_clipped_alone(C):
    model = model_of()
    plain = copy.deepcopy(model)
    model, optimizer, loader = private(model, C)
    for rows, cu_seqlens in loader:
        with ffa.packed(model, cu_seqlens):
            loss = record_loss(model(rows))
        loss.backward()
        optimizer.step()

    trained = [p for p in plain.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in trained]
    for x in records():
        grads = torch.autograd.grad(record_loss(plain(x)), trained)
        norm = torch.stack([g.norm() for g in grads]).norm().item()
        for sum_, g in zip(total, grads, strict=True):
            sum_ += g * min(1.0, C / norm if norm else 1.0)
    for before, after, sum_ in zip(
        trained, [p for p in model.parameters() if p.requires_grad], total, strict=True
    ):
        torch.testing.assert_close(after, before - sum_ / len(LENGTHS), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_packed_rows_without_their_bounds_are_refused():
    model, _, loader = private(model_of(), 1.0)
    rows, _ = next(iter(loader))
    with pytest.raises(PrivacyError, match="first dimension must be the record"):
        model(rows)


@pytest.mark.filterwarnings("ignore")
def test_bounds_of_another_number_of_records_are_refused():
    model, _, loader = private(model_of(), 1.0)
    rows, cu_seqlens = next(iter(loader))
    wrong = pytest.raises(PrivacyError, match="cu_seqlens has 5 numbers; accepted: 6")
    with wrong, ffa.packed(model, cu_seqlens[:-1]):
        model(rows)


@pytest.mark.filterwarnings("ignore")
def test_a_trained_layer_that_knows_no_packed_rows_is_refused():
    model = ffa.convert(
        nn.Sequential(nn.Linear(WIDTH, 7), nn.Linear(7, 2)),
        r=2,
        target_modules=["0"],
        modules_to_save=["1"],
    )
    model, _, loader = private(model, 1.0)
    _, cu_seqlens = next(iter(loader))
    with (
        pytest.raises(PrivacyError, match=r"'1' .* takes no packed rows"),
        ffa.packed(model, cu_seqlens),
    ):
        pass


@pytest.mark.parametrize(
    "offsets, message",
    [
        (torch.tensor([0, 2, 1], dtype=torch.int32), "do not fall, from 0 to 4"),
        (torch.tensor([0, 5], dtype=torch.int32), "do not fall, from 0 to 4"),
        (torch.tensor([-1, 4], dtype=torch.int32), "do not fall, from 0 to 4"),
        (torch.tensor([0, 4]), "torch.int64 .*accepted: int32"),
        (torch.tensor([[0, 4]], dtype=torch.int32), r"\(1, 2\) .*accepted: int32"),
        (torch.tensor([], dtype=torch.int32), r"\(0,\) .*accepted: int32"),
    ],
)
def test_bad_bounds_are_refused(offsets, message):
    with pytest.raises(ConfigError, match=f"cu_seqlens is .*{message}"):
        ops.per_sample_grad(torch.zeros(4, 3), torch.zeros(4, 2), None, offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_segments_equal_each_record_alone(backend, dtype, threads):
    # The GPU backends multiply no fp64 matrices: 16-bit ones in their place.
    if backend in ("triton", "cuda") and dtype == torch.float64:
        dtype = torch.float16
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # Rows 0 and 12 to 13 belong to no record, record 2 has none.
    g, h = torch.randn(14, 77, dtype=dtype), torch.randn(14, 3, dtype=dtype)
    B = torch.randn(77, 3, dtype=dtype)
    offsets = torch.tensor([1, 4, 6, 6, 12], dtype=torch.int32)
    u, G, squares = ops.per_sample_grad(g, h, B, offsets, scaling=0.5, mean_loss=True)
    torch.testing.assert_close(u, g @ B)
    assert G.shape == (4, 77, 3) and squares.dtype == torch.float64 and (squares[1] == 1).all()
    for i in range(4):
        rows = slice(offsets[i], offsets[i + 1])
        torch.testing.assert_close(G[i], 4 * 0.5 * g[rows].t() @ h[rows])
    torch.testing.assert_close(squares[0], G.double().square().sum((1, 2)))
    assert squares[0, 2] == 0


def test_opcheck_with_segments(backend):
    g, h, B = torch.randn(5, 4), torch.randn(5, 2), torch.randn(4, 2)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    torch.library.opcheck(torch.ops.ffa.per_sample_grad.default, (g, h, B, offsets, 0.5, False))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_is_run_again_outside_the_block_is_refused(reentrant):
    """Its rows would be taken for records: here their number is the same."""
    model = model_of()
    options = {"use_reentrant": reentrant}
    model, optimizer, loader = private(model, 1.0)
    n = len(LENGTHS)
    for _, cu_seqlens in loader:
        rows = torch.randn(n, 3, WIDTH, requires_grad=True)
        cu_seqlens = torch.tensor([0, 1, 5, 6, 9, 15], dtype=torch.int32)
        with ffa.packed(model, cu_seqlens):
            inside = record_loss(checkpoint(model, rows, **options))
        with pytest.raises(PrivacyError, match="outside the `packed` block"):
            inside.backward()
        optimizer.zero_grad()
        break
    for _, _ in loader:
        with ffa.packed(model, cu_seqlens):
            record_loss(checkpoint(model, rows, **options)).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_a_block_around_the_batchs_beginning_counts_too():
    model, _optimizer, loader = private(model_of(), 1.0)
    batches = iter(loader)
    lengths = torch.tensor([0, 1, 5, 6, 9, 15], dtype=torch.int32)
    rows = torch.randn(len(LENGTHS), 3, WIDTH, requires_grad=True)
    with ffa.packed(model, lengths):
        next(batches)
        loss = record_loss(checkpoint(model, rows, use_reentrant=True))
    with pytest.raises(PrivacyError, match="outside the `packed` block"):
        loss.backward()
