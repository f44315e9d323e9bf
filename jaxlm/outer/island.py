"""An island that is a job of its own: what it keeps on the host beside its state on the devices."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.outer.about import About
from jaxlm.outer.claims import Claims
from jaxlm.outer.courier import Boxes, Contribution, Gone, Merge, Sent
from jaxlm.outer.ledger import Position
from jaxlm.outer.presence import Process, Watch

FOUNDING = "founding"  # the island that trains what all start from
JOINING = "joining"
STARTING = "starting"  # it has joined, and has made no step: compiling takes long


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


def facts(island: Island) -> dict[str, Any]:
    """What the island's beat says, for `jaxlm outer status` and for the merger."""
    return {
        "state": island.state, "step": island.step, "steps": island.steps,
        "round": island.position.number, "speed": island.speed, "needs": island.needs,
        "tokens": island.step * island.step_tokens,
        **{f"total_{key}": value for key, value in island.numbers.items()},
    }  # fmt: skip


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
