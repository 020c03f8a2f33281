"""Adaptive clipping: the joint release is what is charged, the count is exact, C finds its place.

The model is one weight whose gradient for a record is the record itself, so that all norms are
known.
"""

import math
from contextlib import closing

import pytest
import torch
from test_federated import document, settled, tiny_bert  # noqa: F401
from test_site import North, assert_equal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ffa_kernels import ops
from ffa_kernels.errors import ConfigError, LedgerError, PrivacyError
from ffa_kernels.federated.site import Site
from ffa_kernels.privacy import AdaptiveClipping, PrivacyEngine, epsilon

WIDTH = 4


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*noise and sampling can be repeated"),
]


def rows(norms):
    """Records of these norms, each with its number."""
    directions = torch.randn(len(norms), WIDTH, generator=torch.Generator().manual_seed(1))
    scaled = directions.double() / directions.double().norm(dim=1, keepdim=True)
    x = scaled * torch.tensor(norms, dtype=torch.float64).unsqueeze(1)
    return TensorDataset(x.float(), torch.arange(len(norms)))


def private(norms, batch_size=None, engine=None, adaptive=True, lr=0.1, **options):
    model = nn.Linear(WIDTH, 1, bias=False)
    options = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "loss_reduction": "sum",
        "poisson_sampling": batch_size is not None,
        "adaptive_clipping": AdaptiveClipping() if adaptive is True else adaptive,
        **options,
    }
    return (engine or PrivacyEngine()).make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        data_loader=DataLoader(rows(norms), batch_size=batch_size or len(norms)),
        **options,
    )


def step(model, optimizer, x):
    optimizer.scale(model(x).sum()).backward()
    optimizer.step()


def train(model, optimizer, loader, epochs=1):
    """(bound, records of the draw) of each step."""
    steps, draw = [], []
    for _ in range(epochs):
        for x, number in loader:
            piece = optimizer.private_step.piece
            draw += number[: piece.kept].tolist()
            bound = optimizer.max_grad_norm
            step(model, optimizer, x)
            if piece.last:
                steps.append((bound, draw))
                draw = []
            else:
                assert optimizer.max_grad_norm == bound, "within a step"
    return steps


@pytest.fixture
def released(monkeypatch):
    """(count before noise, Gaussian, what is released) of each step."""
    seen, noised = [], AdaptiveClipping.noised

    def recording(self, doubled_count, gaussian, *rest):
        seen.append((doubled_count, gaussian, noised(self, doubled_count, gaussian, *rest)))
        return seen[-1][2]

    monkeypatch.setattr(AdaptiveClipping, "noised", recording)
    return seen


@pytest.mark.parametrize("z", [0.3, 0.7, 1.0, 3.7])
@pytest.mark.parametrize("sigma", [0.16, 0.500001, 0.51, 1.0, 6.4, 1e4])
def test_the_two_releases_together_are_a_gaussian_of_the_charged_multiplier(z, sigma):
    """RDP of order a is a / 2 times the sum of squared sensitivity over noise (Mironov 2017)."""
    own = AdaptiveClipping(count_noise_multiplier=sigma).gradient_noise(z, 100.0)
    if 2 * sigma <= z:
        assert own == math.inf
        return
    joint = own**-2 + (0.5 / sigma) ** 2
    assert joint == pytest.approx(z**-2, rel=1e-14) and own > z


def test_by_default_the_counts_noise_is_a_twentieth_of_the_batch():
    adaptive = AdaptiveClipping()
    assert adaptive.count_noise(1.0, 640.0) == 32.0
    assert 1.0 < adaptive.gradient_noise(1.0, 640.0) < 1.0002
    assert adaptive.count_noise(0.0, 640.0) == adaptive.gradient_noise(0.0, 640.0) == 0.0


@pytest.mark.parametrize("scale", [1.0, 256.0])
@pytest.mark.parametrize("pieces", [None, (3, True), (3, False)])
def test_the_count_is_exact_over_physical_batches_padding_and_records_that_are_dropped(
    released, pieces, scale
):
    norms = [0.2 * k for k in range(12)]
    norms[4], norms[9] = math.nan, math.inf
    options = {}
    if pieces is not None:
        options = dict(max_physical_batch_size=pieces[0], pad_physical_batches=pieces[1])
    engine = PrivacyEngine(seed=3)
    model, optimizer, loader = private(
        norms, 2, engine, max_grad_norm=0.9, loss_scale=scale, **options
    )
    steps = train(model, optimizer, loader, epochs=12)
    sizes = {len(draw) for _, draw in steps}
    assert min(sizes) == 0 and max(sizes) > 3, "draws of all kinds"
    expected = [
        sum((1 if norms[i] <= c else -1) for i in draw if math.isfinite(norms[i]))
        for c, draw in steps
    ]
    assert [doubled for doubled, _, _ in released] == expected
    assert [noised for _, _, noised in released] == expected, "no noise is no noise"
    bounds = [c for c, _ in steps] + [optimizer.max_grad_norm]
    for c, after, doubled in zip(bounds, bounds[1:], expected, strict=False):
        # exp(-lr (fraction - 1/2)), fraction = doubled / 2 L + 1/2.
        assert after == pytest.approx(c * math.exp(-0.2 * doubled / 4))
    assert engine.stats["dropped"] == sum(i in (4, 9) for _, draw in steps for i in draw) > 0


def test_records_at_the_bound_are_within_it(released):
    model, optimizer, loader = private([2.0, 2.0, 2.0, 2.1], max_grad_norm=2.0 * (1 + 2**-20))
    train(model, optimizer, loader)
    assert [doubled for doubled, _, _ in released] == [3 - 1]


@pytest.mark.parametrize("start", [0.01, 100.0])
@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.8])
def test_the_bound_goes_to_the_quantile(start, quantile):
    norms = [1.0 + k / 100 for k in range(101)]
    adaptive = AdaptiveClipping(quantile)
    model, optimizer, loader = private(norms, max_grad_norm=start, adaptive=adaptive)
    train(model, optimizer, loader, epochs=200)
    assert optimizer.max_grad_norm == pytest.approx(1.0 + quantile, abs=0.03)


def test_a_record_more_moves_the_count_by_one_at_most(released):
    norms = [0.1, 0.7, 3.0, math.nan, 0.9, 1.1]
    for left_out in (None, *range(len(norms))):
        kept = [norm for i, norm in enumerate(norms) if i != left_out]
        train(*private(kept))
    whole, *others = [doubled for doubled, _, _ in released]
    assert [whole - other for other in others] == [1, 1, -1, 0, 1, -1]


def test_noise_of_count_and_gradients_is_as_said_and_of_streams_of_their_own(released):
    """Without gradients, what moves the weight is noise: its deviation is z_delta C / L."""
    adaptive, n, epochs = AdaptiveClipping(0.5, 1e-9, 1.5), 8, 300
    engine = PrivacyEngine(seed=11)
    key = engine._noise.state.clone()
    options = dict(noise_multiplier=2.0, max_grad_norm=3.0, lr=1.0, adaptive=adaptive)
    model, optimizer, loader = private([0.0] * n, None, engine, **options)
    moved = []
    for _ in range(epochs):
        before = model.weight.detach().double().clone()
        train(model, optimizer, loader)
        moved.append((before - model.weight.detach().double()).flatten() * n / 3.0)
    gradient_noise, count_noise = torch.stack(moved), []
    for (doubled, gaussian, noised), number in zip(released, range(epochs), strict=True):
        assert doubled == n
        key[4] = number
        assert gaussian == ops.gaussian(key, 1, 1, torch.float64).item()
        assert gaussian != ops.gaussian(key, 0, 1, torch.float64).item()
        assert noised * 2**32 == int(noised * 2**32), "on the grid"
        count_noise.append((noised - doubled) / 2)
    count_noise = torch.tensor(count_noise, dtype=torch.float64)
    own = adaptive.gradient_noise(2.0, n)
    assert own == pytest.approx(1 / math.sqrt(1 / 4 - 1 / 9))
    # A standard deviation's own error is 1 / sqrt(2 n) of it; five of those.
    for values, deviation in ((count_noise, 1.5), (gradient_noise, own)):
        error = 5 / math.sqrt(2 * values.numel())
        assert values.square().mean().sqrt() == pytest.approx(deviation, rel=error)
    correlation = torch.corrcoef(torch.cat([count_noise[None], gradient_noise.T]))[0, 1:]
    assert correlation.abs().max() < 5 / math.sqrt(epochs)
    assert torch.unique(count_noise).numel() == epochs


@pytest.mark.parametrize("poisson", [True, False])
def test_the_ledger_is_charged_as_without_it(poisson):
    histories = []
    for adaptive in (True, None):
        engine = PrivacyEngine()
        options = dict(noise_multiplier=0.15, adaptive=adaptive, poisson_sampling=poisson)
        model, optimizer, loader = private([1.0] * 8, 4, engine, **options)
        train(model, optimizer, loader, epochs=3)
        histories.append(engine.ledger.history)
    assert histories[0] == histories[1] != []


def test_a_target_holds_with_it():
    model = nn.Linear(WIDTH, 1, bias=False)
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(rows([1.0] * 40), batch_size=20),
        **dict(target_epsilon=6.0, target_delta=1e-3, epochs=3, max_grad_norm=0.1),
        loss_reduction="sum",
        adaptive_clipping=AdaptiveClipping(count_noise_multiplier=3.0),
    )
    train(model, optimizer, loader, epochs=3)
    assert 5.9 < engine.get_epsilon(1e-3) <= 6.0
    with pytest.raises(PrivacyError, match="is spent"):
        train(model, optimizer, loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(clipping="per_layer"), "adaptive_clipping .*'per_layer'; accepted: \"flat\""),
        (dict(max_grad_norm=math.inf), "max_grad_norm is inf; accepted with adaptive_clipping"),
        (dict(max_grad_norm=2.0**101), "max_grad_norm is .*accepted with adaptive_clipping"),
        (dict(adaptive=0.5), r"adaptive_clipping is 0\.5; accepted: None, or Adaptive"),
        (dict(noise_multiplier=0.4), r"is 0\.2 \(batch size / 20\) .*accepted: above 0\.2"),
        (
            dict(noise_multiplier=1.0, adaptive=AdaptiveClipping(count_noise_multiplier=0.5)),
            r"count_noise_multiplier is 0\.5 with .*accepted: above 0\.5",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_done(options, message):
    engine = PrivacyEngine()
    with pytest.raises(ConfigError, match=message):
        private([1.0] * 4, None, engine, **options)
    assert engine._steps == []


@pytest.mark.parametrize("field", ["target_quantile", "learning_rate", "count_noise_multiplier"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True, "0.5"])
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=f"{field} is .*; accepted"):
        AdaptiveClipping(**{field: value})


@pytest.mark.parametrize(("norms", "end"), [([0.0] * 4, 2.0**-100), ([math.nan] * 4, 2.0**100)])
def test_a_bound_that_finds_no_quantile_stays_finite(norms, end):
    # A record that is dropped counts as half a one.
    adaptive = AdaptiveClipping(0.9 if end > 1 else 0.5, learning_rate=100.0)
    model, optimizer, loader = private(norms, None, adaptive=adaptive)
    for x, _ in loader:
        step(model, optimizer, x)
    assert optimizer.private_step.mechanism.after(10**9, 0.0).max_grad_norm == (2.0**-100,)
    for _ in range(4):
        train(model, optimizer, loader)
    assert optimizer.max_grad_norm == end


def test_the_bound_goes_on_in_another_run():
    model, optimizer, loader = private([1.0, 3.0, 4.0, 5.0], max_grad_norm=0.5)
    train(model, optimizer, loader, epochs=3)
    state = optimizer.state_dict()
    _, again, _ = private([1.0, 3.0, 4.0, 5.0], max_grad_norm=0.5)
    again.load_state_dict(state)
    assert again.max_grad_norm == optimizer.max_grad_norm == state["max_grad_norm"] > 0.5
    _, fixed, _ = private([1.0], max_grad_norm=0.5, adaptive=None)
    fixed.load_state_dict(state)
    assert fixed.max_grad_norm == 0.5 and "max_grad_norm" not in fixed.state_dict()
    again.load_state_dict(fixed.state_dict())
    assert again.max_grad_norm == optimizer.max_grad_norm, "nothing else was said"
    for bad in (math.nan, math.inf, -1.0, 0.0, "1"):
        with pytest.raises(ConfigError, match=r"max_grad_norm is .*accepted"):
            again.load_state_dict({**state, "max_grad_norm": bad})


def test_a_bound_is_not_changed_within_a_draw():
    model, optimizer, loader = private([1.0] * 4, max_physical_batch_size=2)
    state = {**optimizer.state_dict(), "max_grad_norm": 7.0}
    for x, _ in loader:
        piece = optimizer.private_step.piece
        step(model, optimizer, x)
        if piece.last:
            optimizer.load_state_dict(state)
        else:
            with pytest.raises(PrivacyError, match="in the middle of a draw"):
                optimizer.load_state_dict(state)
    assert optimizer.max_grad_norm == 7.0


def test_a_step_that_could_not_be_charged_leaves_no_count(released, tmp_path):
    engine = PrivacyEngine(ledger=tmp_path / "ledger.jsonl", new_ledger=True)
    norms, options = [0.5, 0.5, 2.0, 2.0], dict(max_physical_batch_size=2)
    model, optimizer, loader = private(norms, None, engine, **options)
    charge = optimizer.private_step._charge

    def fails():
        raise LedgerError("full")

    optimizer.private_step._charge = fails
    with pytest.raises(LedgerError, match="full"):
        train(model, optimizer, loader)
    assert released == [] and optimizer.max_grad_norm == 1.0
    optimizer.private_step._charge = charge
    # Abandoned after its first piece, which both lie within the bound.
    for x, _ in loader:
        step(model, optimizer, x)
        break
    train(model, optimizer, loader)
    assert [doubled for doubled, _, _ in released] == [0] and optimizer.max_grad_norm == 1.0


def test_an_update_that_fails_keeps_the_bound_and_uses_its_noise_up(released, monkeypatch):
    engine = PrivacyEngine(seed=2)
    model, optimizer, loader = private([0.5] * 4, None, engine, noise_multiplier=0.1)
    with monkeypatch.context() as patched:
        patched.setattr(ops, "private_step", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(model, optimizer, loader)
    assert released == [] and optimizer.max_grad_norm == 1.0 and engine._noise.state[4] == 1
    train(model, optimizer, loader)
    assert [doubled for doubled, _, _ in released] == [4]
    state = engine._noise.state.clone()
    state[4] = 1
    assert released[0][1] == ops.gaussian(state, 1, 1, torch.float64).item()


def test_a_draw_of_which_a_batch_is_dropped_is_not_counted(released):
    model, optimizer, loader = private([0.5] * 4, max_physical_batch_size=2)
    for x, _ in loader:
        optimizer.scale(model(x).sum()).backward()
        optimizer.zero_grad()
    for x, _ in loader:
        step(model, optimizer, x)
    assert [doubled for doubled, _, _ in released] == [4]


def test_a_model_that_is_made_private_again_begins_anew():
    model, optimizer, loader = private([0.5] * 4)
    train(model, optimizer, loader)
    held = optimizer.max_grad_norm
    PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(rows([0.5] * 4), batch_size=4),
        **dict(noise_multiplier=0.0, max_grad_norm=1.0),
    )
    assert optimizer.max_grad_norm == held < 1.0
    with pytest.raises(PrivacyError, match="made private again"):
        optimizer.step()


# A federation.


def bound_of(site: Site) -> float:
    return site._optimizer.max_grad_norm


@pytest.mark.parametrize("method", ["ffa", "alternating"])
def test_a_site_goes_on_with_its_bound(document, tmp_path, method):  # noqa: F811
    """Opened for each round or once, it sends the same; whatever moves has a bound of its own."""
    rounds = {"ffa": 2, "alternating": 4}[method]
    north = North(
        document,
        tmp_path,
        federation={"method": method, "rounds": rounds},
        privacy={"target_quantile": 0.5, "max_grad_norm": 0.01, "new_ledger": True},
    )
    server, bounds = north.server(), []
    with closing(north.open(tmp_path / "once", seed=5)) as site:
        for round_ in range(1, rounds + 1):
            update = site.run_round(round_, server.message(round_, "north"))
            with closing(north.open(tmp_path / "anew", seed=5)) as again:
                assert_equal(again.run_round(round_, server.message(round_, "north")), update)
                assert bound_of(again) == bound_of(site)
            bounds.append(bound_of(site))
            server.aggregate(round_, ["north"], [("north", update)])
        spent = epsilon(site._engine.ledger.history, 1e-3, "rdp")
        assert 7.9 < spent <= north.config.privacy.target_epsilon
        own = site._optimizer.private_step.mechanism.gradient_noise
        assert 1.0 < own / site.noise_multiplier < 1.1548
    # Far below the median, it rises by some exp(0.1) in each of a round's two steps.
    moving = {"ffa": [bounds], "alternating": [bounds[0::2], bounds[1::2]]}[method]
    assert all(0.01 < first < second for first, second in moving)


def test_the_quantile_needs_one_bound(document, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match=r"target_quantile: got .*accepted: .*'flat'"):
        privacy = {"target_quantile": 0.5, "clipping": "per_layer"}
        settled(document, tmp_path, privacy={**document["privacy"], **privacy})
    for value in (0.0, 1.0):
        with pytest.raises(ConfigError, match="target_quantile: got"):
            settled(document, tmp_path, privacy={"target_quantile": value})
