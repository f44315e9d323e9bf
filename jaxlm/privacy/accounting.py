"""What a run spends: epsilon after a number of steps, by Google's dp-accounting.

A step releases the sum of clipped gradients over a Poisson sample, with Gaussian noise. Privacy
loss distributions (arXiv:2106.08567) compose steps; rounding there is upwards. A sample too large
for the batch is cut: with T steps, each cut with chance t at most, both of two datasets' runs
differ from those without cuts with chance T t, which adds (1 + e^epsilon) T t to delta
(arXiv:2411.04205).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from jaxlm import extras

UNIT = (  # of a sequence length
    "one row ({} tokens, and the one after them to predict): whether it is among the rows of the "
    "training split or left out"
)


def make_accountant(
    noise_multiplier: float, rate: float, delta: float, cut: float
) -> Callable[[int], float]:
    """steps -> epsilon at this delta; `cut`: the chance that a step's sample is cut.

    Raises UserError where dp-accounting is not installed.
    """
    name = "dp_accounting.pld.privacy_loss_distribution"
    losses = extras.load(name, "privacy", "privacy.clip_norm")
    one = losses.from_gaussian_mechanism(noise_multiplier, sampling_prob=rate)

    @functools.lru_cache(None)
    def epsilon(steps: int) -> float:
        if steps == 0:
            return 0.0
        composed, found = one.self_compose(steps), 0.0
        for _ in range(50):  # upwards, from what delta would be without cuts
            left = delta - (1 + math.exp(min(found, 700.0))) * steps * cut
            new = composed.get_epsilon_for_delta(left) if left > 0 else math.inf
            if new <= found * (1 + 1e-9):
                return found
            found = new
        return math.inf

    return epsilon


def affordable_steps(epsilon: Callable[[int], float], budget: float, steps: int) -> int:
    """The most steps, up to `steps`, that stay within a budget."""
    if epsilon(steps) <= budget:
        return steps
    low, high = 0, steps  # within, beyond
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon(middle) <= budget else (low, middle)
    return low
