"""Tiny runs for the tests: configs, a dataset, and the losses of a run on some mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import configfile
from jaxlm.config import UserError
from jaxlm.data import load, open_split
from jaxlm.data.prepare import prepare
from jaxlm.program import make_program
from jaxlm.sharding import batch_shardings, sequence_order
from jaxlm.state import create_state

CONFIGS = Path(__file__).parent / "configs"


def config(family: str, *overrides: str):
    """A tiny config of a family; Llama's dimensions where it has none of its own."""
    own = CONFIGS / f"{family}.yaml"
    if own.exists():
        return configfile.load(own, overrides)
    return configfile.load(CONFIGS / "llama.yaml", [f"model.family={family}", *overrides])


def make_data(out: Path) -> Path:
    """A dataset of 40 short documents, bytes as tokens."""
    source = out.parent / "texts"
    source.mkdir()
    rng = np.random.default_rng(0)
    words = ["mesh", "axis", "shard", "token", "layer", "batch", "gather", "reduce"]
    for i in range(40):
        text = " ".join(rng.choice(words, rng.integers(5, 60)))
        (source / f"{i:02}.txt").write_text(text)
    prepare(out, [source], "bytes", validation_fraction=0.2, report=lambda _: None)
    return out


def run(config, num_devices: int, steps: int = 20, watch=lambda state, metrics: None):
    """(losses, initial params, first batch, state) of a run on the first devices.

    `watch` is called with the state and metrics of every step.
    """
    mesh, layout, _, optimizer, train_step, _ = make_program(config, jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        state = create_state(config, layout, optimizer, mesh)
        initial = {name: np.asarray(value) for name, value in state.params.items()}
        batches = load.batches(
            open_split(config.data.path, "train"), config.batch, config.seed,
            batch_shardings(config, layout, mesh), segments=config.data.segments,
            order=sequence_order(layout, config.batch.sequence_length),
        )  # fmt: skip
        natural = np.argsort(sequence_order(layout, config.batch.sequence_length))
        losses, first = [], None
        for _ in range(steps):
            batch = next(batches)
            if first is None:
                first = {name: np.asarray(value)[:, natural] for name, value in batch.items()}
            state, metrics = train_step(state, batch)
            watch(state, metrics)
            losses.append(float(metrics["loss"]))
        assert train_step._cache_size() == 1
    return losses, initial, first, state


def gradients(config, state, metrics) -> dict:
    """Gradients of the first step, from the mean that AdamW then holds."""
    own = config.optimizer
    assert own.name == "adamw" and int(state.step) == 1
    norm, mean = jax.device_get((metrics["grad_norm"], state.opt[0].mu))
    return {n: m * max(norm / own.clip_norm, 1) / (1 - own.b1) for n, m in mean.items()}


def run_and_gradients(config, num_devices: int, steps: int = 10):
    """(run, (loss, gradients, metrics) of its first step)."""
    first = []

    def watch(state, metrics):
        if not first:
            metrics = jax.device_get(metrics)
            first.extend((metrics["loss"], gradients(config, state, metrics), metrics))

    return run(config, num_devices, steps, watch), tuple(first)


def command(*arguments: str) -> subprocess.Popen:
    """`jaxlm ARGUMENTS` in a process of its own, with real CPU devices only."""
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.Popen(
        [sys.executable, "-m", "jaxlm", *map(str, arguments)],
        env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def nightly(*values):
    """A parameter of a test whose claim others hold every day."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def finish(process: subprocess.Popen) -> str:
    """The output of a command that succeeds."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def records(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The JSON objects of a run's file."""
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """step -> training loss of a run."""
    return {r["step"]: r["loss"] for r in records(run_dir) if "loss" in r}


def message(call, *args, **kwargs) -> str:
    """The one line of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text
    return text
