"""Arrays of chunks: the weights of each stage, and what a stage takes of an array.

Shapes: Z stages, V repeats, M microbatches, k layers of a chunk, L layers, B rows of a microbatch,
S sequence.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxlm.pipeline.schedule import Schedule
from jaxlm.sharding import partitions


def to_chunks(x: jax.Array, schedule: Schedule) -> jax.Array:
    """[L, ...] -> [Z, V, k, ...]; with V > 1 the weights move to other stages."""
    rest = partitions(jax.typeof(x).sharding.spec)[1:]

    def local(x):  # local shards below
        x = x.reshape(schedule.repeats, -1, *x.shape[1:])
        return _exchange(x, schedule.stages, deal=True)[None]

    spec = P("stage", None, None, *rest)
    x = reshard(x, P("stage", *rest))
    return jax.shard_map(local, in_specs=P("stage", *rest), out_specs=spec, check_vma=False)(x)


def from_chunks(x: jax.Array) -> jax.Array:
    """[Z, V, k, ...] -> [L, ...]: the inverse of `to_chunks`, of sums that may still wait."""
    spec = jax.typeof(x).sharding.spec
    stages, rest = x.shape[0], partitions(spec)[3:]

    def local(x):  # local shards below
        x = _exchange(x[0], stages, deal=False)
        return x.reshape(-1, *x.shape[2:])

    out = P("stage", *rest, unreduced=spec.unreduced)
    return jax.shard_map(local, in_specs=spec, out_specs=out, check_vma=False)(x)


def _exchange(x: jax.Array, stages: int, deal: bool) -> jax.Array:
    """Local chunks [V, ...] to the stages that want them, by one all-to-all.

    In a row, stage s has the chunks s V .. (s+1) V - 1; dealt out, it has s, Z + s, 2 Z + s ...
    A stage sends ceil(V / Z) chunks to each: with V < Z some of that is padding.
    """
    repeats = x.shape[0]
    if repeats == 1:
        return x
    stage, j = jax.lax.axis_index("stage"), jnp.arange(repeats)
    in_row, dealt = stage * repeats + j, j * stages + stage
    to, source = in_row % stages, dealt // repeats
    if not deal:
        to, source = source, to
    earlier = j[:, None] > j[None, :]
    rank = lambda key: jnp.sum((key[:, None] == key[None, :]) & earlier, axis=1)
    shape = (stages, -(-repeats // stages), *x.shape[1:])
    send = jnp.zeros(shape, x.dtype).at[to, rank(to)].set(x)
    received = jax.lax.all_to_all(send, "stage", 0, 0)
    return received[source, rank(source)]


def pick(x: jax.Array, index_Z: jax.Array) -> jax.Array:
    """[Z, n, ...] -> [Z, ...]: every stage takes its own entry. Mapped, because it is local."""
    if x.shape[1] == 1:
        return x[:, 0]
    stage, _, *rest = partitions(jax.typeof(x).sharding.spec)
    take = lambda x, i: jax.lax.dynamic_index_in_dim(x, i[0], 1, keepdims=False)
    return jax.shard_map(
        take, in_specs=(P(stage, None, *rest), P("stage")), out_specs=P(stage, *rest)
    )(x, index_Z)


def pick_part(x: jax.Array, index_Z: jax.Array) -> jax.Array:
    """[M, B, S] -> [Z, B, S]: every stage takes its own microbatch."""
    _, *rest = partitions(jax.typeof(x).sharding.spec)
    take = lambda x, i: jax.lax.dynamic_index_in_dim(x, i[0], 0)
    return jax.shard_map(
        take, in_specs=(P(None, *rest), P("stage")), out_specs=P("stage", *rest)
    )(x, index_Z)  # fmt: skip


def add_at(sums: jax.Array, x: jax.Array, index_Z: jax.Array) -> jax.Array:
    """sums [Z, V, ...] with x [Z, ...] added to each stage's own repeat."""
    if sums.shape[1] == 1:
        return sums + x[:, None].astype(sums.dtype)
    spec, x_spec = (jax.typeof(a).sharding.spec for a in (sums, x))
    add = lambda sums, x, i: sums.at[0, i[0]].add(x[0].astype(sums.dtype))
    return jax.shard_map(
        add, in_specs=(spec, x_spec, P("stage")), out_specs=spec, check_vma=False
    )(sums, x, index_Z)  # fmt: skip
