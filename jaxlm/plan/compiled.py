"""Compile the train step for a target and read the program: `python -m jaxlm.plan.compiled`.

It runs in a process of its own, so that a compiler that crashes or hangs is a message: `measure`
starts that process, and keeps what it found.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from jaxlm import config as cfg
from jaxlm import configfile, program_cache, xla
from jaxlm.attention.compiled import kernel_flops
from jaxlm.hardware.network import route
from jaxlm.hardware.target import Target, parse_target
from jaxlm.outer import exchange, fleet
from jaxlm.plan import cache, cost, overflow
from jaxlm.plan.memory_classes import classify
from jaxlm.program import Program, make_program, trace_train_step

LARGEST = 12  # buffers that are named
NUMBERS = ("trace_seconds", "compile_seconds", "peak_bytes", "code_bytes")
# XLA:GPU writes its estimates into the program's text.
GPU_OPTIONS: dict[str, str | bool] = {"xla_gpu_collect_cost_model_stats": True}
SURFACED = "nvoluntary full rematerialization"  # a reshard that XLA cannot do without a full copy


class CompileError(cfg.UserError):
    """A program that could not be compiled: the compiler crashed, refused it or took too long."""


def report(config: cfg.Config, name: str) -> dict[str, Any]:
    """Compile for a target: its cost, what it holds, and the times that tracing and compiling took.

    Bytes of collectives are results; once, and in a step. "refused" is what a compiler says that
    stops at a program that does not fit: the rest is then read from the program that it refused.
    """
    target = parse_target(name)
    program = make_program(config, target.devices())
    start = time.monotonic()
    if config.outer.every and not config.outer.store:  # islands' steps are plans of their own
        return {"outer": [cost.to_json(each) for each in read_merges(config, program, target)]}
    lowered = trace_train_step(config, program).lower()
    traced = time.monotonic()
    refused = None
    try:
        compiled = lowered.compile(GPU_OPTIONS if target.platform == "gpu" else None)
        memory, text = compiled.memory_analysis(), compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        refused, memory, text = overflow.explain(lowered, error)
    done = time.monotonic()
    assert memory is not None and text is not None
    return {
        "trace_seconds": round(traced - start, 1),
        "compile_seconds": round(done - traced, 1),
        "refused": refused._asdict() if refused else None,
        **read(config, program, target, memory, text),
    }


def read(
    config: cfg.Config, program: Program, target: Target, memory: Any, text: str
) -> dict[str, Any]:
    """What a compiled program and its memory_analysis say; empty `text`: there is no program."""
    found, buffers, collectives = None, [], []
    if text:
        module = xla.parse(text)
        found, buffers = read_cost(config, program, target, memory, module)
        collectives = xla.summarize(xla.find_collectives(module), dict(program.layout.axes))
    return {
        "target": target.text,
        "devices": program.mesh.size,
        "attention": program.layout.attention.backend,
        "peak_bytes": memory.peak_memory_in_bytes,
        "state_and_batch_bytes": memory.argument_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,  # beside the peak
        "collectives": collectives,
        "cost": cost.to_json(found) if found else None,
        "warnings": [],
        "largest": buffers,
    }


def read_cost(
    config: cfg.Config, program: Program, target: Target, memory: Any, module: xla.Module
) -> tuple[cost.Cost, list[dict[str, Any]]]:
    """The Cost of a compiled program, and the largest buffers at its peak."""
    visits, axes = list(xla.walk(module)), dict(program.layout.axes)
    flops, kernels, notes = xla.count_flops(visits, cost.part_of, kernel_flops)
    hbm, host = xla.count_bytes(module, visits)
    kind = target.kind
    chip = xla.Chip(target.platform, kind.clock, kind.bf16_flops, kind.hbm_bandwidth)
    peak = classify(module, memory, program.layout, program.structure, config)
    taken = cost.Cost(
        memory=peak.classes, flops=flops, kernel_flops=kernels,
        traffic=count_traffic(xla.find_collectives(module), axes, target, config.mesh.dcn),
        hbm_bytes=hbm, host_bytes=host, compute_seconds=xla.compute_seconds(module, visits, chip),
        notes=(*notes, *unknown_trips(visits)),
    )  # fmt: skip
    return taken, [buffer._asdict() for buffer in peak.buffers[:LARGEST]]


def read_merges(config: cfg.Config, program: Program, target: Target) -> list[cost.Cost]:
    """The costs of the two programs of a merge between islands.

    Memory is the peak, of no class; time that of the wires and of the device's memory.
    """
    made, axes = [], dict(program.layout.axes)
    for step, arguments in exchange.abstract_calls(fleet.open_fleet(config, program)):
        with jax.set_mesh(program.mesh):
            done = step.lower(*arguments).compile()
        memory, text = done.memory_analysis(), done.as_text()
        assert memory is not None and text is not None
        module = xla.parse(text)
        hbm, host = xla.count_bytes(module, list(xla.walk(module)))
        found = xla.find_collectives(module)
        rows = count_traffic(found, axes, target, config.mesh.dcn)
        peak = {"merge": float(memory.peak_memory_in_bytes)}
        made.append(cost.Cost(peak, {}, 0.0, rows, hbm, host))
    return made


def unknown_trips(visits: list[xla.Visit]) -> list[str]:
    """What to say of loops of which the text does not tell how often they run."""
    unknown = {visit.scheduled.name for visit in visits if not visit.known}
    if not unknown:
        return []
    return [f"{len(unknown)} operations in loops of unknown trips are counted once"]


def count_traffic(
    found: list[xla.Collective], axes: dict[str, int], target: Target, dcn: dict[str, int]
) -> tuple[cost.Traffic, ...]:
    """Collectives of one kind and the same axes as one row each, most bytes first."""
    sums: dict = collections.defaultdict(lambda: [0.0] * 4)
    for one in found:
        along = xla.mesh_axes(one.groups, axes)
        size = math.prod(axes[axis] for axis in along)
        if size <= 1:
            continue
        wire = one.bytes * xla.WIRE[one.kind](size) * one.times
        row = sums[one.kind, along, size]
        for i, more in enumerate((one.times, one.bytes * one.times, wire, wire * one.blocking)):
            row[i] += more
    rows = [
        cost.Traffic(kind, along, *route(target, axes, dcn, along), size, *row)
        for (kind, along, size), row in sums.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.wire))


def measure(config: cfg.Config, target: Target) -> dict[str, Any]:
    """`report` by a process of its own, kept in the cache ("cached": it came from there).

    CompileError names a crash or a time-out.
    """
    config = cache.settled(config, target)
    name = cache.key(config, "compiled", target=target.text)
    kept = cache.read(config, name)
    if kept is not None and _is_whole(kept):
        return kept | {"cached": True}
    with tempfile.TemporaryDirectory(prefix="jaxlm-plan-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(configfile.dump(config), encoding="utf-8")
        done = _run_worker(path, target, config.plan.timeout)
    if done.returncode:
        raise CompileError(_last_words(done, target))
    found = json.loads(done.stdout.splitlines()[-1])
    surfaced = [line for line in done.stderr.splitlines() if SURFACED in line]
    if "outer" not in found:  # a refused program was compiled twice
        found["warnings"] += dict.fromkeys(surfaced)
    cache.write(config, name, found)
    return found | {"cached": False}


def _is_whole(kept: dict[str, Any]) -> bool:
    """Whether a kept result has what `report` makes; a file that does not is damaged."""
    try:
        if "outer" in kept:
            return all(cost.from_json(each).peak >= 0 for each in kept["outer"])
        taken = cost.from_json(kept["cost"]).peak if kept["cost"] else 0.0
        needed = overflow.Refusal(**kept["refused"]).needed_bytes if kept["refused"] else 0.0
        numbers = [taken, needed, *(kept[name] for name in NUMBERS)]
        text = kept["attention"], *kept["warnings"], *(row["name"] for row in kept["largest"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return (
        bool(kept["cost"] or kept["refused"])
        and all(isinstance(number, int | float) for number in numbers)
        and all(isinstance(each, str) for each in text)
    )


def _run_worker(path: Path, target: Target, timeout: float) -> subprocess.CompletedProcess:
    root = Path(__file__).parent.parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *_python_path()])}
    environment["XLA_FLAGS"] = cache.flags()
    command = [sys.executable, "-m", "jaxlm.plan.compiled", str(path), "--target", target.text]
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise CompileError(
            f"target={target.text}: compiling took longer than plan.timeout={timeout:g} s"
        ) from error


def _python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def _last_words(done: subprocess.CompletedProcess, target: Target) -> str:
    """Why the worker failed, from the end of its standard error, in a line."""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    starts = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception): ", line)]
    words = " ".join(lines[starts[-1] if starts else -1 :])
    own = [line for line in lines if line.startswith("jaxlm: ")]
    if own:  # it names the key itself
        return own[-1].removeprefix("jaxlm: ")
    if done.returncode < 0:
        return f"target={target.text}: the compiler crashed (signal {-done.returncode})"
    return f"target={target.text}: compiling failed: {words[:400]}"


def main(argv: list[str] | None = None) -> int:
    """Print a report as JSON; 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description="Compile the train step for absent devices.")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--target", required=True, help="v5e:2x4, h100:1x8, cpu:8")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("jaxlm").setLevel(logging.INFO)
    try:
        if parse_target(args.target).platform == "cpu":
            program_cache.keep()  # `train` loads it
        else:  # compilers of absent devices cannot read what they kept
            jax.config.update("jax_enable_compilation_cache", False)
        print(json.dumps(report(configfile.load(args.config, args.overrides), args.target)))
    except cfg.UserError as error:
        print(f"jaxlm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
