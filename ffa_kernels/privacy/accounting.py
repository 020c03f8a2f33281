"""Epsilon from what was released, and the noise that a target epsilon needs.

The accountants are Opacus'; this library only keeps their history honest (see `ledger`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence

from ffa_kernels.errors import ConfigError, PrivacyError

ACCOUNTANTS = ("prv", "rdp")
# (noise multiplier, sample rate, steps), as Opacus' accountants keep it.
History = Sequence[tuple[float, float, int]]

# More than this is no training: what is left of a target is as good as spent.
_MAX_NOISE = 1e3
# The PRV's memory grows with epsilon * sqrt(steps): some 2 GB at this bound, without limit beyond.
_MAX_PRV_WORK = 1e4
_MAX_PRV_EPSILON = 200.0


def check_accountant(name: object) -> str:
    """`name` if it is an accountant that never understates (Opacus' "gdp" can).

    Raises:
        ConfigError: it is not.
    """
    if name not in ACCOUNTANTS:
        raise ConfigError(f"accountant is {name!r}; accepted: {', '.join(ACCOUNTANTS)}")
    return str(name)


def check_delta(target_delta: object, records: int) -> None:
    """Raises ConfigError unless `target_delta` promises something to each of so many records."""
    if not isinstance(target_delta, float) or not 0 < target_delta < 1 / records:
        raise ConfigError(
            f"target_delta is {target_delta!r}; accepted: above 0 and below 1 / {records}, the "
            "number of records"
        )


def merged(history: Iterable[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The history with steps of equal noise and rate added together."""
    steps: dict[tuple[float, float], int] = {}
    for noise_multiplier, sample_rate, count in history:
        key = (noise_multiplier, sample_rate)
        steps[key] = steps.get(key, 0) + count
    return [(*key, count) for key, count in steps.items() if count > 0]


def epsilon(history: History, delta: float, accountant: str = "prv") -> float:
    """The epsilon at `delta` of all releases in `history` together.

    Args:
        history: (noise multiplier, Poisson sample rate, steps) entries; rate 1 is no sampling.
        delta: in (0, 1).
        accountant: "prv" (Gopi, Lee, Wutschitz 2021), which gives way to "rdp" (Mironov 2017)
            where it would need gigabytes: an epsilon above 200, or millions of steps.

    Returns:
        An upper bound; infinity when a step had no noise, 0 when nothing was released.

    Raises:
        ConfigError: an argument that is not accepted.
    """
    check_accountant(accountant)
    if not isinstance(delta, float) or not 0 < delta < 1:
        raise ConfigError(f"delta is {delta!r}; accepted: a number in (0, 1)")
    entries = merged(history)
    if not entries:
        return 0.0
    if any(noise_multiplier == 0 for noise_multiplier, _, _ in entries):
        return math.inf
    return _epsilon(tuple(sorted(entries)), delta, accountant)


def _surely_light(history: History) -> bool:
    """Whether the PRV's work is small beyond doubt, by the central-limit mu (Dong, Roth, Su 2022).

    Epsilon is about mu^2 / 2 + 5 mu: below 40 at the bound here.
    """
    if any(noise_multiplier < 0.1 for noise_multiplier, _, _ in history):
        return False
    squares = [steps * q * q * math.expm1(noise**-2) for noise, q, steps in history]
    return sum(squares) < 25.0 and sum(steps for _, _, steps in history) <= 10_000


@functools.lru_cache(maxsize=1 << 16)
def _rdp_of_a_step(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """Opacus' RDP of one step."""
    from opacus.accountants.analysis.rdp import compute_rdp

    (rdp,) = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=[order])
    return float(rdp)


def _rdp_epsilon(history: History, delta: float) -> float:
    """As Opacus' RDPAccountant has it: the least bound of its orders.

    It tries all 151, most of them slow. But (order - 1) rdp is convex in the order (van Erven and
    Harremoes 2014), so that each bound is convex in 1 / (order - 1), Balle's terms included: the
    least one is where they cease to fall.
    """
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    orders = sorted(RDPAccountant.DEFAULT_ALPHAS)

    @functools.cache
    def bound(k: int) -> float:
        rdp = sum(steps * _rdp_of_a_step(noise, rate, orders[k]) for noise, rate, steps in history)
        spent, _ = get_privacy_spent(orders=[orders[k]], rdp=[rdp], delta=delta)
        return math.inf if math.isnan(spent) else float(spent)

    low, high = 0, len(orders) - 1
    while low < high:
        middle = (low + high) // 2
        # Large orders are the ones that overflow.
        if bound(middle + 1) < bound(middle):
            low = middle + 1
        else:
            high = middle
    return bound(low) if math.isfinite(bound(low)) else min(map(bound, range(len(orders))))


@functools.lru_cache(maxsize=1024)
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float, accountant: str) -> float:
    from opacus.accountants import PRVAccountant

    if accountant == "prv" and not _surely_light(history):
        looser = _epsilon(history, delta, "rdp")
        work = looser * math.sqrt(sum(steps for _, _, steps in history))
        if looser > _MAX_PRV_EPSILON or work > _MAX_PRV_WORK:
            return looser
    with warnings.catch_warnings():
        # At rate 1 the PRV takes log(0) on the way; a note on RDP orders is no news either.
        warnings.simplefilter("ignore")
        try:
            if accountant == "rdp":
                value = _rdp_epsilon(history, delta)
            else:
                counter = PRVAccountant()
                counter.history = list(history)
                value = float(counter.get_epsilon(delta))
        except (ValueError, RuntimeError, OverflowError, MemoryError) as error:
            if accountant == "rdp":
                raise PrivacyError(f"accountant: rdp cannot account {history}: {error}") from error
            # Too little noise for the PRV's grid: RDP is looser, and always answers.
            return _epsilon(history, delta, "rdp")
    return value if not math.isnan(value) else math.inf


def noise_multiplier_for(
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "prv",
    history: History = (),
) -> float:
    """The least noise with which `steps` more steps keep the total within the target.

    Args:
        target_epsilon: for `history` and the new steps together.
        target_delta: in (0, 1).
        sample_rate: the new steps' Poisson rate in (0, 1], 1 for no amplification.
        steps: how many new steps, 1 or more.
        accountant: as in `epsilon`.
        history: what has been released already.

    Returns:
        A noise multiplier, rounded up by less than 0.1%.

    Raises:
        PrivacyError: the history alone has spent the target, or no noise is enough.
        ConfigError: an argument that is not accepted.
    """
    if not isinstance(target_epsilon, (int, float)) or not 0 < target_epsilon < math.inf:
        raise ConfigError(f"target_epsilon is {target_epsilon!r}; accepted: a positive number")
    if not 0 < sample_rate <= 1:
        raise ConfigError(f"sample_rate is {sample_rate!r}; accepted: a number in (0, 1]")
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps is {steps!r}; accepted: an integer of 1 or more")
    spent = epsilon(history, target_delta, accountant)
    if spent >= target_epsilon:
        raise PrivacyError(
            f"target_epsilon {target_epsilon:g} is already spent: the ledger holds "
            f"epsilon {spent:.4g} at delta {target_delta:g}"
        )

    def total(noise_multiplier: float) -> float:
        return epsilon([*history, (noise_multiplier, sample_rate, steps)], target_delta, accountant)

    guess = 1.0
    if accountant == "prv":
        # RDP's answer is at hand at once, and a little above.
        with contextlib.suppress(PrivacyError):
            guess = 0.95 * noise_multiplier_for(
                target_epsilon, target_delta, sample_rate, steps, "rdp", history
            )
    noise = _least(total, target_epsilon, guess)
    if noise is None:
        raise PrivacyError(
            f"target_epsilon {target_epsilon:g} leaves too little after the {spent:.4g} that "
            f"the ledger holds: no noise makes {steps} more steps fit"
        )
    return noise


def _least(total: Callable[[float], float], target: float, guess: float) -> float | None:
    """The least noise up to _MAX_NOISE with `total` within `target`, but for 0.1%; None of none.

    Each evaluation may take seconds: lines through the last two points in logarithms, between
    bounds that bisection moves where lines do not.
    """
    low, high = (0.0, math.inf), (math.inf, 0.0)  # (noise, epsilon) of too little and of enough
    noise, turn, least = min(guess, _MAX_NOISE), 0, 1.005
    while True:
        spent = total(noise)
        if spent <= target:
            high = noise, spent
        else:
            low = noise, spent
        if low[0] >= _MAX_NOISE:
            return None
        if math.isfinite(high[0]) and high[0] - low[0] <= 1e-3 * high[0]:
            return high[0]
        if low[0] == 0.0 or math.isinf(high[0]):
            # Epsilon falls about as noise^-1.3; not far at once, for what it does is not a law.
            known = 0 < spent < math.inf
            factor = (spent / target) ** (1 / 1.3) if known else 0.5 if spent <= target else 2.0
            factor = min(max(factor, 0.5), 2.0)
            noise *= min(factor, 1 / least) if spent <= target else max(factor, least)
            # Beside a history that has spent nearly all, epsilon hardly falls: longer each time.
            noise, least = min(noise, _MAX_NOISE), min(least**2, 2.0)
            continue
        turn += 1
        if turn % 4 == 0 or math.isinf(low[1]) or high[1] <= 0.0:
            noise = (low[0] + high[0]) / 2
            continue
        slope = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
        line = low[0] * math.exp(math.log(target / low[1]) / slope)
        # Beside it, now above and now below, to close in from both ends.
        line *= 1 + (4e-4 if turn % 2 else -4e-4)
        noise = min(max(line, low[0] * (1 + 2e-4)), high[0] * (1 - 2e-4))
