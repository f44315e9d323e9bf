"""Disjoint streams of data: islands claim blocks of one stream, each by a record created once.

Place k of the stream is what a run without islands reads as its k-th item. A block is some places
in a row; an island reads the blocks that it has claimed one after another. So no two islands read
the same place, however many there are and whenever they come, and together they read the stream
that a run without islands would have read.
"""

from __future__ import annotations

import dataclasses
import threading
import time

from jaxlm.outer import records
from jaxlm.outer.presence import Process
from jaxlm.outer.records import Damaged

KEPT = 4096  # records below the newest that stay: sixteen epochs
POLL = 0.5  # seconds between looks for a claim that another process of the island makes


@dataclasses.dataclass
class Claims:
    """The blocks of one island, in the order in which it reads them."""

    process: Process
    size: int  # places in a block
    blocks: list[int]
    leads: bool = True  # whether this process of the island makes the claims, or waits for them
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    known: int = -1  # the newest record that was looked at


def open_claims(process: Process, size: int, blocks: list[int], leads: bool = True) -> Claims:
    """The claims of an island: those that a checkpoint knows, and those that it made since."""
    claims = Claims(process, size, list(blocks), leads)
    _find(claims)
    return claims


def place(claims: Claims, item: int) -> int:
    """The place in the stream of an island's own item, which is claimed where it is not yet."""
    block, rest = divmod(item, claims.size)
    with claims.lock:
        while len(claims.blocks) <= block:
            if claims.leads:
                _claim(claims)
            else:
                time.sleep(POLL)
                _find(claims)
        return claims.blocks[block] * claims.size + rest


def _claim(claims: Claims) -> None:
    store, identity = claims.process.store, claims.process.identity
    taken = records.numbers(store, "blocks")
    block = taken[-1] + 1 if taken else 0
    body = {"island": identity.name, "process": claims.process.id}
    while not records.create_record(store, identity, records.numbered("blocks", block), body):
        block += 1
    claims.blocks.append(block)
    claims.known = max(claims.known, block)
    if block >= KEPT:
        store.delete(records.numbered("blocks", block - KEPT))


def _find(claims: Claims) -> None:
    """Add the island's claims that are in the store and not in the list."""
    store, identity = claims.process.store, claims.process.identity
    for block in records.numbers(store, "blocks"):
        if block <= claims.known or block in claims.blocks:
            continue
        try:
            name = records.numbered("blocks", block)
            claimed_by = records.read_record(store, identity, name)["island"]
        except (KeyError, Damaged):
            continue  # taken by somebody: never read twice, at worst not at all
        if claimed_by == identity.name:
            claims.blocks.append(block)
        claims.known = max(claims.known, block)
