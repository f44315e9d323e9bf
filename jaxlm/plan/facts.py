"""What each platform's compiler does, as far as a plan depends on it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from jaxlm.hardware.target import Target
from jaxlm.plan.walk import Array, Sizes


@dataclasses.dataclass(frozen=True)
class Facts:
    """One platform."""

    scatters: bool = True  # there is a reduce-scatter; else an all-reduce stands for it
    wire: int = 1  # bytes of a float on its way between devices, at least
    merges: bool = True  # two sums over devices that are added are made as one
    hoists: bool = (
        False  # also what is larger than its operands leaves a loop in which it is the same
    )

    # When an operation runs: as it was traced; "early", as soon as what it reads is there (XLA for
    # CPU by its default, xla_cpu_enable_concurrency_optimized_scheduler); "late", where it makes
    # more than it frees, right before its result is read (libtpu).
    order: str = "traced"

    once: bool = False  # what has several readers is computed once and written, not for each

    # Constants that a loop is given are made in it, where they are read: the masks of the head in
    # programs for v5e (benchmarks/README.md).
    sinks: bool = False

    tiles: bool = False  # arrays lie in tiles of TPUs (padding)

    masks: bool = False  # a product of groups is a dense one of copies of its rows, masked for each

    def bytes(self, array: Array, sizes: Sizes) -> Any:
        """In device memory."""
        if array.host:
            return 0.0
        factor = padding(array.local(sizes), array.width) if self.tiles else 1.0
        return factor * array.bytes(sizes)

    # The part of the bytes of collectives that the compiler leaves blocking (BLOCKING).
    blocks: tuple[float, float, float, float, float] = (1, 1, 1, 1, 1)

    def blocking(self, kind: str, early: bool, looped: bool) -> float:
        """The part of a collective's bytes that nothing hides."""
        gather, reduce, late, between, permute = self.blocks
        if kind == "collective-permute":
            return permute
        if early and kind == "all-gather":
            return gather
        if not looped:
            return late
        return reduce if kind in ("reduce-scatter", "all-reduce") and not early else between


FACTS = {
    "tpu": Facts(sinks=True, tiles=True, order="late"),
    "gpu": Facts(masks=True),
    "cpu": Facts(
        scatters=False, wire=4, merges=False, hoists=True, order="early", once=True, masks=True,
    ),
}  # fmt: skip
# As the programs of benchmarks/ranking.py show (2026-11-25): gathers of weights that could start
# early, sums of gradients in a loop, those after it, what lies between two operations, permutes.
# libtpu starts gathers early on v5e alone, XLA:GPU hides all of those.
BLOCKING = {
    "v5e": (0.5, 1.0, 1.0, 0.9, 0.0), "tpu": (1.0, 1.0, 1.0, 1.0, 0.0),
    "gpu": (0.0, 0.6, 0.2, 0.25, 0.0), "cpu": (1.0, 1.0, 1.0, 1.0, 1.0),
}  # fmt: skip


LANES = 128


def padding(shape: tuple[Any, ...], width: int) -> Any:
    """Elements in a TPU's memory for each that there is, of elements of `width` bytes.

    The two fastest dimensions are cut into tiles of 128 elements by 8 of 4 bytes, 16 of 2 or 32 of
    one; by the next power of two where there are fewer. Which are the fastest libtpu chooses: those
    that waste least. Dimensions are numbers, or arrays for many meshes.
    """
    rows, many = 32 // min(width, 4), [n for n in shape if np.any(n != 1)]
    whole = [isinstance(n, int) and n % LANES == 0 for n in many]
    if not many or any(
        whole[i] and isinstance(n, int) and n % rows == 0
        for i in range(len(many)) for j, n in enumerate(many) if i != j
    ):  # fmt: skip
        return 1.0
    up = lambda n, tile: -(-n // tile) * tile / n
    lanes = [up(n, LANES) for n in many]
    seconds = [up(n, np.minimum(rows, 2 ** np.ceil(np.log2(n)))) for n in many]
    pairs = [a * b for i, a in enumerate(lanes) for j, b in enumerate(seconds) if i != j]
    return functools.reduce(np.minimum, pairs or lanes)


def find_facts(target: Target) -> Facts:
    """What the compiler of a target does."""
    blocks = BLOCKING.get(target.name) or BLOCKING[target.platform]
    return dataclasses.replace(FACTS[target.platform], blocks=blocks)
