"""Checks of `outer:` before anything is traced, and what of it is likely a mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from jaxlm.config import Config, UserError
from jaxlm.keys_outer import WIRES, Outer
from jaxlm.nearest import or_list

ISLAND = "replica"
ISLAND_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
KEY_DIGITS = 64  # hexadecimal digits of a public key
ROUNDS = 50  # below it, momentum 0.9 hurt and averaging did better (docs/slow-links.md)


def check_outer(config: Config, sizes: dict[str, int]) -> None:
    """Raise UserError for the first mistake in `outer:` on a mesh of these sizes."""
    o = config.outer
    _check_wire(o)
    if not o.every:
        _refuse_without_islands(o)
        return
    if o.store:
        _check_store(o, sizes)
    else:
        _refuse_without_store(o)
    for key in ("fragments", "overlap"):
        limit = o.every if key == "fragments" else o.every - 1
        if getattr(o, key) > limit:
            raise UserError(
                f"outer.{key}={getattr(o, key)} with outer.every={o.every}: a fragment is merged "
                f"once in outer.every steps, before its next turn; use outer.{key}={limit} or less"
            )
    if o.rule == "average" and (o.learning_rate, o.momentum) != _defaults("learning_rate momentum"):
        raise UserError(
            f"outer.learning_rate={o.learning_rate} outer.momentum={o.momentum} have no effect "
            "with outer.rule=average; leave them out, or use outer.rule=diloco"
        )
    if config.mesh.auto and not o.store:
        raise UserError(
            f"mesh=auto with outer.every={o.every}: it would leave one island; give the axes, as "
            "in mesh.replica=2 mesh.fsdp=-1"
        )
    if o.start_step >= config.steps:
        raise UserError(
            f"outer.start_step={o.start_step} is not below steps={config.steps}: the islands "
            "would never part; use a smaller one, or outer.every=0"
        )
    _check_tables(config)


def parse_keys(texts: Sequence[str], key: str = "outer.keys") -> tuple[tuple[str, str], ...]:
    """NAME:PUBLIC_KEY texts as pairs; UserError where one is neither."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, public = text.partition(":")
        hexadecimal = re.fullmatch(rf"[0-9a-fA-F]{{{KEY_DIGITS}}}", public)
        if not re.fullmatch(ISLAND_NAME, name) or not hexadecimal:
            raise UserError(
                f"{key}: {text!r} must be NAME:PUBLIC_KEY with {KEY_DIGITS} hexadecimal digits, as "
                "the log of an island shows at its first start"
            )
        if name in found:
            raise UserError(f"{key}: {name} is named twice; an island has one key")
        found[name] = public.lower()
    return tuple(found.items())


def _defaults(names: str) -> tuple:
    return tuple(getattr(Outer(), name) for name in names.split())


def _check_wire(o: Outer) -> None:
    for name in o.wire:
        if name not in WIRES:
            raise UserError(f"outer.wire: {name!r} is not a format{or_list(name, WIRES)}")
    if len(o.wire) not in (1, 2):
        raise UserError(
            f"outer.wire has {len(o.wire)} formats; give one, or two: of what islands send and of "
            "what they receive, as in [int4, bfloat16]"
        )


def _refuse_without_islands(o: Outer) -> None:
    names = "store island start_step overlap mix keys"
    given = [n for n in names.split() if getattr(o, n) != getattr(Outer(), n)]
    if given:
        raise UserError(
            f"outer.{given[0]}={getattr(o, given[0])} has no effect with outer.every=0: there are "
            "no islands; set outer.every to the local steps between outer steps, as in 100"
        )


def _refuse_without_store(o: Outer) -> None:
    if o.rule == "delayed":
        raise UserError(
            "outer.rule=delayed is for islands that are jobs of their own: those of one job keep "
            "step; set outer.store, or use outer.rule=diloco"
        )
    given = [n for n in ("island", "keys", "quorum") if getattr(o, n) != getattr(Outer(), n)]
    if given:
        raise UserError(
            f"outer.{given[0]}={getattr(o, given[0])} has no effect without outer.store: islands "
            "are mesh.replica of this job; set outer.store to where the jobs meet, or leave it out"
        )


def _check_store(o: Outer, sizes: dict[str, int]) -> None:
    if not re.fullmatch(ISLAND_NAME, o.island) or o.island == "merger":
        raise UserError(
            f"outer.island={o.island!r} must be a name of letters, digits, _, - and . but not "
            "merger, another one for each job that meets in outer.store, as in outer.island=paris"
        )
    parse_keys(o.keys)
    if o.overlap >= max(1, o.every // o.fragments):
        raise UserError(
            f"outer.overlap={o.overlap} with outer.every={o.every} and outer.fragments="
            f"{o.fragments}: with outer.store one merge is under way at a time; use outer.overlap="
            f"{max(1, o.every // o.fragments) - 1} or less"
        )
    if sizes[ISLAND] > 1:
        raise UserError(
            f"mesh.replica={sizes[ISLAND]} with outer.store: there the islands are jobs, and this "
            f"one is one of them; use mesh.data={sizes[ISLAND]}, or leave outer.store out"
        )


def _check_tables(config: Config) -> None:
    """Nothing but rows of the batch, and those first, lies along the axis of the islands."""
    for table, entries in (("rules", config.rules), ("storage", config.storage)):
        for dim, axes in entries.items():
            rows = table == "rules" and dim in ("batch", "cache_batch")
            if ISLAND in axes and not (rows and axes[0] == ISLAND):
                raise UserError(
                    f"{table}.{dim}={list(axes)}: with outer.every={config.outer.every} replica "
                    "holds islands, which nothing else may be split over; leave replica out"
                    + (" or put it first" if rows else "")
                )
    batch = config.rules.get("batch", (ISLAND,))
    if not config.outer.store and ISLAND not in batch:
        raise UserError(
            f"rules.batch={list(batch)}: all islands would train on the same rows; "
            f"use rules.batch={[ISLAND, *batch]}"
        )


def warn_outer(config: Config, islands: int) -> Iterator[str]:
    """One line for each thing that works and is likely to be a mistake; 0 islands: unknown."""
    o = config.outer
    if not o.every:
        return
    rounds = (config.steps - o.start_step) // o.every
    if o.rule != "average" and o.momentum >= 0.9 and rounds < ROUNDS:
        yield (
            f"outer.momentum={o.momentum} in a run of {rounds} outer steps: momentum needs some "
            f"{ROUNDS} to pay; use outer.rule=average, a smaller outer.momentum, or a smaller "
            f"outer.every than {o.every}"
        )
    if not o.start_step and not config.checkpoint.start_from:
        yield (
            "outer.start_step=0: islands part from random parameters, which costs quality at any "
            f"size; train together first, as in outer.start_step={max(1, config.steps // 10)}"
        )
    if o.defend != "none" and 0 < islands < 3:
        yield (
            f"outer.defend={o.defend} does nothing with {islands} island{'s' * (islands > 1)}: of "
            "fewer than three nothing says which is the bad one"
        )
