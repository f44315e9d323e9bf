"""One tick of the pipeline in training: a forward, the loss, a backward, and the sums so far.

Shapes: Z stages, V repeats, K slots, k layers of a chunk, B rows of a microbatch, S sequence, D
embed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.loss import sum_losses
from jaxlm.pipeline.chunks import add_at, pick
from jaxlm.pipeline.stages import Stages, sum_aux_losses, weigh_aux
from jaxlm.sharding import partitions, wide
from jaxlm.state import Arrays


class Carry(NamedTuple):
    """What goes from tick to tick."""

    x: jax.Array  # [Z, B, S, D]: the input of each stage's next forward
    g: jax.Array  # [Z, B, S, D]: the cotangent of each stage's next backward
    saved: jax.Array  # [Z, K, B, S, D]
    layers: Arrays  # gradients [Z, V, k, ...]
    outer: Arrays  # gradients of the embedding, the final norm, the head, layers on no stage
    aux: Arrays  # of the blocks [Z, V, k, ...]
    beside: Arrays  # aux of the layers on no stage
    sums: Arrays  # loss, weight, z_loss


def train_tick(
    stages: Stages, layers, frozen, outer, parts, phase: tuple[bool, bool], carry: Carry, t
):
    """One tick of the schedule: forward, loss, backward, and the way to the next stage."""
    forward, backward = phase
    schedule, y_ZBSD = stages.schedule, None
    if forward:
        item = schedule.forward(t, stages.numbers())
        x_ZBSD = stages.enter(carry.x, t, outer, parts)
        saved = jax.lax.dynamic_update_index_in_dim(carry.saved, x_ZBSD, t % schedule.slots, 1)
        y_ZBSD = stages.forward(layers, frozen, x_ZBSD, item, parts)
        carry = carry._replace(saved=saved, x=stages.shift(y_ZBSD, 1))
    if backward:
        if y_ZBSD is not None:
            carry = _add_loss(stages, outer, parts, carry, y_ZBSD, t)
        item = schedule.backward(t, stages.numbers())
        x_ZBSD = pick(carry.saved, item.slot)
        grads, dx_ZBSD, aux = stages.backward(layers, frozen, x_ZBSD, carry.g, item, parts)
        add = lambda sums, new: {n: add_at(sums[n], x, item.repeat) for n, x in new.items()}
        carry = carry._replace(layers=add(carry.layers, grads), aux=add(carry.aux, aux))
        carry = _add_embedding(stages, outer, parts, carry, dx_ZBSD, t)
        carry = carry._replace(g=stages.shift(dx_ZBSD, -1))
    return carry, None


def _add_loss(stages: Stages, outer, parts, carry: Carry, y_ZBSD, t) -> Carry:
    """The loss of the microbatch that leaves the last stage, and its cotangent there."""
    last = stages.schedule.stages - 1
    item = stages.schedule.forward(t, last)
    part = {name: x[item.microbatch] for name, x in parts.items()}

    def sums_of(weights, x_BSD):
        nll_BS, z_BS, aux = stages.head(weights, x_BSD, part)
        sums, weight = sum_losses(stages.config, nll_BS, z_BS, part["weights"]), part["aux_weight"]
        total = sums["loss"] + sums["z_loss"] + weight * sum_aux_losses(aux, weight)
        return total, (sums, weigh_aux(aux, item.valid, weight))

    def due(sums, beside, grads, g_ZBSD):
        x_BSD = stages.leave(y_ZBSD, last)
        pull = jax.value_and_grad(sums_of, argnums=(0, 1), has_aux=True)
        (_, (new, aux)), (new_grads, g_BSD) = pull(stages.after(outer), x_BSD)
        sums, beside, grads = _add(sums, new), _add(beside, aux), _add(grads, new_grads)
        return sums, beside, grads, stages.put(stages.numbers() == last, g_BSD, g_ZBSD)

    old = (carry.sums, carry.beside, carry.outer, carry.g)
    if stages.schedule.repeats == 1:  # in every tick of this phase
        new = due(*old)
    else:
        now = item.valid & (item.repeat == stages.schedule.repeats - 1)
        new = jax.lax.cond(now, due, lambda *old: old, *old)
    return carry._replace(**dict(zip(("sums", "beside", "outer", "g"), new, strict=True)))


def _add_embedding(stages: Stages, outer, parts, carry: Carry, dx_ZBSD, t) -> Carry:
    """Gradients of what comes before the stages, from what stage 0 hands back."""
    item = stages.schedule.backward(t, 0)
    part = {name: x[item.microbatch] for name, x in parts.items()}
    weights, weight = stages.before(outer), jnp.where(item.valid, part["aux_weight"], 0)
    if not weights and not stages.group:
        return carry

    def run(weights):
        x_BSD, aux = stages.embed(weights, part)
        return (x_BSD, sum_aux_losses(aux, weight)), aux

    def due(beside, grads):
        (_, extra), pull, aux = jax.vjp(run, weights, has_aux=True)
        (new,) = pull((stages.leave(dx_ZBSD, 0), weight.astype(extra.dtype)))
        return _add(beside, weigh_aux(aux, item.valid, weight)), _add(grads, new)

    old = (carry.beside, carry.outer)
    if stages.schedule.repeats == 1:  # what is not valid is zero
        beside, grads = due(*old)
    else:
        now = item.valid & (item.repeat == 0)
        beside, grads = jax.lax.cond(now, due, lambda *old: old, *old)
    return carry._replace(beside=beside, outer=grads)


def zeros_of(stages: Stages, layers, frozen, outer, parts) -> Carry:
    """The carry of the first tick."""
    x_ZBSD = stages.ring(parts)
    item = stages.schedule.backward(0, stages.numbers())
    _, _, aux = jax.eval_shape(stages.backward, layers, frozen, x_ZBSD, x_ZBSD, item, parts)
    part = {name: x[0] for name, x in parts.items()}
    _, before = jax.eval_shape(stages.embed, outer, part)
    x_BSD = jax.eval_shape(stages.leave, x_ZBSD, 0)
    _, _, after = jax.eval_shape(stages.head, outer, x_BSD, part)
    beside = jax.tree.map(jnp.zeros_like, before | after)
    count, *shape = x_ZBSD.shape
    first, *rest = jax.typeof(x_ZBSD).sharding.spec
    saved = jnp.zeros(
        (count, stages.schedule.slots, *shape), x_ZBSD.dtype, out_sharding=P(first, None, *rest)
    )

    def stacked(a):
        spec = P("stage", None, *partitions(a.sharding.spec)[1:])
        shape = (a.shape[0], stages.schedule.repeats, *a.shape[1:])
        return jnp.zeros(shape, a.dtype, out_sharding=spec)

    waits = lambda name: jax.typeof(stages.params[name]).sharding.spec.reduced
    zeros = lambda name, a: jnp.zeros(
        a.shape, wide(a.dtype),
        out_sharding=P(*partitions(jax.typeof(a).sharding.spec), unreduced=waits(name)),
    )  # fmt: skip
    sums: Arrays = dict.fromkeys(("loss", "weight", "z_loss"), jnp.zeros((), wide(x_ZBSD.dtype)))
    return Carry(
        x_ZBSD, x_ZBSD, saved, {n: zeros(n, a) for n, a in layers.items()},
        {n: zeros(n, a) for n, a in outer.items()}, jax.tree.map(stacked, aux), beside, sums,
    )  # fmt: skip


def _add(sums: Arrays, new: Arrays) -> Arrays:
    return sums | {name: sums[name] + x.astype(sums[name].dtype) for name, x in new.items()}
