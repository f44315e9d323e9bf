"""What each platform's compiler holds in memory beyond what a train step names.

Every number was read off programs compiled for that platform (jax 0.12, libtpu 0.0.52, XLA for CUDA
12 and for CPU): the buffers that are alive at their peak, by their shapes and the names of what
made them. `benchmarks/memory.py` compares the sums again.
"""

from __future__ import annotations

import dataclasses

from jaxlm.hardware.target import Target

WIDE = 4  # bytes of float32: of state, sums, norms and softmax


@dataclasses.dataclass(frozen=True)
class Habits:
    """What a compiler holds beyond what the step names.

    Numbers count arrays: scores [n, H, S], logits [n / chunks, V] and a table [V, D] are float32,
    [n, F], [n, D], [R, F] and [R, D] of the compute type.
    """

    logits: float = 1  # while a chunk of the head runs
    loss_logits: float = (
        0  # before there are gradients: a chunk's, two masks of it and their choice
    )
    scores: float = 2  # while a layer runs: two of scores, weights and their gradients
    narrow_scores: bool = False  # and one of the two is of the compute type
    mlp: float = 2  # [n, F] while a layer runs
    stream: float = 6  # [n, D] while a layer runs: norms, projections and their gradients
    rows: tuple[float, float] = (0, 0)  # [R, F] and [R, D] while experts run, and are recomputed
    exchanged: float = 0  # and [R, D] more where experts are split: sent, received, arranged
    rows_always: bool = False  # or were kept: the kernels take copies
    masked: tuple[float, float] = (0, 0)  # and for each expert here: products are dense and masked
    masked_bytes: int = 0  # of an element of those; 0: of the compute type
    operand_bytes: int = 4  # at most, of an operand of a product that the backward pass reads
    cast_all: bool = False  # split weights are cast to the compute type for all layers at once
    wide_head: bool = False  # the head in use is widened before its chunks, not in each
    wide_head_stays: bool = False  # and held while layers run
    head_product: bool = False  # a chunk's gradient of the head is written before it is added
    turn_stays: bool = False  # what a microbatch saved is held until its gradients are added
    zeros_twice: float = 0  # part of what a tick saves whose first zeros are constants beside it
    tables_early: bool = False  # tables are gathered, and zeros for their gradients made, at once
    reduces_aside: bool = False  # all gradients are summed over devices at once, and not in place
    idle_logits: float = 0  # masks of the head, from the start to its end
    idle_scores: float = 0  # masks of attention, likewise
    lanes: int = 1  # head_dim is padded to a multiple, at rest and where the kernel reads it
    fast: float = 0  # bytes of on-chip memory, which takes temporaries first


HABITS = {
    "tpu": Habits(
        mlp=4, rows=(4, 2), exchanged=4, rows_always=True, operand_bytes=2, cast_all=True,
        turn_stays=True, zeros_twice=1, lanes=128, fast=128 * 2**20,
    ),
    "gpu": Habits(
        logits=2, loss_logits=3.25, rows=(4, 0), masked=(2, 1), narrow_scores=True, wide_head=True,
        wide_head_stays=True, zeros_twice=0.5,
    ),
    "cpu": Habits(
        mlp=0, stream=4, rows=(7, 0), masked=(2, 2), masked_bytes=WIDE, wide_head=True,
        head_product=True, zeros_twice=1, tables_early=True, reduces_aside=True,
        idle_logits=2, idle_scores=1.25,
    ),
}  # fmt: skip


def find_habits(target: Target) -> Habits:
    """The table's, with the on-chip memory that the compiler's options leave to temporaries."""
    habits, options = HABITS[target.platform], dict(target.kind.compiler_options)
    kernels = 1024 * int(options.get("xla_tpu_scoped_vmem_limit_kib", 0))
    return dataclasses.replace(habits, fast=habits.fast - kernels) if kernels else habits
