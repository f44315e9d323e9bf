"""What the stages compute in a tick, and how they hand it on.

Shapes: Z stages, V repeats, M microbatches, k layers of a chunk, B rows of a microbatch, S
sequence, D embed.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxlm import config as cfg
from jaxlm.loss import PEAK, UPDATE, token_losses
from jaxlm.models import family_module
from jaxlm.models.decoder import run_group
from jaxlm.pipeline.chunks import pick, pick_part, to_chunks
from jaxlm.pipeline.schedule import Item, Schedule
from jaxlm.sharding import Layout, partitions
from jaxlm.state import Arrays, Structure


@dataclasses.dataclass(frozen=True)
class Stages:
    """The parts of a tick; arrays of a chunk have no stage inside vmap."""

    config: cfg.Config
    structure: Structure
    layout: Layout
    schedule: Schedule
    params: Arrays
    fixed: Arrays

    def numbers(self) -> jax.Array:
        """0 .. Z-1, each on its stage."""
        return reshard(jnp.arange(self.schedule.stages), P("stage"))

    def merge(self, *arrays: Arrays):
        """The model with some of its arrays replaced."""
        return self.structure.merge(self.params, self.fixed, *arrays)

    def chunks(self, arrays: Arrays) -> Arrays:
        """The stacked weights as [Z, V, k, ...]."""
        stacked = lambda name: self.structure.dims[name].startswith("layers ")
        return {n: to_chunks(a, self.schedule) for n, a in arrays.items() if stacked(n)}

    def marked(self, arrays: Arrays) -> Arrays:
        """Inside vmap: weights [k, ...] whose gradients wait (program.defer_reduction)."""

        def one(name: str, array: jax.Array) -> jax.Array:
            source = jax.typeof((self.params | self.fixed)[name]).sharding.spec
            return reshard(array, P(None, *partitions(source)[1:], reduced=source.reduced))

        return {name: one(name, array) for name, array in arrays.items()}

    def ring(self, parts: Arrays) -> jax.Array:
        """Zeros [Z, B, S, D] for what stages hand on."""
        _, rows, length = parts["tokens"].shape
        shape = (self.schedule.stages, rows, length, self.config.model.embed_dim)
        spec = P("stage", *self.layout.spec("batch residual_seq _"))
        return jnp.zeros(shape, self.layout.compute, out_sharding=spec)

    def shift(self, x_ZBSD: jax.Array, by: int) -> jax.Array:
        """Every stage's array to the stage `by` further round the ring."""
        count, spec = self.schedule.stages, jax.typeof(x_ZBSD).sharding.spec
        pairs = [(i, (i + by) % count) for i in range(count)]
        move = lambda x: jax.lax.ppermute(x, "stage", pairs)
        return jax.shard_map(move, in_specs=spec, out_specs=spec)(x_ZBSD)

    def leave(self, x_ZBSD: jax.Array, stage: int) -> jax.Array:
        """One stage's array [B, S, D], on all of them: a sum of which the others add zero."""
        return jnp.sum(where(self.numbers() == stage, x_ZBSD, jnp.zeros_like(x_ZBSD)), axis=0)

    def put(self, here_Z: jax.Array, x_BSD: jax.Array, ring: jax.Array) -> jax.Array:
        """The ring, with x on the stages that `here_Z` says."""
        wide_ZBSD = reshard(
            jnp.broadcast_to(x_BSD[None], ring.shape), jax.typeof(ring).sharding.spec
        )
        return where(here_Z, wide_ZBSD, ring)

    def embed(self, tables: Arrays, part: Arrays) -> jax.Array:
        """The embedding of a microbatch, [B, S, D]."""
        return self.merge(tables).embed_tokens(part["tokens"], part["positions"], self.layout)

    def enter(self, ring: jax.Array, t, outer: Arrays, parts: Arrays) -> jax.Array:
        """Inputs of the forward [Z, B, S, D]: stage 0 takes the embedding, and comes round to
        itself. So does a stage that nothing has reached yet, since zeros may have no norm."""
        item, first = self.schedule.forward(t, self.numbers()), self.schedule.forward(t, 0)
        part = {name: x[first.microbatch] for name, x in parts.items()}
        new = functools.partial(self.embed, outer, part)
        if self.schedule.repeats == 1:
            x_BSD = new()
        else:
            due = first.valid & (first.repeat == 0)
            spec = P(*jax.typeof(ring).sharding.spec[1:])
            zeros = lambda: jnp.zeros(ring.shape[1:], ring.dtype, out_sharding=spec)
            x_BSD = jax.lax.cond(due, new, zeros)
        early = ~item.valid & (item.microbatch == 0)
        return self.put((self.numbers() == 0) & (item.repeat == 0) | early, x_BSD, ring)

    def chunk(self, params: Arrays, fixed: Arrays, x_BSD, positions_BS, segments_BS):
        """Inside vmap: one chunk's layers, as (output, aux)."""
        blocks = list(self.merge(params, fixed).groups[0])
        table = family_module(self.config.model.family).encode_positions(
            self.config.model, positions_BS
        )
        y_BSD, _, aux = run_group(
            blocks, x_BSD, table, positions_BS, segments_BS, self.layout.without("stage"), None
        )
        return y_BSD, {f"group0/{name}": value for name, value in aux.items()}

    def inputs(self, layers: Arrays, frozen: Arrays, item: Item, parts: Arrays):
        """(weights, positions, segments) of each stage's item, with a leading Z."""
        chosen = [
            {name: pick(array, item.repeat) for name, array in arrays.items()}
            for arrays in (layers, frozen)
        ]
        names = [name for name in ("positions", "segments") if name in parts]
        return *chosen, *(pick_part(parts[name], item.microbatch) for name in names)

    def forward(self, layers, frozen, x_ZBSD, item: Item, parts: Arrays) -> jax.Array:
        """Every stage runs its chunk."""

        def one(params, fixed, x_BSD, positions_BS, segments_BS=None):
            params, fixed = self.marked(params), self.marked(fixed)
            return self.chunk(params, fixed, x_BSD, positions_BS, segments_BS)[0]

        params, fixed, *rest = self.inputs(layers, frozen, item, parts)
        return jax.vmap(one)(params, fixed, x_ZBSD, *rest)

    def backward(self, layers, frozen, x_ZBSD, g_ZBSD, item: Item, parts: Arrays):
        """Every stage differentiates its chunk: gradients, cotangents of x, aux."""

        def one(params, fixed, x_BSD, g_BSD, valid, weight, positions_BS, segments_BS=None):
            def run(params, x_BSD):
                y_BSD, aux = self.chunk(params, fixed, x_BSD, positions_BS, segments_BS)
                losses = [jnp.sum(v) for name, v in aux.items() if name.endswith("_loss")]
                return (y_BSD, sum(losses, jnp.zeros((), weight.dtype))), aux

            fixed = self.marked(fixed)
            (_, extra), pull, aux = jax.vjp(run, self.marked(params), x_BSD, has_aux=True)
            grads, dx_BSD = pull((g_BSD, weight.astype(extra.dtype)))
            counted = lambda name: UPDATE in name or PEAK in name
            scale = lambda name, v: v * (valid if counted(name) else weight).astype(v.dtype)
            return grads, dx_BSD, {name: scale(name, v) for name, v in aux.items()}

        params, fixed, *rest = self.inputs(layers, frozen, item, parts)
        own_ZM = item.microbatch[:, None] == jnp.arange(self.schedule.microbatches)
        weights_Z = jnp.sum(jnp.where(own_ZM, parts["aux_weight"], 0), axis=1)
        weights_Z = jnp.where(item.valid, weights_Z, 0)
        g_ZBSD = where(item.valid, g_ZBSD, jnp.zeros_like(g_ZBSD))
        return jax.vmap(one)(params, fixed, x_ZBSD, g_ZBSD, item.valid, weights_Z, *rest)


def rows_of(stages: Stages, outer: Arrays, x_BSD: jax.Array, part: Arrays) -> jax.Array:
    """-log p(target) of a microbatch, summed over each row."""
    nll_BS, _ = head(stages, outer, x_BSD, part)
    return jnp.sum(nll_BS * part["weights"], axis=1)


def head(stages: Stages, outer: Arrays, x_BSD: jax.Array, part: Arrays):
    """The final norm, the head and the losses of every token [B, S]."""
    model = stages.merge(outer)
    hidden_BSD, head_VD = model.finish(x_BSD, stages.layout), model.head_weight(stages.layout)
    config = stages.config
    return token_losses(
        hidden_BSD, head_VD, part["targets"], config.model, stages.layout, config.loss.chunks
    )


def where(here_Z: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(jnp.expand_dims(here_Z, tuple(range(1, x.ndim))), x, y)
