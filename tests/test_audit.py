"""The audit: its bounds hold, come close, and see what is planted in the engine."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from ffa_kernels import cli, ops
from ffa_kernels.errors import ConfigError
from ffa_kernels.privacy.auditing import (
    audit,
    epsilon_of_mu,
    gaussian_mu,
    mu_of_epsilon,
    one_run_epsilon,
    one_run_p_value,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:PrivacyEngine"),
]

DELTA = 1e-6
EPSILONS = [1.0, 3.0, 8.0]
# The errors of all honest runs together, those of `make test-full`, are to stay below 5%.
CONFIDENCE = 1 - 0.05 / 60


def gaussian_scores(mu, count, seed):
    generator = np.random.default_rng(seed)
    included = generator.integers(0, 2, count).astype(bool)
    return mu * included + generator.standard_normal(count), included


# The statistics.


def test_p_values_are_those_of_the_paper():
    """Steinke, Nasr, Jagielski 2023: the examples of appendix D and of section 7."""
    for given, published in [
        ((1000, 100, 75, 1e-4), 0.673),
        ((100_000, 1510, 1439, 1e-5), 2.675),
    ]:
        m, r, v, delta = given
        assert one_run_p_value(m, r, v, published - 1e-3, delta) < 0.05
        assert one_run_p_value(m, r, v, published + 1e-3, delta) >= 0.05


@pytest.mark.parametrize(
    ("m", "r", "v", "epsilon", "delta"),
    [
        (50, 50, 50, 1.0, 1e-3),
        (200, 40, 33, 0.5, 1e-4),
        (200, 200, 150, 2.0, 1e-2),
        (9, 9, 0, 0.0, 0.1),
        (300, 300, 299, 6.0, 1e-6),
    ],
)
def test_p_value_is_the_formula_term_by_term(m, r, v, epsilon, delta):
    chance = 1 / (1 + math.exp(-epsilon))
    mass = [math.comb(r, k) * chance**k * (1 - chance) ** (r - k) for k in range(r + 1)]
    alpha = max((sum(mass[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    expected = min(1.0, sum(mass[v:]) + 2 * m * delta * alpha)
    assert one_run_p_value(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mu", [0.05, 0.3, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_epsilon_of_mu_is_where_the_gaussians_are_delta_apart(mu, delta):
    """Delta as the integral of what one density has beyond e^epsilon times the other."""
    epsilon = epsilon_of_mu(mu, delta)
    if epsilon == 0.0:
        assert 2 * norm.cdf(mu / 2) - 1 <= delta
        return
    x = np.linspace(-20, 40, 2_000_001)
    excess = np.maximum(norm.pdf(x - mu) - math.exp(epsilon) * norm.pdf(x), 0)
    assert np.trapezoid(excess, x) == pytest.approx(delta, rel=1e-4)
    assert mu_of_epsilon(epsilon, delta) == pytest.approx(mu, rel=1e-6)


def test_epsilon_and_mu_at_the_ends():
    assert epsilon_of_mu(0.0, DELTA) == 0.0
    assert epsilon_of_mu(math.inf, DELTA) == math.inf
    assert mu_of_epsilon(0.0, DELTA) == pytest.approx(2 * norm.ppf((1 + DELTA) / 2))


@pytest.mark.parametrize("mu", [0.0, 0.3, 2.0])
def test_the_bounds_hold_as_often_as_they_say_and_come_close(mu):
    """Each of 400 bounds of confidence 0.9 may exceed the truth: 40 do on average, 64 at most."""
    limit = binom.ppf(1 - 1e-4, 400, 0.1)
    runs = [gaussian_scores(mu, 4000, seed) for seed in range(400)]
    bounds = np.array([gaussian_mu(*run, 0.9) for run in runs])
    assert (bounds > mu).sum() <= limit
    assert np.median(bounds) >= mu - 0.1
    true = epsilon_of_mu(mu, DELTA)
    one_run = np.array([one_run_epsilon(*run, DELTA, 0.9) for run in runs[:40]])
    assert (one_run > true).sum() <= binom.ppf(1 - 1e-4, 40, 0.1)
    assert (one_run > 0).all() or mu == 0.0


def test_scores_that_tell_all_give_large_finite_bounds_and_none_give_zero():
    _, included = gaussian_scores(0.0, 5000, 1)
    assert 5 < gaussian_mu(included * 1.0, included, 0.95) < 10
    assert 4 < one_run_epsilon(included * 1.0, included, 0.0, 0.95) < 8
    for useless in (np.zeros(5000), -1.0 * included):
        assert gaussian_mu(useless, included, 0.95) == 0.0
        assert one_run_epsilon(useless, included, DELTA, 0.95) == 0.0


def test_bounds_know_nothing_of_scale_and_shift():
    scores, included = gaussian_scores(1.0, 3000, 2)
    moved = 8.0 * scores - 64.0
    assert gaussian_mu(moved, included, 0.95) == gaussian_mu(scores, included, 0.95) > 0.8
    assert one_run_epsilon(moved, included, DELTA, 0.95) == one_run_epsilon(
        scores, included, DELTA, 0.95
    )


@pytest.mark.parametrize(
    ("scores", "included", "confidence", "named"),
    [
        ([0.0, math.nan], [True, False], 0.9, "scores"),
        ([], [], 0.9, "scores"),
        ([[0.0]], [[True]], 0.9, "scores"),
        ([0.0, 1.0], [0, 1], 0.9, "included"),
        ([0.0, 1.0], [True], 0.9, "included"),
        ([0.0, 1.0], [True, False], 1.0, "confidence"),
    ],
)
def test_bad_scores(scores, included, confidence, named):
    for bound in (gaussian_mu, lambda s, i, c: one_run_epsilon(s, i, DELTA, c)):
        with pytest.raises(ConfigError, match=f"{named} is .*accepted"):
            bound(np.array(scores), np.array(included), confidence)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "target_epsilon"),
        ({"target_epsilon": 1.0, "noise_multiplier": 1.0}, "target_epsilon"),
        ({"target_epsilon": -1.0}, "target_epsilon"),
        ({"target_epsilon": 1.0, "poisson_sampling": False}, "target_epsilon"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"target_delta": 0.0}, "target_delta"),
        ({"steps": 0}, "steps"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"clipping": "none"}, "clipping"),
        ({"canaries": 5}, "canaries"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"confidence": 0.2}, "confidence"),
        ({"accountant": "gdp"}, "accountant"),
        ({"loss_scale": 3.0}, "loss_scale"),
        ({"seed": "a"}, "seed"),
        ({"device": "nowhere"}, "device"),
    ],
)
def test_bad_settings(settings, named):
    settings = {"canaries": 64, **settings}
    if named != "target_epsilon":
        settings = {"noise_multiplier": 1.0, **settings}
    with pytest.raises(ConfigError, match=f"{named} is .*accepted"):
        audit(**settings)


# Honest runs.


def assert_honest_and_close(epsilon, seed):
    report = audit(target_epsilon=epsilon, target_delta=DELTA, confidence=CONFIDENCE, seed=seed)
    assert epsilon * 0.98 < report.claimed_epsilon <= epsilon
    assert report.gaussian_epsilon <= report.claimed_epsilon
    assert 0 < report.one_run_epsilon <= report.claimed_epsilon
    assert not report.violated, report
    true = math.sqrt(report.steps) / report.noise_multiplier
    assert 0.8 * true <= report.mu <= true


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_bounds_of_an_honest_run_stay_below_the_claim_and_come_close(epsilon):
    assert_honest_and_close(epsilon, seed=0)


@pytest.mark.full
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("seed", range(1, 20))
def test_bounds_of_more_honest_runs(epsilon, seed):
    assert_honest_and_close(epsilon, seed)


# (settings, the least part of the true mu at rate 1 that must be found)
WAYS = {
    "per layer": ({"clipping": "per_layer", "canaries": 4096}, 0.7),
    "steps": ({"steps": 3, "canaries": 8192}, 0.85),
    "one piece": ({"canaries": 2000, "max_physical_batch_size": 2000}, 0.6),
    "scaled loss": ({"canaries": 8192, "loss_scale": 64.0, "loss_reduction": "sum"}, 0.8),
    "small bound": ({"canaries": 8192, "max_grad_norm": 1e-3}, 0.8),
    "a layer half used": ({"canaries": 5003}, 0.7),
    "no padding": ({"canaries": 8192, "pad_physical_batches": False}, 0.8),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_through_the_engine_is_honest(way):
    settings, least = WAYS[way]
    report = audit(noise_multiplier=1.5, accountant="rdp", seed=3, **settings)
    assert not report.violated, report
    true = math.sqrt(report.steps) / 1.5
    assert least * true <= report.mu <= true


def test_a_sampled_run_is_honest_and_its_bounds_positive():
    report = audit(noise_multiplier=1.0, sample_rate=0.1, steps=20, canaries=8192, seed=4)
    assert report.sample_rate == pytest.approx(0.1, rel=1e-2)
    assert not report.violated, report
    assert 0 < report.one_run_epsilon < report.claimed_epsilon
    assert 0.3 < report.gaussian_epsilon < report.claimed_epsilon


def test_batches_that_are_not_drawn_are_charged_at_half_their_noise():
    report = audit(noise_multiplier=3.0, poisson_sampling=False, canaries=8192, seed=5)
    twice = audit(noise_multiplier=1.5, canaries=8192, seed=5)
    assert report.claimed_epsilon == twice.claimed_epsilon
    assert 0 < report.mu <= 1 / 3


def test_without_noise_nothing_is_claimed_that_could_be_violated():
    report = audit(noise_multiplier=0.0, canaries=4096)
    assert report.claimed_epsilon == math.inf and not report.violated
    assert report.mu > 4 and math.isfinite(report.gaussian_epsilon)


def test_coins_are_tossed_anew_and_a_seed_repeats_all():
    settings = {"noise_multiplier": 1.0, "canaries": 1000}
    first, again = audit(**settings, seed=6), audit(**settings, seed=6)
    assert first == again
    assert len({audit(**settings).included for _ in range(8)}) > 1


def test_an_audit_leaves_the_callers_generators_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    audit(noise_multiplier=1.0, canaries=64)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpys).all()


def test_report_as_text_and_as_json():
    report = audit(noise_multiplier=1.0, canaries=1000, seed=7)
    text = str(report)
    for shown in ("1000 canaries", "ledger", "Gaussian", "one run", "Nothing found"):
        assert shown in text
    told = json.loads(json.dumps(report.as_dict()))
    assert told["violated"] is False and told["mu"] == report.mu
    assert told["claimed_epsilon"] == report.claimed_epsilon


# Noise that is not what it should be; for other faults, see test_planted_faults.


def scale_noise(monkeypatch, factor):
    """The noise that is drawn is `factor` of what the ledger is told."""
    for name in ("private_update", "private_step"):
        real = getattr(ops, name)

        def faulty(*args, noise_multiplier, real=real, **settings):
            return real(*args, noise_multiplier=factor * noise_multiplier, **settings)

        monkeypatch.setattr(ops, name, faulty)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_no_noise_is_seen_by_both_bounds(monkeypatch, epsilon):
    scale_noise(monkeypatch, 0.0)
    report = audit(target_epsilon=epsilon, target_delta=DELTA, confidence=0.95)
    assert report.claimed_epsilon <= epsilon
    assert report.claimed_epsilon < report.gaussian_epsilon < math.inf
    assert report.one_run_epsilon > report.claimed_epsilon
    assert report.violated and "NOT what the ledger says" in str(report)


@pytest.mark.parametrize("confidence", [0.999, pytest.param(CONFIDENCE, marks=pytest.mark.full)])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_half_of_the_noise_is_seen(monkeypatch, epsilon, confidence):
    scale_noise(monkeypatch, 0.5)
    report = audit(target_epsilon=epsilon, confidence=confidence, canaries=32768)
    assert report.gaussian_epsilon > report.claimed_epsilon and report.violated


def test_noise_that_is_drawn_twice_is_seen(monkeypatch):
    real = ops.private_update

    def faulty(params, sums, exp_avgs, exp_avg_sqs, steps, rng_state, *rest, **settings):
        rng_state[4] = 7
        real(params, sums, exp_avgs, exp_avg_sqs, steps, rng_state, *rest, **settings)

    monkeypatch.setattr(ops, "private_update", faulty)
    report = audit(noise_multiplier=1.0, steps=2, canaries=8192)
    assert report.noise_growth == pytest.approx(2.0, rel=1e-3)
    assert report.noise_repeated and report.violated and "REPEATED" in str(report)


def test_the_command_says_what_was_found_and_exits_with_it(monkeypatch, capsys):
    arguments = ["audit", "--canaries", "32768", "--json"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["violated"] is False
    scale_noise(monkeypatch, 0.5)
    assert cli.main(arguments[:-1]) == 1
    assert "NOT what the ledger says" in capsys.readouterr().out
    assert cli.main(["audit", "--epsilon", "-1"]) == 2
    assert "target_epsilon is -1.0" in capsys.readouterr().err
