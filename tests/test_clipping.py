"""What a record can change at most: clipping, the sum, and every way around them."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.errors import PrivacyError
from ffa_kernels.privacy import PrivacyEngine

N, TOKENS, WIDTH, CLASSES = 16, 5, 8, 3


pytestmark = pytest.mark.usefixtures("one_thread")


class Classifier(nn.Module):
    """Two adapted layers over tokens, mean pooling, a trained head with bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh().mean(dim=1))


def classifier(dtype=torch.float32):
    torch.manual_seed(0)
    model = ffa.convert(
        Classifier(), r=2, target_modules=["first", "second"], modules_to_save=["head"]
    ).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def dataset(n=N, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, TOKENS, WIDTH, generator=generator, dtype=dtype)
    return TensorDataset(x, torch.randint(CLASSES, (n,), generator=generator))


class Reveal(torch.optim.Optimizer):
    """Keeps what is released: the noised gradient of each tensor."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.released = []

    def step(self, closure=None):
        held = [p for group in self.param_groups for p in group["params"]]
        self.released.append([None if p.grad is None else p.grad.double() for p in held])


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def private(model, data, optimizer=None, engine=None, batch_size=None, **options):
    options = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "poisson_sampling": False,
        **options,
    }
    return (engine or PrivacyEngine()).make_private(
        module=model,
        optimizer=optimizer or torch.optim.SGD(trained(model), lr=1.0),
        data_loader=DataLoader(data, batch_size=batch_size or len(data)),
        **options,
    )


def loss_of(model, batch, reduction="mean"):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


def steps(model, optimizer, loader, reduction="mean"):
    for batch in loader:
        optimizer.zero_grad()
        loss_of(model, batch, reduction).backward()
        optimizer.step()


def joint_norm(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


# A peer whose head goes unclipped passes for private; and one whose norms are 1/n of the truth.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_escapes_a_tiny_bound(reduction):
    C = 1e-9
    model = classifier()
    reveal = Reveal(trained(model))
    _, optimizer, loader = private(
        model, dataset(), reveal, max_grad_norm=C, loss_reduction=reduction
    )
    steps(model, optimizer, loader, reduction)
    (released,) = reveal.released
    total = [g * N for g in released]
    assert joint_norm(total) <= N * C * (1 + 1e-6)
    assert len(total) == 4
    assert all(g.norm() > 0 for g in total)
    # Every record has a norm far above C, so a factor 1/n too many would show here.
    assert joint_norm(total) > 0.1 * N * C

    model = classifier()
    before = [p.detach().clone() for p in model.parameters()]
    _, optimizer, loader = private(model, dataset(), max_grad_norm=C, loss_reduction=reduction)
    steps(model, optimizer, loader, reduction)
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert (parameter.detach().double() - old.double()).abs().max() <= 1e-8


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_bound_everything_moves_as_sgd_moves_it(reduction, dtype):
    model = classifier(dtype)
    plain = copy.deepcopy(model)
    start = [p.detach().clone() for p in trained(model)]
    data = dataset(dtype=dtype)
    _, optimizer, loader = private(model, data, max_grad_norm=math.inf, loss_reduction=reduction)
    steps(model, optimizer, loader, reduction)
    # The release is divided by L whatever the reduction: a sum is L times PyTorch's step.
    sgd = torch.optim.SGD(trained(plain), lr=1.0 if reduction == "mean" else 1.0 / N)
    loss_of(plain, data.tensors, reduction).backward()
    sgd.step()
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    for old, ours, theirs in zip(start, trained(model), trained(plain), strict=True):
        assert (theirs - old).norm() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_record_changes_the_sum_by_at_most_C(dtype):
    C = 0.05
    sums = []
    for left_out in (None, 3, 7):
        data = dataset(dtype=dtype)
        keep = [i for i in range(N) if i != left_out]
        model = classifier(dtype)
        reveal = Reveal(trained(model))
        _, optimizer, loader = private(
            model, TensorDataset(*(t[keep] for t in data.tensors)), reveal, max_grad_norm=C
        )
        steps(model, optimizer, loader)
        sums.append([g * len(keep) for g in reveal.released[0]])
    for without in sums[1:]:
        moved = joint_norm([a - b for a, b in zip(sums[0], without, strict=True)])
        assert C * 0.99 < moved <= C * (1 + 1e-5)


# Layers that run more than once, and what is not a record.


class Twice(nn.Module):
    def __init__(self, adapted):
        super().__init__()
        layer = nn.Linear(WIDTH, CLASSES, bias=False)
        self.layer = ffa.FFALinear.from_linear(layer, r=2) if adapted else layer

    def forward(self, x):
        return self.layer(x) + self.layer(x)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_layer_called_twice_is_clipped_by_the_norm_of_the_summed_gradient(adapted, clipping):
    C = 1e-3
    torch.manual_seed(0)
    model = Twice(adapted)
    reveal = Reveal(trained(model))
    x = dataset(1).tensors[0][:, 0]
    _, optimizer, loader = private(
        model, TensorDataset(x), reveal, max_grad_norm=C, clipping=clipping
    )
    for (batch,) in loader:
        # Both calls give the same gradient: norms added in squares would leave sqrt(2) C.
        model(batch).sum().backward()
        optimizer.step()
    assert joint_norm(reveal.released[0]) == pytest.approx(C, rel=1e-6)


def test_a_gradient_changed_after_backward_is_clipped_by_its_own_norm():
    # Backward's kernels know the norm of the gradient that they made, not of what came of it.
    C = 1e-3
    model = classifier()
    reveal = Reveal(trained(model))
    model, optimizer, loader = private(model, dataset(1), reveal, max_grad_norm=C)
    for batch in loader:
        loss_of(model, batch).backward()
        for p in trained(model):
            p.grad_sample.mul_(100.0)
        optimizer.step()
    assert joint_norm(reveal.released[0]) == pytest.approx(C, rel=1e-6)


@pytest.mark.parametrize("adapted", [True, False])
def test_a_model_that_flattens_its_tokens_is_refused(adapted):
    class Flattens(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.Linear(WIDTH, CLASSES)
            self.layer = ffa.FFALinear.from_linear(layer, r=2) if adapted else layer

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).view(len(x), TOKENS, -1).mean(dim=1)

    model = Flattens()
    _, _, loader = private(model, dataset())
    for batch in loader:
        with pytest.raises(PrivacyError, match=r"'layer'.*16 records.*first dimension"):
            loss_of(model, batch)


def test_tied_parameters_are_one_tensor():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH, bias=False)
            self.second = nn.Linear(WIDTH, WIDTH, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh()).mean(dim=1)[:, :CLASSES]

    torch.manual_seed(0)
    model = Tied()
    plain = copy.deepcopy(model)
    data = dataset(4)
    _, optimizer, loader = private(model, data, max_grad_norm=1e-3)
    batch = next(iter(loader))
    loss_of(model, batch).backward()
    for i in range(4):
        record = [t[i : i + 1] for t in data.tensors]
        (own,) = torch.autograd.grad(loss_of(plain, record), [plain.first.weight])
        torch.testing.assert_close(model.first.weight.grad_sample[i], own, rtol=1e-5, atol=1e-7)
    before = model.first.weight.detach().clone()
    optimizer.step()
    assert joint_norm([model.first.weight.detach() - before]) <= 1e-3 * (1 + 1e-3)


def test_tied_embedding_and_output_layer():
    class LanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, WIDTH)
            self.output = nn.Linear(WIDTH, 7, bias=False)
            self.output.weight = self.embedding.weight

        def forward(self, x):
            return self.output(self.embedding(x).tanh()).mean(dim=1)

    torch.manual_seed(0)
    model = LanguageModel()
    plain = copy.deepcopy(model)
    data = TensorDataset(torch.randint(7, (4, 6)), torch.randint(7, (4,)))
    _, _, loader = private(model, data)
    loss_of(model, next(iter(loader))).backward()
    for i in range(4):
        record = [t[i : i + 1] for t in data.tensors]
        (own,) = torch.autograd.grad(loss_of(plain, record), [plain.output.weight])
        torch.testing.assert_close(model.output.weight.grad_sample[i], own, rtol=1e-5, atol=1e-7)


# Gradients that come around the taps.


class UsesWeightOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = x.mean(dim=1)
        return self.layer(x) + nn.functional.linear(x, self.layer.weight)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_trained_tensor_used_outside_its_layer_is_refused(clipping):
    model = UsesWeightOutside()
    before = copy.deepcopy(model.state_dict())
    _, optimizer, loader = private(model, dataset(), clipping=clipping)
    for batch in loader:
        loss_of(model, batch).backward()
        with pytest.raises(PrivacyError, match=r"layer\.weight.*outside the layer"):
            optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_a_penalty_on_the_weights_in_the_loss_is_refused():
    model = classifier()
    _, optimizer, loader = private(model, dataset())
    for batch in loader:
        (loss_of(model, batch) + model.head.weight.square().sum()).backward()
        with pytest.raises(PrivacyError, match=r"head\.weight"):
            optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_stale_gradients_of_frozen_tensors_reach_no_parameter(kind):
    model = classifier()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    optimizer = kind(model.parameters(), lr=1.0)
    _, optimizer, loader = private(model, dataset(), optimizer, max_grad_norm=1e-9)
    head = model.head.weight.detach().clone()
    steps(model, optimizer, loader)
    for name, old in frozen.items():
        assert torch.equal(model.get_parameter(name), old), name
    if kind is torch.optim.SGD:
        assert (model.head.weight - head).abs().max() < 1e-8


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_layer_unfrozen_after_make_private_is_refused(kind):
    """Gradual unfreezing: its gradient would be summed, unclipped and without noise."""
    torch.manual_seed(0)
    model = Classifier()
    model.first.requires_grad_(False)
    optimizer = kind(model.parameters(), lr=1.0)
    _, optimizer, loader = private(model, dataset(), optimizer, batch_size=4)
    batches = iter(loader)
    loss_of(model, next(batches)).backward()
    optimizer.step()
    model.first.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    loss_of(model, next(batches)).backward()
    with pytest.raises(PrivacyError, match="frozen in make_private"):
        optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_the_plain_optimizer_has_nothing_to_step_with():
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model.state_dict())
    _, _, loader = private(model, dataset(), sgd)
    for batch in loader:
        loss_of(model, batch).backward()
        assert all(p.grad is None for p in model.parameters())
        sgd.step()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_a_graph_of_an_earlier_batch_gives_nothing():
    model = classifier()
    _, optimizer, loader = private(model, dataset(), batch_size=8)
    batches = iter(loader)
    late = loss_of(model, next(batches))
    optimizer.zero_grad()
    batch = next(batches)
    loss_of(model, batch).backward()
    alone = model.head.weight.grad_sample.clone()
    late.backward()
    assert torch.equal(model.head.weight.grad_sample, alone)
    optimizer.step()


# Physical batches.


def release_of(G, pieces, bounds):
    """What a step makes of the given per-record gradients, cut into `pieces`, under seeded noise.

    The real layer forms G from its input: y = x . w has the gradient x for each record.
    """

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(G.shape[1], 1, bias=False)
            self.b = nn.Linear(G.shape[1], 1, bias=False)

        def forward(self, x):
            return self.a(x) + self.b(0.5 * x)

    with pytest.warns(UserWarning, match="seed"):
        engine = PrivacyEngine(seed=4)
    model = Linear()
    reveal = Reveal(trained(model))
    _, optimizer, loader = private(
        model,
        TensorDataset(G),
        reveal,
        engine=engine,
        noise_multiplier=0.7,
        max_grad_norm=bounds,
        clipping="flat" if isinstance(bounds, float) else "per_layer",
        max_physical_batch_size=pieces,
        loss_reduction="sum",
    )
    count = 0
    for (x,) in loader:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        count += 1
    assert count == -(-len(G) // (pieces or len(G)))
    (released,) = reveal.released
    return released


@pytest.mark.parametrize("bounds", [2.0, [1.5, 0.4]])
@pytest.mark.parametrize("pieces", [1, 3, 5, 16, 20])
def test_micro_batches_give_the_same_bits(bounds, pieces):
    G = torch.randn(16, 9, generator=torch.Generator().manual_seed(2))
    whole = release_of(G, None, bounds)
    parts = release_of(G, pieces, bounds)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    # And in another order of the records, where nothing but the integers could be the same.
    turned = release_of(G.flip(0), pieces, bounds)
    assert all(torch.equal(a, b) for a, b in zip(whole, turned, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_micro_batches_of_a_forward_that_is_run_again(reduction, clipping):
    results = []
    for size in (None, 5):
        model = classifier()
        reveal = Reveal(trained(model))
        with pytest.warns(UserWarning, match="seed"):
            engine = PrivacyEngine(seed=4)
        _, optimizer, loader = private(
            model,
            dataset(),
            reveal,
            engine=engine,
            noise_multiplier=0.1,
            max_grad_norm=0.05,
            clipping=clipping,
            loss_reduction=reduction,
            max_physical_batch_size=size,
        )
        assert len(loader) == 1
        steps(model, optimizer, loader, reduction)
        results.append(reveal.released)
    (whole,), (parts,) = results
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_only_the_last_piece_updates_and_zero_grad_keeps_the_sum():
    model = classifier()
    engine = PrivacyEngine()
    before = copy.deepcopy(model.state_dict())
    _, optimizer, loader = private(
        model, dataset(), engine=engine, max_physical_batch_size=4, max_grad_norm=math.inf
    )
    for number, batch in enumerate(loader, start=1):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = not torch.equal(model.head.weight, before["head.weight"])
        assert moved == (number == 4)
        assert engine.stats["steps"] == len(engine.ledger.history) == (number == 4)


def test_padding_rows_are_left_out_even_when_they_are_nan():
    data = dataset(7)
    releases = []
    for size in (7, 10):
        model = classifier()
        reveal = Reveal(trained(model))
        engine = PrivacyEngine()
        _, optimizer, loader = private(
            model, data, reveal, engine=engine, max_physical_batch_size=size
        )
        for x, y in loader:
            assert len(x) == size
            x[7:] = math.nan
            loss_of(model, (x, y)).backward()
            optimizer.step()
        assert engine.stats["dropped"] == 0
        releases.append(reveal.released[0])
    for a, b in zip(*releases, strict=True):
        assert a.isfinite().all() and a.norm() > 0
        assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_an_abandoned_draw_is_not_released_with_the_next(clipping):
    model = classifier()
    reveal = Reveal(trained(model))
    options = {"max_physical_batch_size": 4, "clipping": clipping}
    _, optimizer, loader = private(model, dataset(), reveal, **options)
    for batch in loader:
        loss_of(model, batch).backward()
        optimizer.step()
        break
    assert reveal.released == []
    steps(model, optimizer, loader)
    fresh_model = classifier()
    fresh = Reveal(trained(fresh_model))
    _, optimizer, loader = private(fresh_model, dataset(), fresh, **options)
    steps(fresh_model, optimizer, loader)
    assert all(
        torch.equal(a, b) for a, b in zip(reveal.released[0], fresh.released[0], strict=True)
    )


# Clipping a tensor at a time.


@pytest.mark.parametrize("bounds", [0.02, [0.01, 0.02, 0.03, 0.04]])
def test_per_layer_clips_each_tensor_at_its_own_bound(bounds):
    each = [bounds / 2] * 4 if isinstance(bounds, float) else bounds
    model = classifier()
    reveal = Reveal(trained(model))
    x, y = dataset(1).tensors
    _, optimizer, loader = private(
        model, TensorDataset(x, y), reveal, max_grad_norm=bounds, clipping="per_layer"
    )
    for batch in loader:
        loss_of(model, batch).backward()
        assert all(p.grad_sample is None for p in trained(model))
        optimizer.step()
    for released, C in zip(reveal.released[0], each, strict=True):
        assert released.norm() == pytest.approx(C, rel=1e-5)


def test_per_layer_keeps_grad_sample_when_asked():
    releases = []
    for keep in (False, True):
        model = classifier()
        reveal = Reveal(trained(model))
        _, optimizer, loader = private(
            model,
            dataset(),
            reveal,
            max_grad_norm=0.02,
            clipping="per_layer",
            keep_grad_sample=keep,
        )
        for batch in loader:
            loss_of(model, batch).backward()
            for p in trained(model):
                assert (p.grad_sample is not None) == keep
                assert not keep or p.grad_sample.shape == (N, *p.shape)
            optimizer.step()
            assert all(p.grad_sample is None for p in trained(model))
        releases.append(reveal.released[0])
    assert all(torch.equal(a, b) for a, b in zip(*releases, strict=True))


def test_per_layer_refuses_a_second_backward_and_forgets_the_draw():
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    _, optimizer, loader = private(model, dataset(), clipping="per_layer")
    for batch in loader:
        loss_of(model, batch).backward()
        with pytest.raises(PrivacyError, match="a second gradient in one batch"):
            loss_of(model, batch).backward()
        with pytest.raises(PrivacyError, match="without a batch"):
            optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_flat_adds_two_backwards_before_it_clips():
    C = 1e-3
    model = classifier()
    reveal = Reveal(trained(model))
    _, optimizer, loader = private(
        model, TensorDataset(*dataset(1).tensors), reveal, max_grad_norm=C
    )
    for batch in loader:
        loss_of(model, batch).backward()
        loss_of(model, batch).backward()
        optimizer.step()
    assert joint_norm(reveal.released[0]) == pytest.approx(C, rel=1e-5)


# Noise.


def noise_of(bounds, clipping, sigma, width=200_000):
    """What is released when every record's gradient is zero, times L."""

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(width, 1, bias=False)
            self.b = nn.Linear(width, 1, bias=False)

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = Zero()
    reveal = Reveal(trained(model))
    _, optimizer, loader = private(
        model,
        TensorDataset(torch.zeros(4, width)),
        reveal,
        noise_multiplier=sigma,
        max_grad_norm=bounds,
        clipping=clipping,
        loss_reduction="sum",
    )
    for _ in range(2):
        for (x,) in loader:
            model(x).sum().backward()
            optimizer.step()
    return [[g.flatten() * 4 for g in step] for step in reveal.released]


@pytest.mark.parametrize(
    ("bounds", "clipping", "scale"),
    [
        (2.0, "flat", 2.0),
        (2.0, "per_layer", 2.0),
        ([3.0, 4.0], "per_layer", 5.0),
        ([1e-3, 1.0], "per_layer", math.hypot(1e-3, 1.0)),
    ],
)
def test_noise_has_the_claimed_size_and_never_repeats(bounds, clipping, scale):
    sigma = 1.5
    steps_of_noise = noise_of(bounds, clipping, sigma)
    streams = [z for step in steps_of_noise for z in step]
    assert len(streams) == 4
    for z in streams:
        # 200,000 draws: the standard deviation's own is 0.16 %, the mean's 0.22 % of it.
        assert z.std() == pytest.approx(sigma * scale, rel=0.01)
        assert abs(z.mean()) < 0.012 * sigma * scale
    for i in range(4):
        for j in range(i):
            correlation = torch.corrcoef(torch.stack([streams[i], streams[j]]))[0, 1]
            assert abs(correlation) < 0.012


def test_noise_that_would_overflow_the_integer_sum_is_refused():
    # Beyond the 64-bit range the rounded noise is one constant: the sum would be released bare.
    for bounds, sigma in ([1.0, 1e-9], 1.0), ([1.0, 1.0], 1e9):
        with pytest.raises(ValueError, match="does not fit"):
            noise_of(bounds, "per_layer", sigma, width=2)
    with pytest.raises(ValueError, match="does not fit"):
        noise_of(1e-320, "flat", 1.0, width=2)
    (noise, _), _ = noise_of([1.0, 1e-6], "per_layer", 1.0, width=50_000)
    assert noise.std() == pytest.approx(1.0, rel=0.03)


# Records that are not finite, and draws that are empty.


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_record_that_is_not_finite_drops_alone(value, clipping):
    releases, engines = [], []
    for spoil in (False, True):
        model = classifier()
        data = dataset()
        keep = list(range(N))
        if spoil:
            # Of both signs: an infinity alone may end in a tanh, and layers above it be finite.
            data.tensors[0][5, 2, :2] = torch.tensor([value, -value])
        else:
            keep.remove(5)
        reveal = Reveal(trained(model))
        engine = PrivacyEngine()
        _, optimizer, loader = private(
            model,
            TensorDataset(*(t[keep] for t in data.tensors)),
            reveal,
            engine=engine,
            max_grad_norm=0.05,
            clipping=clipping,
        )
        steps(model, optimizer, loader)
        releases.append([g * len(keep) for g in reveal.released[0]])
        engines.append(engine)
    groups = 1 if clipping == "flat" else 4
    assert [e.stats["dropped"] for e in engines] == [0, groups]
    assert [e.stats["steps"] for e in engines] == [1, 1]
    for a, b in zip(*releases, strict=True):
        assert a.isfinite().all() and a.norm() > 0
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_an_empty_draw_still_makes_a_noised_step():
    # 3 records at a rate of 1/3: an empty draw has probability 8/27.
    model = classifier()
    reveal = Reveal(trained(model))
    engine = PrivacyEngine()
    _, optimizer, loader = private(
        model,
        dataset(3),
        reveal,
        engine=engine,
        batch_size=1,
        poisson_sampling=True,
        noise_multiplier=1e-3,
    )
    done = empty = 0
    for _ in range(20):
        for batch in loader:
            kept = model.head.weight.grad_sample
            assert kept is None
            piece_is_empty = optimizer.private_step._piece.kept == 0
            assert len(batch[0]) >= 1
            loss_of(model, batch).backward()
            optimizer.step()
            done += 1
            empty += piece_is_empty
            released = torch.cat([g.flatten() for g in reveal.released[-1]])
            if piece_is_empty:
                # Noise alone, of its full size: 59 elements.
                assert released.std() == pytest.approx(1e-3, rel=0.6)
            else:
                assert released.norm() > 0.1
    assert done == 60 and 4 <= empty <= 35
    assert engine.ledger.history == [(1e-3, 1 / 3, 60)]
    assert engine.stats["steps"] == 60
