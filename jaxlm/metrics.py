"""What a run reports: metrics.jsonl, a progress line, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from io import RawIOBase
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.live import Live

from jaxlm import config as cfg
from jaxlm import trackers
from jaxlm.attention.xla import visible_pairs
from jaxlm.hardware import chips
from jaxlm.models import layer_windows
from jaxlm.optim import is_matrix
from jaxlm.sharding import Layout
from jaxlm.state import Structure

logger = logging.getLogger("jaxlm")

PLAIN_INTERVAL = 2.0  # seconds between progress lines when the output is not a terminal


def flops_per_token(model: cfg.Model, structure: Structure, sequence_length: int) -> float:
    """FLOPs of one trained token: 6 per matmul parameter, and 12 H C per visible pair and layer.

    6N + 12 H C P / S, with N without the embedding table, which is looked up (tied, it is the
    head), and of a layer's experts those that a token is sent to. P: the pairs of a query and a key
    of a row of S tokens that a causal mask shows, within each layer's window; summed over layers.
    A row counts as one document, also where data.segments hides the others: what a model needs
    does not depend on the lengths of the documents.
    """
    matmul = sum(
        math.prod(shape) * _active(model, structure.dims[name])
        for name, shape in structure.shapes.items()
        if is_matrix(structure.dims[name]) and name != "positions"
    )
    if not model.tie_embeddings:
        matmul -= math.prod(structure.shapes["embed"])
    pairs = sum(visible_pairs(sequence_length, window) for window in layer_windows(model))
    attention = model.num_heads * model.head_dim * pairs / sequence_length
    return 6.0 * matmul + 12.0 * attention


def _active(model: cfg.Model, dims: str) -> float:
    """The part of a weight that one token is multiplied by: of experts, those it is sent to."""
    if not {"experts", "mlp"} <= set(dims.split()):
        return 1.0
    return model.expert_share


@contextlib.contextmanager
def only_informs(what: str) -> Iterator[None]:
    """Log an error as one line and continue: for what a run can do without.

    Not for what all processes compute together: the others would wait for ever for the one that
    failed. `what` says in the log what is missing.
    """
    try:
        yield
    except BrokenPipeError:  # the program that read our output has ended
        raise
    except cfg.UserError as error:
        logger.info("%s: %s", what, error)
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("warning: %s: %s", what, words[:300])


@dataclasses.dataclass(frozen=True)
class Log:
    """The open outputs of one run; on processes other than 0 they say nothing."""

    say: Callable[[str], None]  # a line that stays
    step: Callable[[tuple[int, Any] | None], None]  # (step, its metrics)
    evaluation: Callable[[int, dict[str, float]], None]
    samples: Callable[[int, list[tuple[str, str]]], None]
    compare: Callable[[int, dict[str, Any]], None]  # (step, prediction), beside the measured
    paused: Callable[[], contextlib.AbstractContextManager]  # time inside is not counted


def numbers(values: dict[str, jax.Array]) -> dict[str, float]:
    """The metrics of a step, read."""
    return {name: float(value) for name, value in values.items()}


@contextlib.contextmanager
def open_log(
    config: cfg.Config, structure: Structure, mesh: Mesh, run_dir: Path, start: int,
    read: Callable[[Any], dict[str, float]] = numbers,
) -> Iterator[Log]:  # fmt: skip
    """Open a run's outputs to continue from step `start`; records of later steps are dropped.

    `read` makes numbers of a step's metrics; it is called where they are kept, in all processes.
    """
    with contextlib.ExitStack() as stack:
        say, progress, sinks, keep_sample = _outputs(config, run_dir, start, stack)
        describe = describer(config, structure, mesh)
        step_tokens = config.batch.sequences * config.batch.sequence_length
        clock = {"time": time.monotonic(), "step": start}
        timings: list[float] = []  # of steps; the first includes compiling

        def step(values: tuple[int, dict] | None) -> None:
            if values is None:
                return
            done = values[0]
            jax.block_until_ready(values[1])
            if done % config.log.every and done not in (start + 1, config.steps):
                return
            seconds = (time.monotonic() - clock["time"]) / (done - clock["step"])
            clock.update(time=time.monotonic(), step=done)
            timings.append(seconds)
            record = {"step": done, **read(values[1]), "tokens": done * step_tokens}
            record |= {"tokens_per_second": step_tokens / seconds, "step_seconds": seconds}
            for sink in sinks:
                sink(record)
            show = say if done == config.steps else progress  # the last line stays
            with only_informs("no line of progress"):
                show(describe(record))

        def evaluation(done: int, result: dict[str, float]) -> None:
            for sink in sinks:
                sink({"step": done} | {f"eval/{name}": value for name, value in result.items()})
            loss, bits = result["loss"], result["bits_per_byte"]
            say(f"step {done}  validation loss {loss:.4f}  bits per byte {bits:.4f}")

        def samples(done: int, texts: list[tuple[str, str]]) -> None:
            for prompt, text in texts:
                keep_sample({"step": done, "prompt": prompt, "text": text})
            with only_informs("no sample is shown"):  # a terminal may lack its characters
                say(f"step {done}  sample {texts[0][0] + texts[0][1]!r}")

        def compare(done: int, plan: dict[str, Any]) -> None:
            with only_informs("plan: no comparison with the run"):
                record = {"step": done, **plan, **measurements(timings, list(mesh.devices.flat))}
                if len(record) > 1:
                    for sink in sinks:
                        sink(record)
                    say(comparison(record))

        @contextlib.contextmanager
        def paused() -> Iterator[None]:
            begin = time.monotonic()
            yield
            clock["time"] += time.monotonic() - begin

        yield Log(say, step, evaluation, samples, compare, paused)


def measurements(timings: list[float], devices_: list) -> dict[str, float]:
    """What a run measured: the median step after the first, and the fullest device's peak.

    CPU devices keep no count of their memory.
    """
    found = {}
    if len(timings) > 1:
        found["measured/step_seconds"] = statistics.median(timings[1:])
    local = [d for d in devices_ if d.process_index == jax.process_index()]
    stats = [device.memory_stats() or {} for device in local]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return found | ({"measured/peak_bytes": max(peaks)} if peaks else {})


def comparison(record: dict[str, Any]) -> str:
    """A line: what was predicted, and what was measured."""
    words = []
    for name, unit, scale in (("step_seconds", "s", 1.0), ("peak_bytes", "GB", 1e9)):
        sides = [
            f"{word} {record[f'{side}/{name}'] / scale:.4g} {unit}"
            for side, word in (("plan", "predicted"), ("measured", "measured"))
            if f"{side}/{name}" in record
        ]
        words += [f"{name.split('_')[0]} {', '.join(sides)}"] if sides else []
    return f"plan: {'; '.join(words)}"


def _outputs(config: cfg.Config, run_dir: Path, start: int, stack: contextlib.ExitStack):
    """(say, progress, sinks of metrics, sink of samples) of this process."""
    if jax.process_index() != 0:
        silent = lambda _: None
        return silent, silent, [], silent
    metrics, samples = (
        stack.enter_context(_reopen(run_dir / name, start))
        for name in ("metrics.jsonl", "samples.jsonl")
    )
    sinks: list[trackers.Sink] = [lambda record: _append(metrics, record)]
    if start < config.steps:  # a start that trains nothing is no run of a tracker
        if config.log.tensorboard:
            sinks.append(trackers.open_tensorboard(run_dir, start, stack))
        if config.log.wandb:
            sinks.append(trackers.open_wandb(config, run_dir, start, stack))
    return *_screen(stack), sinks, lambda record: _append(samples, record)


def _reopen(path: Path, start: int) -> RawIOBase:
    """Open a JSON Lines file for appending, without the records after step `start`."""
    try:
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step(line) <= start]
            if kept != lines:
                temporary = path.with_suffix(".tmp")
                temporary.write_bytes(b"".join(kept))
                os.replace(temporary, path)
        return path.open("ab", buffering=0)
    except OSError as error:
        raise cfg.UserError(f"{path}: cannot be written: {error.strerror}") from error


def _step(line: bytes) -> float:
    """The step of a record; a line that was cut off by a kill counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _append(file: RawIOBase, record: dict[str, Any]) -> None:
    finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
    line = json.dumps({k: finite(v) for k, v in record.items()}, allow_nan=False) + "\n"
    try:
        file.write(line.encode())
    except OSError as error:
        raise cfg.UserError(
            f"{file.name}: cannot be written: {error.strerror}; "  # pyright: ignore
            "the same command goes on from the last checkpoint"
        ) from error


def _screen(stack: contextlib.ExitStack):
    """A line that is replaced on a terminal; plain lines, now and then, elsewhere."""
    if not sys.stdout.isatty():
        last = [-math.inf]

        def plain(text: str) -> None:
            if time.monotonic() - last[0] >= PLAIN_INTERVAL:
                last[0] = time.monotonic()
                print(text, flush=True)

        return lambda text: print(text, flush=True), plain
    console = Console(highlight=False, markup=False)
    live = stack.enter_context(Live(console=console, auto_refresh=False, transient=True))
    show = lambda text: live.update(text, refresh=True)
    return lambda text: console.print(text, soft_wrap=True), show


def describer(config: cfg.Config, structure: Structure, mesh: Mesh):
    """record -> the progress line: loss, speed, MFU where the peak is known, time left, end."""
    flops, peak = 0.0, chips.kind(mesh).bf16_flops * mesh.size  # FLOP/s
    with only_informs("no MFU"):
        flops = flops_per_token(config.model, structure, config.batch.sequence_length)

    def describe(record: dict[str, Any]) -> str:
        rate = record["tokens_per_second"]
        left = (config.steps - record["step"]) * record["step_seconds"]
        mfu = f" MFU {rate * flops / peak:.1%}" if peak and flops else ""
        what = "loss" if "loss" in record else "epsilon"  # of a private run no loss is told
        return (
            f"step {record['step']}/{config.steps} {what} {record[what]:.4f}"
            f" norm {record['grad_norm']:.2f} lr {record['learning_rate']:.1e}"
            f" {rate:,.0f} tok/s{mfu} left {_duration(left)}{_end(left)}"
        )

    return describe


def _end(left: float) -> str:
    """When a run ends; empty where that is beyond the last year that Python knows."""
    try:
        end = datetime.datetime.now() + datetime.timedelta(seconds=left)
    except OverflowError:
        return ""
    return f" ends {end:{'%H:%M' if left < 43200 else '%a %d %b %H:%M'}}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds + 0.5), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def describe_run(config, mesh: Mesh, layout: Layout, structure: Structure, start: int) -> str:
    """One line: how large, where, and from which step."""
    count = sum(math.prod(shape) for shape in structure.shapes.values())
    axes = " x ".join(f"{axis}={size}" for axis, size in layout.axes if size > 1) or "one device"
    kind = chips.kind(mesh).name
    come = f", resumed at step {start}" if start else ""
    return (
        f"{config.name}: {count / 1e6:.2f}M parameters, {mesh.size} x {kind} ({axes}), "
        f"{jax.process_count()} process(es), {layout.compute}, {config.steps} steps of "
        f"{config.batch.sequences} x {config.batch.sequence_length} tokens{come}"
    )


def closing_words(
    config: cfg.Config, run_dir: Path, start: int, prompt: str, held_out: bool
) -> str:
    """What was made and what to try next.

    `prompt` fits the data (empty: none); without held-out text no evaluation is suggested.
    """
    if start >= config.steps:
        return f"{run_dir} is at step {start} already; set steps={2 * start} to go on"
    prompt = f" --prompt {shlex.quote(prompt)}" if prompt else ""
    where, out = shlex.quote(str(run_dir)), shlex.quote(f"{run_dir}/hugging-face")
    evaluate = f"  jaxlm eval {where}\n" if held_out else ""
    return (
        f"done: {run_dir} has metrics.jsonl, samples.jsonl and checkpoints. Try next:\n"
        f"  jaxlm generate {where}{prompt}\n"
        f"{evaluate}"
        f"  jaxlm export {where} {out}"
    )
