"""Edits that make a config fit: ordered by their traces, then compiled and confirmed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from collections.abc import Callable, Iterator
from typing import Any

from jaxlm import config as cfg
from jaxlm.divisibility import layout_problems
from jaxlm.hardware.target import Target
from jaxlm.plan import estimate
from jaxlm.plan.compiled import CompileError
from jaxlm.plan.units import duration, size
from jaxlm.validate import resolve_mesh

ENOUGH = 3  # confirmed edits
TRIED = 8  # programs compiled at most
# Where a factor of 2 of a mesh axis may go: to an axis that splits more of what is held.
MOVES = (("data", "fsdp"), ("fsdp", "tensor"), ("data", "tensor"), ("fsdp", "context"))


@dataclasses.dataclass(frozen=True)
class Edit:
    """A change of the config that was compiled and takes less memory than allowed."""

    overrides: tuple[str, ...]
    peak_bytes: float
    step_seconds: float
    before_seconds: float  # of the config as it is

    @property
    def price(self) -> float:
        """Added step time, as a part of it; negative: faster."""
        return self.step_seconds / self.before_seconds - 1


def single_edits(config: cfg.Config, target: Target) -> Iterator[dict[str, Any]]:
    """Each edit as dotted key -> value."""
    sizes = resolve_mesh(config.mesh, target.size)
    if config.remat.policy != "full":
        yield {"remat.policy": "full", "remat.names": (), "remat.offload": ()}
        yield {"remat.policy": "names", "remat.names": ("attention",), "remat.offload": ()}
    for factor in (2, 4):
        yield {"batch.microbatches": config.batch.microbatches * factor}
        yield {"loss.chunks": config.loss.chunks * factor}
    if config.gather_at == "step":
        yield {"gather_at": "layer"}
    for source, to in MOVES:
        if sizes[source] % (2 * config.mesh.dcn.get(source, 1)) == 0:
            yield {f"mesh.{source}": sizes[source] // 2, f"mesh.{to}": sizes[to] * 2}


def apply(config: cfg.Config, edit: dict[str, Any], target: Target) -> cfg.Config | None:
    """The edited config, with its mesh settled; None where its dimensions do not fit."""
    sizes = resolve_mesh(config.mesh, target.size)
    edited = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    for name, value in edit.items():
        section, _, field = name.rpartition(".")
        if section:
            inner = dataclasses.replace(getattr(edited, section), **{field: value})
            edited = dataclasses.replace(edited, **{section: inner})
        else:
            edited = dataclasses.replace(edited, **{field: value})
    if any(layout_problems(edited, resolve_mesh(edited.mesh, target.size))):
        return None
    return edited


def candidates(config: cfg.Config, target: Target) -> list[tuple[dict[str, Any], cfg.Config]]:
    """Single edits, and pairs that change different keys, as far as dimensions allow them."""
    singles = list(single_edits(config, target))
    pairs = [a | b for a, b in itertools.combinations(singles, 2) if not a.keys() & b.keys()]
    found = [(edit, apply(config, edit, target)) for edit in (*singles, *pairs)]
    return [(edit, edited) for edit, edited in found if edited is not None]


def propose(
    config: cfg.Config,
    target: Target,
    measure: Callable[[cfg.Config], dict[str, Any]],
    guess: Callable[[list[cfg.Config]], list[tuple[float, float]]],
) -> list[Edit]:
    """Confirmed edits, the cheapest first; what fits already is made smaller.

    `guess`, (peak bytes, step seconds) of each config, says in which order to compile: single edits
    before pairs, then by step time.
    """
    before = measure(config)
    limit = estimate.memory_limit(target) * config.plan.memory or math.inf
    fits = lambda result: not result["refused"] and result["peak_bytes"] <= limit
    if fits(before):
        limit = 0.99 * before["peak_bytes"]
    tried = candidates(config, target)
    (peak, _), *guesses = guess([config, *(edited for _, edited in tried)])
    ratio = before["peak_bytes"] / peak  # what traces miss of this model
    ranked = []
    for (edit, edited), (peak, seconds) in zip(tried, guesses, strict=True):
        ranked.append((peak * ratio > limit, len(edit), seconds, len(ranked), edit, edited))
    confirmed: list[Edit] = []
    for *_, edit, edited in sorted(ranked, key=lambda each: each[:4])[:TRIED]:
        try:
            after = measure(edited)
        except CompileError:
            continue
        if fits(after):
            confirmed.append(Edit(
                overrides(edit), after["peak_bytes"], after["step_seconds"], before["step_seconds"]
            ))  # fmt: skip
        if len(confirmed) == ENOUGH:
            break
    return sorted(confirmed, key=lambda edit: edit.step_seconds)


def overrides(edit: dict[str, Any]) -> tuple[str, ...]:
    """An edit as key=value."""
    text = lambda value: f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)
    return tuple(f"{name}={text(value)}" for name, value in edit.items())


def describe(edit: Edit) -> str:
    """An edit in a line, with its price."""
    return (
        f"{shlex.join(edit.overrides)}: {size(edit.peak_bytes)}, a step of "
        f"{duration(edit.step_seconds)} ({edit.price:+.1%}); compiled"
    )


def to_dict(edit: Edit) -> dict[str, Any]:
    """An edit as plain data."""
    return {**dataclasses.asdict(edit), "overrides": list(edit.overrides), "price": edit.price}
