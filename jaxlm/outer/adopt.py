"""How an island that is a job of its own takes in what a store has merged.

What all islands hold in common is `base`: the first snapshot less all updates, the same bits
everywhere. An island's own parameters are theta. It sends D = base - theta, and receives the
update U that was made of such: base - U is what all start from next. In rounds, with a share `mix`
of its own,

    theta + (1 - mix) ((base - theta) - U)       its D is in the update
    theta - U                                    it came too late: its D stays for the next round
    base - U                                     it was refused

and, where contributions are merged as they come (delayed), theta + (1 - mix) (D - U): the steps
made since D was sent stay its own. An island from which alone the update comes goes on as if there
were none, bit for bit. Adam's moments, the schedule and the stream of data are the island's own.
"""

from __future__ import annotations

import itertools
import logging
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.config import UserError
from jaxlm.outer import boxes as placed
from jaxlm.outer import courier, parts, presence, records, wire
from jaxlm.outer import ledger as books
from jaxlm.outer.contribute import LATE, REFUSED, USED, contribute, decides, fate, interval
from jaxlm.outer.courier import Boxes, Gone, Merge, Sent
from jaxlm.outer.island import STARTING, Island, Outstanding, agree, leads
from jaxlm.outer.ledger import Position

logger = logging.getLogger("jaxlm")
TELL = 15.0  # seconds between looks at who is there, while a merge is waited for
ATTEMPTS = 4  # to have each fragment merged after the last step


def after_step(island: Island, arrays: dict[str, jax.Array]) -> dict[str, jax.Array] | None:
    """What a step is followed by; the arrays to go on with, None where they stay as they are.

    All processes of the island call it after every step, with the arrays that are merged.
    """
    island.step += 1
    if not island.base:
        return None
    theta: Boxes | None = None
    load = lambda: placed.from_devices(arrays) if theta is None else theta
    final, outer = island.step == island.steps, island.about.outer
    if island.outstanding is not None and _ready(island, final):
        theta = settle(island, load())
    if island.outstanding is None:
        island.span = island.span or interval(island)
    tries = ATTEMPTS * island.fragments if final else 1
    while island.outstanding is None and tries and _is_due(island, final):
        tries -= 1
        measure_speed(island)
        theta = catch_up(island, load())
        contribute(island, theta)
        if final or (not books.delayed(island.about) and outer.overlap == 0):
            theta = settle(island, theta)
    return None if theta is None else placed.to_devices(theta, arrays)


def _is_due(island: Island, final: bool) -> bool:
    """Whether to contribute now; after the last step, until all fragments are merged."""
    if final:
        return any(step < island.step for step in island.taken)
    return island.step - island.last >= island.span


def _ready(island: Island, final: bool) -> bool:
    """Whether the outstanding contribution is to be settled now."""
    assert island.outstanding is not None
    if final:
        return True
    if books.delayed(island.about):
        return bool(agree(int(island.outstanding.merges.done())))
    return island.step - island.outstanding.own.step >= island.about.outer.overlap


def measure_speed(island: Island) -> None:
    """Steps a second since the last contribution, without waits."""
    now, (step, then) = time.monotonic(), island.clock
    if step and island.step > step and now > then:
        island.speed = (island.step - step) / (now - then)
    island.clock = (island.step, now)


def begin(island: Island, position: Position, base: Boxes, arrays: dict[str, jax.Array]) -> None:
    """Start to take part: everything is as in a snapshot."""
    island.state = STARTING
    island.position, island.base = position, base
    island.owned = placed.sent_here(arrays)
    island.taken = [island.step] * island.fragments
    island.last = island.step
    island.numbers["round"] = float(position.number)
    lossy = not wire.exact(books.wires(island.about)[0])
    kinds = {array.name: array.kind for array in island.about.arrays}
    island.error = {
        key: np.zeros_like(box) for key, box in base.items()
        if lossy and kinds[parts.part_of(key)[0]] == "params"
    }  # fmt: skip


def settle(island: Island, theta: Boxes) -> Boxes:
    """Take in the merges up to the one that decides about the outstanding contribution."""
    waiting, begin = island.outstanding, time.monotonic()
    assert waiting is not None
    merges, sent = _wait(island, waiting), waiting.sent.result()
    gone = agree_on_gone(merges)
    waited = time.monotonic() - begin
    island.numbers["waited"] += waited
    island.clock = (island.clock[0], island.clock[1] + waited)
    island.numbers["bytes_sent"] += sent.size
    island.outstanding = None
    if gone is not None:
        return rejoin(island, theta, gone, keep=False)
    assert isinstance(merges, list)
    if not merges:  # the run is being stopped
        return theta
    for merge in merges:
        is_own = decides(island, merge, waiting.own)
        theta = take(island, theta, merge, waiting if is_own else None, sent)
    return theta


def _wait(island: Island, waiting: Outstanding) -> list[Merge] | Gone:
    """The merges that decide about a contribution; the log says now and then what is waited for."""
    for look in itertools.count():
        try:
            return waiting.merges.result(timeout=TELL)
        except TimeoutError:
            _tell(island, look)
    raise AssertionError


def _tell(island: Island, look: int) -> None:
    """Log who is there; at the first look only what their beats are, to see later who is gone."""
    beats = presence.read_beats(island.process.store, island.process.identity)
    living = presence.living(beats, island.watch, TELL)
    merging = any(
        presence.owner(label) == records.MERGER
        and island.watch.idle(("merger", label), beat["count"]) < TELL
        for label, beat in beats.items()
    )
    if look:
        logger.info(
            "waiting for merge %d; islands that are there: %s; %s", island.position.number,
            ", ".join(sorted(living)),
            "a merger is at work" if merging else "no merger: start `jaxlm outer serve`",
        )  # fmt: skip


def agree_on_gone(merges: list[Merge] | Gone) -> Gone | None:
    """Whether any process of the island could not read the merges."""
    lost = merges if isinstance(merges, Gone) else None
    if jax.process_count() == 1:
        return lost
    numbers = multihost_utils.process_allgather(np.int64(lost.number if lost else -1))
    worst = int(np.max(numbers))
    return None if worst < 0 else Gone(worst, str(lost or "another process of the island"))


def take(
    island: Island, theta: Boxes, merge: Merge, waiting: Outstanding | None, sent: Sent | None
) -> Boxes:
    """Take one merge in; `waiting`: the contribution about which it decides."""
    what, record = (LATE, {}) if waiting is None else fate(island, merge, waiting.own.number)
    fragment, own_share = merge.body["fragment"], np.float32(1 - island.about.outer.mix)
    in_rounds = not books.delayed(island.about)
    new = dict(theta)
    if merge.update:
        for key, inside, rows, index in placed.pieces(island.about, theta, fragment):
            own, base = theta[key][inside], island.base[key][inside]
            update = merge.update[parts.part_of(key)[0]][index]
            if what == USED and in_rounds:
                moved = own + own_share * ((base - own) - update)
            elif what == USED and waiting is not None:
                moved = own + own_share * (waiting.deltas[rows] - update)
            elif what == REFUSED:
                moved = base - update
            else:
                moved = own - update
            new[key] = _with(new[key], inside, moved)
            island.base[key] = _with(island.base[key], inside, base - update)
    elif what == REFUSED:
        for key, inside, _, _ in placed.pieces(island.about, theta, fragment):
            new[key] = _with(new[key], inside, island.base[key][inside])
    if waiting is not None and what != LATE:
        _keep_error(island, waiting, what, sent)
        island.taken[fragment] = waiting.own.step
        island.last = waiting.own.step
        island.numbers["staleness"] = float(record["staleness"])
        if what == REFUSED:
            logger.warning(
                "warning: merge %d refused this island's contribution: %s",
                merge.body["number"], record["reason"],
            )  # fmt: skip
    island.position = merge.position
    island.numbers["bytes_received"] += merge.size
    island.numbers["round"] = float(island.position.number)
    return new


def _with(array: np.ndarray, index: Any, value: Any) -> np.ndarray:
    """The array with some of it replaced; another array, where it is not the whole."""
    changed = np.array(array)
    changed[index] = value
    return changed


def _keep_error(island: Island, waiting: Outstanding, what: str, sent: Sent | None) -> None:
    """What the wire lost is sent next time, unless the contribution was refused."""
    for key, inside, rows, _ in placed.pieces(island.about, island.error, waiting.own.fragment):
        lost = sent.errors.get(rows) if sent is not None and what == USED else None
        if what == REFUSED:
            island.error[key] = _with(island.error[key], inside, 0.0)
        elif lost is not None:
            island.error[key] = _with(island.error[key], inside, lost)


def catch_up(island: Island, theta: Boxes, earlier: bool = False) -> Boxes:
    """Take in the merges that are there, in which this island has no part.

    `earlier`: it may have one, of before it was started again.
    """
    merges: list[Merge] = []
    gone: Gone | None = None

    def read(until: int | None, patience: float) -> None:
        nonlocal gone
        found = courier.read_merges(
            island.process, island.about, island.position, until, island.stop, patience
        )
        try:
            merges.extend(found)
        except Gone as error:
            gone = error

    if leads():
        read(None, 0.0)
    until = agree(merges[-1].position.number if merges else island.position.number)
    if not leads():
        read(until, 0.5)
    gone = agree_on_gone(gone if gone is not None else merges)
    if gone is not None:
        return rejoin(island, theta, gone, keep=True)
    for merge in merges:
        if earlier:
            theta = _take_earlier(island, theta, merge)
        else:
            theta = take(island, theta, merge, None, None)
    return theta


def _take_earlier(island: Island, theta: Boxes, merge: Merge) -> Boxes:
    """Take in a merge that may hold what this island contributed before it was started again.

    Then it goes on from the merge, after the steps and the data that the contribution stands for.
    """
    mine = [each for each in merge.body["islands"] if each["island"] == island.name]
    theta = take(island, theta, merge, None, None)
    for each in mine:
        if each["step"] <= island.taken[merge.body["fragment"]]:
            continue
        fragment = merge.body["fragment"]
        for key, inside, _, _ in placed.pieces(island.about, theta, fragment):
            theta[key] = _with(theta[key], inside, island.base[key][inside])
        island.taken[fragment] = island.last = each["step"]
        if each["step"] > island.step:
            island.step, island.origin = each["step"], (each["step"], each["items"])
    return theta


def rejoin(island: Island, theta: Boxes, gone: Gone, keep: bool) -> Boxes:
    """Go on from a snapshot, as the merges since ours cannot be read.

    `keep`: what was learnt since the last contribution is kept. Else a contribution is outstanding
    of which nothing is known: it may be in the snapshot, and must not count twice.
    """
    logger.warning("warning: %s; going on from a snapshot", gone)
    position, arrays = wait_for_snapshot(island, gone.number)
    new = placed.of_whole(arrays, island.base)
    if keep:
        theta = {key: own - (island.base[key] - new[key]) for key, own in theta.items()}
    else:
        theta = {key: np.array(box) for key, box in new.items()}
        island.error = {key: np.zeros_like(box) for key, box in island.error.items()}
        island.taken = [island.step] * island.fragments
        island.last = island.step
    island.base, island.position = new, position
    return theta


def wait_for_snapshot(island: Island, above: int) -> tuple[Position, dict[str, np.ndarray]]:
    """The newest sound snapshot of more than `above` merges; the merger is asked for one."""
    while True:
        number, found = -1, None
        if leads():
            found = courier.read_snapshot(island.process, island.about, above)
            number = -1 if found is None else found[0].number
        number = agree(number)
        if number >= 0:
            if not leads():
                found = courier.read_snapshot(island.process, island.about, above)
            if found is None or found[0].number != number:
                raise UserError(f"outer.store: snapshot {number} went away; start the island again")
            island.needs = 0
            return found
        taken = records.numbers(island.process.store, "snapshots")
        island.needs = max([above, *taken]) + 1
        island.stop.wait(island.process.patience / presence.BEATS)
