"""Held-out loss: every token of a split predicted once, the same on every mesh.

Shapes: B batch, S sequence, M microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from jaxlm import config as cfg
from jaxlm import devices, pipeline, run
from jaxlm.data import Split, check_vocab, load_tokenizer, open_split
from jaxlm.data.load import evaluation_batches
from jaxlm.data.pack import predicted_bytes
from jaxlm.interop import carried
from jaxlm.loss import batch_losses, split_batch
from jaxlm.sharding import Layout, batch_shardings, sequence_order
from jaxlm.state import Arrays, Structure


def make_eval_step(config: cfg.Config, structure: Structure, layout: Layout, options: dict):
    """jit(params, fixed, batch) -> (loss, weight) of each row, float32 [M, B/M], on every device.

    Microbatch by microbatch, as in training: what could train can be evaluated.
    """

    def eval_step(params: Arrays, fixed: Arrays, batch: Arrays):
        if layout.size("layers") > 1:
            rows = pipeline.losses_of_rows(config, structure, params, fixed, batch, layout)
            return tuple(reshard(row_MB, P(None, None)) for row_MB in rows)
        model = structure.merge(params, fixed)

        def part(_, batch: Arrays):
            nll_BS, _, _ = batch_losses(config, model, batch, layout)
            weights_BS = batch["weights"]
            return None, (jnp.sum(nll_BS * weights_BS, axis=1), jnp.sum(weights_BS, axis=1))

        _, rows = jax.lax.scan(part, None, split_batch(batch, config.batch.microbatches))
        return tuple(reshard(row_MB, P(None, None)) for row_MB in rows)

    return jax.jit(eval_step, compiler_options=options)


def evaluate(eval_step, params: Arrays, fixed: Arrays, batches: Iterable, split: Split) -> dict:
    """loss (nats per token), perplexity, bits_per_byte and tokens over these batches.

    bits_per_byte is what all predicted tokens cost, those that end a document too, over the bytes
    of the text that they stand for: what a text costs to write with this model, whatever its
    tokenizer. Text that is not predicted is not counted: what follows these batches, where they are
    a part of the split, and the first token of a document without bos.

    Row sums are added in float64.
    """
    rows, places = [], 0
    for batch in batches:
        rows.append(eval_step(params, fixed, batch))
        places += batch["targets"].size
    total, tokens = (
        float(sum(np.sum(np.asarray(row[i], np.float64)) for row in rows)) for i in (0, 1)
    )
    if not tokens:
        raise cfg.UserError(f"data.path={split.path}: split {split.name} has nothing to predict")
    loss = total / tokens
    size = predicted_bytes(split, places)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / size if size else math.nan,
        "tokens": int(tokens),
    }


def evaluate_run(config: cfg.Config, step: int | None, split_name: str) -> dict:
    """Evaluate a run's checkpoint on a whole split, on the mesh that the config names."""
    split = open_split(config.data.path, split_name)
    check_vocab(split, config.model.vocab_size)
    carried.warn_of_length(config)
    run_dir = cfg.run_dir(config)
    if (run_dir / "tokenizer.json").is_file():
        if load_tokenizer(run_dir).sha256 != split.tokenizer_sha256:
            raise cfg.UserError(
                f"data.path={split.path} was made with another tokenizer than that of "
                f"run.dir={run_dir}; prepare it with --tokenizer {run_dir}"
            )
    with run.open_model(config, step) as model:
        options = dict(devices.kind(model.mesh).compiler_options)
        eval_step = make_eval_step(config, model.structure, model.layout, options)
        shardings = batch_shardings(config, model.layout, model.mesh)
        batches = evaluation_batches(
            split, config.batch, shardings, segments=config.data.segments,
            order=sequence_order(model.layout, config.batch.sequence_length),
        )  # fmt: skip
        result = evaluate(eval_step, model.params, model.fixed, batches, split)
        return {"step": model.step, "split": split_name, **result}
