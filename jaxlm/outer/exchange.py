"""The programs of a merge between islands of one job, on the whole mesh.

`exchange` works like a parameter server that is spread over the islands: each sends every other its
part of what the local steps subtracted (an all-to-all), merges the parts that it received, and all
gather the update (an all-gather); both travel in the formats of `outer.wire`. `adopt` takes the
update in.

Letters: K islands, N elements of a fragment of a local shard (padded), M = N / K, P fragments.
Inside shard_map all arrays are local shards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm import config as cfg
from jaxlm.outer import merge, wire
from jaxlm.outer.fleet import ISLAND, Fleet, join_abstract, joined, local_shape, num_copies
from jaxlm.outer.fragments import cut, paste, unite
from jaxlm.state import Arrays

FLAT = P(cfg.AXES)  # of memory: [devices, P, M or N]
Memory = dict[str, Arrays]


class Programs(NamedTuple):
    """Jitted functions of arrays on the whole mesh; see the function that makes each."""

    exchange: Callable
    adopt: Callable
    save_memory: Callable
    load_memory: Callable
    hold: Callable
    release: Callable


def make_programs(fleet: Fleet) -> Programs:
    """The programs of a job's merges; the fragment is an argument, so that each compiles once."""
    makers = (make_exchange, make_adopt, make_save, make_load, make_hold, make_release)
    return Programs(*(make(fleet) for make in makers))


def _everywhere(program, fleet: Fleet, inputs, outputs, donate=()):
    """jit of a program on local shards of the whole mesh."""
    mapped = jax.shard_map(
        program, mesh=fleet.whole.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=donate, compiler_options=fleet.whole.options)


def _specs(fleet: Fleet, names, islands: bool) -> dict[str, P]:
    """Shardings on the whole mesh of arrays of all islands, or of merged ones."""
    return {n: joined(fleet.homes[n]) if islands else fleet.homes[n] for n in names}


def _fragment_shape(fleet: Fleet, name: str) -> tuple[int, ...]:
    """The shape of a fragment of a parameter's shard."""
    first, *rest = local_shape(fleet, name)
    return (-(-first // fleet.config.outer.fragments), *rest)


def _padded(fleet: Fleet, name: str) -> int:
    """N: elements of a fragment of a shard, with zeros until islands merge whole groups each."""
    group = fleet.count * math.lcm(*map(wire.group, fleet.wires))
    return -(-math.prod(_fragment_shape(fleet, name)) // group) * group


def make_exchange(fleet: Fleet):
    """jit(params of the islands, merged params, memory, fragment, tokens [K]) ->
    (update, memory, verdict): what the islands learnt in a fragment, merged.

    An island whose contribution is refused keeps no error of what it sent.
    """
    count, parts, (up, down) = fleet.count, fleet.config.outer.fragments, fleet.wires
    copies = {n: num_copies(fleet, n) for n in fleet.names}

    def total(sums: Arrays) -> jax.Array:
        return jax.lax.psum(sum(sums[n] / copies[n] for n in copies), cfg.AXES)

    def exchange(thetas: Arrays, before: Arrays, memory: Memory, fragment, tokens):
        own = {each: {n: x[0, fragment] for n, x in a.items()} for each, a in memory.items()}
        received_KM, error_N = {}, {}
        for n in fleet.names:
            change = cut(before[n] - thetas[n], fragment, parts).reshape(-1)
            change_N = jnp.pad(change, (0, _padded(fleet, n) - change.size))
            payload, error_N[n] = wire.send(change_N, own["error"].get(n), up)
            decode = functools.partial(wire.decode, count=change_N.size // count, wire=up)
            swap = lambda x: jax.lax.all_to_all(x.reshape(count, -1), ISLAND, 0, 0)
            received_KM[n] = jax.vmap(decode)(_as_bits(swap, payload))
        weights_K = jax.lax.all_gather(tokens, ISLAND, tiled=True)
        state = {each: own[each] for each in fleet.rule.remembers}
        update_M, state, verdict = merge.make_update(
            received_KM, state, fleet.rule, weights_K, total
        )
        update, sent_M = {}, {}
        for n in fleet.names:
            payload, sent_M[n] = wire.send(update_M[n], own["sent"].get(n), down)
            decode = functools.partial(wire.decode, count=update_M[n].size, wire=down)
            gather = lambda x: jax.lax.all_gather(x, ISLAND)
            update_N = jax.vmap(decode)(_as_bits(gather, payload)).reshape(-1)
            shape = _fragment_shape(fleet, n)
            update[n] = update_N[: math.prod(shape)].reshape(shape)
        refused = merge.is_bad(verdict.refused)[jax.lax.axis_index(ISLAND)]
        dropped = {n: jnp.where(refused, 0.0, x) for n, x in error_N.items() if x is not None}
        new = state | {"error": dropped, "sent": sent_M}
        memory = {
            each: {n: x.at[0, fragment].set(new[each][n]) for n, x in arrays.items()}
            for each, arrays in memory.items()
        }
        return update, memory, verdict

    islands, whole = (_specs(fleet, fleet.names, each) for each in (True, False))
    inputs, outputs = (islands, whole, FLAT, P(), P(ISLAND)), (whole, FLAT, P())
    return _everywhere(exchange, fleet, inputs, outputs, donate=2)


def _as_bits(move: Callable, payload: Arrays) -> Arrays:
    """Arrays moved between devices; bfloat16 as whole numbers, as XLA for CPU would widen it."""

    def one(x: jax.Array) -> jax.Array:
        if x.dtype != jnp.bfloat16:
            return move(x)
        bits = move(jax.lax.bitcast_convert_type(x, jnp.uint16))
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)

    return {n: one(x) for n, x in payload.items()}


def make_adopt(fleet: Fleet):
    """jit(params of the islands, merged params, changed variables of the islands, update,
    refused [K], fragment) -> the first three and the merged variables, with the update taken in.

    theta + (1 - mix) ((before - theta) - U): an island from which alone the update comes stays as
    it is, bit for bit. One whose contribution was refused starts again from the merged parameters.
    Variables that the forward changes are averaged.
    """
    mix, parts = fleet.config.outer.mix, fleet.config.outer.fragments

    def adopt(thetas: Arrays, before: Arrays, fixed: Arrays, update: Arrays, refused_K, fragment):
        refused = merge.is_bad(refused_K)[jax.lax.axis_index(ISLAND)]
        for n in fleet.names:
            old, theta = cut(before[n], fragment, parts), cut(thetas[n], fragment, parts)
            new = theta + (1 - mix) * ((old - theta) - update[n])
            new = jnp.where(refused, old - update[n], new)
            thetas[n] = paste(thetas[n], new, fragment, parts)
            before[n] = paste(before[n], old - update[n], fragment, parts)
        fixed = {n: jax.lax.pmean(x, ISLAND) for n, x in fixed.items()}
        return thetas, before, fixed, fixed

    names, changed = fleet.names, fleet.changed
    islands, whole = _specs(fleet, names, True), _specs(fleet, names, False)
    own, means = _specs(fleet, changed, True), _specs(fleet, changed, False)
    inputs, outputs = (islands, whole, own, whole, P(), P()), (islands, whole, own, means)
    return _everywhere(adopt, fleet, inputs, outputs, donate=(0, 1, 2))


def abstract_memory(fleet: Fleet) -> dict[str, dict]:
    """Shapes of what the rule and lossy formats remember, each [devices, P, M or N]."""
    lossy = [() if wire.exact(each) else fleet.names for each in fleet.wires]
    kept = dict.fromkeys(fleet.rule.remembers, fleet.names)
    kept |= {"error": lossy[0], "sent": lossy[1]}
    mesh, parts = fleet.whole.mesh, fleet.config.outer.fragments

    def one(each: str, n: str):
        # An island remembers the whole error of what it sent, and else its K-th of the merge.
        size = _padded(fleet, n) // (1 if each == "error" else fleet.count)
        home = NamedSharding(mesh, FLAT)
        return jax.ShapeDtypeStruct((mesh.size, parts, size), jnp.float32, sharding=home)

    return {each: {n: one(each, n) for n in names} for each, names in kept.items()}


def new_memory(fleet: Fleet) -> Memory:
    """What is remembered before the first merge: zeros."""
    shapes = abstract_memory(fleet)
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.jit(zeros, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))()


def saved_specs(fleet: Fleet) -> dict[str, dict[str, P]]:
    """Shardings of memory in a checkpoint, where its arrays are like parameters on any mesh: those
    of `error` like the parameters of all islands, others like merged ones."""
    shapes = abstract_memory(fleet)
    return {each: _specs(fleet, shapes[each], each == "error") for each in shapes if shapes[each]}


def make_save(fleet: Fleet):
    """jit(memory) -> the arrays of `saved_specs`."""
    parts, specs = fleet.config.outer.fragments, saved_specs(fleet)

    def save(memory: Memory):
        def one(each: str, n: str):
            flat_PN = memory[each][n][0]
            if each != "error":
                flat_PKM = jax.lax.all_gather(flat_PN, ISLAND, axis=1)
                flat_PN = flat_PKM.reshape(parts, -1)
            shape = _fragment_shape(fleet, n)
            fragments = flat_PN[:, : math.prod(shape)].reshape(parts, *shape)
            return unite(fragments, local_shape(fleet, n)[0])

        return {each: {n: one(each, n) for n in names} for each, names in specs.items()}

    return _everywhere(save, fleet, (FLAT,), specs)


def make_load(fleet: Fleet):
    """jit(arrays of `saved_specs`) -> memory."""
    parts, count, specs = fleet.config.outer.fragments, fleet.count, saved_specs(fleet)

    def load(saved: dict[str, Arrays]):
        def one(each: str, n: str):
            fragments = [cut(saved[each][n], f, parts).reshape(-1) for f in range(parts)]
            size = _padded(fleet, n)
            flat_PN = jnp.stack([jnp.pad(x, (0, size - x.size)) for x in fragments])
            if each == "error":
                return flat_PN[None]
            own = jax.lax.axis_index(ISLAND) * (size // count)
            return jax.lax.dynamic_slice_in_dim(flat_PN, own, size // count, axis=1)[None]

        memory = {each: {n: one(each, n) for n in names} for each, names in specs.items()}
        return {each: memory.get(each, {}) for each in abstract_memory(fleet)}

    return _everywhere(load, fleet, (specs,), FLAT)


def make_hold(fleet: Fleet):
    """jit(arrays like parameters, update, fragment) -> the arrays with the update in its place."""
    parts, whole = fleet.config.outer.fragments, _specs(fleet, fleet.names, False)

    def hold(arrays: Arrays, update: Arrays, fragment):
        return {n: paste(x, update[n], fragment, parts) for n, x in arrays.items()}

    return _everywhere(hold, fleet, (whole, whole, P()), whole)


def make_release(fleet: Fleet):
    """jit(arrays like parameters, fragment) -> the update that `make_hold` put there."""
    parts, whole = fleet.config.outer.fragments, _specs(fleet, fleet.names, False)
    release = lambda arrays, fragment: {n: cut(x, fragment, parts) for n, x in arrays.items()}
    return _everywhere(release, fleet, (whole, P()), whole)


def abstract_calls(fleet: Fleet):
    """The two programs of a merge, each with the shapes that it is called with."""
    mesh, params = fleet.whole.mesh, fleet.abstract.params
    homes = lambda names: {n: NamedSharding(mesh, fleet.homes[n]) for n in names}
    like = lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home)
    thetas = join_abstract(fleet, params)
    before = {n: like(params[n], home) for n, home in homes(params).items()}
    fixed = join_abstract(fleet, {n: fleet.abstract.fixed[n] for n in fleet.changed})
    number = jax.ShapeDtypeStruct((), jnp.int32)
    tokens = jax.ShapeDtypeStruct(
        (fleet.count,), jnp.float32, sharding=NamedSharding(mesh, P(ISLAND))
    )
    update = {
        n: jax.ShapeDtypeStruct(_whole_fragment(fleet, n), jnp.float32, sharding=home)
        for n, home in homes(params).items()
    }
    refused = jax.ShapeDtypeStruct((fleet.count,), jnp.int32, sharding=NamedSharding(mesh, P()))
    memory = abstract_memory(fleet)
    yield make_exchange(fleet), (thetas, before, memory, number, tokens)
    yield make_adopt(fleet), (thetas, before, fixed, update, refused, number)


def _whole_fragment(fleet: Fleet, name: str) -> tuple[int, ...]:
    """The shape of a fragment of a parameter, on all devices."""
    first, *rest = fleet.abstract.params[name].shape
    return (-(-first // fleet.config.outer.fragments), *rest)
