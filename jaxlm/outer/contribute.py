"""What an island sends: when, what, and what became of it."""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np

from jaxlm.config import UserError
from jaxlm.outer import boxes as placed
from jaxlm.outer import courier, presence
from jaxlm.outer import ledger as books
from jaxlm.outer.courier import Boxes, Contribution, Gone, Merge
from jaxlm.outer.island import Island, Outstanding, agree, all_of, leads
from jaxlm.outer.ledger import Position

logger = logging.getLogger("jaxlm")
USED, REFUSED, LATE = "used", "refused", "late"  # what became of a contribution


def interval(island: Island) -> int:
    """Local steps between this island's contributions, less where it is slower than others."""
    outer, number = island.about.outer, _next_number(island)
    turn = number % outer.fragments
    steps = (turn + 1) * outer.every // outer.fragments - turn * outer.every // outer.fragments
    if books.delayed(island.about) and outer.adapt and leads():
        beats = presence.read_beats(island.process.store, island.process.identity)
        living = presence.living(beats, island.watch, island.process.patience)
        fastest = max([island.speed, *(float(b.get("speed") or 0) for b in living.values())])
        if fastest > 0 and island.speed > 0:
            steps = int(island.speed / fastest * steps)
    return agree(max(1, steps))


def _next_number(island: Island) -> int:
    """The number of this island's next contribution."""
    if books.delayed(island.about):
        return dict(island.position.next).get(island.name, 0)
    return island.position.number


def contribute(island: Island, theta: Boxes) -> None:
    """Send what was learnt in the fragment whose turn it is, in the background."""
    number = _next_number(island)
    fragment = number % island.fragments
    steps = island.step - island.taken[fragment]
    own = Contribution(
        number, fragment, island.position.number, steps * island.step_tokens, steps, island.step,
        island.origin[1] + (island.step - island.origin[0]) * island.sequences,
    )  # fmt: skip
    deltas = {
        rows: np.asarray(island.base[key][inside] - theta[key][inside])
        for key, inside, rows, _ in placed.pieces(island.about, theta, fragment)
    }
    send(island, own, deltas)


def send(island: Island, own: Contribution, deltas: Boxes) -> None:
    """Upload a contribution and read what comes of it, in the background."""
    check_lease(island)
    island.span = 0
    pieces = list(placed.pieces(island.about, island.base, own.fragment))
    errors = {
        rows: np.array(island.error[key][inside])
        for key, inside, rows, _ in pieces if key in island.error
    }  # fmt: skip
    here = {rows: deltas[rows] for key, _, rows, _ in pieces if key in island.owned}
    process, about = island.process, island.about
    sent = island.worker.submit(courier.upload, process, about, own, here, errors)
    if jax.process_count() > 1:  # the record names the payloads of all processes
        payloads = all_of(sent.result().payloads)
    else:
        payloads = None

    def announce_and_read() -> list[Merge] | Gone:
        if leads():
            courier.announce(process, own, payloads or sent.result().payloads)
        return read_until_decided(island, own, island.position)

    merges = island.worker.submit(announce_and_read)
    island.outstanding = Outstanding(own, deltas, sent, merges)


def read_until_decided(island: Island, own: Contribution, position: Position) -> list[Merge] | Gone:
    """The merges after a position up to the one that decides about a contribution."""
    found: list[Merge] = []
    process, about = island.process, island.about
    pause = min(0.5, process.patience / 20)
    try:
        while not island.stop.is_set():
            merge = courier.read_merge(process, about, position)
            if merge is None:
                island.stop.wait(pause)
                continue
            found.append(merge)
            position = merge.position
            if decides(island, merge, own):
                return found
    except Gone as gone:
        return gone
    return found


def decides(island: Island, merge: Merge, own: Contribution) -> bool:
    """Whether a merge says what became of a contribution."""
    if books.delayed(island.about):
        return dict(merge.position.next).get(island.name, 0) > own.number
    return merge.body["number"] >= own.number


def fate(island: Island, merge: Merge, number: int) -> tuple[str, dict[str, Any]]:
    """(what became of this island's contribution `number` in a merge, what the record says)."""
    for each in merge.body["islands"]:
        if each["island"] == island.name and each["number"] == number:
            return (USED if each["refused"] == 0 else REFUSED), each
    return LATE, {}


def went_on(island: Island, own: Contribution) -> bool:
    """Whether the store has a merge with a contribution of this island after that one."""
    try:
        found = courier.read_merges(
            island.process, island.about, island.position, None, island.stop, 0.0
        )
        return any(
            each["island"] == island.name and each["number"] > own.number
            for merge in found
            for each in merge.body["islands"]
        )
    except Gone:
        return True  # the snapshot to go on from decides


def check_lease(island: Island) -> None:
    """Stop where another process has taken this island's name while this one slept."""
    held = not leads() or presence.holds_lease(island.process, lease_of(island.name))
    if not agree(int(held)):
        raise UserError(
            f"outer.island={island.name}: another process trains as this island of "
            f"outer.store={island.process.store.url} since this one was stopped; this one ends"
        )


def lease_of(name: str) -> str:
    """The lease of an island's name: one process at a time."""
    return f"island-{name}"
