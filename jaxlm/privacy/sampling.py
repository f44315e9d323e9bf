"""Which rows take part in a step, and the key of its noise: both from the run's secret alone.

Poisson sampling: every row takes part in every step independently, with probability q. A batch has
places for so many rows, so a sample that is larger is cut at random; q is so small that this next
to never happens, and the accountant adds what it may cost (accounting.py).

Letters: N rows of the dataset, B places of a batch.
"""

from __future__ import annotations

import functools
import hashlib
import hmac

import numpy as np
from scipy import special  # jax needs scipy too

SECRET_BYTES = 32
CUT = 1e-9  # of delta: the chance that one step's sample is cut


def cut_chance(delta: float) -> float:
    """The chance, at most, that a step draws more rows than a batch has places for."""
    return CUT * delta


@functools.lru_cache
def expected_rows(places: int, delta: float) -> float:
    """Rows that a step draws on average: the most for which a cut is as rare as `cut_chance`.

    The number drawn is binomial; above its mean its tail is below that of a Poisson variable of
    this mean (Anderson and Samuels, 1967): P(X > B) is the regularized incomplete gamma function
    of B + 1 at the mean.
    """
    return float(special.gammaincinv(places + 1, cut_chance(delta)))


def noise_key(secret: bytes, step: int) -> np.ndarray:
    """The two words of a jax key for the noise of a step."""
    return np.frombuffer(_digest(secret, "noise", step)[:8], "<u4").astype(np.uint32)


def draw_rows(secret: bytes, step: int, num_rows: int, rate: float, places: int) -> np.ndarray:
    """The rows, increasing, that take part in a step: a function of these arguments alone.

    Gaps between rows that take part are geometric, so that only those are drawn.
    """
    key = int.from_bytes(_digest(secret, "rows", step)[:16], "little")
    bits = np.random.Philox(key=key)
    found, last = [], -1
    while last < num_rows:
        count = int(1.2 * rate * (num_rows - last)) + 16
        uniform = ((bits.random_raw(count) >> np.uint64(11)) + 0.5) * 2.0**-53  # in (0, 1)
        gaps = np.log(uniform) / np.log1p(-rate)  # P(gap >= k) = (1 - q)^k
        places_N = last + np.cumsum(np.minimum(gaps, num_rows).astype(np.int64) + 1)
        found.append(places_N)
        last = int(places_N[-1])
    rows = np.concatenate(found)
    rows = rows[rows < num_rows]
    if len(rows) > places:
        chosen = np.argsort(bits.random_raw(len(rows)), kind="stable")[:places]
        rows = rows[np.sort(chosen)]
    return rows


def _digest(secret: bytes, use: str, step: int) -> bytes:
    """32 bytes that tell nothing of the secret or of those of other steps and uses."""
    return hmac.digest(secret, f"{use} {step}".encode(), hashlib.sha256)
