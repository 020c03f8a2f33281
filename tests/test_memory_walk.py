"""The walk of a private step: its parts counted by hand, and its bytes those of a real step."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import ffa_kernels as ffa
from ffa_kernels.backends.dispatch import use_backend
from ffa_kernels.memory.walk import PARTS, _Storages, rounded, walk
from ffa_kernels.privacy.probe import Probe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def without_a_probe(monkeypatch):
    """What it takes beside the first batches, with two records at a time, no walk counts."""
    monkeypatch.setattr(Probe, "done", True)


IN, WIDE, OUT, R = 32, 96, 64, 16
# Scalars, factors and norms, each in a block of 64 bytes, beside the tensors that are counted.
SMALL = 8 * 1024


class Tiny(nn.Module):
    """Two adapted layers with ReLU between, the first in a checkpoint where that is asked for."""

    def __init__(self, head=False):
        super().__init__()
        self.first, self.second = nn.Linear(IN, WIDE), nn.Linear(WIDE, OUT)
        self.head = nn.Linear(OUT, 3) if head else nn.Identity()
        self.checkpointing = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
        self.checkpointing = True

    def _body(self, x):
        return self.first(x).relu()

    def forward(self, x):
        z = checkpoint(self._body, x, use_reentrant=False) if self.checkpointing else self._body(x)
        return self.head(self.second(z))


def model_of(head=False, r=R, base_dtype=None):
    return ffa.convert(
        Tiny(head), r=r, target_modules=["first", "second"], init="kaiming",
        modules_to_save=["head"] if head else [], base_dtype=base_dtype,
    )  # fmt: skip


def loss_of(model, batch):
    return model(batch["x"]).sum(dim=(1, 2)).mean()


def example(tokens):
    return {"x": torch.empty(1, tokens, IN)}


def fp32(*shape):
    return 4 * torch.Size(shape).numel()


TRAINED = (WIDE + OUT) * R


@pytest.mark.usefixtures("compiled")
def test_parts_by_hand_where_gradients_are_most():
    n = 16
    walked = walk(model_of(), example(1), n, loss_of)
    parts = walked.parts
    weights = fp32(WIDE, IN) + fp32(WIDE) + fp32(OUT, WIDE) + fp32(OUT)
    assert parts["weights"] == weights + fp32(R, IN) + fp32(R, WIDE) + 4 * TRAINED
    assert parts["optimizer"] == 2 * 4 * TRAINED
    assert parts["kept sums"] == 8 * TRAINED
    assert parts["inputs"] == fp32(n, 1, IN)
    # At the step all of the batch's are there, and no sums of them.
    assert parts["per-sample gradients"] == 4 * n * TRAINED
    assert parts["transients"] <= SMALL
    assert parts["activations"] <= SMALL and parts["logits"] == 0
    assert walked.peak == sum(parts.values()) and tuple(parts) == PARTS


@pytest.mark.usefixtures("compiled")
def test_parts_by_hand_where_activations_are_most():
    n, tokens, r = 4, 256, 4
    walked = walk(model_of(r=r), example(tokens), n, loss_of)
    # Forward keeps h of both layers and what ReLU made; and never the input of a layer.
    kept = fp32(n, tokens, r), fp32(n, tokens, WIDE), fp32(n, tokens, r)
    # The peak is in ReLU's backward: dL/dz and dL/dy beside what is kept; the second layer's h
    # is gone by then, and its G is there.
    assert 0 <= walked.parts["activations"] - (kept[0] + kept[1]) <= SMALL
    assert walked.parts["per-sample gradients"] == fp32(n, OUT, r)
    made = 2 * fp32(n, tokens, WIDE)
    assert made <= walked.parts["transients"] <= made + SMALL


def test_per_layer_holds_one_gradient_at_a_time():
    n = 16
    flat, layered = (walk(model_of(), example(1), n, loss_of, per_layer=p) for p in (False, True))
    assert flat.parts["per-sample gradients"] == 4 * n * TRAINED
    assert layered.parts["per-sample gradients"] == fp32(n, WIDE, R)
    assert layered.peak < flat.peak


@pytest.mark.parametrize(
    ("optimizer", "moments"), [("sgd", 0), ("momentum", 1), ("adam", 2), ("adamw", 2)]
)
def test_moments(optimizer, moments):
    walked = walk(model_of(), example(1), 2, loss_of, optimizer=optimizer)
    assert walked.parts["optimizer"] == moments * 4 * TRAINED


def test_more_records_take_more_and_in_proportion():
    peaks = [walk(model_of(), example(64), n, loss_of).peak for n in (8, 16, 24, 32)]
    steps = [b - a for a, b in itertools.pairwise(peaks)]
    assert steps[0] > 0
    # Sizes round to blocks, a few of which belong to each tensor.
    assert max(steps) - min(steps) <= SMALL
    assert walk(model_of(), example(128), 8, loss_of).peak > peaks[0]


def test_a_narrow_base_takes_half():
    wide, narrow = (
        walk(model_of(), {"x": torch.empty(1, 8, IN, dtype=of)}, 2, loss_of, dtype=of)
        for of in (torch.float32, torch.bfloat16)
    )
    frozen = wide.parts["weights"] - 4 * TRAINED
    assert narrow.parts["weights"] == 4 * TRAINED + frozen // 2


def test_a_graphics_card_rounds_to_its_own_blocks():
    assert [rounded(b, "cpu") for b in (0, 1, 64, 65)] == [0, 64, 64, 128]
    assert [rounded(b, "cuda") for b in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    cpu, cuda = (walk(model_of(), example(64), 8, loss_of, device=d) for d in ("cpu", "cuda"))
    assert cuda.parts["per-sample gradients"] % 512 == 0
    assert cuda.parts["kept sums"] == cpu.parts["kept sums"]


def test_nothing_of_the_model_is_changed():
    model = model_of(head=True)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    model.eval()
    walk(model, example(4), 2, loss_of, checkpointing=True)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert type(model.head) is nn.Linear and not model.training and not model.checkpointing
    assert all(getattr(layer, "record_taps", None) is None for layer in model.modules())


def real_peak(model, n, tokens, clipping):
    """The largest sum of living storages in the second step of a real training."""
    records = [{"x": torch.randn(tokens, IN)} for _ in range(2 * n)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer, loader = ffa.PrivacyEngine().make_private(
        module=model.train(), optimizer=optimizer, data_loader=DataLoader(records, batch_size=n),
        noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=False, clipping=clipping,
    )  # fmt: skip
    counted = _Storages("cpu")
    for k, batch in enumerate(loader):
        if k == 1:
            step = optimizer.private_step
            moments = [
                s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
            ]
            for t in (*model.parameters(), *model.buffers(), *step._sums, *moments, batch["x"]):
                counted.add(t)
            with counted:
                loss = loss_of(model, batch)
                counted.in_backward = True
                loss.backward()
                counted.in_backward = False
                del loss
                optimizer.step()
            counted.look()
            break
        loss_of(model, batch).backward()
        optimizer.step()
    return counted.peak


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("n", "tokens", "head", "checkpointing"),
    [(16, 1, False, False), (4, 256, False, False), (4, 256, True, True), (64, 2, True, False)],
)
def test_a_walk_counts_what_a_real_step_does(
    n, tokens, head, checkpointing, kernels, clipping, request
):
    if kernels == "cpu":
        request.getfixturevalue("compiled")
    with use_backend(kernels):
        model = model_of(head)
        walked = walk(model, example(tokens), n, loss_of, per_layer=clipping == "per_layer",
                      checkpointing=checkpointing)  # fmt: skip
        model.checkpointing = checkpointing
        real = real_peak(model, n, tokens, clipping)
    assert abs(walked.peak - real) <= SMALL, (walked, real)
    assert real > 20 * SMALL


@pytest.mark.parametrize("tokens", [1, 256])
@pytest.mark.parametrize("base_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_so_it_does_beside_a_smaller_base(kernels, base_dtype, tokens, request):
    if kernels == "cpu":
        request.getfixturevalue("compiled")
    with use_backend(kernels):
        model = model_of(base_dtype=base_dtype)
        walked = walk(model, example(tokens), 16, loss_of)
        real = real_peak(model, 16, tokens, "flat")
    assert abs(walked.peak - real) <= SMALL, (walked, real)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("device, floats_of_W", [("cpu", 0), ("cuda", fp32(512, 512))])
def test_a_smaller_base_is_counted_in_floats_where_it_is_multiplied_so(device, floats_of_W):
    layers = [nn.Linear(512, 512, bias=False) for _ in range(2)]
    model = ffa.convert(nn.Sequential(*layers), 4, target_modules=["0", "1"], base_dtype="int8")
    walked = walk(model, {"input": torch.empty(1, 4, 512)}, 2,
                  lambda model, batch: model(batch["input"]).sum(dim=(1, 2)).mean(),
                  device=device)  # fmt: skip
    assert floats_of_W <= walked.parts["transients"] <= floats_of_W + 8 * SMALL
