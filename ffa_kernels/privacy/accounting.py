"""Epsilon from what was released, and the noise that a target epsilon needs.

The accountants are Opacus'; this library only keeps their history honest (see `ledger`).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence

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


@functools.lru_cache(maxsize=1024)
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float, accountant: str) -> float:
    from opacus.accountants import create_accountant

    if accountant == "prv" and not _surely_light(history):
        looser = _epsilon(history, delta, "rdp")
        work = looser * math.sqrt(sum(steps for _, _, steps in history))
        if looser > _MAX_PRV_EPSILON or work > _MAX_PRV_WORK:
            return looser
    counter = create_accountant(accountant)
    counter.history = list(history)
    with warnings.catch_warnings():
        # At rate 1 the PRV takes log(0) on the way; a note on RDP orders is no news either.
        warnings.simplefilter("ignore")
        try:
            value = float(counter.get_epsilon(delta=delta))
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

    high = 1.0
    while total(high) > target_epsilon:
        high *= 2
        if high > _MAX_NOISE:
            raise PrivacyError(
                f"target_epsilon {target_epsilon:g} leaves too little after the {spent:.4g} that "
                f"the ledger holds: no noise makes {steps} more steps fit"
            )
    low = high / 2 if high > 1 else 0.0
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if total(middle) > target_epsilon:
            low = middle
        else:
            high = middle
    return high
