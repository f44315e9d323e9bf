"""Reads compiled programs: what one device computes, sends, moves and holds in a run of it.

It knows HLO text, as `compiled.as_text()` returns it on any platform, and the names and sizes of a
mesh's axes; nothing of configs, models or jaxlm. For example, of a program that was compiled for
`mesh`:

    module = parse(compiled.as_text())
    for row in summarize(find_collectives(module), mesh.shape): ...      # kind, axes, loops, bytes
    for visit in walk(module): ...                   # every instruction, and how often it runs
    sum(visit.times * matmul_flops(visit.instruction, visit.computation) for visit in walk(module))
    count_bytes(module, walk(module))                # to and from the memories of device and host
    simulate(module).bytes.max()                     # the most bytes that are live at any time
    compiler_peak(compiled.memory_analysis())        # the peak that the compiler plans for
"""

from jaxlm.xla.collectives import WIRE, Collective, find_collectives, mesh_axes, summarize
from jaxlm.xla.estimates import Chip, compute_seconds
from jaxlm.xla.flops import count_flops, kernel_name, matmul_flops
from jaxlm.xla.heap import compiler_peak, lost_bytes
from jaxlm.xla.hlo import Computation, Instruction, Module, Shape, parse
from jaxlm.xla.live_ranges import Liveness, Value, simulate
from jaxlm.xla.memory_traffic import count_bytes
from jaxlm.xla.schedule import Visit, walk

__all__ = [
    "WIRE", "Chip", "Collective", "Computation", "Instruction", "Liveness", "Module", "Shape",
    "Value", "Visit", "compiler_peak", "compute_seconds", "count_bytes", "count_flops",
    "find_collectives", "kernel_name", "lost_bytes", "matmul_flops", "mesh_axes", "parse",
    "simulate", "summarize", "walk",
]  # fmt: skip
