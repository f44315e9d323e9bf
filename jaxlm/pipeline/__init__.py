"""Pipeline parallelism over mesh axis `stage`: one forward, one backward, in lock step.

Layers are cut into Z V chunks; chunk c = r Z + s lives on stage s as its repeat r. Each tick, every
stage does the forward of one chunk for one microbatch and the backward of one for another, so that
the activations kept do not grow with the number of microbatches (1F1B, arXiv:2006.09503; with V > 1
interleaved, arXiv:2104.04473). The stages are a leading dimension under jax.vmap, and what they
hand on moves by one collective-permute a tick. Autodiff never sees the schedule: a backward item
saves nothing but the chunk's input, and recomputes the chunk from it.

remat.policy decides what that recomputation keeps: with full a layer runs forward three times (in
its tick, to save block inputs, and to differentiate), with none twice. Weights rest in the order of
layers: with V > 1 those of each step move to their stages and their gradients back, once a step.

The embedding and the head belong to no stage: their vocabulary is split over all of them.

Shapes: Z stages, V repeats, M microbatches, K slots, k layers of a chunk, L layers, B rows of a
microbatch, S sequence, D embed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxlm import config as cfg
from jaxlm.loss import PEAK, UPDATE, aux_weights, read_aux, split_batch, sum_losses, token_losses
from jaxlm.models import family_module
from jaxlm.models.decoder import run_group
from jaxlm.sharding import Layout, partitions, wide
from jaxlm.state import Arrays, Structure

TABLES = ("embed", "positions")  # parameters of the embedding


class Item(NamedTuple):
    """What a stage does in a tick: integers, or arrays of one for each stage."""

    valid: Any  # else it is in the bubble: computed, and masked out
    repeat: Any
    microbatch: Any
    slot: Any  # where its input is saved


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who does what when; Z microbatches at a time go through all repeats."""

    stages: int
    repeats: int
    microbatches: int

    @property
    def warmup(self) -> int:
        """Ticks before the first backward, and after the last forward."""
        return self.stages * self.repeats - 1

    @property
    def ticks(self) -> int:
        """Ticks with a forward; as many have a backward."""
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def slots(self) -> int:
        """Saved chunk inputs of a stage: the oldest is read 2 (Z V - 1) ticks later."""
        return 2 * self.warmup + 1

    @property
    def bubble(self) -> float:
        """The part of the layers' work that is thrown away."""
        return (self.stages - 1) / self.ticks

    def forward(self, tick, stage) -> Item:
        """The chunk that a stage runs in a tick."""
        valid, group, repeat, place = self._count(tick - stage)
        return self._item(valid, group, repeat, place, stage)

    def backward(self, tick, stage) -> Item:
        """The chunk that a stage differentiates in a tick: the repeats in reverse."""
        n = tick - self.warmup - (self.stages - 1 - stage)
        valid, group, repeat, place = self._count(n)
        return self._item(valid, group, self.repeats - 1 - repeat, place, stage)

    def _count(self, n):
        """Item n of a stage; beyond the ends the nearest one stands in, marked invalid."""
        total, turn = self.microbatches * self.repeats, self.stages * self.repeats
        valid, n = (n >= 0) & (n < total), jnp.clip(n, 0, total - 1)
        return valid, n // turn, n % turn // self.stages, n % self.stages

    def _item(self, valid, group, repeat, place, stage) -> Item:
        tick = (group * self.repeats + repeat) * self.stages + place + stage
        return Item(valid, repeat, group * self.stages + place, tick % self.slots)


def make_schedule(config: cfg.Config, layout: Layout) -> Schedule:
    """The schedule that a config names."""
    return Schedule(layout.size("layers"), config.pipeline.repeats, config.batch.microbatches)


def describe(config: cfg.Config, stages: int) -> str:
    """One line about the schedule and its bubble."""
    s = Schedule(stages, config.pipeline.repeats, config.batch.microbatches)
    few = "" if s.microbatches >= stages else "; more batch.microbatches make it smaller"
    return (
        f"pipeline: {stages} stages x {s.repeats} chunks of "
        f"{config.model.num_layers // (stages * s.repeats)} layers, {s.microbatches} microbatches, "
        f"1F1B in {s.ticks} + {s.warmup} ticks, bubble {s.bubble:.1%}{few}"
    )


def accumulate(
    config: cfg.Config, structure: Structure, params: Arrays, fixed: Arrays, batch, layout: Layout
):
    """(aux, gradients) summed over the microbatches; gradients are not reduced yet."""
    run = _Run(config, structure, layout, make_schedule(config, layout), params, fixed)
    parts = split_batch(batch, config.batch.microbatches)
    parts["aux_weight"] = aux_weights(batch, parts)
    layers, frozen = run.chunks(params), run.chunks(fixed)
    outer = {name: params[name] for name in params if name not in layers}

    zeros = functools.partial(_zeros_of, run, layers, frozen, outer, parts)
    carry = zeros()
    warmup, ticks = run.schedule.warmup, run.schedule.ticks
    for first, last, phase in (
        (0, warmup, (True, False)), (warmup, ticks, (True, True)),
        (ticks, ticks + warmup, (False, True)),
    ):  # fmt: skip
        step = functools.partial(_tick, run, layers, frozen, outer, parts, phase)
        carry, _ = jax.lax.scan(step, carry, jnp.arange(first, last))
    grads = {name: _from_chunks(grad) for name, grad in carry.layers.items()}
    aux = {name: _whole(_from_chunks(value)) for name, value in carry.aux.items()}
    _, aux = read_aux(aux, jnp.ones(()))  # they are weighted already
    return carry.sums | aux, {name: (grads | carry.outer)[name] for name in params}


def losses_of_rows(config, structure: Structure, params: Arrays, fixed: Arrays, batch, layout):
    """-log p(target) and weights summed over each row, [M, B] each: forward only."""
    run = _Run(config, structure, layout, make_schedule(config, layout), params, fixed)
    schedule, parts = run.schedule, split_batch(batch, config.batch.microbatches)
    layers, frozen = run.chunks(params), run.chunks(fixed)
    last = schedule.stages - 1

    def tick(x_ring, t):
        item = schedule.forward(t, run.stage())
        x_ZBSD = run.enter(x_ring, t, {}, parts)
        y_ZBSD = run.forward(layers, frozen, x_ZBSD, item, parts)
        end = schedule.forward(t, last)
        part = {name: x[end.microbatch] for name, x in parts.items()}
        rows = functools.partial(_rows, run, {}, run.leave(y_ZBSD, last), part)
        due = end.valid & (end.repeat == schedule.repeats - 1)
        return run.shift(y_ZBSD, 1), jax.lax.cond(
            due, rows, lambda: jnp.zeros_like(jnp.sum(part["weights"], -1))
        )

    _, rows_TB = jax.lax.scan(tick, run.ring(parts), jnp.arange(schedule.ticks))
    m = jnp.arange(schedule.microbatches)
    done = m // schedule.stages * schedule.stages * schedule.repeats + m % schedule.stages
    done += (schedule.repeats - 1) * schedule.stages + last
    return rows_TB[done], jnp.sum(parts["weights"], axis=2)


class _Carry(NamedTuple):
    """What goes from tick to tick."""

    x: jax.Array  # [Z, B, S, D]: the input of each stage's next forward
    g: jax.Array  # [Z, B, S, D]: the cotangent of each stage's next backward
    saved: jax.Array  # [Z, K, B, S, D]
    layers: Arrays  # gradients [Z, V, k, ...]
    outer: Arrays  # gradients of the embedding, the final norm, the head
    aux: Arrays  # of the blocks [Z, V, k, ...]
    sums: Arrays  # loss, weight, z_loss


@dataclasses.dataclass(frozen=True)
class _Run:
    """The parts of a tick; arrays of a chunk have no stage inside vmap."""

    config: cfg.Config
    structure: Structure
    layout: Layout
    schedule: Schedule
    params: Arrays
    fixed: Arrays

    def stage(self) -> jax.Array:
        """0 .. Z-1, each on its stage."""
        return reshard(jnp.arange(self.schedule.stages), P("stage"))

    def merge(self, *arrays: Arrays):
        """The model with some of its arrays replaced."""
        return self.structure.merge(self.params, self.fixed, *arrays)

    def chunks(self, arrays: Arrays) -> Arrays:
        """The stacked weights as [Z, V, k, ...]."""
        stacked = lambda name: self.structure.dims[name].startswith("layers ")
        return {n: _to_chunks(a, self.schedule) for n, a in arrays.items() if stacked(n)}

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
        return jnp.sum(_where(self.stage() == stage, x_ZBSD, jnp.zeros_like(x_ZBSD)), axis=0)

    def put(self, here_Z: jax.Array, x_BSD: jax.Array, ring: jax.Array) -> jax.Array:
        """The ring, with x on the stages that `here_Z` says."""
        wide_ZBSD = reshard(
            jnp.broadcast_to(x_BSD[None], ring.shape), jax.typeof(ring).sharding.spec
        )
        return _where(here_Z, wide_ZBSD, ring)

    def embed(self, tables: Arrays, part: Arrays) -> jax.Array:
        """The embedding of a microbatch, [B, S, D]."""
        return self.merge(tables).embed_tokens(part["tokens"], part["positions"], self.layout)

    def enter(self, ring: jax.Array, t, outer: Arrays, parts: Arrays) -> jax.Array:
        """Inputs of the forward [Z, B, S, D]: stage 0 takes the embedding, and comes round to
        itself. So does a stage that nothing has reached yet, since zeros may have no norm."""
        item, first = self.schedule.forward(t, self.stage()), self.schedule.forward(t, 0)
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
        return self.put((self.stage() == 0) & (item.repeat == 0) | early, x_BSD, ring)

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
            {name: _pick(array, item.repeat) for name, array in arrays.items()}
            for arrays in (layers, frozen)
        ]
        names = [name for name in ("positions", "segments") if name in parts]
        return *chosen, *(_pick_part(parts[name], item.microbatch) for name in names)

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
        g_ZBSD = _where(item.valid, g_ZBSD, jnp.zeros_like(g_ZBSD))
        return jax.vmap(one)(params, fixed, x_ZBSD, g_ZBSD, item.valid, weights_Z, *rest)


def _rows(run: _Run, outer: Arrays, x_BSD: jax.Array, part: Arrays) -> jax.Array:
    """-log p(target) of a microbatch, summed over each row."""
    nll_BS, _ = _head(run, outer, x_BSD, part)
    return jnp.sum(nll_BS * part["weights"], axis=1)


def _head(run: _Run, outer: Arrays, x_BSD: jax.Array, part: Arrays):
    """The final norm, the head and the losses of every token [B, S]."""
    model = run.merge(outer)
    hidden_BSD, head_VD = model.finish(x_BSD, run.layout), model.head_weight(run.layout)
    config = run.config
    return token_losses(
        hidden_BSD, head_VD, part["targets"], config.model, run.layout, config.loss.chunks
    )


def _tick(run: _Run, layers, frozen, outer, parts, phase: tuple[bool, bool], carry: _Carry, t):
    """One tick of the schedule: forward, loss, backward, and the way to the next stage."""
    forward, backward = phase
    schedule, y_ZBSD = run.schedule, None
    if forward:
        item = schedule.forward(t, run.stage())
        x_ZBSD = run.enter(carry.x, t, outer, parts)
        saved = jax.lax.dynamic_update_index_in_dim(carry.saved, x_ZBSD, t % schedule.slots, 1)
        y_ZBSD = run.forward(layers, frozen, x_ZBSD, item, parts)
        carry = carry._replace(saved=saved, x=run.shift(y_ZBSD, 1))
    if backward:
        if y_ZBSD is not None:
            carry = _add_loss(run, outer, parts, carry, y_ZBSD, t)
        item = schedule.backward(t, run.stage())
        x_ZBSD = _pick(carry.saved, item.slot)
        grads, dx_ZBSD, aux = run.backward(layers, frozen, x_ZBSD, carry.g, item, parts)
        add = lambda sums, new: {n: _add_at(sums[n], x, item.repeat) for n, x in new.items()}
        carry = carry._replace(layers=add(carry.layers, grads), aux=add(carry.aux, aux))
        carry = _add_embedding(run, outer, parts, carry, dx_ZBSD, t)
        carry = carry._replace(g=run.shift(dx_ZBSD, -1))
    return carry, None


def _add_loss(run: _Run, outer, parts, carry: _Carry, y_ZBSD, t) -> _Carry:
    """The loss of the microbatch that leaves the last stage, and its cotangent there."""
    last = run.schedule.stages - 1
    item = run.schedule.forward(t, last)
    part = {name: x[item.microbatch] for name, x in parts.items()}
    tied = run.config.model.tie_embeddings
    weights = {n: a for n, a in outer.items() if n not in TABLES or (tied and n == "embed")}

    def sums_of(weights, x_BSD):
        nll_BS, z_BS = _head(run, weights, x_BSD, part)
        sums = sum_losses(run.config, nll_BS, z_BS, part["weights"])
        return sums["loss"] + sums["z_loss"], sums

    def due(sums, grads, g_ZBSD):
        x_BSD = run.leave(y_ZBSD, last)
        pull = jax.value_and_grad(sums_of, argnums=(0, 1), has_aux=True)
        (_, new), (new_grads, g_BSD) = pull(weights, x_BSD)
        return _add(sums, new), _add(grads, new_grads), run.put(run.stage() == last, g_BSD, g_ZBSD)

    old = (carry.sums, carry.outer, carry.g)
    if run.schedule.repeats == 1:  # in every tick of this phase
        new = due(*old)
    else:
        now = item.valid & (item.repeat == run.schedule.repeats - 1)
        new = jax.lax.cond(now, due, lambda *old: old, *old)
    return carry._replace(**dict(zip(("sums", "outer", "g"), new, strict=True)))


def _add_embedding(run: _Run, outer, parts, carry: _Carry, dx_ZBSD, t) -> _Carry:
    """The gradient of the embedding, from what stage 0 hands back."""
    item = run.schedule.backward(t, 0)
    part = {name: x[item.microbatch] for name, x in parts.items()}
    tables = {name: outer[name] for name in TABLES if name in outer}
    if not tables:
        return carry

    def due(grads):
        _, pull = jax.vjp(lambda tables: run.embed(tables, part), tables)
        return _add(grads, *pull(run.leave(dx_ZBSD, 0)))

    if run.schedule.repeats == 1:  # what is not valid is zero
        return carry._replace(outer=due(carry.outer))
    now = item.valid & (item.repeat == 0)
    return carry._replace(outer=jax.lax.cond(now, due, lambda grads: grads, carry.outer))


def _zeros_of(run: _Run, layers, frozen, outer, parts) -> _Carry:
    """The carry of the first tick."""
    x_ZBSD = run.ring(parts)
    item = run.schedule.backward(0, run.stage())
    _, _, aux = jax.eval_shape(run.backward, layers, frozen, x_ZBSD, x_ZBSD, item, parts)
    stages, *shape = x_ZBSD.shape
    first, *rest = jax.typeof(x_ZBSD).sharding.spec
    saved = jnp.zeros(
        (stages, run.schedule.slots, *shape), x_ZBSD.dtype, out_sharding=P(first, None, *rest)
    )

    def stacked(a):
        spec = P("stage", None, *partitions(a.sharding.spec)[1:])
        shape = (a.shape[0], run.schedule.repeats, *a.shape[1:])
        return jnp.zeros(shape, a.dtype, out_sharding=spec)

    waits = lambda name: jax.typeof(run.params[name]).sharding.spec.reduced
    zeros = lambda name, a: jnp.zeros(
        a.shape, wide(a.dtype),
        out_sharding=P(*partitions(jax.typeof(a).sharding.spec), unreduced=waits(name)),
    )  # fmt: skip
    sums: Arrays = dict.fromkeys(("loss", "weight", "z_loss"), jnp.zeros((), wide(x_ZBSD.dtype)))
    return _Carry(
        x_ZBSD, x_ZBSD, saved, {n: zeros(n, a) for n, a in layers.items()},
        {n: zeros(n, a) for n, a in outer.items()}, jax.tree.map(stacked, aux), sums,
    )  # fmt: skip


def _add(sums: Arrays, new: Arrays) -> Arrays:
    return sums | {name: sums[name] + x.astype(sums[name].dtype) for name, x in new.items()}


def _whole(x: jax.Array) -> jax.Array:
    return reshard(x, P(*(None,) * x.ndim))


def _where(here_Z: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(jnp.expand_dims(here_Z, tuple(range(1, x.ndim))), x, y)


def _pick(x: jax.Array, index_Z: jax.Array) -> jax.Array:
    """[Z, n, ...] -> [Z, ...]: every stage takes its own entry. Mapped, because it is local."""
    if x.shape[1] == 1:
        return x[:, 0]
    stage, _, *rest = partitions(jax.typeof(x).sharding.spec)
    take = lambda x, i: jax.lax.dynamic_index_in_dim(x, i[0], 1, keepdims=False)
    return jax.shard_map(
        take, in_specs=(P(stage, None, *rest), P("stage")), out_specs=P(stage, *rest)
    )(x, index_Z)


def _pick_part(x: jax.Array, index_Z: jax.Array) -> jax.Array:
    """[M, B, S] -> [Z, B, S]: every stage takes its own microbatch."""
    _, *rest = partitions(jax.typeof(x).sharding.spec)
    take = lambda x, i: jax.lax.dynamic_index_in_dim(x, i[0], 0)
    return jax.shard_map(
        take, in_specs=(P(None, *rest), P("stage")), out_specs=P("stage", *rest)
    )(x, index_Z)  # fmt: skip


def _add_at(sums: jax.Array, x: jax.Array, index_Z: jax.Array) -> jax.Array:
    """sums [Z, V, ...] with x [Z, ...] added to each stage's own repeat."""
    if sums.shape[1] == 1:
        return sums + x[:, None].astype(sums.dtype)
    spec, x_spec = (jax.typeof(a).sharding.spec for a in (sums, x))
    add = lambda sums, x, i: sums.at[0, i[0]].add(x[0].astype(sums.dtype))
    return jax.shard_map(
        add, in_specs=(spec, x_spec, P("stage")), out_specs=spec, check_vma=False
    )(sums, x, index_Z)  # fmt: skip


def _to_chunks(x: jax.Array, schedule: Schedule) -> jax.Array:
    """[L, ...] -> [Z, V, k, ...]; with V > 1 the weights move to other stages."""
    rest = partitions(jax.typeof(x).sharding.spec)[1:]

    def local(x):  # local shards below
        x = x.reshape(schedule.repeats, -1, *x.shape[1:])
        return _exchange(x, schedule.stages, deal=True)[None]

    spec = P("stage", None, None, *rest)
    x = reshard(x, P("stage", *rest))
    return jax.shard_map(local, in_specs=P("stage", *rest), out_specs=spec, check_vma=False)(x)


def _from_chunks(x: jax.Array) -> jax.Array:
    """[Z, V, k, ...] -> [L, ...]: the inverse of `_to_chunks`, of sums that may still wait."""
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
