"""The plan of one config on one target: what a step takes, how long it is, what a run costs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxlm import config as cfg
from jaxlm import lint, metrics
from jaxlm.hardware.target import Target
from jaxlm.mesh import make_mesh
from jaxlm.outer.fleet import ISLAND, island_config
from jaxlm.plan import compiled, cost, estimate, outer_step, roofline
from jaxlm.plan.cost import Cost
from jaxlm.plan.memory_classes import UNEXPLAINED
from jaxlm.state import Structure
from jaxlm.validate import resolve_mesh, validate


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a target."""

    config: cfg.Config
    target: Target
    sizes: dict[str, int]  # of the mesh
    structure: Structure
    method: str  # "analytic" or "compiled"
    cost: Cost
    traced: float  # peak bytes by the trace
    time: roofline.Time
    attention: str  # backend
    attention_reason: str  # why that one
    efficiencies: dict[str, roofline.Efficiency]
    cached: bool = False
    compile_seconds: float = 0.0
    code: float = 0.0  # bytes of the program itself, which the compiler's peak leaves out
    largest: tuple[dict[str, Any], ...] = ()  # buffers at the peak of a compiled program
    refused: dict[str, Any] | None = None  # overflow.Refusal: the compiler says it does not fit
    warnings: tuple[str, ...] = ()
    outer: dict[str, Any] | None = None  # outer_step.plan: islands, of which this is one

    @property
    def islands(self) -> int:
        """Islands of the job, each like the one that is planned."""
        return self.outer["islands"] if self.outer else 1

    @property
    def limit(self) -> float:
        """Memory of a device, bytes; 0: not known."""
        return estimate.memory_limit(self.target)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the part of memory that plan.memory allows."""
        if self.refused:
            return False
        taken = self.cost.peak + self.code
        return not self.limit or taken <= self.limit * self.config.plan.memory

    @property
    def tokens(self) -> int:
        """Tokens of a step, on all devices."""
        return self.config.batch.sequences * self.config.batch.sequence_length

    @property
    def ideal_flops(self) -> float:
        """FLOPs of a step on one device by 6ND and causal attention."""
        length = self.config.batch.sequence_length
        each = metrics.flops_per_token(self.config.model, self.structure, length)
        return each * self.tokens / self.target.size

    @property
    def mfu(self) -> float:
        """Part of the peak that the ideal FLOPs take; 0: no peak is known."""
        peak = self.target.kind.bf16_flops
        return self.ideal_flops / peak / self.time.seconds if peak else 0.0

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return sum(math.prod(shape) for shape in self.structure.shapes.values())


def make_plan(config: cfg.Config, target: Target, analytic: bool) -> Plan:
    """Estimate a config, from the trace of its step or from its compiled program."""
    validate(config, target.size)
    sizes = resolve_mesh(config.mesh, target.size)
    if config.outer.every and not config.outer.store:
        return _plan_islands(config, sizes, target, analytic)
    structure = estimate.structure_of(config)
    chosen, why = estimate.attention_of(config, sizes, estimate.one_device(target))
    guess = estimate.of_config(config, target)
    known = roofline.efficiencies(target.kind, estimate.efficiencies_path(config))
    plan = Plan(
        config, target, sizes, structure, "analytic", guess.cost, guess.cost.peak, guess.time,
        chosen.backend, why, known, warnings=lint_lines(config, target, structure),
    )  # fmt: skip
    if analytic:
        return plan
    result = compiled.measure(config, target)
    taken = cost_of(result, guess.cost)
    return dataclasses.replace(
        plan, method="compiled", cost=taken, time=roofline.estimate(taken, target, known),
        attention=result["attention"], cached=result["cached"],
        compile_seconds=result["trace_seconds"] + result["compile_seconds"],
        code=result["code_bytes"], largest=tuple(result["largest"]),
        warnings=(*plan.warnings, *result["warnings"], *refusal_lines(result)),
        refused=result["refused"],
    )  # fmt: skip


def _plan_islands(
    config: cfg.Config, sizes: dict[str, int], target: Target, analytic: bool
) -> Plan:
    """The plan of one island, and of the merges of all."""
    count = sizes[ISLAND]
    part = outer_step.island_target(target, count)
    one = make_plan(island_config(config, sizes), part, analytic)
    merges = outer_step.measure(config, target, analytic)
    kept = outer_step.kept_bytes(config, target)
    taken = dataclasses.replace(one.cost, memory=one.cost.memory | {"outer": kept})
    return dataclasses.replace(
        one, cost=taken, traced=one.traced + kept,
        outer=outer_step.plan(config, target, merges, count),
        warnings=(*lint_lines(config, target, one.structure), *one.warnings),
    )  # fmt: skip


def cost_of(result: dict[str, Any], guess: Cost) -> Cost:
    """The Cost of a compiled program; of a refused one that left no schedule, that of its trace.

    What the compiler says that it needs is then the peak.
    """
    if result["cost"] is not None:
        return cost.from_json(result["cost"])
    rest = result["refused"]["needed_bytes"] - guess.peak
    return dataclasses.replace(guess, memory=guess.memory | {UNEXPLAINED: rest})


def refusal_lines(result: dict[str, Any]) -> list[str]:
    """The words of a compiler that refused a program."""
    if not result["refused"]:
        return []
    without = "" if result["cost"] else "; all but the memory it needs is from its trace"
    return [f"the compiler refuses the program{without}: {result['refused']['message']}"]


def lint_lines(config: cfg.Config, target: Target, structure: Structure) -> tuple[str, ...]:
    """What lint.py says about a config on a target."""
    sizes = resolve_mesh(config.mesh, target.size)
    mesh = make_mesh(sizes, config.mesh.dcn, target.absent_devices())
    layout = estimate.layout_of(config, sizes, mesh.devices.reshape(-1)[:1])
    return tuple(lint.warnings(config, mesh, layout, structure))


def measure_seconds(config: cfg.Config, target: Target) -> dict[str, Any]:
    """A compiled config's peak, step time and limit: what fit.py and the search compare."""
    result = compiled.measure(config, target)
    if result["cost"] is None:
        taken = cost_of(result, estimate.of_config(config, target).cost)
    else:
        taken = cost.from_json(result["cost"])
    known = roofline.efficiencies(target.kind, estimate.efficiencies_path(config))
    time = roofline.estimate(taken, target, known)
    return result | {
        "peak_bytes": taken.peak, "step_seconds": time.seconds, "limit": time.limit,
    }  # fmt: skip


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: the keys of `--json`, which stay as they are."""
    config, target, seconds = plan.config, plan.target, plan.time.seconds
    limit, rate = plan.limit, plan.tokens / seconds if seconds else 0.0
    outer = plan.outer or {"seconds": 0.0, "every": 1}
    hours = config.steps * (seconds + outer["seconds"] / outer["every"]) / 3600
    return {
        "name": config.name,
        "method": plan.method,
        "cached": plan.cached,
        "compile_seconds": plan.compile_seconds,
        "target": {
            "text": target.text, "kind": target.kind.name, "devices": target.size,
            "chips": target.chips, "slices": target.slices,
        },
        "mesh": {axis: size for axis, size in plan.sizes.items() if size > 1},
        "dcn": dict(config.mesh.dcn),
        "settings": {
            "attention": plan.attention, "attention_reason": plan.attention_reason,
            "remat": remat_text(config.remat),
            "microbatches": config.batch.microbatches, "loss_chunks": config.loss.chunks,
            "gather_at": config.gather_at, "sequences": config.batch.sequences,
            "sequence_length": config.batch.sequence_length,
        },
        "parameters": plan.parameters,
        "memory": {
            "classes": by_class(plan.cost.memory), "peak_bytes": plan.cost.peak,
            "traced_bytes": plan.traced, "code_bytes": plan.code, "limit_bytes": limit,
            "usable_bytes": limit * config.plan.memory, "fits": plan.fits,
            "refused": plan.refused,
        },
        "flops": {
            "parts": plan.cost.flops, "total": plan.cost.total_flops, "ideal": plan.ideal_flops,
            "ratio": plan.cost.total_flops / plan.ideal_flops,
            "kernels": plan.cost.kernel_flops,
        },
        "collectives": [dataclasses.asdict(row) for row in plan.cost.traffic],
        "hbm_bytes": plan.cost.hbm_bytes,
        "host_bytes": plan.cost.host_bytes,
        "step": {
            "seconds": seconds, "parts": plan.time.parts, "limit": plan.time.limit,
            "mfu": plan.mfu, "tokens_per_second": rate,
            "tokens_per_second_per_chip": rate / target.chips,
        },
        "run": {
            "steps": config.steps, "tokens": config.steps * plan.tokens * plan.islands,
            "hours": hours, "chip_hours": hours * target.chips * plan.islands,
            "cost": hours * target.chips * plan.islands * config.plan.price,
            "checkpoint_bytes": estimate.checkpoint_bytes(config, plan.structure),
        },
        "efficiencies": {
            name: {"value": known.value, "origin": known.origin}
            for name, known in plan.efficiencies.items()
        },
        "largest": list(plan.largest),
        "outer": plan.outer,
        "warnings": list(plan.warnings),
        "notes": list(plan.cost.notes),
    }  # fmt: skip


def by_class(memory: dict[str, float]) -> dict[str, float]:
    """Memory in the order of cost.MEMORY, and what has no place there last."""
    place = {name: i for i, name in enumerate(cost.MEMORY)}
    rank = lambda name: place.get(name.split("/")[0], len(place))
    return {name: memory[name] for name in sorted(memory, key=rank)}


def remat_text(remat: cfg.Remat) -> str:
    """A remat policy in a word."""
    if remat.policy != "names":
        return remat.policy
    return "names:" + "+".join(n + "@host" * (n in remat.offload) for n in remat.names)
