"""What a step takes, by formulas over the config and its layout: before any trace or compile.

Letters: t tokens of a device in a step, n those of the residual stream (split over tensor too),
L layers, D embed, F mlp, H query heads, K kv heads, C head_dim, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from jaxlm import config as cfg
from jaxlm.attention import splash
from jaxlm.hardware.network import route
from jaxlm.hardware.target import Target
from jaxlm.models import moe
from jaxlm.plan.bytes_moved import hbm_bytes, host_bytes
from jaxlm.plan.cost import Cost, Traffic
from jaxlm.plan.habits import WIDE
from jaxlm.plan.memory import largest, phases
from jaxlm.plan.step import Step, visited
from jaxlm.sharding import Layout
from jaxlm.state import Structure
from jaxlm.xla.collectives import WIRE

_NEWTON_SCHULZ = 5  # steps of Muon's orthogonalisation, three products each
Rows = dict[tuple[str, tuple[str, ...]], list[float]]


def analyze(config: cfg.Config, layout: Layout, structure: Structure, target: Target) -> Cost:
    """The Cost of one train step on one device of the target."""
    step = Step(config, layout, structure, target)
    flops, kernels = _flops(step)
    moments = phases(config, layout, structure, target).values()
    kept = lambda sizes: sum(size for name, size in sizes.items() if name.startswith("saved/"))
    return Cost(
        memory=largest(moments), flops=flops, kernel_flops=kernels,
        traffic=tuple(_traffic(step)), hbm_bytes=hbm_bytes(step, max(map(kept, moments))),
        host_bytes=host_bytes(step), masked=_masked(step),
    )  # fmt: skip


# FLOPs


def _flops(step: Step) -> tuple[dict[str, float], float]:
    """(FLOPs by part and pass, of those in kernels)."""
    layout, m = step.layout, step.config.model
    L = m.num_layers / step.stages
    D, C = m.embed_dim, m.head_dim
    H, K = m.num_heads / layout.size("heads"), m.num_kv_heads / layout.size("kv_heads")
    each = 2.0 * step.tokens * L * step.bubble  # of one multiply-add a token and layer
    total: dict[str, float] = {}

    def add(
        part: str, forward: float, recompute: float, backward: float = 2.0, runs: int | None = None
    ) -> None:
        runs = step.forwards(recompute > 0) if runs is None else runs
        found = {
            "forward": forward * runs, "recompute": forward * recompute,
            "backward": forward * backward,
        }  # fmt: skip
        for when, value in found.items():
            if value:
                name = f"{part}/{when}"
                total[name] = total.get(name, 0.0) + value

    add("projections", each * D * H * C, step.again("query"))
    add("projections", each * D * K * C, step.again("key"))
    add("projections", each * D * K * C, step.again("value"))
    add("projections", each * H * C * D, step.again("output"))
    kernels = _attention(step, add, each, H * C)
    if isinstance(m, moe.Config):
        _experts(step, add, each)
    else:
        F = m.mlp_dim / layout.size("mlp")
        ups = 1 if m.family == "gpt2" else 2
        add("mlp", each * ups * D * F, step.again("mlp"))
        add("mlp", each * D * F, 0, runs=step.forwards(needed=False))
    rows = cfg.padded_vocab(m) / layout.size("vocab")
    # loss.py puts every chunk under remat, also where there is one.
    add("head", 2.0 * step.tokens * D * rows, 1, runs=1)
    if step.config.optimizer.name == "muon":
        total["optimizer/forward"] = _muon(step)
    return total, kernels


def _experts(step: Step, add, each: float) -> None:
    """Router, routed experts on the rows that a device has on average, and the shared expert."""
    m, layout = step.config.model, step.layout
    assert isinstance(m, moe.Config)
    D, F = m.embed_dim, m.expert_mlp_dim / layout.size("mlp")
    rows = moe.product_rows(m, step.config.batch.sequence_length, step.layout)
    residual = layout.size("residual_seq") / layout.size("seq")
    add("router", each * D * m.num_experts / residual, step.policy != "none")
    add("experts", each * rows * 2 * D * F, step.again("mlp"))
    add("experts", each * rows * D * F, 0, runs=step.forwards(needed=False))
    if m.shared_expert_dim:
        shared = m.shared_expert_dim / layout.size("mlp")
        add("mlp", each * 2 * D * shared, step.again("mlp"))
        add("mlp", each * D * shared, 0, runs=step.forwards(needed=False))


def _masked(step: Step) -> float:
    """Elements of rows that libtpu masks for each expert, as it reads them for a product.

    Forward, and for the gradient of what `down` reads; of other products it masks the results.
    """
    m = step.config.model
    if not isinstance(m, moe.Config) or m.dispatch != "dropless" or step.target.platform != "tpu":
        return 0.0
    D, F = m.embed_dim, m.expert_mlp_dim / step.layout.size("mlp")
    ups, downs = step.forwards(step.again("mlp")), step.forwards(needed=False)
    each = 2 * D * (ups + step.again("mlp")) + F * downs + D
    L = m.num_layers / step.stages * step.bubble
    return (
        step.tokens * L * moe.product_rows(m, step.config.batch.sequence_length, step.layout) * each
    )


def _attention(step: Step, add, each: float, width: float) -> float:
    """Adds attention's FLOPs; returns those of fused kernels. `width` is H * C of a device."""
    backend, m = step.layout.attention.backend, step.config.model
    length = step.config.batch.sequence_length
    forward = each * 2 * length * visited(step.layout, m, length) * width
    again = step.again("attention")
    runs = step.forwards(again)
    if backend == "splash":
        sizes = splash.block_sizes(length, m.head_dim * step.width)
        backward = 2.5 if sizes.use_fused_bwd_kernel else 3.5
        add("attention", forward, again, backward)
        return forward * (runs + again + backward)
    if backend == "cudnn":
        add("attention", forward, again, 2.5)
        return forward * (runs + again + 2.5)
    if backend in ("ring", "all_gather"):  # scores once more, then five products
        add("attention", forward, again, 2.5)
    elif backend == "chunked":
        add("attention", forward, again + 0.5, 2.0, runs)
    else:
        add("attention", forward, step.policy != "none", 2.0)
    return 0.0


def _muon(step: Step) -> float:
    """Newton-Schulz on every matrix: X X^T, its square, and their product with X."""
    total = 0.0
    for name, dims in step.structure.dims.items():
        shape = step.structure.shapes[name]
        kinds = dims.split()
        if "embed" not in kinds or "vocab" in kinds or len(shape) < 2:
            continue
        stack = math.prod(
            n for n, d in zip(shape, kinds, strict=True) if d in ("layers", "experts")
        )
        rows = step.config.model.embed_dim
        columns = math.prod(shape) / stack / rows
        small, large = min(rows, columns), max(rows, columns)
        total += stack * _NEWTON_SCHULZ * 2 * small * small * (2 * large + small)
    return total / step.target.size


# Communication


def _traffic(step: Step) -> Iterator[Traffic]:
    rows: Rows = {}

    def add(kind: str, axes, result: float, count: float, blocks: float = 1.0) -> None:
        """`result`: bytes of it, each time; `blocks`: the part that nothing hides."""
        axes = tuple(axis for axis in cfg.AXES if axis in axes and step.sizes[axis] > 1)
        if axes and count and result:
            row = rows.setdefault((kind, axes), [0.0, 0.0, 0.0])
            for i, value in enumerate((count, count * result, count * result * blocks)):
                row[i] += value

    _weights(step, add)
    _activations(step, add)
    for (kind, axes), (count, size, blocked) in rows.items():
        group = math.prod(step.sizes[axis] for axis in axes)
        per_byte = WIRE[kind](group)
        yield Traffic(
            kind, axes, *route(step.target, step.sizes, step.config.mesh.dcn, axes), group,
            count, size, size * per_byte, blocked * per_byte,
        )  # fmt: skip


# The part of the bytes of each kind of collective that compilers leave blocking, as the programs of
# benchmarks/ranking.py show: libtpu starts gathers early on v5e alone, XLA:GPU hides all of those.
_BLOCKING = {
    "v5e": {"gather": 0.5, "reduce": 1.0, "late": 1.0, "tensor": 0.9, "permute": 0.0},
    "tpu": {"gather": 1.0, "reduce": 1.0, "late": 1.0, "tensor": 1.0, "permute": 0.0},
    "gpu": {"gather": 0.0, "reduce": 0.6, "late": 0.2, "tensor": 0.25, "permute": 0.0},
    "cpu": {"gather": 1.0, "reduce": 1.0, "late": 1.0, "tensor": 1.0, "permute": 1.0},
}  # fmt: skip


def _blocking(target: Target) -> dict[str, float]:
    return _BLOCKING.get(target.name) or _BLOCKING[target.platform]


def _weights(step: Step, add) -> None:
    """Gathers of weights, and the reductions of their gradients."""
    layout, config = step.layout, step.config
    platform, count = step.target.platform, config.batch.microbatches
    blocking = _blocking(step.target)
    often = count if layout.gather_at == "layer" else 1
    for name, dims in step.structure.dims.items():
        stacked = dims.startswith("layers ")
        shape = step.structure.shapes[name]
        spec = layout.spec(dims)
        used = {
            axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())
        }
        stored = layout.stored_axes(dims)
        extra = stored - used
        held = math.prod(shape) / math.prod(step.sizes[axis] for axis in used)  # in use
        rest = held / math.prod(step.sizes[axis] for axis in extra)
        layers = shape[0] / (step.stages if stacked else 1) if stacked else 1
        passes = 1.0
        if stacked and layout.gather_at == "layer":
            passes = 1 if step.policy == "none" else 2
            passes = (passes + 1) * step.bubble if step.stages > 1 else passes
        # A tied table is gathered for both of its uses, and on CPU its gradients are reduced twice.
        tied = 1 + (name == "embed" and config.model.tie_embeddings and platform != "tpu")
        if extra:
            passes *= tied
            add(
                "all-gather",
                extra,
                step.wire * held / layers,
                passes * often * layers,
                blocking["gather"],
            )
        summed = layout.summed(step.structure.over[name], spec)
        early = extra & summed if layout.gather_at == "layer" else frozenset()
        if early:
            group = math.prod(step.sizes[axis] for axis in early)
            times = count * layers * (step.bubble if stacked else 1)
            times *= tied if platform == "cpu" else 1
            if platform == "cpu" or (platform == "tpu" and _whole_torus(step, group)):
                add(
                    "all-reduce",
                    early,
                    step.reduce * rest * group / layers,
                    times,
                    blocking["reduce"],
                )
            else:
                add("reduce-scatter", early, step.reduce * rest / layers, times, blocking["reduce"])
        late = summed - early
        if late:
            size = rest if layout.gather_at == "layer" else held
            add("all-reduce", late, step.reduce * size, 1, blocking["late"])


def _whole_torus(step: Step, group: int) -> bool:
    """libtpu makes all-reduces of reduce-scatters over a whole torus of 16 chips and more."""
    return group >= 16 and group == step.target.size


def _activations(step: Step, add) -> None:
    """Within layers: over tensor, context, expert and stage; and in the loss over tensor."""
    layout, config, m = step.layout, step.config, step.config.model
    platform = step.target.platform
    L = m.num_layers / step.stages * step.bubble
    count = config.batch.microbatches
    hidden = step.wire * step.tokens * m.embed_dim / count  # of a microbatch
    pairs = count * L
    blocks = _blocking(step.target)["tensor"]
    tensor = [
        axis for axis in layout.dim_axes("residual_seq") if axis not in layout.dim_axes("seq")
    ]
    if tensor:
        group = math.prod(step.sizes[axis] for axis in tensor)
        extra = step.stages > 1
        again = step.policy != "none"
        gathers = 2 * (1 + extra) + 2 * again + 2
        scatters = 2 * (1 + extra) + (1 if step.again("output") else 0) + 2
        if platform == "cpu":
            add("all-reduce", tensor, hidden, scatters * pairs + count, blocks)
        else:
            add("reduce-scatter", tensor, hidden / group, scatters * pairs + count, blocks)
        add("all-gather", tensor, hidden, gathers * pairs + 2 * count, blocks)
        add("all-reduce", tensor, hidden / config.loss.chunks, count * config.loss.chunks)
        add(
            "all-reduce",
            tensor,
            WIDE * step.tokens / count / config.loss.chunks,
            5 * count * config.loss.chunks,
        )
    if layout.size("seq") > 1:
        _context(step, add, pairs)
    if isinstance(m, moe.Config):
        _exchange(step, add, m, pairs)
    if step.stages > 1:
        ticks = count * config.pipeline.repeats * step.bubble
        residual = layout.size("residual_seq") / layout.size("seq")
        add("collective-permute", layout.dim_axes("layers"), hidden / residual, 2 * ticks - 1)
        add("all-reduce", layout.dim_axes("layers"), hidden / residual, 2 * count)


def _context(step: Step, add, pairs: float) -> None:
    """Keys and values of other devices: round the ring, or gathered, or heads for sequence."""
    layout, config, m = step.layout, step.config, step.config.model
    axes, ways = layout.dim_axes("seq"), layout.size("seq")
    kv_heads = m.num_kv_heads / layout.size("kv_heads")
    part = 2 * step.tokens / config.batch.microbatches * kv_heads * m.head_dim  # k and v, here
    again = step.again("attention")
    passes = 2 + again + (step.stages > 1)
    if layout.attention.context == "all_to_all":
        heads = (m.num_heads / layout.size("heads") + kv_heads) * m.head_dim
        size = 2 * step.wire * step.tokens / config.batch.microbatches * heads
        add("all-to-all", axes, size, pairs * (2 + again + (step.stages > 1)))
    elif layout.attention.context == "all_gather":
        add("all-gather", axes, step.wire * part * ways, passes * pairs)
        add("reduce-scatter", axes, WIDE * part, pairs)
    else:
        hops = passes * (ways - 1) - again
        blocks = _blocking(step.target)["permute"]
        add("collective-permute", axes, step.wire * part / 2, 2 * hops * pairs, blocks)
        add("collective-permute", axes, WIDE * part / 2, 2 * ways * pairs, blocks)


def _exchange(step: Step, add, m, pairs: float) -> None:
    """Rows to their experts and back, in each pass."""
    layout, config = step.layout, step.config
    axes = layout.dim_axes("experts")
    length = config.batch.sequence_length
    rows = float(m.experts_per_token)
    kind = "all-to-all" if layout.experts == "padded" else "ragged-all-to-all"
    if m.dispatch == "capacity":
        rows, kind = (
            m.num_experts * moe.slots_per_expert(m, length, layout)[1] / length,
            "all-to-all",
        )
    elif layout.experts == "padded":
        rows *= layout.size("experts")  # the worst case travels
    size = step.wire * step.tokens / config.batch.microbatches * rows * m.embed_dim
    passes = 2 * (1 + (step.stages > 1)) + 2 + (step.again("mlp"))
    add(kind, axes, size, passes * pairs)
