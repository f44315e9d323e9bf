"""Held-out loss: every token of a split predicted once, the same on every mesh."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from jaxlm import config as cfg
from jaxlm import run
from jaxlm.data import Split, check_vocab, load_tokenizer, open_split
from jaxlm.data.load import evaluation_batches
from jaxlm.data.pack import predicted_bytes
from jaxlm.hardware import chips
from jaxlm.interop import carried
from jaxlm.program import make_eval_step
from jaxlm.sharding import batch_shardings, sequence_order
from jaxlm.state import Arrays


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
        options = dict(chips.kind(model.mesh).compiler_options)
        eval_step = make_eval_step(config, model.structure, model.layout, options)
        shardings = batch_shardings(config, model.layout, model.mesh)
        batches = evaluation_batches(
            split, config.batch, shardings, segments=config.data.segments,
            order=sequence_order(model.layout, config.batch.sequence_length),
        )  # fmt: skip
        result = evaluate(eval_step, model.params, model.fixed, batches, split)
        return {"step": model.step, "split": split_name, **result}
