"""Formats of what travels between islands: sizes, errors against numpy, and error feedback."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.keys_outer import WIRES
from jaxlm.outer import wire

N = 3 * wire.CHUNK
BITS = {"float32": 32, "bfloat16": 16, "int8": 8.125, "int4": 4.125, "int2": 2.125, "topk": 0.5}


def values(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spread = np.repeat(10.0 ** rng.uniform(-4, 1, N // wire.GROUP), wire.GROUP)
    return (rng.normal(size=N) * spread).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def through(x, name):
    payload = wire.encode(x, name)
    return wire.decode(payload, x.size, name), payload


def rounded(x):
    """As a scale travels: bfloat16."""
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def oracle(x: np.ndarray, name: str) -> np.ndarray:
    x = x.astype(np.float64)
    if name == "float32":
        return x
    if name == "bfloat16":
        return rounded(x)
    if name == "topk":
        rows = x.reshape(-1, wire.CHUNK)
        kept = np.zeros_like(rows)
        for row, out in zip(rows, kept, strict=True):
            places = np.argsort(-np.abs(row), kind="stable")[: wire.KEPT]
            out[places] = rounded(row[places])
        return kept.reshape(-1)
    groups = x.reshape(-1, wire.GROUP)
    if name == "int2":
        scale = rounded(np.sqrt(np.mean(groups**2, axis=1)))[:, None]
        levels = np.array([0.4528, 1.510])
        size = np.where(np.abs(groups) > 0.9816 * scale, levels[1], levels[0]) * scale
        return np.where(groups < 0, -size, size).reshape(-1)
    largest = {"int8": 127, "int4": 7}[name]
    scale = rounded(np.abs(groups).max(axis=1) / largest)[:, None]
    return (np.clip(np.round(groups / scale), -largest, largest) * scale).reshape(-1)


@pytest.mark.parametrize("name", WIRES)
def test_a_format_is_its_numpy_oracle_and_takes_its_bits(name):
    x = values()
    decoded, payload = through(jnp.asarray(x), name)
    expected = oracle(x, name)
    # Where float32 and float64 fall to different sides of a border, an element is a step off.
    close = np.isclose(decoded, expected, rtol=1e-6, atol=0)
    assert close.mean() > 0.9999, np.flatnonzero(~close)[:5]
    assert sum(p.nbytes for p in payload.values()) * 8 / N == BITS[name]
    assert wire.num_bytes(N, name) * 8 / N == BITS[name]


@pytest.mark.parametrize("name", WIRES)
def test_zeros_and_short_arrays_travel(name):
    count = wire.group(name)
    decoded, _ = through(jnp.zeros(count), name)
    assert not np.any(decoded)


@pytest.mark.parametrize("name", [w for w in WIRES if w != "float32"])
def test_error_feedback_loses_nothing_over_time(name):
    """What was sent adds up to what there was to send, less the last error, which stays small."""
    rng = np.random.default_rng(1)
    rounds, drift = 200, rng.normal(size=wire.CHUNK).astype(np.float32)
    send = jax.jit(wire.send, static_argnums=2)
    error = jnp.zeros(wire.CHUNK)
    sent, alone = np.zeros(wire.CHUNK), np.zeros(wire.CHUNK)
    for _ in range(rounds):
        payload, error = send(jnp.asarray(drift), error, name)
        sent += np.asarray(wire.decode(payload, wire.CHUNK, name), np.float64)
        alone += np.asarray(through(jnp.asarray(drift), name)[0], np.float64)
    whole = rounds * drift.astype(np.float64)
    np.testing.assert_allclose(sent + np.asarray(error), whole, atol=1e-2)
    relative = lambda got: np.linalg.norm(got - whole) / np.linalg.norm(whole)
    assert relative(sent) < 0.2 * relative(alone)


def test_float32_keeps_no_error():
    payload, error = wire.send(jnp.asarray(values()), None, "float32")
    assert error is None and np.array_equal(payload["values"], values())
