"""How XLA packs temporaries into one block, and what is lost between them.

The largest first, each into the smallest gap that is free while it is live (xla/service/
heap_simulator/heap_simulator.h: GlobalDecreasingSizeBestFitHeap), in order of size and in order of
time; the smaller block is kept. Time is counted in allocations and frees, as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxlm.xla.live_ranges import Liveness, Value

ALIGNMENT = 64  # bytes, of XLA's CPU backend


def compiler_peak(memory: Any) -> tuple[float, bool]:
    """Peak bytes by `compiled.memory_analysis()`, and whether they are those of one packed block.

    The peak of TPU and GPU is of what is live. libtpu's is that of the memory that is filled most:
    of a small program VMEM, which says nothing; its block is taken there. CPU's leaves temporaries
    out, and allocates them as one block: that is its peak.
    """
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak, temporary = memory.peak_memory_in_bytes, memory.temp_size_in_bytes
    if peak - whole > temporary / 100:
        return float(min(peak, whole + temporary)), False
    return float(whole + temporary), True


def lost_bytes(liveness: Liveness) -> float:
    """Bytes of the block of temporaries that nothing live takes at the peak."""
    temporaries = [value for value in liveness.values if liveness.is_temporary(value)]
    held = sum(value.bytes for value in liveness.values if value.argument)
    return packed_bytes(temporaries) - (float(liveness.bytes.max()) - held)


def packed_bytes(values: list[Value]) -> int:
    """The size of the block that holds these temporaries."""
    values = [value for value in values if value.bytes]
    groups: dict[int, list[tuple[int, int]]] = {}
    sizes: dict[int, int] = {}
    for value, span in zip(values, _events(values), strict=True):
        groups.setdefault(value.chunk, []).append(span)
        sizes[value.chunk] = max(sizes.get(value.chunk, 0), value.bytes)
    size = {key: -(-n // ALIGNMENT) * ALIGNMENT for key, n in sizes.items()}
    length = {key: max(e for _, e in spans) - spans[0][0] for key, spans in groups.items()}
    by_size = sorted(groups, key=lambda key: (-size[key], -length[key]))
    by_time = sorted(groups, key=lambda key: (-length[key], -size[key]))
    return min(_pack([(size[k], groups[k]) for k in order]) for order in (by_size, by_time))


def _events(values: list[Value]) -> list[tuple[int, int]]:
    """(allocated, freed) of each value: in a step what it makes comes first, then what it frees."""
    order = sorted(range(len(values)), key=lambda i: values[i].first)
    events = [(values[i].first, 0, i) for i in order] + [(values[i].end, 1, i) for i in order]
    starts, ends = [0] * len(values), [0] * len(values)
    for clock, (_, frees, i) in enumerate(sorted(events, key=lambda event: event[:2])):
        (ends if frees else starts)[i] = clock
    return list(zip(starts, ends, strict=True))


def _pack(spans: list[tuple[int, list[tuple[int, int]]]]) -> int:
    """Place (size, times) in this order; the height of the block."""
    times = np.array([time for _, each in spans for time in each])
    owner = np.array([i for i, (_, each) in enumerate(spans) for _ in each])
    sizes = np.array([size for size, _ in spans])
    offsets = np.zeros(len(spans), np.int64)
    for i, (size, each) in enumerate(spans):
        meets = np.zeros(len(times), bool)
        for start, end in each:
            meets |= (times[:, 0] <= end) & (times[:, 1] >= start)
        others = np.unique(owner[meets & (owner < i)])
        offsets[i] = _best_gap(offsets[others], sizes[others], size)
    return int((offsets + sizes).max(initial=0))


def _best_gap(offsets: np.ndarray, sizes: np.ndarray, size: int) -> int:
    """The start of the smallest gap that fits; after all others where there is none."""
    best, smallest, top = 0, None, 0
    for k in np.argsort(offsets, kind="stable"):
        gap = int(offsets[k]) - top
        if gap >= size and (smallest is None or gap < smallest):
            best, smallest = top, gap
        top = max(top, int(offsets[k] + sizes[k]))
    return best if smallest is not None else top
