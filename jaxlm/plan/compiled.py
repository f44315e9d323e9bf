"""Compile the train step for a target and read the program: `python -m jaxlm.plan.compiled`.

It runs in a process of its own, so that a compiler that crashes or hangs is a message.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time

import jax
import jax.numpy as jnp

from jaxlm import config as cfg
from jaxlm import configfile
from jaxlm.plan import hlo
from jaxlm.plan.account import collectives, summarize
from jaxlm.plan.target import parse_target
from jaxlm.sharding import batch_shardings
from jaxlm.state import abstract_state
from jaxlm.train import Program, make_program


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
    with jax.set_mesh(mesh):
        state = abstract_state(config, layout, program.optimizer, mesh)
        return program.train_step.trace(state, batch)


def report(config: cfg.Config, target: str) -> dict:
    """Compile for a target: memory, collectives (bytes: results; once, and in a step), backend."""
    program = make_program(config, parse_target(target).devices())
    start = time.monotonic()
    lowered = trace_train_step(config, program).lower()
    traced = time.monotonic()
    compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    return {
        "target": target,
        "devices": program.mesh.size,
        "attention": program.layout.attention.backend,
        "trace_seconds": round(traced - start, 1),
        "compile_seconds": round(time.monotonic() - traced, 1),
        "peak_bytes": memory.peak_memory_in_bytes,
        "state_and_batch_bytes": memory.argument_size_in_bytes,
        "collectives": summarize(collectives(hlo.parse(text)), program.layout),
    }


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
        print(json.dumps(report(configfile.load(args.config, args.overrides), args.target)))
    except cfg.UserError as error:
        print(f"jaxlm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
