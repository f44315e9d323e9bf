"""What islands of one job add to a plan: the merge between them, beside the steps of each."""

from __future__ import annotations

import dataclasses
import math

import jax

from jaxlm import config as cfg
from jaxlm.hardware.target import Target, parse_target
from jaxlm.outer import exchange, fleet
from jaxlm.plan import compiled, cost, estimate, roofline, traced
from jaxlm.program import Program, make_program


def island_target(target: Target, count: int) -> Target:
    """The part of a target that one of `count` islands has; UserError where there is no such part.

    Islands are whole slices or hosts, or equal parts of one: `replica` is the first mesh axis.
    """
    slices = target.slices // math.gcd(target.slices, count)
    rest, shape = count * slices // target.slices, list(target.shape)
    for i, side in enumerate(shape):
        cut = math.gcd(side, rest)
        shape[i], rest = side // cut, rest // cut
    text = f"{target.name}:{'x'.join(map(str, shape))}"
    try:
        if rest > 1 or slices > 1 and list(target.shape) != shape:
            raise cfg.UserError("")
        return parse_target(f"{slices}*{text}" if slices > 1 else text)
    except cfg.UserError:
        raise cfg.UserError(
            f"mesh.replica={count} does not cut target={target.text} into parts that are targets "
            "too; use as many islands as it has slices or hosts"
        ) from None


def measure(config: cfg.Config, target: Target, analytic: bool) -> list[cost.Cost]:
    """The costs of `exchange` and `adopt`: by their traces, or as the compiler makes them."""
    if analytic:
        return of_traces(config, target)
    found = compiled.measure(config, target)
    return [cost.from_json(each) for each in found["outer"]]


def of_traces(config: cfg.Config, target: Target) -> list[cost.Cost]:
    """The costs of `exchange` and `adopt` by their traces."""
    found, program = _open(config, target.absent_devices())
    made = []
    for step, arguments in exchange.abstract_calls(found):
        with jax.set_mesh(program.mesh):
            reading = traced.read_step(step.trace(*arguments), target)
        made.append(traced.analyze(reading, dict(program.mesh.shape), target, config.mesh.dcn))
    return made


def _open(config: cfg.Config, devices: list) -> tuple[fleet.Fleet, Program]:
    program = make_program(config, devices)
    return fleet.open_fleet(config, program), program


def plan(config: cfg.Config, target: Target, costs: list[cost.Cost], islands: int) -> dict:
    """The outer step as plain data: `outer` of `jaxlm plan --json`.

    bytes and seconds are of one device and one merge, which is of one fragment; `share` is its part
    of the steps between two merges; `payload_bytes` is what an island sends and receives of it.
    """
    known = roofline.efficiencies(target.kind, estimate.efficiencies_path(config))
    times = [roofline.estimate(each, target, known) for each in costs]
    rows = [row for each in costs for row in each.traffic]
    wires: dict[str, dict[str, float]] = {}
    for row in rows:
        place = wires.setdefault(row.network, {"bytes": 0.0, "seconds": 0.0})
        place["bytes"] += row.wire
        rate = known[row.network].value if row.network in known else 1.0
        place["seconds"] += row.wire / (row.bandwidth * rate) if row.bandwidth else 0.0
    return {
        "islands": islands, "every": config.outer.every, "fragments": config.outer.fragments,
        "rule": config.outer.rule, "wire": list(config.outer.wire),
        "collectives": [dataclasses.asdict(row) for row in rows], "networks": wires,
        "seconds": sum(time.seconds for time in times),
        "peak_bytes": max(each.peak for each in costs),
    }  # fmt: skip


def kept_bytes(config: cfg.Config, target: Target) -> float:
    """Bytes on a device between merges, beside an island's state: merged parameters, memory."""
    found, program = _open(config, target.absent_devices())
    sizes = [4.0 * math.prod(fleet.local_shape(found, n)) for n in found.names]
    memory = jax.tree.leaves(exchange.abstract_memory(found))
    pending = sum(sizes) * bool(config.outer.overlap) / config.outer.fragments
    return sum(sizes) + pending + sum(4.0 * x.size / program.mesh.size for x in memory)
