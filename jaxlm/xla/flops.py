"""FLOPs of the matmuls and the fused kernels of a compiled program."""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Iterable

import numpy as np

from jaxlm.xla.hlo import Computation, Instruction, Shape
from jaxlm.xla.schedule import Visit

# What a kernel, a custom call, computes; None: it is not known.
KernelFlops = Callable[[Instruction, Computation], float | None]


def count_flops(
    visits: Iterable[Visit], label: Callable[[str], str], kernel_flops: KernelFlops
) -> tuple[dict[str, float], float, list[str]]:
    """(FLOPs by the label that an op_name gets, those of kernels, notes)."""
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
            total[label(name)] += found * visit.times
    return dict(total), kernels, list(notes)


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
