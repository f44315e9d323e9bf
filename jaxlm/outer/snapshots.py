"""Snapshots: all that the merger and the islands hold after some merges, and what they make old.

Snapshot n is the state after the merges below n. Snapshot 0 is what the first island begins with.
The newest two are kept; all that lies before the older of them is removed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxlm.config import UserError
from jaxlm.outer import ledger as books
from jaxlm.outer import merging, parts, records, wire
from jaxlm.outer.about import About
from jaxlm.outer.ledger import Ledger, Position
from jaxlm.outer.presence import Process
from jaxlm.outer.records import Body, Damaged, Identity
from jaxlm.outer.store import Store

logger = logging.getLogger("jaxlm")
KEPT = 2


def interval(about: About) -> int:
    """Merges between snapshots, so that these take no more bytes than the updates do."""
    up = books.wires(about)[1]
    elements = sum(math.prod(array.shape) for array in about.arrays)
    kinds = 1 + len(books.merge.make_rule(about.outer).remembers) + (not wire.exact(up))
    update = wire.num_bytes(elements, up) / about.outer.fragments
    return max(2, math.ceil(4 * elements * kinds / update))


def name_of(number: int) -> str:
    """The record of a snapshot."""
    return records.numbered("snapshots", number)


def write(ledger: Ledger) -> bool:
    """Write the state as a snapshot; False where there is one of this position already."""
    position = ledger.position
    name = name_of(position.number)
    groups = {"base": ["base"], "memory": list(books.KINDS[1:])}
    body: Body = {"position": dataclasses.asdict(position)}
    for group, kinds in groups.items():
        payloads = parts.packed(name, _arrays(ledger, kinds))
        body[group] = [records.put_payload(ledger.store, name, data) for data in payloads]
    return records.create_record(ledger.store, ledger.identity, name, body)


def _arrays(ledger: Ledger, kinds: list[str]) -> Iterator[tuple[parts.Part, dict]]:
    for place, array in enumerate(ledger.about.arrays):
        for kind in kinds:
            if books.file_of(ledger, kind, place).exists():
                values = books.read_array(ledger, kind, place).reshape(-1)
                yield parts.whole(f"{kind}:{array.name}", array.shape), {"values": values}


def read_position(body: Body) -> Position:
    """The position in a snapshot's record."""
    values = dict(body["position"])
    for key in ("next", "shares"):
        values[key] = tuple((island, value) for island, value in values[key])
    return Position(**values)


def boxes(store: Store, about: About, name: str, body: Body, group: str):
    """(kind, array's name, index, values) of what a snapshot holds: of "base" or "memory".

    Raises Damaged where a payload is not sound.
    """
    shapes = tuple((f"{kind}:{a.name}", a.shape) for a in about.arrays for kind in books.KINDS)
    for sha256 in body[group]:
        for key, fields in parts.grouped(records.read_payload(store, name, sha256)).items():
            each, index = parts.checked_part(key, shapes)
            kind, _, array = each.partition(":")
            yield kind, array, index, parts.decode(fields, parts.box_shape(index), "float32")


def newest(store: Store, identity: Identity, above: int = -1) -> Iterator[tuple[str, Body]]:
    """The sound records of snapshots of more than `above` merges, the newest first."""
    for number in reversed(records.numbers(store, "snapshots")):
        if number <= above:
            return
        name = name_of(number)
        try:
            yield name, records.read_record(store, identity, name, records.MERGER if number else "")
        except (KeyError, Damaged) as error:
            logger.warning("warning: a snapshot is skipped: %s", error)


def load(process: Process, about: About, folder: Path) -> Ledger | None:
    """The state of the newest sound snapshot; None where there is no snapshot yet.

    Raises UserError where there are some and none is sound.
    """
    # Asked first: the first snapshot may come while we look for it.
    begun = records.numbers(process.store, "snapshots") or records.numbers(process.store, "merges")
    for name, body in newest(process.store, process.identity):
        try:
            return load_from(process, about, folder, name, body)
        except Damaged as error:
            logger.warning("warning: %s is skipped: %s", name, error)
    if begun:
        raise UserError(
            f"outer.store={process.store.url}: no snapshot there is sound; put one back from a "
            "copy, or begin a new store from a checkpoint (checkpoint.start_from)"
        )
    return None


def load_from(process: Process, about: About, folder: Path, name: str, body: Body) -> Ledger:
    """The state of a snapshot in a scratch folder; Damaged where a payload is not sound."""
    for file in folder.glob("*.npy*"):
        file.unlink()
    ledger = Ledger(process, about, folder, read_position(body))
    _fill(ledger, name, body)
    return ledger


def _fill(ledger: Ledger, name: str, body: Body) -> None:
    places = {array.name: (i, array.shape) for i, array in enumerate(ledger.about.arrays)}
    missing = {array: math.prod(shape) for array, (_, shape) in places.items()}
    for group in ("base", "memory"):
        for kind, array, index, values in boxes(ledger.store, ledger.about, name, body, group):
            place, shape = places[array]
            file = books.file_of(ledger, kind, place)
            whole = np.load(file, mmap_mode="r+") if file.exists() else books.zeros(file, shape)
            whole[index] = values
            missing[array] -= values.size if kind == "base" else 0
    if any(missing.values()):
        raise Damaged(f"{name}: not all arrays are whole")


def open_ledger(process: Process, about: About, folder: Path) -> Ledger | None:
    """The state after all merges of the store; None where no island has begun yet.

    Where a merge cannot be made again because something of it is damaged, the state before it is
    published as that after all merges: islands that went further come back to it, and keep what
    they have not contributed yet.
    """
    ledger = load(process, about, folder)
    if ledger is None:
        return None
    last = -1
    try:
        while True:
            # Asked first: another merger may make merges while we follow.
            last = max([-1, *records.numbers(process.store, "merges")])
            if not merging.follow(ledger):
                break
        if last <= ledger.position.number:
            return ledger
        error: Exception = Damaged(f"{records.numbered('merges', ledger.position.number)}: absent")
    except Damaged as damage:
        error = damage
    everything = records.numbers(process.store, "merges") + records.numbers(
        process.store, "snapshots"
    )
    number = max(everything) + 1
    logger.warning(
        "warning: %s; the merges from %d to %d are given up", error, ledger.position.number,
        number - 1,
    )  # fmt: skip
    chain = records.digest(f"{ledger.position.chain} {number} {process.label}".encode())
    ledger.position = dataclasses.replace(ledger.position, number=number, chain=chain)
    write(ledger)
    return ledger


def prune(ledger: Ledger) -> None:
    """Remove what lies before the older of the newest two snapshots."""
    store, identity = ledger.store, ledger.identity
    kept = [name for name, _ in _first(newest(store, identity), KEPT)]
    if len(kept) < KEPT:
        return
    oldest = records.number_of(kept[-1]) or 0
    done = read_position(records.read_record(store, identity, kept[-1]))
    following = dict(done.next)
    for folder in ("merges", "snapshots"):
        for name in store.list(f"{folder}/") + store.list(f"payloads/{folder}/"):
            if _number_in(name, folder) < oldest:
                store.delete(name)
    for name in store.list("contributions/") + store.list("payloads/contributions/"):
        island, number = _contribution_in(name)
        limit = following.get(island, 0) if books.delayed(ledger.about) else oldest
        if number < limit:
            store.delete(name)


def _first(found: Iterator, count: int) -> list:
    return [each for each, _ in zip(found, range(count), strict=False)]


def _number_in(name: str, folder: str) -> int:
    text = name.removeprefix("payloads/").removeprefix(f"{folder}/")[: records.DIGITS]
    return int(text) if text.isdecimal() else math.inf  # pyright: ignore


def _contribution_in(name: str) -> tuple[str, float]:
    """(island, number) of a record or payload of a contribution; infinite: of none."""
    island, _, rest = name.removeprefix("payloads/").removeprefix("contributions/").partition("/")
    text = rest[: records.DIGITS]
    return island, int(text) if text.isdecimal() else math.inf
