"""What a step takes, by formulas over the config and its layout: before any trace or compile.

Letters: t tokens of a device in a step, n those of the residual stream (split over tensor too),
L layers, D embed, F mlp, H query heads, K kv heads, C head_dim, S sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from jaxlm import config as cfg
from jaxlm.attention import splash
from jaxlm.attention.chunked import SPANS
from jaxlm.models import moe
from jaxlm.plan.collectives import WIRE
from jaxlm.plan.cost import Cost, Traffic
from jaxlm.plan.habits import HABITS
from jaxlm.plan.memory import largest, phases
from jaxlm.plan.network import route
from jaxlm.plan.target import Target
from jaxlm.sharding import Layout
from jaxlm.state import Structure

WIDE = 4  # bytes of float32
_NEWTON_SCHULZ = 5  # steps of Muon's orthogonalisation, three products each
Rows = dict[tuple[str, tuple[str, ...]], list[float]]


@dataclasses.dataclass(frozen=True)
class _Step:
    """The numbers that the formulas share."""

    config: cfg.Config
    layout: Layout
    structure: Structure
    target: Target

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        return dict(self.layout.axes)

    @functools.cached_property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.layout.compute == "bfloat16" else WIDE

    @functools.cached_property
    def wire(self) -> int:
        """Bytes of an activation or weight between devices: XLA on CPU sends float32."""
        return WIDE if self.target.platform == "cpu" else self.width

    @functools.cached_property
    def reduce(self) -> int:
        """Bytes of a gradient on its way between devices."""
        narrow = self.layout.reduce == "bfloat16" and self.target.platform != "cpu"
        return 2 if narrow else WIDE

    @functools.cached_property
    def tokens(self) -> float:
        """Tokens of a device in a step."""
        batch = self.config.batch
        ways = self.layout.size("batch") * self.layout.size("seq")
        return batch.sequences * batch.sequence_length / ways

    @functools.cached_property
    def stages(self) -> int:
        return self.layout.size("layers")

    @functools.cached_property
    def bubble(self) -> float:
        """Ticks of the pipeline for each that works (parallel/pipeline.py)."""
        if self.stages == 1:
            return 1.0
        work = self.config.batch.microbatches * self.config.pipeline.repeats
        return (work + self.stages - 1) / work

    @property
    def policy(self) -> str:
        return self.config.remat.policy

    def again(self, name: str) -> bool:
        """Whether the backward pass computes this named activation a second time."""
        if self.policy == "names":
            return name not in self.config.remat.names
        kept = ("query", "key", "value", "mlp", "output")
        return self.policy == "full" or (self.policy == "dots" and name not in kept)

    def forwards(self, again: bool = False, needed: bool = True) -> int:
        """Runs of a part of the forward pass: pipelines do one more, to save inputs of layers.

        Where a tick is one layer that one leaves out what is computed again, or is not `needed`.
        """
        deep = self.config.model.num_layers > self.stages * self.config.pipeline.repeats
        return 1 + (self.stages > 1 and (deep or (needed and not again)))


def analyze(config: cfg.Config, layout: Layout, structure: Structure, target: Target) -> Cost:
    """The Cost of one train step on one device of the target."""
    step = _Step(config, layout, structure, target)
    flops, kernels = _flops(step)
    moments = phases(config, layout, structure, target).values()
    kept = lambda sizes: sum(size for name, size in sizes.items() if name.startswith("saved/"))
    return Cost(
        memory=largest(moments), flops=flops, kernel_flops=kernels,
        traffic=tuple(_traffic(step)), hbm_bytes=_hbm_bytes(step, max(map(kept, moments))),
        host_bytes=_host_bytes(step),
    )  # fmt: skip


# FLOPs


def _flops(step: _Step) -> tuple[dict[str, float], float]:
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


def _experts(step: _Step, add, each: float) -> None:
    """Router, routed experts on the rows that a device has on average, and the shared expert."""
    m, layout = step.config.model, step.layout
    assert isinstance(m, moe.Config)
    D, F = m.embed_dim, m.expert_mlp_dim / layout.size("mlp")
    rows = _product_rows(step, m)
    residual = layout.size("residual_seq") / layout.size("seq")
    add("router", each * D * m.num_experts / residual, step.policy != "none")
    add("experts", each * rows * 2 * D * F, step.again("mlp"))
    add("experts", each * rows * D * F, 0, runs=step.forwards(needed=False))
    if m.shared_expert_dim:
        shared = m.shared_expert_dim / layout.size("mlp")
        add("mlp", each * 2 * D * shared, step.again("mlp"))
        add("mlp", each * D * shared, 0, runs=step.forwards(needed=False))


def _product_rows(step: _Step, m: moe.Config) -> float:
    """Rows of the experts' products for each token of a device.

    XLA makes of a ragged product one masked product of all rows for each expert that is held; where
    experts are split the rows are those of the largest exchange (parallel/experts.py).
    """
    if m.dispatch == "capacity":
        length = step.config.batch.sequence_length
        return m.num_experts * moe.slots_per_expert(m, length, step.layout)[1] / length
    peers = step.layout.size("experts")
    held = m.num_experts / peers
    return held * (peers * min(m.experts_per_token, held) if peers > 1 else m.experts_per_token)


def _attention(step: _Step, add, each: float, width: float) -> float:
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


def visited(layout: Layout, m: cfg.Model, length: int) -> float:
    """The part of all scores that an attention backend computes, of queries times keys."""
    backend, window = layout.attention.backend, m.sliding_window
    if backend == "splash":
        sizes = splash.block_sizes(length, m.head_dim * 2)
        rows, columns = length // sizes.block_q, length // (sizes.block_kv or length)
        shown = 0
        for row in range(rows):
            last = -(-(row + 1) * columns // rows)
            first = max(0, (row * sizes.block_q - window) * columns // length) if window else 0
            shown += min(columns, last) - first
        return shown / (rows * columns)
    if backend == "chunked" and not window:
        return (SPANS + 1) / (2 * SPANS)
    if backend == "chunked":
        return min(1.0, (window + length / SPANS) / length)
    if backend == "cudnn":
        return 0.5
    if backend in ("ring", "all_gather"):  # halves of the pieces are skipped where hidden
        ways = layout.size("seq")
        return (2 * ways + 1) / (4 * ways) if not window else min(1.0, (window / length + 1 / ways))
    return 1.0


def _muon(step: _Step) -> float:
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


def _traffic(step: _Step) -> Iterator[Traffic]:
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


def _weights(step: _Step, add) -> None:
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


def _whole_torus(step: _Step, group: int) -> bool:
    """libtpu makes all-reduces of reduce-scatters over a whole torus of 16 chips and more."""
    return group >= 16 and group == step.target.size


def _activations(step: _Step, add) -> None:
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


def _context(step: _Step, add, pairs: float) -> None:
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


def _exchange(step: _Step, add, m, pairs: float) -> None:
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


# Memory traffic


def _hbm_bytes(step: _Step, saved: float) -> float:
    """Device memory read and written: weights in each pass, activations, logits, the optimizer.

    `saved`: bytes that a microbatch keeps for its backward pass, written and read.
    """
    layout, config, m = step.layout, step.config, step.config.model
    count = config.batch.microbatches
    rest = used = 0.0
    for name, dims in step.structure.dims.items():
        elements = math.prod(step.structure.shapes[name])
        entries = layout.spec(dims)
        axes = {a for e in entries for a in ((e,) if isinstance(e, str) else e or ())}
        used += elements / math.prod(step.sizes[a] for a in axes)
        rest += elements / math.prod(step.sizes[a] for a in layout.stored_axes(dims))
    states = {"adamw": 2, "lion": 1, "muon": 1, "adafactor": 0.1}[config.optimizer.name]
    optimizer = rest * WIDE * (3 + 2 * states)  # gradient and weight read, weight written
    again = 1.0 if step.policy == "full" else 0.5 if step.policy != "none" else 0.0
    touches = _TOUCHES[step.target.platform]
    weights = used * step.width * (3 + again + (step.stages > 1)) * count
    # Gradients are written; where microbatches add up, read with their sum, which is written.
    weights += rest * WIDE * (1 if count == 1 else touches.sums * count)
    L = m.num_layers / step.stages * step.bubble
    layer = step.tokens * L * step.width * _layer_elements(step, touches, again)
    rows = cfg.padded_vocab(m) / layout.size("vocab")
    head = step.tokens * rows * (3 * WIDE + 3 * step.width)
    if config.loss.chunks > 1:  # each adds to the sum of the table's gradients
        head += config.loss.chunks * count * rows * m.embed_dim * WIDE * touches.table
    return optimizer + weights + layer + head + touches.saved * saved * count * step.bubble


@dataclasses.dataclass(frozen=True)
class _Touches:
    """How often compiled programs touch an array, as those of benchmarks/ranking.py show."""

    activations: float = 1  # of those of a pass: XLA:GPU keeps some of them in float32
    scores: float = 4  # in a pass: of plain attention, in float32
    masked: float = 0  # in a pass: copies of rows for the dense products of experts (habits.py)
    sums: float = 4  # of gradients in a microbatch; XLA:GPU makes zeros, stacks, and copies them
    table: float = 2  # of the head's gradients in a chunk; XLA:GPU adds in a kernel of its own
    saved: float = 2  # of what is kept for the backward pass; XLA:GPU writes zeros first


_TOUCHES = {
    "tpu": _Touches(),
    "gpu": _Touches(activations=1.5, scores=2.5, masked=1, sums=8, table=4, saved=3),
    "cpu": _Touches(),
}


def _layer_elements(step: _Step, touches: _Touches, again: float) -> float:
    """Elements that a layer reads and writes for a token, in all passes."""
    layout, config, m = step.layout, step.config, step.config.model
    heads = m.num_heads / layout.size("heads") + 2 * m.num_kv_heads / layout.size("kv_heads")
    hidden = m.mlp_dim / layout.size("mlp")
    masked = 0.0
    if isinstance(m, moe.Config):
        split = layout.size("mlp")
        hidden = (m.experts_per_token * m.expert_mlp_dim + m.shared_expert_dim) / split
        hidden += 2 * m.experts_per_token * m.embed_dim
        if m.dispatch == "dropless":
            wide, narrow = HABITS[step.target.platform].masked
            masked = wide * m.expert_mlp_dim / split + narrow * m.embed_dim
            masked *= touches.masked * _product_rows(step, m)
    residual = layout.size("residual_seq") / layout.size("seq")
    # A pass reads and writes: the residual stream eight times, heads four, the MLP's hidden five.
    activations = 8 * m.embed_dim / residual + 2 * m.embed_dim + 4 * heads * m.head_dim + 5 * hidden
    # The passes of _flops: pipelines run forward once more, chunks and pieces make scores again.
    passes = 2 + step.forwards() + again
    elements = (touches.activations * activations + masked) * passes
    backend = layout.attention.backend
    if backend in ("xla", "chunked", "ring", "all_gather"):
        length = config.batch.sequence_length
        shown = visited(layout, m, length)
        if backend == "xla":
            length /= layout.size("seq")
        scores = m.num_heads / layout.size("heads") * length * shown * WIDE / step.width
        passes = 2 + step.forwards() + step.again("attention") + (backend != "xla")
        elements += touches.scores * scores * passes
    return elements


def _host_bytes(step: _Step) -> float:
    """Activations that are kept in host memory: there, and back."""
    m, layout = step.config.model, step.layout
    heads = m.num_heads / layout.size("heads") * m.head_dim
    kv = m.num_kv_heads / layout.size("kv_heads") * m.head_dim
    hidden = m.mlp_dim / layout.size("mlp") * (1 if m.family == "gpt2" else 2)
    sizes = {"query": heads, "key": kv, "value": kv, "attention": heads, "mlp": hidden}
    elements = sum(sizes[name] for name in step.config.remat.offload)
    return 2 * step.tokens * m.num_layers / step.stages * step.width * elements
