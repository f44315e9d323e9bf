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
from jaxlm.models import family_module, staged_group
from jaxlm.models.decoder import Decoder, run_group
from jaxlm.pipeline.chunks import pick, pick_part, to_chunks
from jaxlm.pipeline.schedule import Item, Schedule
from jaxlm.sharding import Layout, partitions
from jaxlm.state import Arrays, Structure

TABLES = ("embed", "positions")  # parameters of the embedding


@dataclasses.dataclass(frozen=True, eq=False)
class Stages:
    """The parts of a tick; arrays of a chunk have no stage inside vmap."""

    config: cfg.Config
    structure: Structure
    layout: Layout
    schedule: Schedule
    params: Arrays
    fixed: Arrays

    @property
    def group(self) -> int:
        """The group of layers that is on stages; the others are before and after it."""
        return staged_group(self.config.model)

    def numbers(self) -> jax.Array:
        """0 .. Z-1, each on its stage."""
        return reshard(jnp.arange(self.schedule.stages), P("stage"))

    def merge(self, *arrays: Arrays):
        """The model with some of its arrays replaced."""
        return self.structure.merge(self.params, self.fixed, *arrays)

    def chunks(self, arrays: Arrays) -> Arrays:
        """The weights of the group on stages as [Z, V, k, ...]."""
        prefix = f"groups.{self.group}."
        return {n: to_chunks(a, self.schedule) for n, a in arrays.items() if n.startswith(prefix)}

    def before(self, arrays: Arrays) -> Arrays:
        """The weights that meet a microbatch before its first stage."""
        prefixes = tuple(f"groups.{i}." for i in range(self.group))
        return {n: a for n, a in arrays.items() if n in TABLES or n.startswith(prefixes)}

    def after(self, arrays: Arrays) -> Arrays:
        """The weights outside the stages that meet it after its last one."""
        both = {"embed"} if self.config.model.tie_embeddings else set()
        return {n: a for n, a in arrays.items() if n in both or n not in self.before(arrays)}

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

    def embed(self, outer: Arrays, part: Arrays) -> tuple[jax.Array, Arrays]:
        """What enters the first stage of a microbatch, [B, S, D], and the aux of layers before."""
        model = self.merge(outer)
        x_BSD = model.embed_tokens(part["tokens"], part["positions"], self.layout)
        return self.run_beside(model, range(self.group), x_BSD, part)

    def head(self, outer: Arrays, x_BSD: jax.Array, part: Arrays):
        """The losses [B, S] of every token, as `token_losses` has them, and the aux of layers after
        the last stage."""
        model = self.merge(outer)
        groups = range(self.group + 1, len(model.groups))
        x_BSD, aux = self.run_beside(model, groups, x_BSD, part)
        losses = token_losses(
            model.finish(x_BSD, self.layout), model.head_weight(self.layout), part["targets"],
            self.config.model, self.layout, self.config.loss.chunks,
        )  # fmt: skip
        return *losses, aux

    def run_beside(self, model: Decoder, groups: range, x_BSD: jax.Array, part: Arrays):
        """Groups of layers that are on no stage: every stage runs them for its part of the rows."""
        if not groups:
            return x_BSD, {}
        layout, aux = self.layout.beside_stages(), {}
        positions_BS = layout.move(part["positions"], "batch seq")
        segments_BS = layout.move(part["segments"], "batch seq") if "segments" in part else None
        x_BSD = layout.move(x_BSD, "batch residual_seq _")
        for i in groups:
            x_BSD, new = self._run_group(model, i, x_BSD, positions_BS, segments_BS, layout)
            aux |= new
        return self.layout.move(x_BSD, "batch residual_seq _"), aux

    def _run_group(self, model: Decoder, i: int, x_BSD, positions_BS, segments_BS, layout: Layout):
        family, blocks = family_module(self.config.model.family), list(model.groups[i])
        table = family.encode_positions(self.config.model, positions_BS)
        x_BSD, _, aux = run_group(blocks, x_BSD, table, positions_BS, segments_BS, layout, None)
        return x_BSD, {f"group{i}/{name}": value for name, value in aux.items()}

    def enter(self, ring: jax.Array, t, outer: Arrays, parts: Arrays) -> jax.Array:
        """Inputs of the forward [Z, B, S, D]: stage 0 takes the embedding, and comes round to
        itself. So does a stage that nothing has reached yet, since zeros may have no norm."""
        item, first = self.schedule.forward(t, self.numbers()), self.schedule.forward(t, 0)
        part = {name: x[first.microbatch] for name, x in parts.items()}
        new = lambda: self.embed(outer, part)[0]
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
        model, layout = self.merge(params, fixed), self.layout.without("stage")
        return self._run_group(model, self.group, x_BSD, positions_BS, segments_BS, layout)

    def inputs(self, layers: Arrays, frozen: Arrays, item: Item, parts: Arrays):
        """(weights, positions, segments) of each stage's item, with a leading Z."""
        chosen = [
            {name: pick(array, item.repeat) for name, array in arrays.items()}
            for arrays in (layers, frozen)
        ]
        names = [name for name in ("positions", "segments") if name in parts]
        return *chosen, *(pick_part(parts[name], item.microbatch) for name in names)

    @functools.cached_property
    def forward(self):
        """`run_forward`, traced once for all phases of the schedule."""
        return jax.jit(self.run_forward, inline=True)

    @functools.cached_property
    def backward(self):
        """`run_backward`, traced once."""
        return jax.jit(self.run_backward, inline=True)

    def run_forward(self, layers, frozen, x_ZBSD, item: Item, parts: Arrays) -> jax.Array:
        """Every stage runs its chunk."""

        def one(params, fixed, x_BSD, positions_BS, segments_BS=None):
            params, fixed = self.marked(params), self.marked(fixed)
            return self.chunk(params, fixed, x_BSD, positions_BS, segments_BS)[0]

        params, fixed, *rest = self.inputs(layers, frozen, item, parts)
        return jax.vmap(one)(params, fixed, x_ZBSD, *rest)

    def run_backward(self, layers, frozen, x_ZBSD, g_ZBSD, item: Item, parts: Arrays):
        """Every stage differentiates its chunk: gradients, cotangents of x, aux."""

        def one(params, fixed, x_BSD, g_BSD, valid, weight, positions_BS, segments_BS=None):
            def run(params, x_BSD):
                y_BSD, aux = self.chunk(params, fixed, x_BSD, positions_BS, segments_BS)
                return (y_BSD, sum_aux_losses(aux, weight)), aux

            fixed = self.marked(fixed)
            (_, extra), pull, aux = jax.vjp(run, self.marked(params), x_BSD, has_aux=True)
            grads, dx_BSD = pull((g_BSD, weight.astype(extra.dtype)))
            return grads, dx_BSD, weigh_aux(aux, valid, weight)

        params, fixed, *rest = self.inputs(layers, frozen, item, parts)
        own_ZM = item.microbatch[:, None] == jnp.arange(self.schedule.microbatches)
        weights_Z = jnp.sum(jnp.where(own_ZM, parts["aux_weight"], 0), axis=1)
        weights_Z = jnp.where(item.valid, weights_Z, 0)
        g_ZBSD = where(item.valid, g_ZBSD, jnp.zeros_like(g_ZBSD))
        return jax.vmap(one)(params, fixed, x_ZBSD, g_ZBSD, item.valid, weights_Z, *rest)


def sum_aux_losses(aux: Arrays, like: jax.Array) -> jax.Array:
    """What blocks add to the loss of a microbatch, as `read_aux` has it, not weighted yet."""
    losses = [jnp.sum(value) for name, value in aux.items() if name.endswith("_loss")]
    return sum(losses, jnp.zeros((), like.dtype))


def weigh_aux(aux: Arrays, valid: jax.Array, weight: jax.Array) -> Arrays:
    """Means over a microbatch times its weight, and sums over it as they are."""
    counted = lambda name: UPDATE in name or PEAK in name
    scale = lambda name, v: v * (valid if counted(name) else weight).astype(v.dtype)
    return {name: scale(name, value) for name, value in aux.items()}


def where(here_Z: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """x on the stages that `here_Z` says, else y; both [Z, ...]."""
    return jnp.where(jnp.expand_dims(here_Z, tuple(range(1, x.ndim))), x, y)
