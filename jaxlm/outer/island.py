"""An island that is a job of its own: it trains, and meets others in a store.

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

import concurrent.futures
import dataclasses
import logging
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.config import UserError
from jaxlm.outer import boxes as placed
from jaxlm.outer import courier, parts, presence, records, wire
from jaxlm.outer import ledger as books
from jaxlm.outer.about import About
from jaxlm.outer.claims import Claims
from jaxlm.outer.courier import Boxes, Contribution, Gone, Merge, Sent
from jaxlm.outer.ledger import Position
from jaxlm.outer.presence import Process, Watch

logger = logging.getLogger("jaxlm")
FOUNDING = "founding"  # the island that trains what all start from
JOINING = "joining"
STARTING = "starting"  # it has joined, and has made no step: compiling takes long
ATTEMPTS = 4  # to have each fragment merged after the last step
USED, REFUSED, LATE = "used", "refused", "late"  # what became of a contribution


@dataclasses.dataclass
class Outstanding:
    """A contribution of which no merge is known to have decided yet."""

    own: Contribution
    deltas: Boxes  # by key within the fragment
    sent: concurrent.futures.Future[Sent]
    merges: concurrent.futures.Future[list[Merge] | Gone]


@dataclasses.dataclass
class Island:
    """What an island keeps beside its state, on the host."""

    process: Process
    about: About
    claims: Claims
    step_tokens: int  # tokens of a step
    sequences: int  # items of data of a step
    steps: int  # the run's
    stop: threading.Event
    worker: concurrent.futures.ThreadPoolExecutor
    watch: Watch = dataclasses.field(default_factory=Watch)
    state: str = JOINING
    step: int = 0  # local steps made
    origin: tuple[int, int] = (0, 0)  # a local step, and the items that were read before it
    position: Position = Position()
    base: Boxes = dataclasses.field(default_factory=dict)
    error: Boxes = dataclasses.field(default_factory=dict)  # what the wire lost so far
    owned: frozenset[str] = frozenset()  # the boxes that this process sends
    taken: list[int] = dataclasses.field(default_factory=list)  # fragment -> step of its last D
    last: int = 0  # the step of the last contribution that counted
    span: int = 0  # local steps from there to the next; 0: to be found out
    outstanding: Outstanding | None = None
    needs: int = 0  # a snapshot of so many merges is waited for
    speed: float = 0.0  # steps a second
    clock: tuple[int, float] = (0, 0.0)  # a step, and the time of its end without waits
    numbers: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(
            ("round", "staleness", "bytes_sent", "bytes_received", "waited"), 0.0
        )
    )

    @property
    def fragments(self) -> int:
        return self.about.outer.fragments

    @property
    def name(self) -> str:
        return self.process.identity.name


# --- agreement of the processes of an island -----------------------------------------------------


def leads() -> bool:
    """Whether this process writes the island's records."""
    return jax.process_index() == 0


def agree(value: int) -> int:
    """The value that process 0 has; all processes call it."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def all_of(texts: list[str]) -> list[str]:
    """The texts of all processes, SHA-256 each, in the order of the processes."""
    if jax.process_count() == 1:
        return texts
    counts = multihost_utils.process_allgather(np.int64(len(texts)))
    own = np.zeros((int(counts.max()), 32), np.uint8)
    for row, text in zip(own, texts, strict=False):
        row[:] = np.frombuffer(bytes.fromhex(text), np.uint8)
    rows = multihost_utils.process_allgather(own)
    return [rows[i, j].tobytes().hex() for i, count in enumerate(counts) for j in range(int(count))]


# --- contributing --------------------------------------------------------------------------------


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


def is_decided(island: Island, own: Contribution) -> bool:
    """Whether the store has a merge that decides about a contribution."""
    try:
        found = courier.read_merges(
            island.process, island.about, island.position, None, island.stop, 0.0
        )
        return any(decides(island, merge, own) for merge in found)
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


# --- taking merges in ----------------------------------------------------------------------------


def settle(island: Island, theta: Boxes) -> Boxes:
    """Take in the merges up to the one that decides about the outstanding contribution."""
    waiting, begin = island.outstanding, time.monotonic()
    assert waiting is not None
    merges, sent = waiting.merges.result(), waiting.sent.result()
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
    if leads():
        try:
            merges = list(
                courier.read_merges(
                    island.process, island.about, island.position, None, island.stop, 0.0
                )
            )
        except Gone as error:
            gone = error
    until = agree(merges[-1].position.number if merges else island.position.number)
    if not leads():
        try:
            merges = list(
                courier.read_merges(
                    island.process, island.about, island.position, until, island.stop, 0.5
                )
            )
        except Gone as error:
            gone = error
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
        number = -1
        if leads():
            found = courier.read_snapshot(island.process, island.about, above)
            number = -1 if found is None else found[0].number
        number = agree(number)
        if number >= 0:
            found = courier.read_snapshot(island.process, island.about, above)
            if found is None or found[0].number != number:
                raise UserError(f"outer.store: snapshot {number} went away; start the island again")
            island.needs = 0
            return found
        taken = records.numbers(island.process.store, "snapshots")
        island.needs = max([above, *taken]) + 1
        island.stop.wait(island.process.patience / presence.BEATS)


# --- the loop ------------------------------------------------------------------------------------


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


def facts(island: Island) -> dict[str, Any]:
    """What the island's beat says, for `jaxlm outer status` and for the merger."""
    return {
        "state": island.state, "step": island.step, "steps": island.steps,
        "round": island.position.number, "speed": island.speed, "needs": island.needs,
        "tokens": island.step * island.step_tokens,
        **{f"total_{key}": value for key, value in island.numbers.items()},
    }  # fmt: skip
