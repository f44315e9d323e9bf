"""Who does what when: one forward, one backward in every tick, in lock step."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp


class Item(NamedTuple):
    """What a stage does in a tick: integers, or arrays of one for each stage."""

    valid: Any  # else it is in the bubble: computed, and masked out
    repeat: Any
    microbatch: Any
    slot: Any  # where its input is saved


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who does what when; Z microbatches at a time go through all repeats."""

    stages: int
    repeats: int
    microbatches: int

    @property
    def warmup(self) -> int:
        """Ticks before the first backward, and after the last forward."""
        return self.stages * self.repeats - 1

    @property
    def ticks(self) -> int:
        """Ticks with a forward; as many have a backward."""
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def slots(self) -> int:
        """Saved chunk inputs of a stage: the oldest is read 2 (Z V - 1) ticks later."""
        return 2 * self.warmup + 1

    @property
    def bubble(self) -> float:
        """The part of the layers' work that is thrown away."""
        return (self.stages - 1) / self.ticks

    def forward(self, tick, stage) -> Item:
        """The chunk that a stage runs in a tick."""
        valid, group, repeat, place = self._count(tick - stage)
        return self._item(valid, group, repeat, place, stage)

    def backward(self, tick, stage) -> Item:
        """The chunk that a stage differentiates in a tick: the repeats in reverse."""
        n = tick - self.warmup - (self.stages - 1 - stage)
        valid, group, repeat, place = self._count(n)
        return self._item(valid, group, self.repeats - 1 - repeat, place, stage)

    def _count(self, n):
        """Item n of a stage; beyond the ends the nearest one stands in, marked invalid."""
        total, turn = self.microbatches * self.repeats, self.stages * self.repeats
        valid, n = (n >= 0) & (n < total), jnp.clip(n, 0, total - 1)
        return valid, n // turn, n % turn // self.stages, n % self.stages

    def _item(self, valid, group, repeat, place, stage) -> Item:
        tick = (group * self.repeats + repeat) * self.stages + place + stage
        return Item(valid, repeat, group * self.stages + place, tick % self.slots)
