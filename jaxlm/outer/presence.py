"""Who is there: beats that processes write, and leases that one of them holds at a time.

Nobody reads another's clock. A process writes a beat with a counter again and again; who watches
holds it for gone when the beat has not changed for some time of the watcher's own clock. A lease is
a row of records, each created once: who creates the next number holds it, and may do so when the
holder before is gone. A holder that was only stopped finds a larger number when it wakes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from jaxlm.outer import records
from jaxlm.outer.records import Body, Damaged, Identity
from jaxlm.outer.store import Store

logger = logging.getLogger("jaxlm")
LONGEST_PATIENCE = 15.0  # seconds without a change of a beat after which its writer is gone
SHORTEST_PATIENCE = 2.0
BEATS = 6  # in that time


def patience(grace: float) -> float:
    """Seconds without a change of a beat after which its writer counts as gone."""
    return min(LONGEST_PATIENCE, max(SHORTEST_PATIENCE, grace / 2))


@dataclasses.dataclass(frozen=True)
class Process:
    """A process that takes part in a store; an island that is started again is another one."""

    store: Store
    identity: Identity
    patience: float
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:12])

    @property
    def label(self) -> str:
        """Its name in beats and leases: "a.0123456789ab"."""
        return f"{self.identity.name}.{self.id}"


@dataclasses.dataclass
class Watch:
    """What one observer has seen of values that others change: (value, when it was new)."""

    clock: Callable[[], float] = time.monotonic
    seen: dict[Any, tuple[Any, float]] = dataclasses.field(default_factory=dict)

    def idle(self, what: Any, value: Any) -> float:
        """Seconds of the observer's clock since a value last changed; 0 when it is first seen."""
        now = self.clock()
        last = self.seen.get(what)
        if last is None or last[0] != value:
            self.seen[what] = last = (value, now)
        return now - last[1]


# --- beats ---------------------------------------------------------------------------------------


def beat_name(label: str) -> str:
    """The record of a process's beat."""
    return f"beats/{label}.json"


def owner(label: str) -> str:
    """The island, or "merger", that a label is of."""
    return label.rpartition(".")[0]


def write_beat(process: Process, count: int, facts: Body) -> None:
    """Write a beat; `facts` say what the process is doing."""
    name = beat_name(process.label)
    body = {"process": process.label, "count": count, **facts}
    process.store.write(name, records.seal(process.identity, name, body))


def read_beats(store: Store, identity: Identity) -> dict[str, Body]:
    """The sound beats of a store by label."""
    found = {}
    for name in store.list("beats/"):
        label = name.removeprefix("beats/").removesuffix(".json")
        with contextlib.suppress(KeyError, Damaged):
            found[label] = records.read_record(store, identity, name, owner(label))
    return found


def living(beats: dict[str, Body], watch: Watch, limit: float) -> dict[str, Body]:
    """The beats of islands that are there and have not left, by the name of the island."""
    return {
        owner(label): body
        for label, body in beats.items()
        if watch.idle(("beat", label), body["count"]) < limit
        and owner(label) != records.MERGER
        and not body.get("left")
    }


def start_beats(process: Process, facts: Callable[[], Body]) -> Callable[[bool], None]:
    """Write beats in the background; gives the function that ends them.

    Its argument: whether the last beat says that the process has left for good.
    """
    stop, count = threading.Event(), 0

    def beat() -> None:
        nonlocal count
        while not stop.wait(process.patience / BEATS):
            count += 1
            write_beat(process, count, facts())

    def end(left: bool) -> None:
        stop.set()
        thread.join(timeout=process.patience)
        if left:
            write_beat(process, count + 1, facts() | {"left": True})

    write_beat(process, count, facts())
    thread = threading.Thread(target=beat, name="beats", daemon=True)
    thread.start()
    return end


def forget_predecessors(process: Process) -> None:
    """Remove the beats of processes that had this one's name before it."""
    for name in process.store.list("beats/"):
        label = name.removeprefix("beats/").removesuffix(".json")
        if owner(label) == process.identity.name and label != process.label:
            process.store.delete(name)


# --- leases --------------------------------------------------------------------------------------


def take_lease(process: Process, what: str, watch: Watch) -> bool:
    """Whether this process holds a lease now; it takes the lease where the holder is gone.

    Call it again and again: that a holder is gone shows only with time.
    """
    store, folder = process.store, f"leases/{what}"
    epochs = records.numbers(store, folder)
    if epochs:
        holder = _holder(process, folder, epochs[-1])
        if holder == process.label:
            return True
        beat = _beat_of(process, holder)
        gone = beat is not None and beat.get("left")
        idle = watch.idle((folder, epochs[-1]), None if beat is None else beat["count"])
        if not gone and idle < process.patience:
            return False
    mine = epochs[-1] + 1 if epochs else 0
    name = records.numbered(folder, mine)
    if not records.create_record(store, process.identity, name, {"process": process.label}):
        return False
    # A record below the newest is of no use; that of a process which slept since it listed them
    # must not make it a holder, so that it looks again.
    if records.numbers(store, folder)[-1] != mine:
        return False
    for epoch in epochs:
        store.delete(records.numbered(folder, epoch))
    return True


def holds_lease(process: Process, what: str) -> bool:
    """Whether this process still holds a lease that it took."""
    folder = f"leases/{what}"
    epochs = records.numbers(process.store, folder)
    return bool(epochs) and _holder(process, folder, epochs[-1]) == process.label


def _holder(process: Process, folder: str, epoch: int) -> str:
    """The label in a lease's record; empty where it is damaged: nobody who beats."""
    try:
        name = records.numbered(folder, epoch)
        return records.read_record(process.store, process.identity, name)["process"]
    except (KeyError, Damaged):
        return ""


def _beat_of(process: Process, label: str) -> Body | None:
    try:
        name = beat_name(label)
        return records.read_record(process.store, process.identity, name, owner(label))
    except (KeyError, Damaged):
        return None
