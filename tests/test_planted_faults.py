"""Each promise is taken away once, and what watches over it must notice.

A fault is planted in the library; its detector, which passes without it, must then fail.
"""

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels import ops
from ffa_kernels.backends.grid import grid_size, zero_sums
from ffa_kernels.errors import PrivacyError
from ffa_kernels.privacy import Ledger, PrivacyEngine, audit, sampling
from ffa_kernels.privacy import engine as engine_module

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:PrivacyEngine"),
]

WIDTH = 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = ffa.FFALinear(WIDTH, WIDTH, r=2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.body(x))


def sums_of(data, **options):
    """(model, what each logical step moved the trained tensors by, times -L / lr): the sums."""
    torch.manual_seed(0)
    model = Net()
    nn.init.normal_(model.body.lora_B)
    trained = [p for p in model.parameters() if p.requires_grad]
    batch_size = min(4, len(data))
    engine = PrivacyEngine(accountant="rdp", seed=1)
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, **options}
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=float(batch_size)),
        data_loader=DataLoader(TensorDataset(data), batch_size=batch_size),
        **settings,
    )
    sums = []
    before = [p.detach().clone() for p in trained]
    for (x,) in loader:
        (100 * model(x).square()).mean().backward()
        optimizer.step()
        after = [p.detach().clone() for p in trained]
        sums.append([b - a for a, b in zip(after, before, strict=True)])
        before = after
    return model, engine, sums


# Detectors.


def audit_of_one_step():
    assert not audit(target_epsilon=1.0, canaries=32768).violated


def audit_of_clipping_by_layer():
    assert not audit(target_epsilon=1.0, canaries=4096, clipping="per_layer").violated


def audit_of_two_steps():
    assert not audit(noise_multiplier=3.0, steps=2, canaries=32768).violated


def one_record_moves_the_sum_by_its_bound():
    """All tensors together, in a batch of one record whose gradient is far above C."""
    for options in ({}, {"max_physical_batch_size": 1}):
        _, _, sums = sums_of(torch.randn(1, 2, WIDTH), poisson_sampling=False, **options)
        norm = math.sqrt(sum(float(t.double().square().sum()) for t in sums[0]))
        assert 0.99 < norm <= 1 + 1e-6


def a_record_counts_the_same_in_draws_of_any_size():
    """Records are alike, so that a step's sum is as many times one record's as were drawn."""
    draws = []
    original = sampling.PoissonSampler.__iter__

    def noted(self):
        for indices in original(self):
            draws.append(len(indices))
            yield indices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling.PoissonSampler, "__iter__", noted)
        _, _, sums = sums_of(torch.ones(24, 2, WIDTH))
    sizes = [math.sqrt(sum(float(t.double().square().sum()) for t in step)) for step in sums]
    assert len(set(draws)) > 2
    for drawn, size in zip(draws, sizes, strict=True):
        # Each is clipped to C; they point one way, since they are alike.
        assert size == pytest.approx(drawn, rel=1e-3)


def no_tensor_is_trained_around_the_mechanism():
    """Under noise far above C, whatever is trained privately is thrown far from where it was."""
    model, engine, sums = sums_of(torch.randn(24, 2, WIDTH), noise_multiplier=1e3)
    assert all(float(t.std()) > 100 for t in sums[0])
    engine.check()
    assert len(sums[0]) == sum(p.requires_grad for p in model.parameters())


# Faults.


def change_releases(patch, change):
    """`change(noise_multiplier, args)` before each op that releases."""
    for name in ("private_update", "private_step"):
        real = getattr(ops, name)

        def faulty(*args, real=real, **settings):
            change(args, settings)
            return real(*args, **settings)

        patch.setattr(ops, name, faulty)


def no_noise(patch):
    change_releases(patch, lambda _, settings: settings.update(noise_multiplier=0.0))


def half_noise(patch):
    def half(_, settings):
        settings["noise_multiplier"] *= 0.5

    change_releases(patch, half)


def apart(patch):
    """Draws of one physical batch go the way of all others, where the faults below lie."""

    def in_two(grads, stats, keep, params, *rest, squares, **settings):
        bounds = settings["max_grad_norm"]
        sums = zero_sums(params, bounds)
        factors = ops.clip_accumulate(grads, sums, stats, keep, bounds, squares=squares)
        ops.private_update(params, sums, *rest, **settings)
        return factors

    patch.setattr(ops, "private_step", in_two)


def a_layer_without_clipping(patch):
    apart(patch)
    real, unclipped = ops.clip_accumulate, []

    def faulty(grads, sums, stats, keep, bounds, squares=()):
        unclipped.extend(sums[:1] if not unclipped else [])
        for k, (grad, total) in enumerate(zip(grads, sums, strict=True)):
            if total is unclipped[0]:
                kept = grad if keep is None else grad[keep]
                total += (kept.double().sum(dim=0) / grid_size(bounds[0])).round().long()
            else:
                own = list(squares[k : k + 1])
                real([grad], [total], stats, keep, bounds, squares=own)

    patch.setattr(ops, "clip_accumulate", faulty)


def norms_by_layer(patch):
    apart(patch)
    real = ops.clip_accumulate

    def faulty(grads, sums, stats, keep, bounds, squares=()):
        for k, (grad, total) in enumerate(zip(grads, sums, strict=True)):
            real([grad], [total], stats, keep, bounds, squares=list(squares[k : k + 1]))

    patch.setattr(ops, "clip_accumulate", faulty)


def the_same_noise_twice(patch):
    def rewind(args, _):
        state = next(a for a in args if isinstance(a, torch.Tensor) and a.shape == (5,))
        state[4] = 7

    change_releases(patch, rewind)


def the_actual_batch_size(patch):
    drawn = []
    real = sampling.PoissonSampler.__iter__

    def noted(self):
        for indices in real(self):
            drawn.append(max(len(indices), 1))
            yield indices

    patch.setattr(sampling.PoissonSampler, "__iter__", noted)
    change_releases(
        patch, lambda _, settings: settings.update(expected_batch_size=float(drawn[-1]))
    )


def two_steps_charged_as_one(patch):
    real, calls = Ledger.charge, []

    def faulty(self, *args, **settings):
        calls.append(args)
        if len(calls) % 2:
            real(self, *args, **settings)

    patch.setattr(Ledger, "charge", faulty)


def a_head_left_out(patch):
    """The engine forgets the head: plain gradients reach it, and the optimizer takes them."""
    real = engine_module.attach_taps

    def faulty(module, trained, *settings):
        return real(module, {n: p for n, p in trained.items() if "head" not in n}, *settings)

    patch.setattr(engine_module, "attach_taps", faulty)


FAULTS = [
    (no_noise, audit_of_one_step),
    (half_noise, audit_of_one_step),
    (a_layer_without_clipping, audit_of_one_step),
    (a_layer_without_clipping, audit_of_clipping_by_layer),
    (a_layer_without_clipping, one_record_moves_the_sum_by_its_bound),
    (norms_by_layer, one_record_moves_the_sum_by_its_bound),
    (the_same_noise_twice, audit_of_two_steps),
    (the_actual_batch_size, a_record_counts_the_same_in_draws_of_any_size),
    (two_steps_charged_as_one, audit_of_two_steps),
    (a_head_left_out, no_tensor_is_trained_around_the_mechanism),
]


@pytest.mark.parametrize("detector", dict.fromkeys(d for _, d in FAULTS), ids=lambda d: d.__name__)
def test_detectors_pass_where_nothing_is_wrong(detector):
    detector()


@pytest.mark.parametrize(("fault", "detector"), FAULTS, ids=lambda f: f.__name__)
def test_each_fault_is_noticed(fault, detector, monkeypatch):
    fault(monkeypatch)
    with pytest.raises((AssertionError, PrivacyError)), contextlib.suppress(RuntimeWarning):
        detector()
