"""An audit: how much privacy a run of this library has lost for sure, beside what its ledger says.

Canaries are records whose gradient is one coordinate of one B. Each is in the data set by the toss
of a coin that the training does not know, and goes the way of every record: loader, backward,
clipping, noise, ledger. Who could tell the coins from what was released has a lower bound on
epsilon. A bound above the ledger's claim is a fault; one below it proves nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ffa_kernels.errors import ConfigError, is_number
from ffa_kernels.nn.linear import FFALinear
from ffa_kernels.privacy.accounting import epsilon, noise_multiplier_for
from ffa_kernels.privacy.engine import PrivacyEngine
from ffa_kernels.privacy.keys import generators_kept
from ffa_kernels.privacy.optimizer import PrivateOptimizer

_Array = npt.NDArray[np.float64]
_Flags = npt.NDArray[np.bool_]

_RANK = 8
# Coordinates of one B. A record's gradient is as large, so that more of them cost time; with fewer
# the layers, which each physical batch taps, become many.
_WIDTH = 2048
# A canary's norm in units of the bound: clipping has something to do.
_RAW_NORM = 10.0
# Of the canaries, how many are guessed, and the share of the error probability that goes with it.
_GUESSED = ((1.0, 0.5), (1 / 4, 0.25), (1 / 16, 0.25))
_MOST_EPSILON = 1e4
_NORMAL = NormalDist()


@dataclass(frozen=True)
class AuditReport:
    """What an audit has found.

    Attributes:
        delta: of the three epsilons.
        claimed_epsilon: the ledger's, after the run.
        gaussian_epsilon: at least this was lost, by `mu`.
        mu: lower bound on mu of Gaussian DP, over all canaries or those of one layer.
        one_run_epsilon: at least this was lost, whatever the mechanism.
        noise_growth: variance of the steps' summed noise over the sum of their variances; 1 where
            the steps' noise is independent.
        noise_tolerance: how far from 1 chance may bring that.
        confidence: with which each of the three findings holds by itself.
        noise_multiplier, sample_rate, steps, clipping: of the run.
        canaries: how many coins were tossed; `included` of them were in the data set.
    """

    delta: float
    claimed_epsilon: float
    gaussian_epsilon: float
    mu: float
    one_run_epsilon: float
    noise_growth: float
    noise_tolerance: float
    confidence: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    clipping: str
    canaries: int
    included: int

    @property
    def noise_repeated(self) -> bool:
        """Whether steps had noise in common, which their difference would be rid of."""
        return abs(self.noise_growth - 1.0) > self.noise_tolerance

    @property
    def violated(self) -> bool:
        """Whether the run was not what the ledger says."""
        found = max(self.gaussian_epsilon, self.one_run_epsilon)
        return found > self.claimed_epsilon or self.noise_repeated

    def as_dict(self) -> dict[str, Any]:
        """All fields and `violated`."""
        return {**dataclasses.asdict(self), "violated": self.violated}

    def __str__(self) -> str:
        noise = "REPEATED" if self.noise_repeated else "independent"
        verdict = (
            "The run is NOT what the ledger says."
            if self.violated
            else "Nothing found that the ledger does not say."
        )
        lines = [
            f"Audit: steps {self.steps} at rate {self.sample_rate:g}, noise multiplier "
            f"{self.noise_multiplier:.4g}, {self.clipping} clipping; {self.included} of "
            f"{self.canaries} canaries were in the data. Each finding holds with probability "
            f"{self.confidence:.6g}.",
            f"  ledger    epsilon {self.claimed_epsilon:.4g} at delta {self.delta:g}",
            f"  Gaussian  epsilon at least {self.gaussian_epsilon:.4g} (mu at least {self.mu:.4g})",
            f"  one run   epsilon at least {self.one_run_epsilon:.4g}",
            f"  noise     {noise} between steps (variance {self.noise_growth:.4g}, 1 within "
            f"{self.noise_tolerance:.2g})",
            verdict,
        ]
        if self.steps == 1:
            # It has no other to share its noise with.
            del lines[-2]
        return "\n".join(lines)


def audit(
    *,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    target_delta: float = 1e-6,
    steps: int = 1,
    sample_rate: float = 1.0,
    canaries: int | None = None,
    max_grad_norm: float = 1.0,
    clipping: str = "flat",
    max_physical_batch_size: int = 512,
    device: torch.device | str = "cpu",
    accountant: str = "prv",
    confidence: float = 0.999,
    seed: int | None = None,
    **options: Any,
) -> AuditReport:
    """Trains canaries privately, and bounds from below what that has lost.

    The Gaussian bound takes the mechanism for a Gaussian, which it is at rate 1. Below, its worst
    lies farther out than where mu is measured, and the bound is modest.

    Args:
        target_epsilon: the noise is the least that keeps the run within it; or else
        noise_multiplier: the noise, as in `make_private`. One of the two is given.
        target_delta: in (0, 1). However much was lost, the one-run bound stays below about
            log((1 - confidence) / (4 target_delta)).
        steps: how many are made.
        sample_rate: each canary's chance to be in a step, in (0, 1]; at 1 the bounds are tight.
        canaries: 64 or more; 131072 by default, 16384 with clipping "per_layer", where each uses
            all layers and time grows with their square. Bounds come closer as its root grows.
        max_grad_norm: C.
        clipping: "flat" or "per_layer".
        max_physical_batch_size, options: as in `PrivacyEngine.make_private`.
        device: where the run is made.
        accountant: "prv" or "rdp".
        confidence: in [0.5, 1), of each finding. At rate 1 the Gaussian bound is so close that an
            honest run exceeds its claim nearly as often as this allows.
        seed: for tests: coins, noise and sampling can be repeated.

    Raises:
        ConfigError: an argument that is not accepted.
    """
    one = (target_epsilon is None) != (noise_multiplier is None)
    _require(one, "target_epsilon", target_epsilon, "a number, or None and a noise_multiplier")
    fits = target_epsilon is None or options.get("poisson_sampling", True)
    _require(fits, "target_epsilon", target_epsilon, "None where poisson_sampling=False")
    _check_delta("target_delta", target_delta)
    _require(isinstance(steps, int) and steps >= 1, "steps", steps, "an integer of 1 or more")
    fits = is_number(sample_rate) and 0 < sample_rate <= 1
    _require(fits, "sample_rate", sample_rate, "a number in (0, 1]")
    _require(clipping in ("flat", "per_layer"), "clipping", clipping, "flat, per_layer")
    if canaries is None:
        canaries = 131072 if clipping == "flat" else 16384
    fits = isinstance(canaries, int) and canaries >= 64
    _require(fits, "canaries", canaries, "None or an integer of 64 or more")
    fits = is_number(max_grad_norm) and 0 < max_grad_norm < math.inf
    _require(fits, "max_grad_norm", max_grad_norm, "a positive number")
    _check_confidence(confidence)
    fits = seed is None or (isinstance(seed, int) and seed >= 0)
    _require(fits, "seed", seed, "None, or an integer of 0 or more")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as unknown:
        raise ConfigError(f"device is {device!r}; accepted: one that PyTorch has here") from unknown

    coins = np.random.default_rng(seed).integers(0, 2, canaries).astype(bool)
    inside = np.flatnonzero(coins).tolist()
    batch_size = max(1, round(sample_rate * len(inside)))
    if target_epsilon is not None:
        rate = batch_size / len(inside)
        noise_multiplier = noise_multiplier_for(
            target_epsilon, target_delta, rate, steps, accountant
        )
    assert noise_multiplier is not None
    engine = PrivacyEngine(accountant=accountant, seed=seed)
    # Frozen weights, loaders and the engine draw from generators that are the user's.
    with generators_kept():
        model = _Canaries(canaries, clipping == "per_layer", _RAW_NORM * max_grad_norm).to(device)
        # With lr = L a step moves B by the noised sum itself.
        _, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.trained(), lr=float(batch_size)),
            data_loader=DataLoader(cast(Any, inside), batch_size=batch_size),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            max_physical_batch_size=max_physical_batch_size,
            **options,
        )
        mean_loss = options.get("loss_reduction", "mean") == "mean"
        total, squares = _released(model, optimizer, loader, steps, mean_loss)
    error, outside = 1 - confidence, ~coins
    mu = _worst_mu(total, coins, np.arange(canaries) // model.width, error)
    growth = 1.0
    if noise_multiplier > 0 and squares[outside].any():
        growth = float((total[outside] ** 2).sum() / squares[outside].sum())
    return AuditReport(
        delta=target_delta,
        # Not ledger.epsilon, which is infinite where a seed was given.
        claimed_epsilon=epsilon(engine.ledger.history, target_delta, accountant),
        gaussian_epsilon=epsilon_of_mu(mu, target_delta),
        mu=mu,
        one_run_epsilon=one_run_epsilon(total, coins, target_delta, confidence),
        noise_growth=growth,
        noise_tolerance=_NORMAL.inv_cdf(1 - error / 2) * math.sqrt(2 / outside.sum()),
        confidence=confidence,
        noise_multiplier=noise_multiplier,
        sample_rate=optimizer.private_step.mechanism.sample_rate,
        steps=steps,
        clipping=clipping,
        canaries=canaries,
        included=len(inside),
    )


def _released(
    model: _Canaries, optimizer: PrivateOptimizer, loader: Any, steps: int, mean_loss: bool
) -> tuple[_Array, _Array]:
    """What the steps moved each canary's coordinate by: the sum, and the sum of squares."""
    total, squares = np.zeros(model.canaries), np.zeros(model.canaries)
    done, before = 0, model.seen()
    while done < steps:
        for numbers in loader:
            losses = model(numbers)
            loss = optimizer.scale(losses.mean() if mean_loss else losses.sum())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if optimizer.private_step.steps == done:
                # A piece of a draw, of which nothing is released yet.
                continue
            now = model.seen()
            total += before - now
            squares += (before - now) ** 2
            done, before = optimizer.private_step.steps, now
            if done == steps:
                break
    return total, squares


class _Canaries(nn.Module):
    """Layers in whose B each canary has a coordinate of its own: in one layer, or in every one.

    Flat clipping bounds all layers together, so that one coordinate shows the whole norm C. Layer
    by layer each gives up its own share, and only a canary in all of them shows C.
    """

    def __init__(self, canaries: int, everywhere: bool, norm: float) -> None:
        super().__init__()
        self.canaries, self.everywhere, self.norm = canaries, everywhere, norm
        self.width = canaries if everywhere else min(_WIDTH, canaries)
        self.rows = math.ceil(self.width / _RANK)
        count = 2 if everywhere else math.ceil(canaries / self.width)
        self.layers = nn.ModuleList(
            FFALinear(_RANK, self.rows, _RANK, alpha=_RANK, bias=False) for _ in range(count)
        )

    def trained(self) -> list[nn.Parameter]:
        return [layer.lora_B for layer in cast(list[FFALinear], list(self.layers))]

    def forward(self, numbers: Tensor) -> Tensor:
        """Canaries' numbers (n,) to their losses (n,)."""
        numbers = numbers.to(self.trained()[0].device)
        home, place = numbers // self.width, numbers % self.width
        row, column = place // _RANK, place % _RANK
        picked = torch.arange(self.rows, device=numbers.device) == row[:, None]
        losses = torch.zeros(numbers.shape, device=numbers.device)
        # A layer that none of these canaries uses is not run: its gradient would be n times zeros.
        for k in range(len(self.layers)) if self.everywhere else sorted(set(home.tolist())):
            layer = cast(FFALinear, self.layers[k])
            # A's rows are orthonormal: h = x A^T is one at `column`, and zero elsewhere.
            x = layer.lora_A[column]
            if not self.everywhere:
                x = x * (home == k)[:, None]
            losses = losses + (layer(x) * picked).sum(dim=1)
        return self.norm * losses

    def seen(self) -> _Array:
        """Where the canaries' coordinates stand, (canaries,): the mean over the layers of each."""
        values = torch.stack([B.detach().flatten() for B in self.trained()]).double().cpu()
        if self.everywhere:
            return values.mean(dim=0).numpy()[: self.canaries]
        return values[:, : self.width].flatten().numpy()[: self.canaries]


def one_run_epsilon(scores: _Array, included: _Flags, delta: float, confidence: float) -> float:
    """The lower bound on epsilon of Steinke, Nasr, Jagielski (arXiv 2305.08846, theorem 5.2).

    It holds for any mechanism, and however the scores depend on each other. A canary's coin is
    guessed by the side of the scores' centre on which its score lies; all are guessed, and the
    quarter and the sixteenth that lie farthest out, with half, a quarter and a quarter of the error
    probability. Fixed beforehand, these allow the best of the three bounds. However much the
    scores tell, it stays below about log((1 - confidence) / (4 delta)).

    Args:
        scores: (m,), higher where the canary is thought to be in the data; not made from coins.
        included: (m,), the coins: fair and independent.
        delta: in [0, 1), of the bound.
        confidence: in [0.5, 1).

    Returns:
        A number that is above the mechanism's epsilon at `delta` with probability 1 - confidence
        at most; 0 where the scores tell nothing.

    Raises:
        ConfigError: an argument that is not accepted.
    """
    scores, included = _checked(scores, included, confidence)
    _require(is_number(delta) and 0 <= delta < 1, "delta", delta, "a number in [0, 1)")
    m, centre = len(scores), _centre(scores)
    correct = ((scores > centre) == included)[np.argsort(-np.abs(scores - centre), kind="stable")]
    best = 0.0
    for part, share in _GUESSED:
        r = max(1, round(part * m))
        v = int(correct[:r].sum())
        error = share * (1 - confidence)

        def rejected(e: float, r: int = r, v: int = v, error: float = error) -> bool:
            return one_run_p_value(m, r, v, e, delta) < error

        best = max(best, _last(rejected))
    return best


def one_run_p_value(
    canaries: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """How probable as many correct guesses are, at most, under (epsilon, delta)-DP.

    P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i with W ~ Binomial(r, e^epsilon / (1 +
    e^epsilon)): Steinke, Nasr, Jagielski (arXiv 2305.08846), theorem 5.2 and appendix D.

    Args:
        canaries: m.
        guesses: r <= m, fixed before the coins are looked at.
        correct: v <= r.
        epsilon, delta: of the mechanism.
    """
    from scipy.stats import binom

    chance = 1 / (1 + math.exp(-epsilon))
    spread = math.sqrt(guesses * chance * (1 - chance))
    # Farther down there is no more mass to gain, while i grows.
    lowest = max(0, math.floor(guesses * chance - 12 * spread - 12))
    counts = np.arange(correct - 1, lowest - 1, -1)
    gains = np.cumsum(binom.pmf(counts, guesses, chance)) / np.arange(1, len(counts) + 1)
    tail = float(binom.sf(correct - 1, guesses, chance))
    return min(1.0, tail + 2 * canaries * delta * float(gains.max(initial=0.0)))


def gaussian_mu(scores: _Array, included: _Flags, confidence: float) -> float:
    """A lower bound on mu of Gaussian DP, for scores that depend on nothing but their own coin.

    No test of a mu-GDP mechanism has mu < Phi^-1(1 - FPR) - Phi^-1(FNR) (Dong, Roth, Su 2022; Nasr
    et al., arXiv 2302.07956, section 4), so none guesses fair coins better than Phi(mu / 2). Given
    all scores, coins are independent: guesses by a threshold that was chosen from the scores alone
    are right at most as often as Binomial(m, Phi(mu / 2)), whose parameter Clopper and Pearson
    bound. One count of both errors needs less than bounds on each, and no correction for the
    threshold.

    Args:
        scores, included, confidence: as in `one_run_epsilon`.

    Returns:
        mu, 0 or more and finite.

    Raises:
        ConfigError: an argument that is not accepted.
    """
    from scipy.stats import beta

    scores, included = _checked(scores, included, confidence)
    correct = int(((scores > _centre(scores)) == included).sum())
    if correct == 0:
        return 0.0
    accuracy = float(beta.ppf(1 - confidence, correct, len(scores) - correct + 1))
    return max(0.0, 2 * _NORMAL.inv_cdf(accuracy))


def _worst_mu(scores: _Array, included: _Flags, layers: npt.NDArray[Any], error: float) -> float:
    """The highest bound over all canaries, with half of the error, and over each layer's."""
    numbers = np.unique(layers)
    if len(numbers) == 1:
        return gaussian_mu(scores, included, 1 - error)
    alone = [
        gaussian_mu(scores[layers == k], included[layers == k], 1 - error / 2 / len(numbers))
        for k in numbers
    ]
    return max(gaussian_mu(scores, included, 1 - error / 2), *alone)


def epsilon_of_mu(mu: float, delta: float) -> float:
    """The exact epsilon at `delta` of mu-Gaussian DP.

    delta(epsilon) = Phi(-epsilon / mu + mu / 2) - e^epsilon Phi(-epsilon / mu - mu / 2): Balle and
    Wang 2018, theorem 8; Dong, Roth, Su 2022, corollary 1.

    Args:
        mu: 0 or more; sqrt(T) / sigma after T steps at rate 1.
        delta: in (0, 1).

    Raises:
        ConfigError: an argument that is not accepted.
    """
    _require(is_number(mu) and mu >= 0, "mu", mu, "a number of 0 or more")
    _check_delta("delta", delta)
    if mu == 0:
        return 0.0
    return _last(lambda e: _gaussian_delta(e, mu) > delta)


def mu_of_epsilon(epsilon: float, delta: float) -> float:
    """The mu whose `epsilon_of_mu` at `delta` is `epsilon`, 0 or more and finite.

    Raises:
        ConfigError: an argument that is not accepted.
    """
    fits = is_number(epsilon) and 0 <= epsilon < math.inf
    _require(fits, "epsilon", epsilon, "a number of 0 or more")
    _check_delta("delta", delta)
    return _last(lambda mu: mu == 0 or _gaussian_delta(epsilon, mu) <= delta)


def _gaussian_delta(e: float, mu: float) -> float:
    from scipy.special import log_ndtr

    first, second = log_ndtr(-e / mu + mu / 2), e + log_ndtr(-e / mu - mu / 2)
    return float(math.exp(first) - math.exp(second))


def _last(holds: Callable[[float], bool]) -> float:
    """The largest number up to which `holds` is true, rounded down; 0 where it never is."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2 * high
        if high > _MOST_EPSILON:
            return math.inf
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _centre(scores: _Array) -> float:
    """Midway between the quartiles: between the two groups where they lie apart."""
    return float(np.quantile(scores, [0.25, 0.75]).mean())


def _checked(scores: object, included: object, confidence: object) -> tuple[_Array, _Flags]:
    values, coins = np.asarray(scores, dtype=np.float64), np.asarray(included)
    fits = values.ndim == 1 and len(values) > 0 and bool(np.isfinite(values).all())
    _require(fits, "scores", f"of shape {values.shape}", "finite numbers, (m,)")
    fits = coins.dtype == np.bool_ and coins.shape == values.shape
    _require(fits, "included", f"{coins.dtype} {coins.shape}", f"bool {values.shape}, as scores")
    _check_confidence(confidence)
    return values, coins


def _check_delta(name: str, value: object) -> None:
    _require(isinstance(value, float) and 0 < value < 1, name, value, "a number in (0, 1)")


def _check_confidence(value: object) -> None:
    _require(is_number(value) and 0.5 <= value < 1, "confidence", value, "a number in [0.5, 1)")


def _require(fits: object, name: str, value: object, accepted: str) -> None:
    if not fits:
        raise ConfigError(f"{name} is {value!r}; accepted: {accepted}")
