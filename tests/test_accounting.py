"""Epsilon of a history, and the noise that a target needs."""

import math
import random
import warnings

import pytest
import torch
from opacus.accountants import RDPAccountant, create_accountant
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ffa_kernels.errors import ConfigError, PrivacyError
from ffa_kernels.privacy import PrivacyEngine, accounting, epsilon, noise_multiplier_for
from ffa_kernels.privacy.accounting import merged

DELTA = 1e-5
HISTORIES = [
    [(1.0, 0.01, 300)],
    [(0.8, 0.02, 50), (1.3, 0.05, 40), (0.8, 0.02, 30)],
    [(5.0, 1.0, 10)],
]


@pytest.mark.parametrize("seed", range(6))
def test_rdp_is_what_opacus_finds_among_all_its_orders(seed):
    """From next to no noise to a lot, from one step to many, alone and together."""
    drawn = random.Random(seed)
    for _ in range(5):
        history = [
            (
                math.exp(drawn.uniform(math.log(0.15), math.log(60.0))),
                drawn.choice([1.0, math.exp(drawn.uniform(math.log(1e-4), 0.0))]),
                drawn.choice([1, 20, 1000, 100_000]),
            )
            for _ in range(drawn.choice([1, 1, 2]))
        ]
        delta = drawn.choice([1e-2, 1e-5, 1e-9])
        theirs = RDPAccountant()
        theirs.history = history
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert epsilon(history, delta, "rdp") == pytest.approx(theirs.get_epsilon(delta), 1e-12)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("history", HISTORIES)
def test_epsilon_is_that_of_opacus_after_as_many_steps(history, accountant):
    theirs = create_accountant(accountant)
    for noise_multiplier, sample_rate, steps in history:
        for _ in range(steps):
            theirs.step(noise_multiplier=noise_multiplier, sample_rate=sample_rate)
    got = epsilon(history, DELTA, accountant)
    # PRV composes equal steps at once, and rounds a little differently when they are apart.
    assert got == pytest.approx(theirs.get_epsilon(delta=DELTA), rel=2e-2)
    if len(history) == 1:
        assert got == pytest.approx(theirs.get_epsilon(delta=DELTA), rel=1e-9)


def gaussian_epsilon(mu, delta):
    """The exact epsilon of mu-Gaussian DP (Dong, Roth, Su 2022, corollary 1), by bisection."""

    def phi(t):
        return 0.5 * math.erfc(-t / math.sqrt(2))

    def delta_at(e):
        return phi(-e / mu + mu / 2) - math.exp(e) * phi(-e / mu - mu / 2)

    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize(("sigma", "steps"), [(5.0, 10), (20.0, 100), (2.0, 1)])
def test_epsilon_at_rate_one_is_no_less_than_the_exact_gaussians(sigma, steps, accountant):
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, DELTA)
    got = epsilon([(sigma, 1.0, steps)], DELTA, accountant)
    assert exact <= got + 1e-3
    assert got <= exact * 1.3


def test_epsilon_adds_up_the_whole_history():
    half = epsilon([(1.0, 0.05, 100)], DELTA)
    assert epsilon([(1.0, 0.05, 100), (1.0, 0.05, 100)], DELTA) == epsilon(
        [(1.0, 0.05, 200)], DELTA
    )
    assert epsilon([(1.0, 0.05, 200)], DELTA) > half * 1.2
    assert epsilon([(1.0, 0.05, 100), (0.7, 0.1, 3)], DELTA) > half
    assert merged([(1.0, 0.1, 2), (2.0, 0.1, 1), (1.0, 0.1, 3)]) == [(1.0, 0.1, 5), (2.0, 0.1, 1)]


def test_epsilon_at_the_ends():
    assert epsilon([], DELTA) == 0.0
    assert epsilon([(1.0, 0.1, 0)], DELTA) == 0.0
    assert epsilon([(100.0, 0.01, 10), (0.0, 0.01, 1)], DELTA) == math.inf


@pytest.mark.parametrize("history", [[(0.05, 0.5, 20)], [(1000.0, 1.0, 10**8)]])
def test_what_is_too_large_for_the_prv_is_left_to_rdp(history):
    got = epsilon(history, DELTA)
    assert got == epsilon(history, DELTA, "rdp") and 10 < got < math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, 1])
def test_bad_delta(delta):
    with pytest.raises(ConfigError, match="delta"):
        epsilon([(1.0, 0.1, 1)], delta)


@pytest.mark.parametrize("name", ["gdp", "PRV", None])
def test_accountants_that_may_understate_are_refused(name):
    with pytest.raises(ConfigError, match="accepted: prv, rdp"):
        epsilon([(1.0, 0.1, 1)], DELTA, name)
    with pytest.raises(ConfigError, match="accepted: prv, rdp"):
        PrivacyEngine(accountant=name)


@pytest.mark.parametrize(
    ("target", "rate", "steps", "accountant", "history"),
    [
        (1.0, 0.02, 200, "prv", []),
        (6.0, 0.05, 100, "prv", []),
        (3.0, 1.0, 5, "rdp", []),
        (0.5, 0.1, 20, "rdp", []),
        (4.0, 0.05, 60, "prv", [(1.1, 0.05, 60)]),
        (8.0, 0.01, 500, "rdp", [(0.9, 0.02, 30), (2.0, 1.0, 2)]),
    ],
)
def test_the_noise_is_the_least_to_a_thousandth_and_never_above_target(
    target, rate, steps, accountant, history
):
    sigma = noise_multiplier_for(target, DELTA, rate, steps, accountant, history)
    assert epsilon([*history, (sigma, rate, steps)], DELTA, accountant) <= target
    less = sigma * (1 - 1.001e-3)
    assert epsilon([*history, (less, rate, steps)], DELTA, accountant) > target


def test_a_history_that_leaves_little_takes_few_evaluations(monkeypatch):
    """Epsilon hardly falls then, however far the noise goes; each PRV takes half a second."""
    alone = noise_multiplier_for(6.0, DELTA, 0.06, 6, "rdp")
    asked, real = [], accounting.epsilon

    def counted(history, *args):
        asked.append(history)
        return real(history, *args)

    monkeypatch.setattr(accounting, "epsilon", counted)
    sigma = noise_multiplier_for(6.0, DELTA, 0.06, 6, "rdp", [(alone, 0.06, 6)])
    assert sigma > 3 * alone and len(asked) < 30


def test_history_asks_for_more_noise():
    alone = noise_multiplier_for(3.0, DELTA, 0.05, 50, "rdp")
    after = noise_multiplier_for(3.0, DELTA, 0.05, 50, "rdp", [(1.5, 0.05, 50)])
    assert after > alone * 1.02


def test_a_target_that_is_spent():
    history = [(1.0, 0.05, 100)]
    spent = epsilon(history, DELTA)
    with pytest.raises(PrivacyError, match="already spent"):
        noise_multiplier_for(spent, DELTA, 0.05, 1, history=history)
    with pytest.raises(PrivacyError, match="already spent"):
        noise_multiplier_for(100.0, DELTA, 0.05, 1, history=[(0.0, 0.1, 1)])
    with pytest.raises(PrivacyError, match="too little"):
        noise_multiplier_for(spent * (1 + 1e-9), DELTA, 1.0, 10**9, history=history)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, DELTA, 0.1, 1), "target_epsilon"),
        ((math.inf, DELTA, 0.1, 1), "target_epsilon"),
        ((1.0, 0.0, 0.1, 1), "delta"),
        ((1.0, DELTA, 0.0, 1), "sample_rate"),
        ((1.0, DELTA, 1.1, 1), "sample_rate"),
        ((1.0, DELTA, 0.1, 0), "steps"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        noise_multiplier_for(*arguments)


# The engine's account.


def prepared(engine, target=None, epochs=2, records=60, batch_size=6, delta=DELTA, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    common = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(TensorDataset(torch.randn(records, 3)), batch_size=batch_size),
        "max_grad_norm": 1.0,
        **options,
    }
    if target is None:
        return engine.make_private(noise_multiplier=1.5, **common)
    return engine.make_private_with_epsilon(
        target_epsilon=target, target_delta=delta, epochs=epochs, **common
    )


def train(model, optimizer, loader, epochs):
    for _ in range(epochs):
        for (x,) in loader:
            model(x).square().mean().backward()
            optimizer.step()


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_training_ends_at_the_target(accountant, poisson):
    engine = PrivacyEngine(accountant=accountant)
    train(*prepared(engine, 4.0, epochs=3, poisson_sampling=poisson), epochs=3)
    ((_, rate, steps),) = engine.ledger.history
    assert (rate, steps) == (0.1 if poisson else 1.0, 30)
    assert 3.9 < engine.get_epsilon(DELTA) <= 4.0


def test_a_second_engine_run_gets_only_what_is_left():
    engine = PrivacyEngine(accountant="rdp")
    train(*prepared(engine, 2.0), epochs=2)
    first = engine.ledger.history
    assert 1.95 < engine.get_epsilon(DELTA) <= 2.0
    with pytest.raises(PrivacyError, match=r"target_epsilon 1\.5 is already spent"):
        prepared(engine, 1.5)
    train(*prepared(engine, 3.0), epochs=2)
    assert 2.95 < engine.get_epsilon(DELTA) <= 3.0
    (old,), (_, new) = first, engine.ledger.history
    # Alone it would have had the noise of epsilon 3, far less than that of what is left.
    alone = noise_multiplier_for(3.0, DELTA, 0.1, 20, "rdp")
    assert new[0] > 1.05 * alone and old[2] == new[2] == 20


def test_a_step_beyond_the_planned_epochs_is_refused():
    engine = PrivacyEngine(accountant="rdp")
    private = prepared(engine, 2.0)
    train(*private, epochs=2)
    before = [p.detach().clone() for p in private[0].parameters()]
    with pytest.raises(PrivacyError, match=r"target_epsilon 2 is spent.*20 steps"):
        train(*private, epochs=1)
    assert engine.ledger.steps == 20
    for old, new in zip(before, private[0].parameters(), strict=True):
        assert torch.equal(old, new)


def test_two_plans_on_one_budget_do_not_both_run():
    engine = PrivacyEngine(accountant="rdp")
    first, second = prepared(engine, 2.0), prepared(engine, 2.0)
    train(*first, epochs=1)
    with pytest.raises(PrivacyError, match="charged for something else"):
        train(*second, epochs=1)
    train(*first, epochs=1)
    assert engine.get_epsilon(DELTA) <= 2.0


def test_each_step_costs_one_step_however_it_is_cut():
    engine = PrivacyEngine(accountant="rdp")
    train(*prepared(engine, max_physical_batch_size=2), epochs=1)
    assert engine.ledger.history == [(1.5, 0.1, 10)]
    assert engine.get_epsilon(DELTA) == epsilon([(1.5, 0.1, 10)], DELTA, "rdp")


@pytest.mark.parametrize("delta", [1 / 60, 0.5, 0.0, 1])
def test_delta_of_one_record_or_more_is_refused(delta):
    with pytest.raises(ConfigError, match=r"target_delta.*1 / 60"):
        prepared(PrivacyEngine(), 3.0, delta=delta)


def test_delta_just_below_one_record_is_accepted():
    prepared(PrivacyEngine(accountant="rdp"), 3.0, delta=1 / 61)


@pytest.mark.parametrize("epochs", [0, 1.5, -1])
def test_epochs_are_whole_and_positive(epochs):
    with pytest.raises(ConfigError, match="epochs"):
        prepared(PrivacyEngine(), 3.0, epochs=epochs)


def test_no_noise_is_no_privacy():
    engine = PrivacyEngine()
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    private = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(10, 3)), batch_size=5),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
    )
    assert engine.get_epsilon(DELTA) == 0.0
    train(*private, epochs=1)
    assert engine.get_epsilon(DELTA) == math.inf


def test_a_seeded_ledger_cannot_be_held_to_a_target():
    with pytest.warns(UserWarning, match="seed"):
        engine = PrivacyEngine(seed=1)
    train(*prepared(engine), epochs=1)
    assert engine.get_epsilon(DELTA) == math.inf
    with pytest.raises(PrivacyError, match="seeded"):
        prepared(engine, 5.0)
