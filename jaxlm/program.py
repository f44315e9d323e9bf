"""What a config runs: mesh, layout, train step and evaluation step, for loop and planner alike.

Read it with train.py, which loops over this step. Shapes: B batch, S sequence, M microbatches.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from jaxlm import config as cfg
from jaxlm import optim, pipeline
from jaxlm.hardware import chips
from jaxlm.loss import (
    aux_weights,
    batch_losses,
    read_aux,
    read_peaks,
    split_batch,
    sum_losses,
    update_fixed,
)
from jaxlm.mesh import open_mesh
from jaxlm.models.decoder import Decoder
from jaxlm.privacy.noise import add_noise
from jaxlm.privacy.norms import clip_rows
from jaxlm.privacy.sampling import expected_rows
from jaxlm.sharding import Layout, batch_shardings, wide
from jaxlm.state import Arrays, State, Structure, abstract_state, model_structure


class Program(NamedTuple):
    """What a config runs on a mesh; the trainer and the planner share it."""

    mesh: Mesh
    layout: Layout
    structure: Structure
    optimizer: optax.GradientTransformation
    train_step: jax.stages.Wrapped
    options: dict  # of XLA, for the kind of device


def make_program(config: cfg.Config, found: list | None = None) -> Program:
    """The train step of a config on these devices (None: all that there are)."""
    return program_on(config, *open_mesh(config, found))


def program_on(config: cfg.Config, mesh: Mesh, layout: Layout) -> Program:
    """The train step of a config on a mesh."""
    with jax.set_mesh(mesh):
        structure = model_structure(config.model, layout)
    optimizer = optim.make_optimizer(config.optimizer, config.steps, structure.dims)
    options = dict(chips.kind(mesh).compiler_options)
    step = make_train_step(config, structure, layout, optimizer, options)
    return Program(mesh, layout, structure, optimizer, step, options)


def trace_train_step(config: cfg.Config, program: Program) -> jax.stages.Traced:
    """The train step on shapes only; `.lower().compile()` needs the compiler, not the devices."""
    mesh, layout = program.mesh, program.layout
    shape = (config.batch.sequences, config.batch.sequence_length)
    batch = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if name == "weights" else jnp.int32, sharding=sharding
        )
        for name, sharding in batch_shardings(config, layout, mesh).items()
    }
    if config.privacy.clip_norm:
        batch["noise"] = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        state = abstract_state(config, layout, program.optimizer, mesh)
        return program.train_step.trace(state, batch)


def turns(config: cfg.Config, layout: Layout) -> int:
    """Trips of the step's loop over microbatches; with stages, over the ticks that do all work."""
    if layout.size("layers") == 1:
        return config.batch.microbatches
    schedule = pipeline.make_schedule(config, layout)
    return schedule.ticks - schedule.warmup


def make_train_step(config: cfg.Config, structure: Structure, layout: Layout, optimizer, options):
    """jit(State, batch) -> (State, metrics); the state is donated. `options` are XLA's."""
    schedule = optim.schedule(config.optimizer, config.steps)
    private = config.privacy.clip_norm > 0

    def train_step(state: State, batch: Arrays) -> tuple[State, Arrays]:
        rows = {name: x for name, x in batch.items() if name != "noise"}
        loss_sum, weight_sum, grads, aux = loss_and_grads(config, structure, state, rows, layout)
        count = jnp.where(weight_sum > 0, weight_sum, 1)  # a batch in which nothing counts
        if private:  # nothing may tell how many rows the batch has
            grads = add_noise(config.privacy, grads, batch["noise"])
            count = expected_rows(config.batch.sequences, config.privacy.delta)
        grads = jax.tree.map(lambda g: g / count, grads)
        fixed, aux = update_fixed(config.model, state.fixed, aux)
        updates, opt, grad_norm = make_updates(config.optimizer, optimizer, state, grads)
        params = jax.tree.map(jnp.add, state.params, updates)
        metrics = {"grad_norm": grad_norm, "learning_rate": schedule(state.step)}
        if private:  # all else is of the rows themselves
            return State(state.step + 1, params, fixed, opt), metrics
        metrics |= {
            "loss": loss_sum / count,
            "weight": weight_sum,
            **{name: value / count for name, value in aux.items()},
        }
        return State(state.step + 1, params, fixed, opt), metrics

    return jax.jit(train_step, donate_argnums=0, compiler_options=options)


@jax.named_scope("optimizer")
def make_updates(config: cfg.Optimizer, optimizer, state: State, grads: Arrays):
    """(what to add to the parameters, optimizer state, norm of the gradients before clipping)."""
    norm = optim.global_norm(grads)
    if config.clip_norm:
        grads = optim.clip_by_norm(grads, norm, config.clip_norm)
    updates, opt = optimizer.update(grads, state.opt, state.params)
    return updates, opt, norm


def loss_and_grads(config: cfg.Config, structure: Structure, state: State, batch, layout: Layout):
    """Sums over the batch: loss, weight, gradients, aux. The one seam between kinds of step."""
    params = defer_reduction(state.params, structure, layout)
    fixed = defer_reduction(state.fixed, structure, layout)
    if config.privacy.clip_norm:
        batch = clip_rows(config, structure, params, fixed, batch, layout)
    if layout.size("layers") > 1:
        aux, grads = pipeline.accumulate(config, structure, params, fixed, batch, layout)
    else:
        aux, grads = accumulate(config, structure, params, fixed, batch, layout)
    grads = reduce_gradients(grads, structure, layout)
    aux = read_peaks(aux)
    return aux.pop("loss"), aux.pop("weight"), grads, aux


def accumulate(config: cfg.Config, structure: Structure, params, fixed, batch, layout: Layout):
    """(aux, gradients) of the microbatches, one after another, summed."""
    loss = functools.partial(loss_sums, config, structure, layout)
    grad_fn = jax.value_and_grad(loss, has_aux=True)
    if config.batch.microbatches == 1:
        whole = batch | {"aux_weight": jnp.sum(batch["weights"])}
        (_, aux), grads = grad_fn(params, fixed, whole)
        return aux, grads

    def add(sums, part):
        (_, aux), grads = grad_fn(params, fixed, part)
        return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, (aux, grads)), None

    parts = split_batch(batch, config.batch.microbatches)
    parts["aux_weight"] = aux_weights(batch, parts)
    first = jax.tree.map(lambda x: x[0], parts)
    _, aux = jax.eval_shape(loss, params, fixed, first)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), aux)
    sums, _ = jax.lax.scan(add, (zeros, jax.tree.map(_unreduced_zeros, params)), parts)
    return sums


def loss_sums(config: cfg.Config, structure: Structure, layout: Layout, params, fixed, batch):
    """The sum to differentiate (cross-entropy, z-loss, losses of the blocks), and its parts."""
    model = structure.merge(params, fixed)
    nll_BS, z_BS, aux = batch_losses(config, model, batch, layout)
    sums = sum_losses(config, nll_BS, z_BS, batch["weights"])
    extra, aux = read_aux(aux, batch["aux_weight"])
    return sums["loss"] + sums["z_loss"] + extra, sums | aux


def defer_reduction(arrays: Arrays, structure: Structure, layout: Layout) -> Arrays:
    """Mark weights so that their gradients are summed over microbatches first, over devices after.

    With gather_at=step they are also gathered here, once.
    """

    def one(name: str, array: jax.Array) -> jax.Array:
        dims, over, home = structure.dims[name], structure.over[name], structure.home(name, layout)
        if layout.gather_at == "step":
            spec, dtype = home.spec(dims), jnp.dtype(layout.compute)
        else:
            spec, dtype = home.stored(dims), array.dtype
        return reshard(array.astype(dtype), P(*spec, reduced=home.summed(over, spec)))

    return {name: one(name, array) for name, array in arrays.items()}


def reduce_gradients(grads: Arrays, structure: Structure, layout: Layout) -> Arrays:
    """The one reduction of a step, in precision.reduce, to the sharding at rest."""

    def one(name: str, grad: jax.Array) -> jax.Array:
        stored = structure.home(name, layout).stored(structure.dims[name])
        return reshard(grad.astype(layout.reduce), stored).astype(wide(layout.reduce))

    return {name: one(name, grad) for name, grad in grads.items()}


def _unreduced_zeros(weight: jax.Array) -> jax.Array:
    spec = jax.typeof(weight).sharding.spec
    return jnp.zeros(
        weight.shape, wide(weight.dtype), out_sharding=P(*spec.partitions, unreduced=spec.reduced)
    )


def make_eval_step(config: cfg.Config, structure: Structure, layout: Layout, options: dict):
    """jit(params, fixed, batch) -> (loss, weight) of each row, float32 [M, B/M], on every device.

    Microbatch by microbatch, as in training: what could train can be evaluated.
    """

    def losses_of_rows(model: Decoder, batch: Arrays):
        nll_BS, _, _ = batch_losses(config, model, batch, layout)
        weights_BS = batch["weights"]
        return jnp.sum(nll_BS * weights_BS, axis=1), jnp.sum(weights_BS, axis=1)

    def eval_step(params: Arrays, fixed: Arrays, batch: Arrays):
        if layout.size("layers") > 1:
            rows = pipeline.losses_of_rows(config, structure, params, fixed, batch, layout)
        else:
            model = structure.merge(params, fixed)
            parts = split_batch(batch, config.batch.microbatches)
            _, rows = jax.lax.scan(lambda _, part: (None, losses_of_rows(model, part)), None, parts)
        return tuple(reshard(row_MB, P(None, None)) for row_MB in rows)

    return jax.jit(eval_step, compiler_options=options)
