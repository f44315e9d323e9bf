"""What a compiled program does in one step on one device, counted from its HLO.

FLOPs of matmuls and kernels by part of the model, collectives by mesh axis, memory traffic, and
the compiler's own estimate of time; loops count with their trips.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

import numpy as np

from jaxlm.hardware.target import Target
from jaxlm.plan.cost import PARTS, Traffic
from jaxlm.sharding import Layout
from jaxlm.xla.collectives import KINDS, count_traffic, find_collectives
from jaxlm.xla.hlo import HOST, Computation, Instruction, Module, Shape, Visit, bits, walk


@dataclasses.dataclass(frozen=True)
class Account:
    """One step on one device."""

    flops: dict[str, float]  # "<part>/<pass>" -> FLOPs, kernels included
    kernel_flops: float  # of those, in fused attention kernels
    traffic: tuple[Traffic, ...]
    hbm_bytes: float
    host_bytes: float
    compute_seconds: float  # the compiler's estimate of all but kernels and collectives; 0: none
    notes: tuple[str, ...]  # what could not be counted


def account(module: Module, layout: Layout, target: Target, dcn: dict[str, int]) -> Account:
    """Count a program that was compiled for this layout."""
    visits = list(walk(module))
    flops, kernels, notes = count_flops(visits)
    unknown = {v.scheduled.name for v in visits if not v.known}
    if unknown:
        notes.append(f"{len(unknown)} operations in loops of unknown trips are counted once")
    hbm, host = count_bytes(module, visits)
    return Account(
        flops, kernels, count_traffic(find_collectives(module), layout, target, dcn), hbm, host,
        compute_seconds(module, visits, target), tuple(notes),
    )  # fmt: skip


# FLOPs


def count_flops(visits: list[Visit]) -> tuple[dict[str, float], float, list[str]]:
    """(FLOPs by part and pass, those of kernels, notes)."""
    total: dict[str, float] = collections.defaultdict(float)
    kernels, notes = 0.0, {}
    for visit in visits:
        each, computation = visit.instruction, visit.computation
        kernel = each.opcode == "custom-call" and kernel_name(each)
        if kernel:
            found = kernel_flops(each, computation)
            if found is None:
                notes[f"FLOPs of kernel {kernel} are not known"] = None
                continue
            kernels += found * visit.times
        else:
            found = matmul_flops(each, computation)
        if found:
            name = each.op_name or visit.scheduled.op_name
            total[part(name)] += found * visit.times
    return dict(total), kernels, list(notes)


def part(op_name: str) -> str:
    """ "<part>/<pass>" of an operation, from its named scopes and autodiff's marks."""
    scopes = re.findall(r"[\w.]+", op_name)
    name = next((scope for scope in reversed(scopes) if scope in PARTS), "other")
    when = "forward"
    if "rematted_computation" in scopes:
        when = "recompute"
    elif "transpose(" in op_name:
        when = "backward"
    return f"{name}/{when}"


def matmul_flops(each: Instruction, computation: Computation) -> float:
    """2 x multiply-adds of a dot, a convolution (which TPU makes of dots) or a GPU's GEMM."""
    if each.opcode == "dot":
        left = computation.by_name[each.operands[0]].shapes[0]
        inner = math.prod(left.dims[d] for d in each.numbers("lhs_contracting_dims"))
        return 2.0 * each.shapes[0].size * inner
    if each.opcode == "convolution":
        left, right = (made.shapes[0] for made in computation.operands(each)[:2])
        return _convolution_flops(each, left, right)
    if each.opcode == "custom-call" and re.match(r"__cublas\$(lt\$)?(matmul|gemm)", each.target):
        left = computation.by_name[each.operands[0]].shapes[0]
        inner = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', each.attributes)
        dims = re.findall(r"\d+", inner[1]) if inner else []
        return 2.0 * each.shapes[0].size * math.prod(left.dims[int(d)] for d in dims)
    return 0.0


def _convolution_flops(each: Instruction, left: Shape, right: Shape) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    assert labels, each.attributes
    of_left, of_right, of_out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", each.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial = sorted(int(letter) for letter in of_out if letter.isdigit())
    field = lambda name, default: (
        fields[name].split("x") if name in fields else [default] * len(spatial)
    )
    groups = int(each.attribute("feature_group_count") or 1)
    batches = int(each.attribute("batch_group_count") or 1)
    total = 2.0 * left.dims[of_left.index("f")] / groups * right.dims[of_right.index("o")]
    total *= left.dims[of_left.index("b")] / batches
    numbers = zip(
        spatial, field("size", "1"), field("stride", "1"), field("pad", "0_0"),
        field("lhs_dilate", "1"), field("rhs_dilate", "1"), strict=True,
    )  # fmt: skip
    for dim, size, stride, pad, spread, gap in numbers:
        out = each.shapes[0].dims[of_out.index(str(dim))]
        length = left.dims[of_left.index(str(dim))]
        total *= _touches(
            out, int(size), length, int(stride), int(pad.split("_")[0]), int(spread), int(gap)
        )
    return total


@functools.cache
def _touches(out: int, size: int, length: int, stride: int, pad: int, spread: int, gap: int) -> int:
    """Pairs of an output and a place of the window that meet an element, not padding."""
    shift = pad - np.arange(size) * gap  # an output o meets place o * stride - shift
    if spread == 1:
        first = np.maximum(0, -(-shift // stride))
        last = np.minimum(out - 1, (length - 1 + shift) // stride)
        return int(np.maximum(0, last - first + 1).sum())
    total = 0
    for one in shift.tolist():
        places = np.arange(out) * stride - one
        total += int(((places >= 0) & (places % spread == 0) & (places // spread < length)).sum())
    return total


def kernel_name(each: Instruction) -> str:
    """The name of a fused kernel; empty for other custom calls."""
    if each.target == "tpu_custom_call":
        return re.sub(r"[.\d]+$", "", each.name)
    return each.target if each.target.startswith("__cudnn$fmha") else ""


def kernel_flops(each: Instruction, computation: Computation) -> float | None:
    """FLOPs of the blocks of scores that an attention kernel visits; None for other kernels.

    Splash: of a grid of blocks [heads, queries, keys], those that a causal mask does not hide
    whole, of the window that attention/splash.py names its scope by. cuDNN: all scores, or half
    of them if it is told that they are causal.
    """
    shapes = [shape for made in computation.operands(each) for shape in made.shapes]
    wide = [shape for shape in shapes if bits(shape.dtype) >= 16 and len(shape.dims) >= 3]
    if each.target.startswith("__cudnn$fmha"):
        sums = [s.dims for s in (*each.shapes, *shapes) if s.dtype == "f32" and len(s.dims) == 3]
        if not sums:
            return None
        seen = 0.5 if "CAUSAL" in each.attributes else 1.0
        times = 2.5 if "Backward" in each.target else 1.0
        return 4.0 * times * seen * wide[0].size * sums[0][-1]
    narrow = [shape.dims for shape in shapes if len(shape.dims) == 3 and bits(shape.dtype) <= 8]
    if "splash" not in each.name + each.op_name or not narrow:
        return None
    queries, keys, name = wide[0], wide[1], each.name + each.op_name
    rows, columns = narrow[0][1:]
    backward = next((mark for mark in ("dkv", "dq") if mark in name), "")
    block = re.search(rf'block_kv{backward and "_"}{backward}\\": (\d+)', each.attributes)
    if block:  # the grid may leave hidden columns out
        columns = keys.dims[-2] // int(block[1])
    window = re.search(r"\bwindow_(\d+)\b", each.op_name)
    part = shown_blocks(rows, columns, keys.dims[-2], int(window[1]) if window else 0)
    times = {"": 1.0, "dq": 1.5, "dkv": 2.5 if _fused(each) else 2.0}[backward]
    return 4.0 * times * queries.size * keys.dims[-2] * part


def _fused(each: Instruction) -> bool:
    """Whether the backward kernel makes dq too: it has a third result."""
    return len([shape for shape in each.shapes if len(shape.dims) >= 3]) > 2


def shown_blocks(rows: int, columns: int, length: int, window: int) -> float:
    """The part of a grid of blocks that a causal mask, of a window, does not hide whole."""
    shown = 0
    for row in range(rows):
        last = min(columns, -(-(row + 1) * columns // rows))
        start = row * length // rows - window + 1 if window else 0
        shown += last - max(0, start) * columns // length
    return shown / (rows * columns)


# Memory traffic and the compilers' own estimates

_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "partition-id", "replica-id", "after-all", "optimization-barrier", "iota", "async-done",
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "copy", "convert", "reshape", "transpose")


def count_bytes(module: Module, visits: list[Visit]) -> tuple[float, float]:
    """(bytes to and from device memory, bytes to and from host memory) of the scheduled operations.

    A fusion reads its operands and writes its result once; of a slice only what is read counts, of
    an update in place only what is written. Arrays in on-chip memory (TPU) are free.
    """
    hbm = host = 0.0
    for visit in visits:
        if visit.instruction is visit.scheduled:
            hbm += _moved(module, visit.computation, visit.instruction) * visit.times
            host += _moved(module, visit.computation, visit.instruction, HOST) * visit.times
    return hbm, host


def _moved(module: Module, computation: Computation, each: Instruction, space: int = 0) -> float:
    """Bytes that one scheduled operation moves in a memory space."""
    if each.opcode in _FREE or each.opcode.endswith("-done"):
        return 0.0
    return sum(size for one, size in _touched(module, computation, each) if one == space)


def _touched(module: Module, computation: Computation, each: Instruction):
    """(memory space, bytes) that one operation reads or writes."""
    made = [computation.by_name.get(name) for name in dict.fromkeys(each.operands)]
    operands = [one for one in made if one is not None]
    if each.opcode == "custom-call" and not kernel_name(each):
        return []
    if each.kind == "dynamic-update-slice":
        update = operands[1].shapes[0]
        return [(update.space, update.bytes), (each.shapes[0].space, update.bytes)]
    if each.kind in ("copy", "slice", "dynamic-slice") and each.opcode.endswith("-start"):
        whole = operands[0].shapes[0]
        arrays = [
            s for s in each.shapes if s.dtype == whole.dtype and len(s.dims) == len(whole.dims)
        ]
        moved = min(arrays, key=lambda shape: shape.size)
        others = {shape.space for shape in arrays} - {whole.space}
        return [(space, moved.bytes) for space in (whole.space, *(others or {whole.space}))]
    if each.opcode in _SLICES:
        return [(shape.space, 2 * shape.bytes) for shape in each.shapes]
    if each.kind == "fusion":
        called = module.called(each, "calls")
        assert called
        return _fusion_touched(module, computation, each, called)
    arrays = [shape for one in operands for shape in one.shapes]
    arrays += () if each.opcode.endswith("-start") else each.shapes
    twice = 2 if each.opcode.endswith("-start") else 1  # read here, written by its other half
    return [(shape.space, twice * shape.bytes) for shape in arrays]


def _fusion_touched(module: Module, computation: Computation, each: Instruction, called):
    root = called.root
    outs = [called.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    inside, found = called.parameters(), []
    in_place = set()
    results = each.shapes
    if each.opcode.endswith("-start"):  # its operands come first, and a context last
        skip = sum(len(made.shapes) for made in computation.operands(each))
        results = each.shapes[skip : skip + len(outs)]
    for shape, out in zip(results, outs, strict=False):
        last = _origin(called, out)
        if last.opcode == "dynamic-update-slice":
            found.append((shape.space, called.by_name[last.operands[1]].bytes))
            in_place.add(_origin(called, called.by_name[last.operands[0]]).name)
        else:
            found.append((shape.space, shape.bytes))
    for number, name in enumerate(each.operands):
        made, parameter = computation.by_name[name], inside.get(number)
        if parameter is None or parameter.name in in_place:
            continue
        size = _read(module, called, parameter.name, made.bytes)
        found += [(shape.space, size / len(made.shapes)) for shape in made.shapes]
    return found


def _origin(computation: Computation, each: Instruction) -> Instruction:
    while each.opcode in _SAME:
        each = computation.by_name[each.operands[0]]
    return each


def _read(module: Module, computation: Computation, name: str, whole: float) -> float:
    """Bytes of a value that a fused computation really reads."""
    total = 0.0
    for each in computation.instructions:
        if name not in each.operands:
            continue
        first = each.operands[0] == name
        if each.opcode in _SLICES and first:
            total += each.bytes
        elif each.opcode in ("bitcast", "reshape"):
            total += _read(module, computation, each.name, whole)
        elif inner := module.called(each, "calls"):
            inside = inner.parameters()
            places = [i for i, operand in enumerate(each.operands) if operand == name]
            total += sum(_read(module, inner, inside[i].name, whole) for i in places)
        elif not (each.opcode == "dynamic-update-slice" and first):
            return whole
    return min(total, whole)


def compute_seconds(module: Module, visits: list[Visit], target: Target) -> float:
    """The compiler's estimate of the scheduled operations: TPU all but kernels and collectives,
    from `estimated_cycles`; GPU also without matmuls, for which its cost models are not sound,
    and by the bytes that move where they say nothing.
    """
    total, kind = 0.0, target.kind
    for visit in visits:
        each = visit.instruction
        if target.platform == "tpu" and kind.clock:
            cycles = _cycles(visit.scheduled)
            if each is visit.scheduled and cycles is not None:
                total += cycles / kind.clock * visit.times
            elif each is not visit.scheduled and cycles is None:
                total += matmul_flops(each, visit.computation) / kind.bf16_flops * visit.times
        elif target.platform == "gpu" and each is visit.scheduled:
            if each.kind not in KINDS and not _has_matmul(module, each):
                moved = _moved(module, visit.computation, each) / kind.hbm_bandwidth
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
