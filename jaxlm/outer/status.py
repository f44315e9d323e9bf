"""`jaxlm outer status`: islands, merges, staleness, tokens, bytes, who is late."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from jaxlm.outer import about as facts
from jaxlm.outer import ledger as books
from jaxlm.outer import presence, records, snapshots
from jaxlm.outer.about import About
from jaxlm.outer.presence import Watch
from jaxlm.outer.records import MERGER, Body, Damaged, Identity
from jaxlm.outer.store import Store, open_store
from jaxlm.validate_outer import parse_keys

COLUMNS = {
    "island": "", "state": "", "step": "d", "round": "d", "behind": "d", "staleness": "d",
    "tokens": ",d", "steps_per_second": ".3g", "sent_mb": ",.1f", "received_mb": ",.1f",
    "waited_seconds": ",.0f", "refused": "d",
}  # fmt: skip


def read_status(place: str, keys: Sequence[str] = (), watch_seconds: float | None = None) -> Body:
    """What a store tells of its islands; takes as long as it takes a beat to change.

    Raises UserError where the store cannot be used.
    """
    store = open_store(place, "STORE", make=False)
    identity = Identity("status", "", None, parse_keys(keys, "--keys"))
    _, about, identity = facts.read(store, identity)
    patience = presence.patience(about.outer.grace)
    watched = patience / presence.BEATS * 2 if watch_seconds is None else watch_seconds
    watch, begin = Watch(), time.monotonic()
    first = presence.read_beats(store, identity)
    for label, beat in first.items():
        watch.idle(label, beat["count"])
    time.sleep(watched)
    beats = presence.read_beats(store, identity)
    moving = {
        label for label, beat in beats.items() if watch.idle(label, beat["count"]) < watched / 2
    }
    merges = _merges(store, identity)
    number = max([-1, *merges]) + 1
    position = _position(store, identity)
    return {
        "store": store.url, "rule": about.outer.rule, "merges": number,
        # A step is in a contribution of each fragment.
        "tokens": position.tokens // about.outer.fragments,
        "island_steps": position.steps // about.outer.fragments,
        "snapshots": records.numbers(store, "snapshots"),
        "merger": "at work" if any(presence.owner(x) == MERGER for x in moving) else "absent",
        "waiting_for": _late(store, identity, about, number, beats, moving),
        "islands": [
            _island(label, beat, label in moving, merges, number)
            for label, beat in sorted(beats.items())
            if presence.owner(label) != MERGER
        ],
        "watched_seconds": time.monotonic() - begin,
    }  # fmt: skip


def _merges(store: Store, identity: Identity) -> dict[int, Body]:
    """The sound records of merges that the store still has."""
    found = {}
    for number in records.numbers(store, "merges"):
        try:
            name = records.numbered("merges", number)
            found[number] = records.read_record(store, identity, name, MERGER)
        except (KeyError, Damaged):
            continue
    return found


def _position(store: Store, identity: Identity) -> books.Position:
    """The position after all merges: that of the newest snapshot, and the records since."""
    for _, body in snapshots.newest(store, identity):
        position = snapshots.read_position(body)
        merges = _merges(store, identity)
        while position.number in merges:
            position = books.advance(position, identity, merges[position.number])
        return position
    return books.Position()


def _late(
    store: Store, identity: Identity, about: About, number: int, beats: dict[str, Body],
    moving: set[str],
) -> list[str]:  # fmt: skip
    """Of rounds, the islands that train and have not contributed to the one that is open."""
    if books.delayed(about):
        return []
    training = {
        presence.owner(x)
        for x, beat in beats.items()
        if x in moving and beat.get("state") == "training"
    }
    there = {
        island for island in training
        if books.contribution_name(island, number) in store.list(f"contributions/{island}/")
    }  # fmt: skip
    return sorted(training - there) if there else []


def _island(
    label: str, beat: Body, moves: bool, merges: dict[int, Body], number: int
) -> dict[str, Any]:
    """A row of the table."""
    name = presence.owner(label)
    mine = [e for body in merges.values() for e in body["islands"] if e["island"] == name]
    state = "left" if beat.get("left") else beat.get("state") if moves else "silent"
    return {
        "island": name, "state": state, "step": beat.get("step", 0),
        "round": beat.get("round", 0), "behind": number - beat.get("round", 0),
        "staleness": int(beat.get("total_staleness", 0)), "tokens": beat.get("tokens", 0),
        "steps_per_second": beat.get("speed", 0.0),
        "sent_mb": beat.get("total_bytes_sent", 0.0) / 1e6,
        "received_mb": beat.get("total_bytes_received", 0.0) / 1e6,
        "waited_seconds": beat.get("total_waited", 0.0),
        "refused": sum(each["refused"] > 1 for each in mine),
    }  # fmt: skip


def table(status: Body) -> str:
    """The status as lines for a terminal."""
    rows = [list(COLUMNS)] + [
        [format(each[name], form) if form else str(each[name]) for name, form in COLUMNS.items()]
        for each in status["islands"]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        f"{status['store']}: rule {status['rule']}, {status['merges']} merges, "
        f"{status['tokens']:,} tokens in {status['island_steps']:,} steps of all islands, "
        f"merger {status['merger']}"
    ]
    lines += [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if status["waiting_for"]:
        lines.append(f"merge {status['merges']} waits for: {', '.join(status['waiting_for'])}")
    return "\n".join(lines)
