"""Merging against numpy in float64: every rule over 50 outer steps, every defence, every attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.outer import merge
from jaxlm.outer.merge import Rule

SHAPES = {"embed": (12, 8), "groups.0.0.mlp": (3, 8, 6), "norm": (8,)}
ISLANDS = 4
STEPS = 50


def tree(rng, *lead) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=(*lead, *shape)) for name, shape in SHAPES.items()}


def single(arrays: dict) -> dict:
    return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}


@functools.partial(jax.jit, static_argnames=("rule", "count"))
def merged(before, deltas, state, rule, weights, flush=True, count=0):
    return merge.merge(before, deltas, state, rule, weights, flush=flush, count=count)


def norms_of(deltas: dict) -> np.ndarray:
    flat = [np.reshape(d, (len(d), -1)) for d in deltas.values()]
    return np.linalg.norm(np.concatenate(flat, axis=1), axis=1)


def middle(deltas: np.ndarray, cut: int) -> np.ndarray:
    ordered = np.sort(deltas, axis=0)
    return ordered[cut : len(deltas) - cut].mean(0)


def oracle_mean(rule: Rule, deltas: dict, weights: np.ndarray) -> dict:
    """What a defence makes of contributions that are all finite."""
    if rule.defend in ("median", "trimmed"):
        count = len(weights)
        cut = {"median": (count - 1) // 2, "trimmed": max(count // 4, 1)}[rule.defend]
        return {name: middle(d, cut) for name, d in deltas.items()}
    scales = np.ones(len(weights))
    if rule.defend in ("clip", "cosine"):
        norms = norms_of(deltas)
        scales = np.minimum(1, np.median(norms) / norms)
    deltas = {n: d * scales.reshape((-1,) + (1,) * (d.ndim - 1)) for n, d in deltas.items()}
    if rule.defend == "cosine":
        medians = {name: np.median(d, axis=0) for name, d in deltas.items()}
        dots = sum(np.einsum("k...,...->k...", d, medians[n]).reshape(len(weights), -1).sum(1)
                   for n, d in deltas.items())  # fmt: skip
        weights = np.where(dots > 0, weights, 0)
    shares = weights / weights.sum()
    return {name: np.tensordot(shares, d, 1) for name, d in deltas.items()}


@pytest.mark.parametrize("defend", ["none", "clip", "median", "trimmed", "cosine"])
@pytest.mark.parametrize("name", ["average", "diloco"])
def test_a_rule_equals_its_float64_oracle_over_50_steps(name, defend):
    rule = Rule(name, *((0.7, 0.9) if name == "diloco" else ()), defend=defend)
    rng = np.random.default_rng(0)
    expected = tree(rng)
    before = single(expected)
    state = merge.initial(rule, before)
    momentum = {n: np.zeros(s) for n, s in SHAPES.items()}
    for _ in range(STEPS):
        shared = tree(rng)  # what islands agree on, as data of one kind makes them
        deltas = {n: shared[n] + d for n, d in tree(rng, ISLANDS).items()}
        weights = rng.integers(1, 9, ISLANDS).astype(float)
        mean = oracle_mean(rule, deltas, weights)
        if name == "diloco":
            momentum = {n: 0.9 * momentum[n] + mean[n] for n in SHAPES}
            mean = {n: 0.7 * (mean[n] + 0.9 * momentum[n]) for n in SHAPES}
        expected = {n: expected[n] - mean[n] for n in SHAPES}
        before, state, _ = merged(before, single(deltas), state, rule, jnp.asarray(weights))
    for n in SHAPES:
        np.testing.assert_allclose(before[n], expected[n], atol=2e-5 * np.abs(expected[n]).max())


def test_delayed_equals_its_float64_oracle_over_50_pushes():
    rule, count = Rule("delayed", 0.7, 0.9), ISLANDS
    rng = np.random.default_rng(1)
    expected = tree(rng)
    before = single(expected)
    state = merge.initial(rule, before)
    momentum, buffer = ({n: np.zeros(s) for n, s in SHAPES.items()} for _ in range(2))
    for push in range(STEPS):
        delta, flush = tree(rng, 1), (push + 1) % count == 0
        for n in SHAPES:
            buffer[n] += delta[n][0] / count
            step = 0.7 * delta[n][0] / count
            if flush:
                momentum[n] = 0.9 * momentum[n] + buffer[n]
                step, buffer[n] = step + 0.7 * 0.9 * momentum[n], np.zeros(SHAPES[n])
            expected[n] = expected[n] - step
        before, state, _ = merged(
            before, single(delta), state, rule, jnp.ones(1), flush=flush, count=count
        )
    for n in SHAPES:
        np.testing.assert_allclose(before[n], expected[n], atol=2e-5 * np.abs(expected[n]).max())


def test_delayed_is_diloco_where_all_contributions_come_at_once():
    rng = np.random.default_rng(2)
    before, deltas = single(tree(rng)), single(tree(rng, ISLANDS))
    together, _, _ = merged(
        before, deltas, merge.initial(Rule("diloco"), before), Rule("diloco", 0.7, 0.9),
        jnp.ones(ISLANDS),
    )  # fmt: skip
    rule = Rule("delayed", 0.7, 0.9)
    after, state = before, merge.initial(rule, before)
    for k in range(ISLANDS):
        one = {n: d[k : k + 1] for n, d in deltas.items()}
        flush = k == ISLANDS - 1
        after, state, _ = merged(after, one, state, rule, jnp.ones(1), flush=flush, count=ISLANDS)
    for n in SHAPES:
        np.testing.assert_allclose(after[n], together[n], atol=1e-5)


def test_the_outer_step_descends_and_nesterov_starts_with_one_plus_mu():
    """What an island subtracted is subtracted again, (1 + mu) times in the first step."""
    before = {"w": jnp.zeros(3)}
    theta_K3 = jnp.array([[-1.0, 2.0, 0.5], [-3.0, 4.0, 1.5]])
    deltas = {"w": before["w"] - theta_K3}
    rule = Rule("diloco", 1.0, 0.9)
    after, _, _ = merged(before, deltas, merge.initial(rule, before), rule, jnp.ones(2))
    np.testing.assert_allclose(after["w"], 1.9 * np.mean(theta_K3, axis=0), rtol=1e-6)


def test_one_contribution_is_taken_bit_for_bit():
    rng = np.random.default_rng(3)
    deltas = single(tree(rng, 1))
    for rule in (Rule(), Rule("diloco", 1.0, 0.0)):
        for defend in ("none", "clip", "median", "trimmed", "cosine"):
            own = rule._replace(defend=defend)
            state = merge.initial(own, single(tree(rng)))
            updates, _, _ = merge.make_update(deltas, state, own, jnp.array([37.0]))
            assert all(np.array_equal(updates[n], deltas[n][0]) for n in SHAPES)


@pytest.mark.parametrize("defend", ["none", "clip", "median", "trimmed", "cosine"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_what_is_not_finite_never_counts(defend, bad):
    """One such element refuses its island's whole contribution, in every array."""
    rng = np.random.default_rng(4)
    before, deltas = single(tree(rng)), tree(rng, ISLANDS)
    rest = {n: d[1:] for n, d in deltas.items()}
    deltas["norm"][0, 2] = bad
    rule = Rule(defend=defend)
    after, _, verdict = merged(before, single(deltas), {}, rule, jnp.ones(ISLANDS))
    clean, _, _ = merged(before, single(rest), {}, rule, jnp.ones(ISLANDS - 1))
    assert [merge.REASONS[i] for i in verdict.refused] == ["it is not finite", "", "", ""]
    for n in SHAPES:
        np.testing.assert_allclose(after[n], clean[n], atol=1e-6)


def test_cosine_refuses_what_points_away_and_says_so():
    rng = np.random.default_rng(5)
    shared = tree(rng)
    deltas = {n: shared[n] + 0.5 * d for n, d in tree(rng, ISLANDS).items()}
    for d in deltas.values():
        d[2] *= -1
    rule = Rule(defend="cosine")
    _, _, verdict = merged(single(tree(rng)), single(deltas), {}, rule, jnp.ones(ISLANDS))
    assert [merge.REASONS[i] for i in verdict.refused] == [
        "", "", "it points away from the others", "",
    ]  # fmt: skip
    assert verdict.weights[2] == 0 and np.isclose(sum(verdict.weights), 1)


def test_two_contributions_cannot_be_defended():
    """Their median would clip one of them to the mean norm, whichever is the honest one."""
    deltas = {"w": jnp.array([[1.0, 0.0], [-10.0, 0.0]])}
    for defend in ("clip", "median", "trimmed", "cosine"):
        after, _, _ = merged({"w": jnp.zeros(2)}, deltas, {}, Rule(defend=defend), jnp.ones(2))
        np.testing.assert_allclose(after["w"], [4.5, 0.0])


ATTACKS = {
    "sign flip": lambda d, rng: -d,
    "ten times": lambda d, rng: 10 * d,
    "away, ten times": lambda d, rng: -10 * d,
    "noise": lambda d, rng: 10 * rng.normal(size=d.shape),
    "nan": lambda d, rng: np.nan * d,
}


@pytest.mark.parametrize("count, hostile", [(4, 1), (8, 2)])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_quarter_of_hostile_islands_is_borne(attack, count, hostile):
    """Descent on a quadratic: where a mean ends far away, every defence ends near the optimum."""
    ends = {}
    for defend in ("none", "clip", "median", "trimmed", "cosine"):
        rng = np.random.default_rng(6)
        before, rule = {"w": jnp.full(64, 3.0)}, Rule("average", defend=defend)
        for _ in range(30):
            honest = 0.2 * np.asarray(before["w"]) + 0.02 * rng.normal(size=(count, 64))
            honest[:hostile] = ATTACKS[attack](honest[:hostile], rng)
            before, _, _ = merged(before, {"w": jnp.asarray(honest, jnp.float32)}, {}, rule,
                                  jnp.ones(count))  # fmt: skip
        ends[defend] = float(jnp.linalg.norm(before["w"]))
    start = 3.0 * 8
    assert all(ends[d] < 0.1 * start for d in ("median", "trimmed", "cosine")), ends
    assert ends["clip"] < 0.2 * start, ends
    if attack in ("away, ten times", "noise"):
        assert not ends["none"] < 0.2 * start, ends  # the mean is not defended
