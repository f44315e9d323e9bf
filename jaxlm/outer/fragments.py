"""Fragments of a model: every P-th row of each array, merged at different times.

Rows are those of dimension 0: layers, where a weight is stacked; else rows of the weight itself. So
all fragments are equally large, and every P-th layer is in the same one (arXiv:2501.18512 strides
its fragments too).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.keys_outer import Outer


def cut(x: jax.Array, fragment, count: int) -> jax.Array:
    """Rows fragment, fragment + P, ... of [d, ...]; zeros fill the last fragments."""
    if count == 1:
        return x
    return jax.lax.dynamic_index_in_dim(_rows(x, count), fragment, axis=1, keepdims=False)


def paste(x: jax.Array, rows: jax.Array, fragment, count: int) -> jax.Array:
    """`x` with these rows in the place that `cut` takes them from."""
    if count == 1:
        return rows
    parts = jax.lax.dynamic_update_index_in_dim(_rows(x, count), rows, fragment, axis=1)
    return parts.reshape(-1, *x.shape[1:])[: x.shape[0]]


def unite(fragments: jax.Array, rows: int) -> jax.Array:
    """[P, ceil(d / P), ...], all fragments, as the array [d, ...] that they are of."""
    return jnp.moveaxis(fragments, 0, 1).reshape(-1, *fragments.shape[2:])[:rows]


def _rows(x: jax.Array, count: int) -> jax.Array:
    """[d, ...] as [ceil(d / P), P, ...]."""
    more = -x.shape[0] % count
    padded = jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) if more else x
    return padded.reshape(-1, count, *x.shape[1:])


def due(config: Outer, step: int) -> int | None:
    """The fragment that is merged after this many steps, if any: fragments take turns."""
    done = step - config.start_step
    if done <= 0:
        return None
    turns = {(f + 1) * config.every // config.fragments: f for f in range(config.fragments)}
    return turns.get((done - 1) % config.every + 1)


def last_merge(config: Outer, step: int, fragment: int) -> int | None:
    """The last step up to this one after which a fragment was merged."""
    turn = (fragment + 1) * config.every // config.fragments
    rounds = (step - config.start_step - turn) // config.every
    return None if rounds < 0 else config.start_step + turn + rounds * config.every


def waits(config: Outer, step: int, fragment: int) -> bool:
    """Whether a fragment's update is under way after this many steps: merged, not taken in yet."""
    sent = last_merge(config, step, fragment)
    return sent is not None and step - sent < config.overlap
