"""The train step and the loop: the file to read first.

Shapes: B batch, S sequence, M microbatches.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, reshard
from jax.sharding import PartitionSpec as P

from jaxlm import (
    checkpoint,
    configfile,
    data,
    devices,
    evaluate,
    generate,
    lint,
    metrics,
    optim,
    programs,
    run,
)
from jaxlm import config as cfg
from jaxlm.data import load
from jaxlm.data.pack import evaluation_items
from jaxlm.interop import carried
from jaxlm.loss import (
    aux_weights,
    batch_losses,
    read_aux,
    read_peaks,
    split_batch,
    sum_losses,
    update_fixed,
)
from jaxlm.parallel import pipeline
from jaxlm.plan import estimate
from jaxlm.sharding import Layout, batch_shardings, sequence_order, wide
from jaxlm.state import Arrays, State, Structure, model_structure, open_mesh

logger = logging.getLogger("jaxlm")


class Program(NamedTuple):
    """What a config runs on a mesh; the trainer and plan/compiled.py share it."""

    mesh: Mesh
    layout: Layout
    structure: Structure
    optimizer: optax.GradientTransformation
    train_step: jax.stages.Wrapped
    options: dict  # of XLA, for the kind of device


def make_program(config: cfg.Config, found: list | None = None) -> Program:
    """The train step of a config on these devices (None: all that there are)."""
    mesh, layout = open_mesh(config, found)
    with jax.set_mesh(mesh):
        structure = model_structure(config.model, layout)
    optimizer = optim.make_optimizer(config.optimizer, config.steps, structure.dims)
    options = dict(devices.kind(mesh).compiler_options)
    step = make_train_step(config, structure, layout, optimizer, options)
    return Program(mesh, layout, structure, optimizer, step, options)


def make_train_step(config: cfg.Config, structure: Structure, layout: Layout, optimizer, options):
    """jit(State, batch) -> (State, metrics); the state is donated. `options` are XLA's."""
    schedule = optim.schedule(config.optimizer, config.steps)

    def train_step(state: State, batch: Arrays) -> tuple[State, Arrays]:
        loss_sum, weight_sum, grads, aux = loss_and_grads(config, structure, state, batch, layout)
        count = jnp.where(weight_sum > 0, weight_sum, 1)  # a batch in which nothing counts
        grads = jax.tree.map(lambda g: g / count, grads)
        fixed, aux = update_fixed(config.model, state.fixed, aux)
        updates, opt, grad_norm = make_updates(config.optimizer, optimizer, state, grads)
        params = jax.tree.map(jnp.add, state.params, updates)
        metrics = {
            "loss": loss_sum / count,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
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
    grad_fn = jax.value_and_grad(
        functools.partial(loss_sums, config, structure, layout), has_aux=True
    )

    def microbatch(sums, part):
        (total, aux), grads = grad_fn(params, fixed, part)
        return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, (aux, grads)), None

    count = config.batch.microbatches
    if layout.size("layers") > 1:
        aux, grads = pipeline.accumulate(config, structure, params, fixed, batch, layout)
    elif count == 1:
        whole = batch | {"aux_weight": jnp.sum(batch["weights"])}
        (_, aux), grads = grad_fn(params, fixed, whole)
    else:
        parts = split_batch(batch, count)
        parts["aux_weight"] = aux_weights(batch, parts)
        first = jax.tree.map(lambda x: x[0], parts)
        (_, aux), _ = jax.eval_shape(grad_fn, params, fixed, first)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), aux)
        sums = zeros, jax.tree.map(_unreduced_zeros, params)
        (aux, grads), _ = jax.lax.scan(microbatch, sums, parts)
    grads = reduce_gradients(grads, structure, layout)
    aux = read_peaks(aux)
    return aux.pop("loss"), aux.pop("weight"), grads, aux


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
        dims, over = structure.dims[name], structure.over[name]
        if layout.gather_at == "step":
            spec, dtype = layout.spec(dims), jnp.dtype(layout.compute)
        else:
            spec, dtype = layout.stored(dims), array.dtype
        return reshard(array.astype(dtype), P(*spec, reduced=layout.summed(over, spec)))

    return {name: one(name, array) for name, array in arrays.items()}


def reduce_gradients(grads: Arrays, structure: Structure, layout: Layout) -> Arrays:
    """The one reduction of a step, in precision.reduce, to the sharding at rest."""
    return {
        name: reshard(grad.astype(layout.reduce), layout.stored(structure.dims[name])).astype(
            wide(layout.reduce)
        )
        for name, grad in grads.items()
    }


def _unreduced_zeros(weight: jax.Array) -> jax.Array:
    spec = jax.typeof(weight).sharding.spec
    return jnp.zeros(
        weight.shape, wide(weight.dtype), out_sharding=P(*spec.partitions, unreduced=spec.reduced)
    )


def train(config: cfg.Config) -> None:
    """Train to config.steps, from the newest checkpoint of the run directory if it has one."""
    if jax.process_count() == 1:  # where one loads and others compile, gloo gives up waiting
        programs.keep()
    mesh, layout, structure, optimizer, train_step, options = make_program(config)
    run.prepare_data(config)
    training = data.open_split(config.data.path, "train")
    data.check_vocab(training, config.model.vocab_size)
    run_dir = cfg.run_dir(config)
    prediction = predict(config, mesh, structure)
    facts = functools.partial(load.data_state, split=training, batch=config.batch, seed=config.seed)
    for key, before, now in checkpoint.refuse_other_run(run_dir, config, facts(0)):
        logger.info("changed since the last start: %s=%s, was %s", key, now, before)
    with jax.set_mesh(mesh):
        shardings = batch_shardings(config, layout, mesh)
        held_out = make_evaluation(config, structure, layout, shardings, options)
        tokenizer = run.training_tokenizer(config)
        example = run.example_prompt(config, tokenizer, training)
        write_samples = make_sampling(config, structure, layout, mesh, tokenizer)
        state, start = run.first_state(config, layout, optimizer, mesh, facts)
        batches = load.batches(
            training, config.batch, config.seed, shardings, start,
            order=sequence_order(layout, config.batch.sequence_length),
            segments=config.data.segments, prefetch=config.data.prefetch,
        )  # fmt: skip
        if start < config.steps:
            run.write_config(config)
            run.keep_tokenizer(run_dir, tokenizer)
        if start == 0:
            carried.take_along(config, tokenizer)
        manager = checkpoint.open_manager(run_dir / "checkpoints", config.checkpoint)
        due = lambda step, every: step == config.steps or (every and step % every == 0)

        with metrics.open_log(config, structure, mesh, run_dir, start) as log:
            with metrics.only_informs("the run is not described"):
                logger.info("%s", metrics.describe_run(config, mesh, layout, structure, start))
                if layout.size("layers") > 1:
                    logger.info("%s", pipeline.describe(config, layout.size("layers")))
            with metrics.only_informs("costly settings are not named"):
                for line in lint.warnings(config, mesh, layout, structure):
                    logger.warning("warning: %s", line)
            if config.optimizer.warmup_steps >= config.steps:
                logger.info("the run ends within its warm-up (optimizer.warmup_steps)")
            previous = None
            for step in range(start, config.steps):
                state, values = train_step(state, next(batches))
                log.step(previous)  # reading the last step's numbers never stalls the device
                previous, done = (step + 1, values), step + 1
                evaluating = held_out is not None and due(done, config.eval.every)
                saving = due(done, config.checkpoint.every)
                sampling = config.sample.every and due(done, config.sample.every)
                if not (evaluating or saving or sampling):
                    continue
                log.step(previous)
                previous = None
                with log.paused():
                    if evaluating and held_out:
                        log.evaluation(done, held_out(state))
                    if saving:
                        checkpoint.save(
                            manager, done, state, facts(done), configfile.to_dict(config)
                        )
                    if sampling:
                        log.samples(done, write_samples(state))
            checkpoint.finish(manager)
            if start < config.steps:
                log.compare(config.steps, prediction)
            with metrics.only_informs("no closing words"):
                can_evaluate = held_out is not None
                log.say(metrics.closing_words(config, run_dir, start, example, can_evaluate))


def predict(config: cfg.Config, mesh: Mesh, structure: Structure) -> dict[str, Any]:
    """What the formulas of the planner expect of a step here; said, and kept with the metrics."""
    with metrics.only_informs("plan: no prediction"):
        target, (cost, time) = estimate.predict(config, mesh, structure)
        logger.info(
            "plan: a step of %.4g s, %.2f GB a device, limited by %s (formulas; "
            "jaxlm plan compiles)", time.seconds, cost.peak / 1e9, time.limit,
        )  # fmt: skip
        return {
            "plan/target": target.text, "plan/step_seconds": time.seconds,
            "plan/peak_bytes": cost.peak,
        }  # fmt: skip
    return {}


def make_evaluation(config: cfg.Config, structure: Structure, layout: Layout, shardings, options):
    """state -> held-out numbers, or None where the dataset holds nothing out."""
    if not data.read_manifest(config.data.path)["splits"]["validation"]["tokens"]:
        logger.info("no evaluation: the validation split of %s is empty", config.data.path)
        return None
    split = data.open_split(config.data.path, "validation")
    evaluation_items(split, config.batch.sequence_length)  # a mistake must not stop a run half-way
    eval_step = evaluate.make_eval_step(config, structure, layout, options)

    def held_out(state: State) -> dict:
        batches = load.evaluation_batches(
            split, config.batch, shardings, config.eval.batches,
            order=sequence_order(layout, config.batch.sequence_length),
            segments=config.data.segments,
        )  # fmt: skip
        return evaluate.evaluate(eval_step, state.params, state.fixed, batches, split)

    return held_out


def make_sampling(
    config: cfg.Config, structure: Structure, layout: Layout, mesh: Mesh, tokenizer: data.Tokenizer
):
    """state -> [(prompt, text)]: sample.prompts, continued."""
    sample = config.sample
    if sample.every:  # a mistake in the prompts must not stop a run half-way
        prompts = generate.encode_prompts(tokenizer, list(sample.prompts))
        generate.check_lengths(config.model, prompts, sample.tokens)

    def continue_prompts(state: State) -> list[tuple[str, str]]:
        texts = generate.generate_text(
            config, structure, layout, mesh, state.params | state.fixed, tokenizer,
            list(sample.prompts), tokens=sample.tokens, temperature=sample.temperature,
            top_k=sample.top_k, top_p=sample.top_p, seed=config.seed,
        )  # fmt: skip
        return list(zip(sample.prompts, texts, strict=True))

    return continue_prompts
