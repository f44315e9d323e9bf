"""Arrays on devices as boxes on the host, and back.

A box is what a device of this process holds of an array: "embed|0:128,0:64" -> numpy array. Boxes
that several devices hold are there once. What an island merges is computed on the host, in float32
and in a fixed order, so that all islands get the same bits from the same update.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.outer import courier, parts
from jaxlm.outer.about import About
from jaxlm.outer.courier import Boxes
from jaxlm.state import Arrays, State, Structure

STEP_STATES = (optax.ScaleByScheduleState,)  # parts of an optimizer's state that count steps


def key_of(name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """The text of a box; `index` is jax's, in which a whole dimension has no bounds."""
    whole = (each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
    return parts.key_of((name, tuple(slice(start, stop) for start, stop in whole)))


def from_devices(arrays: Arrays) -> Boxes:
    """Copies of the boxes of arrays that this process holds."""
    found: Boxes = {}
    for name, array in arrays.items():
        for shard in array.addressable_shards:
            key = key_of(name, shard.index, array.shape)
            if key not in found:
                found[key] = np.array(shard.data)  # a copy: the next step may take the buffer
    return found


def sent_here(arrays: Arrays) -> frozenset[str]:
    """The boxes that this process sends: of those that several devices hold, one process has the
    first."""
    return frozenset(
        key_of(name, shard.index, array.shape)
        for name, array in arrays.items()
        for shard in array.addressable_shards
        if shard.replica_id == 0
    )


def to_devices(boxes: Boxes, like: Arrays) -> Arrays:
    """The arrays that have these boxes, placed as those of `like`."""

    def one(name: str, array) -> jax.Array:
        take = lambda index: boxes[key_of(name, index, array.shape)]
        return jax.make_array_from_callback(array.shape, array.sharding, take)

    return {name: one(name, array) for name, array in like.items()}


def of_whole(arrays: dict[str, np.ndarray], like: Boxes) -> Boxes:
    """The boxes of whole arrays, those that `like` has."""
    found: Boxes = {}
    for key in like:
        name, index = parts.part_of(key)
        found[key] = np.array(arrays[name][index], np.float32)
    return found


def pieces(about: About, boxes: Boxes, fragment: int):
    """(key, index within the box, key within the fragment, index within the fragment's array)."""
    for key in boxes:
        name, index = parts.part_of(key)
        found = courier.fragment_box(index, fragment, about.outer.fragments)
        if found is not None:
            inside, rows = found
            yield key, inside, parts.key_of((name, rows)), rows


# --- states ---------------------------------------------------------------------------------------


def mergeable(structure: Structure, state: State) -> Arrays:
    """The arrays that are merged: parameters, and variables that the forward changes."""
    weights = structure.weights
    changed = {
        name: array
        for name, array in state.fixed.items()
        if name not in weights and jnp.issubdtype(array.dtype, jnp.floating)
    }
    return state.params | changed


def with_arrays(state: State, arrays: Arrays) -> State:
    """The state with these arrays in the place of its own."""
    pick = lambda own: {name: arrays.get(name, array) for name, array in own.items()}
    return dataclasses.replace(state, params=pick(state.params), fixed=pick(state.fixed))


def at_step(state: State, step: int) -> State:
    """The state at another local step: also for the schedule, so that no warm-up comes again."""

    def number(like: jax.Array) -> jax.Array:
        value = np.asarray(step, like.dtype)
        return jax.make_array_from_callback((), like.sharding, lambda _: value)

    is_counter = lambda leaf: isinstance(leaf, STEP_STATES)
    counted = lambda leaf: leaf._replace(count=number(leaf.count)) if is_counter(leaf) else leaf
    opt = jax.tree.map(counted, state.opt, is_leaf=is_counter)
    return dataclasses.replace(state, step=number(state.step), opt=opt)
