"""What an island sends to a store and reads there, as arrays of the host.

Arrays are boxes that this process holds, by the text of their part ("embed|0:128,0:64"); those of a
contribution and of an update count in rows of their fragment.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator

import numpy as np

from jaxlm.outer import ledger as books
from jaxlm.outer import merging, parts, records, snapshots
from jaxlm.outer.about import About
from jaxlm.outer.ledger import Position
from jaxlm.outer.presence import Process
from jaxlm.outer.records import Body, Damaged

logger = logging.getLogger("jaxlm")
Boxes = dict[str, np.ndarray]
NONE: Boxes = {}


@dataclasses.dataclass(frozen=True)
class Contribution:
    """What an island learnt in a fragment, on its way to the store."""

    number: int  # of the merge that it is for; of delayed, of the island's contributions
    fragment: int
    base: int  # merges that the island had taken in when it was made
    tokens: int  # that it stands for
    steps: int
    step: int  # the island's local step when it was made
    items: int  # of its data that the island had read

    def body(self, island: str, payloads: list[str]) -> Body:
        """The record, but for its seal."""
        return {"island": island, "payloads": payloads} | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Sent:
    """What one process of an island has uploaded."""

    payloads: list[str]
    size: int  # bytes
    errors: Boxes  # what the format lost, for the next contribution


def fragment_box(index: parts.Index, fragment: int, fragments: int):
    """(index within the box, the same rows within the fragment) of a box's part of a fragment;
    None where it has none."""
    if not index:
        return ((), ()) if fragment == 0 else None
    first, *rest = index
    inside = slice((fragment - first.start) % fragments, None, fragments)
    count = len(range(first.stop - first.start)[inside])
    start = -((first.start - fragment) // -fragments)
    return (inside, (slice(start, start + count), *rest)) if count else None


def upload(
    process: Process, about: About, contribution: Contribution, deltas: Boxes, errors: Boxes
) -> Sent:
    """Write the payloads of a contribution; nobody sees it before its record is created."""
    name = books.contribution_name(process.identity.name, contribution.number)
    up = books.wires(about)[0]
    kinds = {array.name: array for array in about.arrays}
    kept: Boxes = {}

    def coded():
        for key, delta in deltas.items():
            part = parts.part_of(key)
            form = books.form_of(kinds[part[0]], up)
            payload, _, error = parts.send(delta, errors.get(key), form)
            if error is not None:
                kept[key] = error
            yield part, payload

    payloads, size = [], 0
    for data in parts.packed(name, coded()):
        payloads.append(records.put_payload(process.store, name, data))
        size += len(data)
    return Sent(payloads, size, kept)


def announce(process: Process, contribution: Contribution, payloads: list[str]) -> bool:
    """Create the record of a contribution, whose payloads are in the store.

    False where the island has made this contribution before: that one counts.
    """
    name = books.contribution_name(process.identity.name, contribution.number)
    body = contribution.body(process.identity.name, payloads)
    return records.create_record(process.store, process.identity, name, body)


def upload_first(process: Process, boxes: Boxes) -> list[str]:
    """Write the payloads of snapshot 0, what the first island begins with."""
    coded = (
        ((f"base:{name}", index), {"values": np.ascontiguousarray(boxes[key]).reshape(-1)})
        for key, (name, index) in ((key, parts.part_of(key)) for key in boxes)
    )
    name = snapshots.name_of(0)
    return [records.put_payload(process.store, name, data) for data in parts.packed(name, coded)]


def announce_first(process: Process, payloads: list[str], step: int) -> bool:
    """Create snapshot 0; False where another island was first."""
    body = {"base": payloads, "memory": [], "position": dataclasses.asdict(Position(step=step))}
    return records.create_record(process.store, process.identity, snapshots.name_of(0), body)


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge as an island reads it."""

    body: Body
    position: Position  # after it
    update: Boxes  # array -> what is subtracted from its rows of the fragment
    size: int  # bytes that were read


class Gone(Exception):
    """Merges that an island lacks cannot be read: it needs a snapshot newer than `number`."""

    def __init__(self, number: int, reason: str):
        super().__init__(reason)
        self.number = number


def read_merge(process: Process, about: About, position: Position) -> Merge | None:
    """The merge after a position; None where there is none yet.

    Raises Gone where it is damaged, was removed because it is old, or continues other merges.
    """
    name = records.numbered("merges", position.number)
    data = _read(process, name)
    if data is None:
        taken = records.numbers(process.store, "snapshots")
        if not taken or taken[-1] <= position.number:
            return None
        data = _read(process, name)  # a merge is there before the snapshot that follows it
    if data is None:
        raise Gone(position.number, f"{name}: removed as old, or given up")
    try:
        body = records.unseal(process.identity, name, data, records.MERGER)
        if (body["number"], body["previous"]) != (position.number, position.chain):
            raise Damaged(f"{name}: continues other merges than those before it here")
        update, size = {}, len(data)
        for _, array, values, read in merging.read_update(process.store, about, name, body):
            update[array.name] = values
            size += read
    except Damaged as error:
        raise Gone(position.number, str(error)) from None
    after = books.advance(position, process.identity, body)
    return Merge(body, after, update, size)


def _read(process: Process, name: str) -> bytes | None:
    try:
        return process.store.read(name)
    except KeyError:
        return None


def read_merges(
    process: Process, about: About, position: Position, until: int | None,
    stop: threading.Event, pause: float,
) -> Iterator[Merge]:  # fmt: skip
    """The merges after a position, one after another.

    Those that are there; with `until`, also those to come, until the store has `until` merges.
    """
    while until is None or position.number < until:
        merge = read_merge(process, about, position)
        if merge is not None:
            position = merge.position
            yield merge
        elif until is None or stop.is_set():
            return
        else:
            stop.wait(pause)


def read_snapshot(
    process: Process, about: About, above: int = -1
) -> tuple[Position, dict[str, np.ndarray]] | None:
    """(position, whole arrays by name) of the newest sound snapshot of more than `above` merges."""
    shapes = {array.name: array.shape for array in about.arrays}
    for name, body in snapshots.newest(process.store, process.identity, above):
        arrays = {each: np.full(shape, np.nan, np.float32) for each, shape in shapes.items()}
        seen = dict.fromkeys(shapes, 0)
        try:
            for _, each, index, values in snapshots.boxes(process.store, about, name, body, "base"):
                arrays[each][index] = values
                seen[each] += values.size
        except Damaged as error:
            logger.warning("warning: %s is skipped: %s", name, error)
            continue
        if all(seen[each] == array.size for each, array in arrays.items()):
            return snapshots.read_position(body), arrays
        logger.warning("warning: %s is skipped: not all arrays are whole", name)
    return None
