"""The rule of merging: what islands learnt becomes one update of the parameters.

An island's contribution is D = before - theta, what its local steps subtracted. The merged
parameters are before - U, with the update U made of the contributions:

- average:  U = mean(D)                                     local SGD, arXiv:1805.09767
- diloco:   b = mu b + mean(D);  U = eta (mean(D) + mu b)   Nesterov, arXiv:2311.08105
- delayed:  each contribution as it comes, U = eta D / N; every N-th also b = mu b + mean(D) of
            the last N, and U = U + eta mu b                  arXiv:2401.09135, algorithm 3, c = 0

Means are weighted. Everything is a pure function of arrays of any sharding, in float32. A program
with the whole model uses `merge`; who has a model array by array (the merger of a store) takes the
same steps one after another: `squares` of every array, `judge`, `directions` of every array and
`judge_directions` where the rule asks for them, then `update` of every array.

Letters: K contributions. Arrays of contributions are [K, ...], weights and verdicts [K].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.keys_outer import Outer

Arrays = dict[str, jax.Array]
ENOUGH = 3  # contributions from which a bad one can be told from the others


class Rule(NamedTuple):
    """What of the config decides a merge."""

    name: str = "average"  # average, diloco, delayed
    learning_rate: float = 1.0
    momentum: float = 0.0
    defend: str = "none"  # none, clip, median, trimmed, cosine

    @property
    def remembers(self) -> tuple[str, ...]:
        """Names of the arrays that a rule keeps from one merge to the next, each like a weight."""
        kept = {"average": (), "diloco": ("momentum",), "delayed": ("momentum", "buffer")}
        return kept[self.name]


class Verdict(NamedTuple):
    """What is made of each contribution, [K]: its weight (0: refused; they add up to 1) and scale.

    `refused` says why: 0 it counts, 1 it has no weight, 2 it is not finite, 3 it points away from
    the others. `norms` are those of the contributions as they came.
    """

    weights: jax.Array
    scales: jax.Array
    refused: jax.Array
    norms: jax.Array


REASONS = ("", "it has no weight", "it is not finite", "it points away from the others")


def is_bad(refused_K: jax.Array) -> jax.Array:
    """[K]: whether a contribution is refused for what it is, and not for having no weight."""
    return refused_K > 1


def make_rule(config: Outer) -> Rule:
    """The rule of a config."""
    if config.rule == "average":
        return Rule(defend=config.defend)
    return Rule(config.rule, config.learning_rate, config.momentum, config.defend)


def initial(rule: Rule, before: Arrays) -> dict[str, Arrays]:
    """The outer state before the first merge: zeros."""
    return {kept: jax.tree.map(jnp.zeros_like, before) for kept in rule.remembers}


def merge(
    before: Arrays, contributions: Arrays, outer_state: dict[str, Arrays], rule: Rule, weights_K,
    total: Callable[[Arrays], jax.Array] | None = None, flush=True, count: float = 0.0,
) -> tuple[Arrays, dict[str, Arrays], Verdict]:  # fmt: skip
    """(after, outer state, verdict) of merging contributions D [K, ...] with these weights [K].

    `total` adds up sums of squares over the arrays, by name: inside shard_map, over shards too. Of
    `delayed`: `count` is N (0: K), or the sum of all weights over that of these contributions where
    islands differ, and `flush` says that these complete N contributions.
    """
    updates, outer_state, verdict = make_update(
        contributions, outer_state, rule, weights_K, total, flush, count
    )
    return {n: before[n] - updates[n] for n in before}, outer_state, verdict


def make_update(
    contributions: Arrays, outer_state: dict[str, Arrays], rule: Rule, weights_K,
    total=None, flush=True, count: float = 0.0,
):  # fmt: skip
    """(U, outer state, verdict): `merge` without the subtraction."""
    total = total or (lambda sums: functools.reduce(jnp.add, sums.values()))
    verdict = judge(total({n: squares(d) for n, d in contributions.items()}), weights_K, rule)
    if rule.defend == "cosine":
        found = {n: directions(d, verdict) for n, d in contributions.items()}
        dots_K = total({n: dots for n, (dots, _) in found.items()})
        median = total({n: square for n, (_, square) in found.items()})
        verdict = judge_directions(verdict, dots_K, median)
    updates, state = {}, {kept: {} for kept in outer_state}
    for name, deltas in contributions.items():
        own = {kept: outer_state[kept][name] for kept in outer_state}
        updates[name], own = update(deltas, own, verdict, rule, flush, count)
        for kept, array in own.items():
            state[kept][name] = array
    return updates, state, verdict


def squares(deltas: jax.Array) -> jax.Array:
    """The sum of squares of each contribution's array, [K]; not finite where an element is not."""
    return jnp.sum(jnp.square(deltas), axis=tuple(range(1, deltas.ndim)))


def judge(squares_K: jax.Array, weights_K: jax.Array, rule: Rule) -> Verdict:
    """What is not finite is refused; with clip and cosine, norms go down to the median norm.

    `squares_K` are sums over all arrays. A median of fewer than three says nothing, so that then
    nothing is clipped.
    """
    finite_K = jnp.isfinite(squares_K)
    counts_K = finite_K & (weights_K > 0)
    norms_K = jnp.sqrt(squares_K)
    scales_K = jnp.ones_like(norms_K)
    if rule.defend in ("clip", "cosine"):
        median = _middle(jnp.where(counts_K, norms_K, jnp.inf), counts_K, "median")
        down_K = jnp.minimum(1.0, median / jnp.where(norms_K > 0, norms_K, 1.0))
        enough = jnp.sum(counts_K) >= ENOUGH
        scales_K = jnp.where(counts_K & (norms_K > 0) & enough, down_K, scales_K)
    refused_K = jnp.where(finite_K, jnp.where(weights_K > 0, 0, 1), 2)
    return Verdict(_shares(weights_K, counts_K), scales_K, refused_K, norms_K)


def directions(deltas: jax.Array, verdict: Verdict) -> tuple[jax.Array, jax.Array]:
    """(dot product of each contribution's array with their coordinate median [K], its square)."""
    counts_K = verdict.refused == 0
    deltas = _accepted(deltas * _along(verdict.scales, deltas), counts_K)
    median = _middle(jnp.where(_along(counts_K, deltas), deltas, jnp.inf), counts_K, "median")
    axes = tuple(range(1, deltas.ndim))
    return jnp.sum(deltas * median, axis=axes), jnp.sum(jnp.square(median))


def judge_directions(verdict: Verdict, dots_K: jax.Array, median_square: jax.Array) -> Verdict:
    """Refuse what has no positive cosine with the coordinate median, from three contributions on.

    `dots_K` and `median_square` are the sums of `directions` over all arrays.
    """
    counts_K = verdict.refused == 0
    enough = (jnp.sum(counts_K) >= ENOUGH) & (median_square > 0)
    away_K = counts_K & (dots_K <= 0) & enough
    weights_K = _shares(verdict.weights, counts_K & ~away_K)
    return verdict._replace(weights=weights_K, refused=jnp.where(away_K, 3, verdict.refused))


def update(
    deltas: jax.Array, state: Arrays, verdict: Verdict, rule: Rule, flush=True, count: float = 0.0,
) -> tuple[jax.Array, Arrays]:  # fmt: skip
    """(U, what the rule remembers) of one array, from its contributions [K, ...]."""
    counts_K = verdict.refused == 0
    deltas = _accepted(deltas * _along(verdict.scales, deltas), counts_K)
    mean = jnp.sum(deltas * _along(verdict.weights, deltas), axis=0)
    if rule.defend in ("median", "trimmed"):
        last = jnp.where(_along(counts_K, deltas), deltas, jnp.inf)
        middle = _middle(last, counts_K, rule.defend)
        mean = jnp.where(jnp.sum(counts_K) >= ENOUGH, middle, mean)
    eta, mu = rule.learning_rate, rule.momentum
    if rule.name == "average":
        return mean, state
    if rule.name == "diloco":
        momentum = mu * state["momentum"] + mean
        return eta * (mean + mu * momentum), {"momentum": momentum}
    # `mean` is that of K contributions of N that make a round together.
    part = mean * (deltas.shape[0] / (count or deltas.shape[0]))
    buffer = state["buffer"] + part
    momentum = jnp.where(flush, mu * state["momentum"] + buffer, state["momentum"])
    late = jnp.where(flush, eta * mu * momentum, jnp.zeros_like(momentum))
    kept = jnp.where(flush, jnp.zeros_like(buffer), buffer)
    return eta * part + late, {"momentum": momentum, "buffer": kept}


def _shares(weights_K: jax.Array, counts_K: jax.Array) -> jax.Array:
    """Weights that add up to 1 over what counts; zeros where nothing does."""
    kept_K = jnp.where(counts_K, weights_K, 0.0)
    total = jnp.sum(kept_K)
    return kept_K / jnp.where(total > 0, total, 1.0)


def _accepted(deltas: jax.Array, counts_K: jax.Array) -> jax.Array:
    """Zeros in place of what is refused: its NaN times a weight of 0 would be NaN."""
    return jnp.where(_along(counts_K, deltas), deltas, 0.0)


def _along(values_K: jax.Array, deltas: jax.Array) -> jax.Array:
    return values_K.reshape((-1,) + (1,) * (deltas.ndim - 1))


def _middle(values: jax.Array, counts_K: jax.Array, kind: str) -> jax.Array:
    """Over dimension 0, the mean of the middle of what counts; what does not is infinite.

    median: of the one or two in the middle. trimmed: without a quarter at each end, at least one,
    which bears as many bad ones (arXiv:1803.01498). Zeros where nothing counts.
    """
    ranks = _along(jnp.arange(values.shape[0]), values)
    count = jnp.sum(counts_K)
    cut = (count - 1) // 2 if kind == "median" else jnp.maximum(count // 4, 1)
    inside = (ranks >= cut) & (ranks < count - cut)
    kept = jnp.where(inside, jnp.sort(values, axis=0), 0.0)
    return jnp.sum(kept, axis=0) / jnp.maximum(count - 2 * cut, 1)
