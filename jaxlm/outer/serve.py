"""`jaxlm outer serve`: merge what the islands of a store contribute, on a CPU, for ever.

The merger holds nothing that the store does not: it may be killed at any moment and started again,
here or elsewhere. A second one waits until the first is gone; were both at work, each merge would
still be made by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxlm.config import UserError
from jaxlm.outer import about as facts
from jaxlm.outer import ledger as books
from jaxlm.outer import merging, presence, records, snapshots
from jaxlm.outer.about import About
from jaxlm.outer.ledger import Entry, Ledger
from jaxlm.outer.presence import Process, Watch
from jaxlm.outer.records import Body, Damaged, Identity
from jaxlm.outer.store import Store, open_store, patient
from jaxlm.validate_outer import parse_keys

logger = logging.getLogger("jaxlm")
LEASE = "merger"
SCRATCH = "jaxlm-merger-"
TRAINING = "training"  # what an island's beat says from its first step on


@dataclasses.dataclass
class Desk:
    """What a merger knows beside its ledger; it may forget all of it."""

    ledger: Ledger
    watch: Watch
    seen: dict[tuple[str, int], Entry | Damaged] = dataclasses.field(default_factory=dict)


def serve(place: str, key_file: str = "", keys: Sequence[str] = ()) -> None:
    """Merge until interrupted. `keys`: those of the islands and of this merger, where they sign.

    Raises UserError where the store cannot be used.
    """
    stop = threading.Event()
    identity = make_identity(key_file, keys)
    store = patient(open_store(place, "STORE"), stop)
    about, identity = _wait_for_islands(store, identity, stop)
    process = Process(store, identity, presence.patience(about.outer.grace))
    watch = Watch()
    with _scratch() as folder:
        state: dict[str, int] = {"number": 0}
        end = presence.start_beats(process, lambda: dict(state))
        try:
            while True:
                _hold(process, watch, stop)
                for number in merges(process, about, folder, watch, stop):
                    state["number"] = number
        finally:
            stop.set()
            end(True)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for the arrays; those of mergers that were killed, as large as a model, are removed.

    A merger that lives holds a lock on a file beside its folder, which ends with it.
    """
    for file in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*.lock"):
        with contextlib.suppress(OSError), file.open("a") as lock:  # OSError: it lives
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)
            file.unlink()
    with tempfile.NamedTemporaryFile(prefix=SCRATCH, suffix=".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = Path(lock.name).with_suffix("")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def make_identity(key_file: str, keys: Sequence[str]) -> Identity:
    """The merger's identity; UserError where a key lacks its counterpart."""
    parsed = parse_keys(keys, "--keys")
    if bool(key_file) != bool(parsed):
        given, other = ("--key", "--keys") if key_file else ("--keys", "--key")
        raise UserError(f"{given} without {other}: who signs must also know whom to believe")
    if not key_file:
        return Identity(records.MERGER, "")
    private, public, made = records.load_private_key(Path(key_file), "--key")
    if made:
        logger.info(
            "made the private key %s; its public key: %s:%s", key_file, records.MERGER, public
        )
    identity = Identity(records.MERGER, "", private, parsed)
    records.check_own_key(identity, public, Path(key_file), "--keys")
    return identity


def _wait_for_islands(
    store: Store, identity: Identity, stop: threading.Event
) -> tuple[About, Identity]:
    told = False
    while True:
        try:
            store.read(facts.FILE)
            break
        except KeyError:
            if not told:
                logger.info("waiting for the first island: no %s yet", facts.FILE)
            told = True
            stop.wait(1.0)
    _, about, identity = facts.read(store, identity)
    return about, identity


def _hold(process: Process, watch: Watch, stop: threading.Event) -> None:
    told = False
    while not presence.take_lease(process, LEASE, watch):
        if not told:
            logger.info("another merger is at work; taking over if it goes away")
        told = True
        stop.wait(process.patience / presence.BEATS)
    presence.forget_predecessors(process)


def merges(
    process: Process, about: About, folder: Path, watch: Watch, stop: threading.Event
) -> Iterator[int]:
    """Make merges, giving how many there are after each, until another merger has the lease."""
    ledger = None
    while ledger is None:
        ledger = snapshots.open_ledger(process, about, folder)
        stop.wait(0.0 if ledger else 0.5)
    logger.info("merging at %s from merge %d on", process.store.url, ledger.position.number)
    desk = Desk(ledger, watch)
    pause = process.patience / 10
    while presence.holds_lease(process, LEASE):
        before = ledger.position.number
        try:
            turn(desk)
        except Damaged as error:
            logger.warning("warning: %s; starting again from the newest snapshot", error)
            return
        if ledger.position.number == before:
            stop.wait(pause)
        yield ledger.position.number
    logger.info("another merger has taken over")


def turn(desk: Desk) -> None:
    """Make the merges that can be made now.

    Raises Damaged where another merger has made one that cannot be followed.
    """
    ledger = desk.ledger
    about = ledger.about
    beats = presence.read_beats(ledger.store, ledger.identity)
    living = presence.living(beats, desk.watch, ledger.process.patience)
    training = {island: beat for island, beat in living.items() if beat.get("state") == TRAINING}
    _heal(desk, living)
    if books.delayed(about):
        for island, number in _pending(desk):
            if number == _expected(ledger, island):
                _merge(desk, {island: _look(desk, island, number)}, training, number)
        return
    number = ledger.position.number
    here = [island for island, each in _pending(desk) if each == number]
    if here and _closes(desk, number, here, beats, training):
        looked = {island: _look(desk, island, number) for island in here}
        _merge(desk, looked, training, number)


def _expected(ledger: Ledger, island: str) -> int:
    """Of delayed: the number of an island's contribution to come."""
    return dict(ledger.position.next).get(island, 0)


def _pending(desk: Desk) -> list[tuple[str, int]]:
    """(island, number) of the contributions that no merge has taken yet, by number and name."""
    ledger, found = desk.ledger, []
    known = dict(ledger.identity.keys)
    for name in ledger.store.list("contributions/"):
        matched = re.fullmatch(r"contributions/([^/]+)/(\d+)\.json", name)
        if not matched or not records.NAME.fullmatch(matched[1]):
            continue
        island, number = matched[1], int(matched[2])
        if known and island not in known:
            if desk.watch.idle(("foreign", name), True) == 0.0:
                logger.warning("warning: %s is ignored: %s is not one of --keys", name, island)
            continue
        limit = _expected(ledger, island) if books.delayed(ledger.about) else ledger.position.number
        if number >= limit:
            found.append((number, island))
    return [(island, number) for number, island in sorted(found)]


def _look(desk: Desk, island: str, number: int) -> Entry | Damaged:
    """A contribution, read and checked once."""
    if (island, number) not in desk.seen:
        try:
            desk.seen[island, number] = books.take(desk.ledger, island, number)
        except KeyError as error:
            desk.seen[island, number] = Damaged(f"{error.args[0]}: absent")
        except Damaged as error:
            desk.seen[island, number] = error
    return desk.seen[island, number]


def _closes(
    desk: Desk, number: int, here: Sequence[str], beats: dict[str, Body], training: dict[str, Body]
) -> bool:
    """Whether a round closes: it has its quorum, and waited for the others as long as it may.

    Islands that have left are no part of the quorum: their run has ended.
    """
    outer = desk.ledger.about.outer
    staying = {presence.owner(label) for label, beat in beats.items() if not beat.get("left")}
    staying = (staying - {records.MERGER}) | set(here)
    for island in here:
        _look(desk, island, number)  # decoded while the others are waited for
    if len(here) < min(outer.quorum, len(staying)):
        return False
    waited = desk.watch.idle(("quorum",), number)
    missing = set(training) - set(here)
    return not missing or waited >= outer.grace


def _merge(
    desk: Desk, looked: dict[str, Entry | Damaged], training: dict[str, Body], number: int
) -> None:
    """Make one merge of these contributions, and what is due after it."""
    ledger = desk.ledger
    damaged = {
        island: {"number": number, "reason": str(entry)}
        for island, entry in looked.items()
        if isinstance(entry, Damaged)
    }
    for each in damaged.values():
        logger.warning("warning: left out: %s", each["reason"])
    sound = sorted(looked.items())
    entries = [entry for _, entry in sound if isinstance(entry, Entry)]
    fragment = books.fragment_of(ledger, number)
    if books.delayed(ledger.about):
        fragment = entries[0].body["fragment"] if entries else 0
    made = merging.make_merge(ledger, fragment, entries, damaged, list(training))
    _finish(desk, made)


def _finish(desk: Desk, made: bool) -> None:
    """Log a merge, follow that of another merger, and write a snapshot where one is due."""
    ledger = desk.ledger
    if not made and not merging.follow(ledger):
        return
    position = ledger.position
    limit = position.number
    desk.seen = {
        key: entry for key, entry in desk.seen.items()
        if key[1] >= (_expected(ledger, key[0]) if books.delayed(ledger.about) else limit)
    }  # fmt: skip
    logger.info("merge %d: %s", position.number - 1, _describe(ledger))
    if position.number % snapshots.interval(ledger.about) == 0:
        snapshots.write(ledger)
        snapshots.prune(ledger)


def _describe(ledger: Ledger) -> str:
    """What the last merge made of whose contributions, in a line."""
    name = records.numbered("merges", ledger.position.number - 1)
    try:
        body = records.read_record(ledger.store, ledger.identity, name)
    except (KeyError, Damaged) as error:
        return str(error)
    said = [each["island"] for each in body["islands"] if not each["refused"]] or ["nothing"]
    said += [f"{e['island']} refused: {e['reason']}" for e in body["islands"] if e["refused"]]
    said += [f"{island} left out" for island in body["damaged"]]
    tokens = ledger.position.tokens // ledger.about.outer.fragments
    return f"{', '.join(said)}; {tokens:,} tokens so far"


def _heal(desk: Desk, living: dict[str, Body]) -> None:
    """Publish a snapshot for an island that cannot read the merges that it lacks.

    Its beat says how new a snapshot has to be. Numbers only grow: where the snapshot of this
    position may be damaged itself, a merge of nothing makes another position.
    """
    ledger = desk.ledger
    needs = max([body.get("needs") or 0 for body in living.values()], default=0)
    if not needs or any(n >= needs for n in records.numbers(ledger.store, "snapshots")):
        return
    while ledger.position.number < needs:
        fragment = books.fragment_of(ledger, ledger.position.number)
        if not merging.make_merge(ledger, fragment, [], {}) and not merging.follow(ledger):
            return
    logger.info("a snapshot of merge %d for an island that lacks %d", ledger.position.number, needs)
    snapshots.write(ledger)
    snapshots.prune(ledger)
