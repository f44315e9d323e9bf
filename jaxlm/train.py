"""The loop: the file to read first; the step that it runs is in program.py."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm import (
    checkpoint,
    configfile,
    data,
    evaluate,
    generate,
    lint,
    metrics,
    outer,
    pipeline,
    program_cache,
    run,
)
from jaxlm import config as cfg
from jaxlm.data import load
from jaxlm.data.pack import evaluation_items
from jaxlm.interop import carried
from jaxlm.plan import estimate
from jaxlm.privacy import ledger as private
from jaxlm.program import Program, make_eval_step, make_program
from jaxlm.sharding import Layout, batch_shardings, sequence_order
from jaxlm.state import State, Structure

logger = logging.getLogger("jaxlm")


def train(config: cfg.Config) -> None:
    """Train to config.steps, from the newest checkpoint of the run directory if it has one."""
    if jax.process_count() == 1:  # of several, one would load while others compile, and time out
        program_cache.keep()
    program = make_program(config)
    run.prepare_data(config)
    training = data.open_split(config.data.path, "train")
    data.check_vocab(training, config.model.vocab_size)
    steps = config.steps
    config, ledger = private.open_ledger(config, training)
    if config.steps != steps:  # the budget pays for fewer
        program = make_program(config)
    mesh, layout, structure, optimizer, _, options = program
    meeting = outer.meet(config, program)
    run_dir = cfg.run_dir(config)
    prediction = predict(config, program)
    data_state = functools.partial(
        load.data_state, split=training, batch=config.batch, seed=config.seed
    )
    for key, before, now in checkpoint.refuse_other_run(run_dir, config, data_state(0)):
        logger.info("changed since the last start: %s=%s, was %s", key, now, before)
    with jax.set_mesh(mesh), contextlib.closing(meeting):
        shardings = batch_shardings(config, layout, mesh)
        held_out = make_evaluation(config, structure, layout, shardings, options)
        tokenizer = run.training_tokenizer(config)
        # Its words are those of a training text, which a private run may not show.
        example = "" if ledger else run.example_prompt(config, tokenizer, training)
        write_samples = make_sampling(config, structure, layout, mesh, tokenizer)
        meeting.enter()
        state, start = run.first_state(
            config, layout, optimizer, mesh, training, meeting.restore, meeting.begin
        )
        stream = functools.partial(load.batches, places=meeting.places)
        if ledger:
            rate, secret = ledger.terms.rate, ledger.secret
            stream = functools.partial(load.private_batches, rate=rate, secret=secret)
        batches = stream(
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

        with metrics.open_log(config, structure, mesh, run_dir, start, meeting.read) as log:
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
                state, values = meeting.step(state, next(batches))
                if ledger:
                    values["epsilon"] = ledger.epsilon(step + 1)
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
                        log.evaluation(done, held_out(meeting.merged(state)))
                    if saving:
                        kept, islands = meeting.saved(state)
                        checkpoint.save(
                            manager, done, kept, data_state(done) | meeting.facts(),
                            configfile.to_dict(config), islands,
                        )  # fmt: skip
                    if sampling:
                        log.samples(done, write_samples(meeting.merged(state)))
            checkpoint.finish(manager)
            if start < config.steps:
                log.compare(config.steps, prediction)
            with metrics.only_informs("no closing words"):
                can_evaluate = held_out is not None
                log.say(metrics.closing_words(config, run_dir, start, example, can_evaluate))


def predict(config: cfg.Config, program: Program) -> dict[str, Any]:
    """What the planner expects of a step on these devices; logged, and kept with the metrics."""
    with metrics.only_informs("plan: no prediction"):
        target, (cost, time) = estimate.predict(config, program)
        logger.info(
            "plan: a step of %.4g s, %.2f GB a device, limited by %s (by its trace; "
            "jaxlm plan compiles)", time.seconds, cost.peak / 1e9, time.limit,
        )  # fmt: skip
        return {
            "plan/target": target.text, "plan/step_seconds": time.seconds,
            "plan/peak_bytes": cost.peak,
        }  # fmt: skip
    return {}


def make_evaluation(config: cfg.Config, structure: Structure, layout: Layout, shardings, options):
    """A function state -> held-out loss; None where the dataset holds nothing out."""
    if not data.read_manifest(config.data.path)["splits"]["validation"]["tokens"]:
        logger.info("no evaluation: the validation split of %s is empty", config.data.path)
        return None
    split = data.open_split(config.data.path, "validation")
    evaluation_items(split, config.batch.sequence_length)  # finds a mistake before the run
    eval_step = make_eval_step(config, structure, layout, options)

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
    """A function state -> [(prompt, text that continues it)] for sample.prompts."""
    sample = config.sample
    if sample.every:  # finds a mistake in the prompts before the run, not in it
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
