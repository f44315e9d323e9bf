"""What the compilers themselves expect their programs to take."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from jaxlm.xla.collectives import KINDS
from jaxlm.xla.flops import matmul_flops
from jaxlm.xla.hlo import Instruction, Module
from jaxlm.xla.memory_traffic import moved_bytes
from jaxlm.xla.schedule import Visit


class Chip(NamedTuple):
    """What an estimate needs of the device that a program is compiled for."""

    platform: str  # tpu, gpu, cpu
    clock: float  # Hz; 0: not known
    flops: float  # a second, of matmuls
    bandwidth: float  # of device memory, bytes a second


def compute_seconds(module: Module, visits: Iterable[Visit], chip: Chip) -> float:
    """The compiler's estimate of the scheduled operations: TPU all but kernels and collectives,
    from `estimated_cycles`; GPU also without matmuls, for which its cost models are not sound,
    and by the bytes that move where they say nothing.
    """
    total = 0.0
    for visit in visits:
        each = visit.instruction
        if chip.platform == "tpu" and chip.clock:
            cycles = _cycles(visit.scheduled)
            if each is visit.scheduled and cycles is not None:
                total += cycles / chip.clock * visit.times
            elif each is not visit.scheduled and cycles is None:
                total += matmul_flops(each, visit.computation) / chip.flops * visit.times
        elif chip.platform == "gpu" and each is visit.scheduled:
            if each.kind not in KINDS and not _has_matmul(module, each):
                moved = moved_bytes(module, visit.computation, each) / chip.bandwidth
                total += (reification_seconds(each) or moved) * visit.times
    return total


def _cycles(each: Instruction) -> int | None:
    """libtpu's estimate; None where it gives the largest number instead of one."""
    found = re.search(r'"estimated_cycles":"?(-?\d+)', each.attributes)
    cycles = int(found[1]) if found else 0
    return cycles if abs(cycles) < 1 << 60 else None


def _has_matmul(module: Module, each: Instruction) -> bool:
    called = module.called(each, "calls")
    if called is None:
        return each.opcode in ("dot", "custom-call")
    return any(one.opcode == "dot" or _has_matmul(module, one) for one in called.instructions)


def reification_seconds(each: Instruction) -> float:
    """Seconds that XLA:GPU's cost models give an operation; 0 without one that is to be trusted.

    They are there with the compiler option xla_gpu_collect_cost_model_stats.
    """
    found = re.search(r'"reification_cost":\[(.*?)\]', each.attributes)
    rows = re.findall(r"\{([^{}]*)\}", found[1]) if found else []
    costs = {}
    for row in rows:
        name = re.search(r'"name":"([^"]*)"', row)
        time = re.search(r'"exec_time_us":"?([\d.eE+\-]+)', row)
        if name and time:
            costs[name[1]] = float(time[1]) * 1e-6
    return next((costs[name] for name in ("indexing-cost-model", "sol") if name in costs), 0.0)
