"""Adaptive clipping: the bound follows a quantile of the records' norms, at no cost in epsilon.

After Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping",
NeurIPS 2021 (arXiv 1905.03871), with records in the place of users.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from ffa_kernels.backends.grid import GRID_BITS
from ffa_kernels.errors import ConfigError, is_number

# Public, and far inside what the grid of the sums and fp32 can hold: a quantile that no bound
# reaches (all gradients zero, say) would move C for ever.
_LEAST_BOUND, _MOST_BOUND = 2.0**-100, 2.0**100
# As for all noise: what a 64-bit sum holds, whatever C becomes.
_MOST_NOISE = 2.0**25


@dataclass(frozen=True)
class AdaptiveClipping:
    """The clipping bound C follows a quantile of the norms of the records' gradients.

    Beside the clipped gradients, a step releases the sum over the drawn records of b_i - 1/2, where
    b_i = [|G_i| <= C], with Gaussian noise of standard deviation sigma_b; a record more or less
    moves it by 1/2 at most. With a noise multiplier z for the two together, the gradients get
    (z^-2 - (2 sigma_b)^-2)^(-1/2), which is more (theorem 1): the pair is one Gaussian mechanism
    of multiplier z, and that is what the ledger is charged for. Then

        C <- C exp(-learning_rate (sum / L + 1/2 - target_quantile)),    L the expected batch size,

    within [2^-100, 2^100]. C is computed from what was released, and is no secret.

    Args:
        target_quantile: share of the records that is to be within C, in (0, 1).
        learning_rate: of log C.
        count_noise_multiplier: sigma_b, in records; above z / 2. By default L / 20, as in the
            paper. Without noise on the gradients there is none here either.

    Raises:
        ConfigError: an argument that is not accepted.
    """

    target_quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        given = self.target_quantile
        if not is_number(given) or not 0 < given < 1:
            raise ConfigError(f"target_quantile is {given!r}; accepted: a number between 0 and 1")
        given = self.learning_rate
        if not is_number(given) or not 0 < given < math.inf:
            raise ConfigError(f"learning_rate is {given!r}; accepted: a finite number above 0")
        noise = self.count_noise_multiplier
        if noise is not None and (not is_number(noise) or not 0 < noise < _MOST_NOISE):
            raise ConfigError(
                f"count_noise_multiplier is {noise!r}; accepted: None, or a number above 0 and "
                "below 2^25"
            )

    def count_noise(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """sigma_b, the standard deviation of the noise on the sum of b_i - 1/2."""
        if noise_multiplier == 0:
            return 0.0
        given = self.count_noise_multiplier
        return expected_batch_size / 20 if given is None else float(given)

    def gradient_noise(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """The gradients' own noise multiplier, rounded up; infinite where sigma_b is too small."""
        if noise_multiplier == 0:
            return 0.0
        # Exact, since the difference of two numbers that are nearly equal decides.
        z = Fraction(noise_multiplier) ** 2
        count = (2 * Fraction(self.count_noise(noise_multiplier, expected_batch_size))) ** 2
        if count <= z:
            return math.inf
        return noise_multiplier * math.sqrt(count / (count - z)) * (1 + 2.0**-50)

    def check(
        self,
        clipping: str,
        max_grad_norm: tuple[float, ...],
        noise_multiplier: float,
        expected_batch_size: float,
    ) -> None:
        """Raises ConfigError unless it can be used with these arguments of make_private."""
        if clipping != "flat":
            raise ConfigError(
                f'adaptive_clipping is given with clipping={clipping!r}; accepted: "flat", which '
                "has one bound, or adaptive_clipping=None"
            )
        check_bound(*max_grad_norm)
        if self.gradient_noise(noise_multiplier, expected_batch_size) >= _MOST_NOISE:
            sigma = self.count_noise(noise_multiplier, expected_batch_size)
            raise ConfigError(
                f"count_noise_multiplier is {sigma:g}"
                + (" (batch size / 20)" if self.count_noise_multiplier is None else "")
                + f" with a noise multiplier of {noise_multiplier:g}; accepted: above "
                f"{noise_multiplier / 2:g}, half of that, or the count alone would cost more"
            )

    def noised(
        self,
        doubled_count: int,
        gaussian: float,
        noise_multiplier: float,
        expected_batch_size: float,
    ) -> float:
        """What is released of the sum of 2 b_i - 1, an integer that a record moves by 1 at most.

        The noise is rounded to the grid of a bound of 1, on which the integers lie as well.
        """
        noise = 2 * self.count_noise(noise_multiplier, expected_batch_size) * gaussian
        steps = (doubled_count << GRID_BITS) + round(math.ldexp(noise, GRID_BITS))
        return math.ldexp(steps, -GRID_BITS)

    def next_bound(self, bound: float, noised: float, expected_batch_size: float) -> float:
        """C of the next step, from C of this one and what this one released."""
        fraction = noised / (2 * expected_batch_size) + 0.5
        # In logarithms, where no fraction is too large.
        log_bound = math.log(bound) - self.learning_rate * (fraction - self.target_quantile)
        least, most = math.log(_LEAST_BOUND), math.log(_MOST_BOUND)
        # Again, for exp(log(x)) is not always x.
        bound = math.exp(min(max(log_bound, least), most))
        return min(max(bound, _LEAST_BOUND), _MOST_BOUND)


def check_bound(max_grad_norm: object) -> float:
    """`max_grad_norm` if adaptive clipping can be at it; ConfigError if not."""
    if not is_number(max_grad_norm) or not _LEAST_BOUND <= max_grad_norm <= _MOST_BOUND:
        raise ConfigError(
            f"max_grad_norm is {max_grad_norm!r}; accepted with adaptive_clipping: one number from "
            "2^-100 to 2^100"
        )
    return float(max_grad_norm)
