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

The embedding and the head belong to no stage: their vocabulary is split over all of them. All
stages run one program, so chunks are cut from one group of layers, a pattern of blocks repeated.
Layers of other groups are on no stage either: before the first stage or after the last one, all
stages run them, each for its part of a microbatch's rows, and gather their weights as with fsdp.

Shapes: Z stages, V repeats, M microbatches, K slots, k layers of a chunk, L layers, B rows of a
microbatch, S sequence, D embed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxlm import config as cfg
from jaxlm.loss import aux_weights, read_aux, split_batch
from jaxlm.models import staged_pattern
from jaxlm.pipeline.chunks import from_chunks
from jaxlm.pipeline.schedule import Schedule
from jaxlm.pipeline.stages import Stages
from jaxlm.pipeline.tick import train_tick, zeros_of
from jaxlm.sharding import Layout
from jaxlm.state import Arrays, Structure


def make_schedule(config: cfg.Config, layout: Layout) -> Schedule:
    """The schedule that a config names."""
    return Schedule(layout.size("layers"), config.pipeline.repeats, config.batch.microbatches)


def describe(config: cfg.Config, stages: int) -> str:
    """One line about the schedule and its bubble."""
    s = Schedule(stages, config.pipeline.repeats, config.batch.microbatches)
    pattern, number = staged_pattern(config.model)
    on_stages = len(pattern) * number
    rest = config.model.num_layers - on_stages
    beside = f"{rest} layers on no stage, each stage with its rows, " if rest else ""
    few = "" if s.microbatches >= stages else "; more batch.microbatches make it smaller"
    return (
        f"pipeline: {stages} stages x {s.repeats} chunks of {on_stages // (stages * s.repeats)} "
        f"layers, {beside}{s.microbatches} microbatches, "
        f"1F1B in {s.ticks} + {s.warmup} ticks, bubble {s.bubble:.1%}{few}"
    )


def accumulate(
    config: cfg.Config, structure: Structure, params: Arrays, fixed: Arrays, batch, layout: Layout
):
    """(aux, gradients) summed over the microbatches; gradients are not reduced yet."""
    stages = Stages(config, structure, layout, make_schedule(config, layout), params, fixed)
    parts = split_batch(batch, config.batch.microbatches)
    parts["aux_weight"] = aux_weights(batch, parts)
    layers, frozen = stages.chunks(params), stages.chunks(fixed)
    outer = {name: params[name] for name in params if name not in layers}

    carry = zeros_of(stages, layers, frozen, outer, parts)
    warmup, ticks = stages.schedule.warmup, stages.schedule.ticks
    for first, last, phase in (
        (0, warmup, (True, False)), (warmup, ticks, (True, True)),
        (ticks, ticks + warmup, (False, True)),
    ):  # fmt: skip
        step = functools.partial(train_tick, stages, layers, frozen, outer, parts, phase)
        carry, _ = jax.lax.scan(step, carry, jnp.arange(first, last))
    grads = {name: from_chunks(grad) for name, grad in carry.layers.items()}
    aux = {name: _whole(from_chunks(value)) for name, value in carry.aux.items()}
    aux |= {name: _whole(value) for name, value in carry.beside.items()}
    _, aux = read_aux(aux, jnp.ones(()))  # they are weighted already
    return carry.sums | aux, {name: (grads | carry.outer)[name] for name in params}


def losses_of_rows(config, structure: Structure, params: Arrays, fixed: Arrays, batch, layout):
    """-log p(target) and weights summed over each row, [M, B] each: forward only."""
    stages = Stages(config, structure, layout, make_schedule(config, layout), params, fixed)
    schedule, parts = stages.schedule, split_batch(batch, config.batch.microbatches)
    layers, frozen = stages.chunks(params), stages.chunks(fixed)
    last = schedule.stages - 1

    def step(x_ring, t):
        item = schedule.forward(t, stages.numbers())
        x_ZBSD = stages.enter(x_ring, t, {}, parts)
        y_ZBSD = stages.forward(layers, frozen, x_ZBSD, item, parts)
        end = schedule.forward(t, last)
        part = {name: x[end.microbatch] for name, x in parts.items()}

        def rows():
            nll_BS, _, _ = stages.head({}, stages.leave(y_ZBSD, last), part)
            return jnp.sum(nll_BS * part["weights"], axis=1)

        due = end.valid & (end.repeat == schedule.repeats - 1)
        return stages.shift(y_ZBSD, 1), jax.lax.cond(
            due, rows, lambda: jnp.zeros_like(jnp.sum(part["weights"], -1))
        )

    _, rows_TB = jax.lax.scan(step, stages.ring(parts), jnp.arange(schedule.ticks))
    m = jnp.arange(schedule.microbatches)
    done = m // schedule.stages * schedule.stages * schedule.repeats + m % schedule.stages
    done += (schedule.repeats - 1) * schedule.stages + last
    return rows_TB[done], jnp.sum(parts["weights"], axis=2)


def _whole(x: jax.Array) -> jax.Array:
    return reshard(x, P(*(None,) * x.ndim))
