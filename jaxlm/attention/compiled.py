"""FLOPs of attention kernels, read off a compiled program."""

from __future__ import annotations

import re

from jaxlm.xla.hlo import Computation, Instruction, Shape, bits


def kernel_flops(each: Instruction, computation: Computation) -> float | None:
    """FLOPs of the blocks of scores that an attention kernel visits; None for other kernels."""
    shapes = [shape for made in computation.operands(each) for shape in made.shapes]
    if each.target.startswith("__cudnn$fmha"):
        return _cudnn_flops(each, shapes)
    return _splash_flops(each, shapes) if "splash" in each.name + each.op_name else None


def _cudnn_flops(each: Instruction, shapes: list[Shape]) -> float | None:
    """All scores, or half of them if it is told that they are causal."""
    sums = [s.dims for s in (*each.shapes, *shapes) if s.dtype == "f32" and len(s.dims) == 3]
    if not sums:
        return None
    seen = 0.5 if "CAUSAL" in each.attributes else 1.0
    times = 2.5 if "Backward" in each.target else 1.0
    return 4.0 * times * seen * _wide(shapes)[0].size * sums[0][-1]


def _splash_flops(each: Instruction, shapes: list[Shape]) -> float | None:
    """Of a grid of blocks [heads, queries, keys], those that a causal mask does not hide whole.

    splash.py names the scope of a kernel by its window.
    """
    narrow = [shape.dims for shape in shapes if len(shape.dims) == 3 and bits(shape.dtype) <= 8]
    if not narrow:
        return None
    queries, keys, *_ = _wide(shapes)
    rows, columns = narrow[0][1:]
    name = each.name + each.op_name
    backward = next((mark for mark in ("dkv", "dq") if mark in name), "")
    block = re.search(rf'block_kv{backward and "_"}{backward}\\": (\d+)', each.attributes)
    if block:  # the grid may leave hidden columns out
        columns = keys.dims[-2] // int(block[1])
    window = re.search(r"\bwindow_(\d+)\b", each.op_name)
    part = shown_blocks(rows, columns, keys.dims[-2], int(window[1]) if window else 0)
    times = {"": 1.0, "dq": 1.5, "dkv": 2.5 if _fused(each) else 2.0}[backward]
    return 4.0 * times * queries.size * keys.dims[-2] * part


def _wide(shapes: list[Shape]) -> list[Shape]:
    """Queries, keys and values, and what else is no mask and no sum."""
    return [shape for shape in shapes if bits(shape.dtype) >= 16 and len(shape.dims) >= 3]


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
