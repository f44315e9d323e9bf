"""Make a config fit: edits that a compiler has confirmed, with what each costs in step time.

A guess (formulas) orders the candidates; only what the compiler measured is proposed.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxlm import config as cfg
from jaxlm.plan.liveness import Split, largest
from jaxlm.plan.target import Target
from jaxlm.validate import resolve_mesh, validate

logger = logging.getLogger("jaxlm")

Measure = Callable[[cfg.Config], dict[str, Any]]  # -> "peak_bytes", "step_seconds"
Guess = Callable[[cfg.Config], tuple[float, float]]  # -> peak bytes, seconds of a step
Change = tuple[tuple[str, Any], ...]  # (key, value) pairs
RESERVED = 0.05  # of the device's memory: the program itself, what the runtime keeps
MOST = 3  # single edits that are put together
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Edit:
    """A change of a config that fits, as it was compiled."""

    change: Change
    config: cfg.Config
    peak_bytes: float
    seconds: float  # of a step
    slower: float  # seconds over those of the config as it was; 0: that could not be compiled

    @property
    def overrides(self) -> tuple[str, ...]:
        """What to write on the command line."""
        return tuple(f"{key}={_text(value)}" for key, value in self.change)


def propose(
    config: cfg.Config,
    target: Target,
    measure: Measure,
    guess: Guess | None = None,
    limit: float = 0.0,
    count: int = 3,
    tries: int = 12,
) -> list[Edit]:
    """The fastest confirmed edits under `limit` bytes (0: those of the target), at most `count`.

    Single edits first; where fewer than `count` of them fit, edits are put together. At most
    `tries` programs are compiled beside the config's own.
    """
    limit = limit or target.kind.hbm_bytes * (1 - RESERVED)
    if not limit:
        raise cfg.UserError(
            f"target={target.text}: how much memory such a device has is not known, so nothing can "
            "be made to fit; give a limit, or plan for a TPU or GPU"
        )
    now = _try(measure, config)
    found: list[Edit] = []
    singles = legal(config, target.size, single_changes(config, target.size))
    measured: dict[Change, float] = {}
    for size in range(1, MOST + 1):
        for change in _order(config, _join(singles, size, measured), guess, limit):
            if len(found) >= count or tries <= 0:
                break
            edited = apply(config, change)
            if not _is_valid(edited, target.size):
                continue
            tries -= 1
            result = _try(measure, edited)
            if result is None:
                continue
            measured[change] = result["peak_bytes"]
            if result["peak_bytes"] <= limit:
                seconds = result["step_seconds"]
                slower = seconds / now["step_seconds"] if now and now["step_seconds"] else 0.0
                found.append(Edit(change, edited, result["peak_bytes"], seconds, slower))
        if found:
            break  # what takes more edits than needed is not proposed
    return sorted(found, key=lambda edit: edit.seconds)


def _try(measure: Measure, config: cfg.Config) -> dict[str, Any] | None:
    """A measurement; none where the compiler crashes, refuses or takes too long, which is said."""
    try:
        return measure(config)
    except cfg.UserError as error:
        logger.warning("not compiled: %s", error)
        return None


def single_changes(config: cfg.Config, num_devices: int) -> Iterator[Change]:
    """Changes that may lower the peak, those that keep the numbers of the run first."""
    if config.remat.policy != "full":
        yield (("remat.policy", "full"), ("remat.names", ()), ("remat.offload", ()))
        for names in (("attention",), ("query", "key", "value", "attention")):
            if config.remat.policy == "none" or set(names) < set(config.remat.names):
                yield (("remat.policy", "names"), ("remat.names", names), ("remat.offload", ()))
    for factor in (2, 4):
        yield (("batch.microbatches", factor * config.batch.microbatches),)
        yield (("loss.chunks", factor * config.loss.chunks),)
    if config.gather_at != "layer":
        yield (("gather_at", "layer"),)
    if config.precision.reduce == "float32" and config.precision.compute == "bfloat16":
        yield (("precision.reduce", "bfloat16"),)
    yield from _other_meshes(config, num_devices)


def _other_meshes(config: cfg.Config, num_devices: int) -> Iterator[Change]:
    """A factor of 2, 4 or 8 moved from one axis to another; all of data to fsdp."""
    sizes = resolve_mesh(config.mesh, num_devices)
    factors = sorted({2, 4, 8, sizes["data"]} - {1})
    goals = ["fsdp", "tensor", "context", "stage"]
    goals += ["expert"] * ("num_experts" in vars(config.model))
    for source, goal in itertools.product(("data", "fsdp"), goals):
        for factor in factors:
            dcn = config.mesh.dcn.get(source, 1)
            if source != goal and sizes[source] % (factor * dcn) == 0:
                moved = {source: sizes[source] // factor, goal: sizes[goal] * factor}
                yield tuple((f"mesh.{axis}", size) for axis, size in moved.items())


def legal(config: cfg.Config, num_devices: int, changes: Iterable[Change]) -> list[Change]:
    """The changes that validate, or that do with microbatches: stages need them."""
    return [
        change for change in dict.fromkeys(changes) if _is_valid(apply(config, change), num_devices)
    ]


def _is_valid(config: cfg.Config, num_devices: int) -> bool:
    try:
        validate(config, num_devices)
    except cfg.UserError:
        return False
    return True


def apply(config: cfg.Config, change: Change) -> cfg.Config:
    """The config with other values for some keys."""
    for key, value in change:
        *sections, name = key.split(".")
        if sections:
            section = dataclasses.replace(getattr(config, sections[0]), **{name: value})
            config = dataclasses.replace(config, **{sections[0]: section})
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


def _join(singles: list[Change], size: int, measured: dict[Change, float]) -> list[Change]:
    """Every `size` of the changes that touch different keys; with measured ones, the best of them.

    What was measured and did not fit is worth joining by how little it took.
    """
    if size == 1:
        return singles
    best = sorted((one for one in singles if one in measured), key=lambda one: measured[one])
    rest = [one for one in singles if one not in measured]
    pool = [*best, *rest][:12]
    joined = []
    for parts in itertools.combinations(pool, size):
        change = tuple(pair for part in parts for pair in part)
        if len({key for key, _ in change}) == len(change):
            joined.append(change)
    return joined


def _order(
    config: cfg.Config, changes: list[Change], guess: Guess | None, limit: float
) -> list[Change]:
    """What is guessed to fit, the fastest first; then what is not, the smallest first."""
    if guess is None:
        return changes

    def rank(change: Change) -> tuple[bool, float]:
        try:
            peak, seconds = guess(apply(config, change))
        except cfg.UserError:
            return True, float("inf")
        return (False, seconds) if peak <= limit else (True, peak)

    return sorted(changes, key=rank)


def _text(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)


def explain_memory(split: Split, count: int = 8) -> list[str]:
    """The largest buffers at the peak, a line each: bytes, class, name, shape, where it is made."""
    return [
        f"{one.bytes / GB:.3f} GB {one.kind}: {one.name} {one.shape} {one.source}".rstrip()
        for one in largest(split, count)
    ]


def describe(edit: Edit) -> str:
    """One line for a person."""
    price = f"{100 * (edit.slower - 1):+.0f} % of step time" if edit.slower else "as compiled"
    return (
        f"{' '.join(edit.overrides)}: peak {edit.peak_bytes / GB:.2f} GB, "
        f"{edit.seconds:.3g} s a step ({price})"
    )


def to_dict(edit: Edit) -> dict[str, Any]:
    """Plain data, for --json."""
    return {
        "overrides": list(edit.overrides), "peak_bytes": edit.peak_bytes,
        "step_seconds": edit.seconds, "slower": edit.slower,
    }  # fmt: skip
