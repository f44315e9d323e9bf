"""Bytes on one device at the peak of a train step, from formulas: before anything is traced.

A step is a handful of phases (the head, the backward pass of a layer, the embedding's gradient, the
update), each of which holds what was made before it and is needed after. The peak is that of the
largest. What a phase holds follows from the source of the step; what a compiler adds to it (casts
before a loop, operands kept in float32) was read off compiled programs and stands in HABITS.

Letters: n tokens of a microbatch on one device, D embed, H query heads, K kv heads, C head_dim,
F mlp, V vocabulary, R rows of a buffer of experts; all as one device holds them.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from jaxlm import config as cfg
from jaxlm.optim import MIN_FACTORED, MUON, is_matrix, sides
from jaxlm.parallel.pipeline import Schedule
from jaxlm.plan.target import Target
from jaxlm.sharding import Layout
from jaxlm.state import Structure, trained

WIDE = 4  # bytes of float32, in which state, sums, norms and softmax are
Sizes = dict[str, float]  # class of cost.MEMORY -> bytes


@dataclasses.dataclass(frozen=True)
class Habits:
    """What a compiler holds beyond what the step names; each fact read off scheduled programs.

    Counts are of arrays: scores [n, H, S] and logits [n / chunks, V] of float32, tables [V, D] of
    float32, mlp [n, F] and stream [n, D] of the compute type.
    """

    cast_stack: bool  # gathered weights are cast to the compute type for all layers at once
    wide_head: bool  # the head in use is held in float32 while it runs
    wide_later: bool  # and through the backward pass of the layers
    head_product: bool  # a chunk's gradient of the head is written before it is added
    fast: float  # bytes of on-chip memory, which takes temporaries first
    lanes: int  # the last dimension of what attention's kernel reads is padded to a multiple
    logits: float  # while a chunk of the head runs
    scores: float  # while a layer runs
    mlp: float
    stream: float
    rows: tuple[float, float]  # [R, F] and [R, D] of the compute type, recomputed
    masked: tuple[float, float]  # [R, F] and [R, D] for each expert that a device holds
    masked_bytes: int  # of their elements; 0: the compute type's
    idle_logits: float = 0  # constants of masks, made at the start and held to the end
    idle_scores: float = 0
    idle_zeros: float = 0  # of the zeros that loops in a tick start from: constants, and copied
    stacks_stay: bool = False  # what a loop's turn saved is held to the end of the turn
    rows_always: bool = False  # `rows` are copied for the kernels even where they were kept
    hoists: bool = False  # gathers of the tables are moved out of the loop over microbatches
    idle_table: bool = False  # and those that the embedding's gradient is added to


HABITS = {
    "tpu": Habits(
        True,
        False,
        False,
        False,
        128 * 2**20,
        128,
        1,
        2,
        4,
        6,
        (4, 6),
        (0, 0),
        0,
        idle_zeros=1,
        stacks_stay=True,
        rows_always=True,
    ),
    "gpu": Habits(False, True, True, False, 0, 1, 2, 2, 2, 6, (4, 0), (2, 1), 0, idle_zeros=0.5),
    "cpu": Habits(
        False,
        True,
        False,
        True,
        0,
        1,
        1,
        2,
        0,
        4,
        (7, 0),
        (2, 2),
        WIDE,
        2,
        1.25,
        1,
        idle_table=True,
        hoists=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter on one device, in elements."""

    name: str
    stored: int  # at rest
    used: int  # gathered, all layers
    padding: float  # elements in memory at rest, for each that there is
    layers: int  # 0: it belongs to no layer
    trained: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the formulas need to know of a run."""

    config: cfg.Config
    layout: Layout
    target: Target
    habits: Habits
    weights: tuple[Weight, ...]
    n: int  # tokens where heads, mlp and the head are computed
    m: int  # tokens of the residual stream, whose sequence tensor may split too
    c: int  # bytes of an element in compute
    layers: int  # that run forward before one of them runs backward


def memory(config: cfg.Config, layout: Layout, structure: Structure, target: Target) -> Sizes:
    """Class of memory (cost.MEMORY) -> bytes at the moment of the peak."""
    found = phases(config, layout, structure, target)
    return max(found.values(), key=lambda sizes: sum(sizes.values()))


def _on_chip(p: Plan, state: float, sizes: Sizes) -> Sizes:
    """What a phase takes of the larger of two memories: on-chip memory takes temporaries first."""
    temporary, fast = sum(sizes.values()) - state, p.habits.fast
    moved = min(sizes["workspace"], fast, max(0.0, temporary - fast))
    return sizes | {"workspace": sizes["workspace"] - moved}


def phases(
    config: cfg.Config, layout: Layout, structure: Structure, target: Target
) -> dict[str, Sizes]:
    """What every phase of the step holds."""
    p = _plan(config, layout, structure, target)
    state = _resident(p, structure)
    make = _pipeline if layout.size("layers") > 1 else _simple
    total = sum(state.values())
    return {name: _on_chip(p, total, state | sizes) for name, sizes in make(p).items()}


def _plan(config, layout: Layout, structure: Structure, target: Target) -> Plan:
    chosen = trained(structure.weights, config.optimizer.train)
    lanes = HABITS[target.platform].lanes
    weights = tuple(
        _weight(name, structure.shapes[name], dims, layout, lanes, name in chosen)
        for name, dims in structure.dims.items()
    )
    b = config.batch
    rows = b.sequences / b.microbatches / layout.size("batch")
    tokens = rows * b.sequence_length
    return Plan(
        config, layout, target, HABITS[target.platform], weights,
        n=math.ceil(tokens / layout.size("seq")), m=math.ceil(tokens / layout.size("residual_seq")),
        c=2 if layout.compute == "bfloat16" else 4,
        layers=config.model.num_layers // (layout.size("layers") * config.pipeline.repeats),
    )  # fmt: skip


def _weight(name: str, shape, dims: str, layout: Layout, lanes: int, is_trained: bool) -> Weight:
    sizes, total = dict(layout.axes), math.prod(shape)
    ways = lambda spec: math.prod(
        sizes[axis]
        for entry in spec
        for axis in ((entry,) if isinstance(entry, str) else entry or ())
    )
    stored, used = (
        math.ceil(total / ways(spec)) for spec in (layout.stored(dims), layout.spec(dims))
    )
    narrow = dims.endswith(" head_dim")  # its rows fill whole tiles at rest
    padding = -(-shape[-1] // lanes) * lanes / shape[-1] if narrow else 1
    layers = shape[0] if dims.startswith("layers ") else 0
    return Weight(name, stored, used, padding, layers, is_trained)


def _resident(p: Plan, structure: Structure) -> Sizes:
    """What lives through the whole step: donated, and written in place at its end."""
    batch, arrays = p.config.batch, 4 + p.config.data.segments
    ways = p.layout.size("batch") * p.layout.size("seq")
    moments = sum(_moments(p, w, structure) * w.padding for w in p.weights if w.trained)
    return {
        "parameters": WIDE * sum(w.stored * w.padding for w in p.weights),
        "optimizer": WIDE * moments,
        "batch": 4 * arrays * batch.sequences * batch.sequence_length / ways,
    }


def _moments(p: Plan, weight: Weight, structure: Structure) -> float:
    """Elements of the optimizer's state for a weight (optim.py)."""
    name, dims, shape = (
        p.config.optimizer.name,
        structure.dims[weight.name],
        structure.shapes[weight.name],
    )
    if name == "adamw":
        return 2 * weight.stored
    if name == "lion":
        return weight.stored
    if name == "muon":
        return weight.stored * (1 if is_matrix(dims) and MUON & set(dims.split()) else 2)
    _, embed, other = sides(dims)
    size = lambda where: math.prod(shape[i] for i in where)
    if not is_matrix(dims) or min(size(embed), size(other)) < MIN_FACTORED:
        return weight.stored
    split = math.prod(shape) / weight.stored  # rows rest split like the embedding, columns whole
    return math.prod(shape) / size(other) / split + math.prod(shape) / size(embed)


def _simple(p: Plan) -> dict[str, Sizes]:
    """Phases of a step without stages."""
    always = _sum(_accumulators(p), _idle(p))
    found = _parts(p, p.config.batch.microbatches > 1, False)
    found["update"] = {"gradients": WIDE * sum(w.stored for w in p.weights if w.trained)}
    return {name: _sum(always, sizes) for name, sizes in found.items()}


def _parts(p: Plan, looped: bool, ticks: bool) -> dict[str, Sizes]:
    """Phases of a microbatch: in a loop over microbatches or ticks, or alone."""
    kept, layer, head = _saved(p), _layer_workspace(p, ticks), _head(p)
    grads = {"gradients": _layer_gradients(p)}
    if ticks:
        kept = {name: size * (1 + p.habits.idle_zeros) for name, size in kept.items()}
    table = WIDE * _table(p)
    held = {"gradients": WIDE * _head_weight(p).used, "workspace": _held_head(p)}
    if ticks and p.habits.hoists:
        grads = _sum(grads, grads)
        held = _sum(held, {"gradients": held["gradients"], "workspace": _gathered_table(p)})
    masks = {"logits": p.habits.idle_logits * _logits(p)}
    embedding = {
        "gradients": WIDE * _head_weight(p).used
        + table * (1 + (looped and p.layout.gather_at == "layer")),
        "workspace": (_gathered_table(p) + _held_head(p) * p.habits.hoists) * looped,
    }
    return {
        "forward": _sum(kept, grads, _layer_workspace(p, ticks, True), held, masks),
        "head": _sum(kept, head, masks, {"workspace": _hidden(p)}),
        "backward": _sum(kept, grads, layer, held),
        "embedding": _sum(
            grads, embedding, kept if ticks or (looped and p.habits.stacks_stay) else {}
        ),
    }


def _gathered_table(p: Plan) -> float:
    """The embedding in use, in the compute type, where that is not what rests."""
    tables = [w for w in p.weights if w.name == "embed"]
    return (
        p.c
        * sum(w.used for w in tables if w.used > w.stored or p.c < WIDE)
        * (p.layout.gather_at == "layer")
    )


def _pipeline(p: Plan) -> dict[str, Sizes]:
    """Phases of a tick (parallel/pipeline.py): forward of one chunk, head, backward of another."""
    config, layout = p.config, p.layout
    schedule = Schedule(layout.size("layers"), config.pipeline.repeats, config.batch.microbatches)
    stream = p.c * p.m * config.model.embed_dim
    carried: Sizes = {
        "gradients": WIDE * sum(w.stored for w in p.weights if w.trained),
        "saved/block input": schedule.slots * stream,
        "workspace": 4 * stream,  # the input and the cotangent, and those of the next tick
    }
    if schedule.repeats > 1:  # weights that moved to their stages
        carried["workspace"] += WIDE * sum(w.stored for w in p.weights if w.layers)
    return {name: _sum(carried, _idle(p), sizes) for name, sizes in _parts(p, True, True).items()}


def _idle(p: Plan) -> Sizes:
    """Constants that the compiler makes at the start."""
    habits = p.habits
    return {
        "workspace": habits.idle_scores * _scores(p),
        "gradients": WIDE
        * sum(w.used for w in p.weights if w.name == "embed" and w.used > w.stored)
        * habits.idle_table,
    }


def _sum(*parts: Sizes) -> Sizes:
    return {
        name: sum(part.get(name, 0.0) for part in parts)
        for name in dict.fromkeys(k for p in parts for k in p)
    }


def _table(p: Plan) -> float:
    """Elements of the embedding in use: its gradient is summed in float32 before it is split."""
    return sum(w.used for w in p.weights if w.name in ("embed", "positions"))


def _head_weight(p: Plan) -> Weight:
    name = "embed" if p.config.model.tie_embeddings else "head"
    return next(w for w in p.weights if w.name == name)


def _accumulators(p: Plan) -> Sizes:
    """What the loop over microbatches carries, and weights gathered before it."""
    sizes: Sizes = {"gradients": 0.0, "workspace": 0.0}
    step = p.layout.gather_at == "step"
    if p.config.batch.microbatches > 1:
        sizes["gradients"] = WIDE * sum(
            w.used if step else w.stored for w in p.weights if w.trained
        )
    if step:
        sizes["workspace"] = p.c * sum(w.used for w in p.weights)
    elif p.habits.cast_stack and p.c < WIDE:
        sizes["workspace"] = p.c * sum(w.stored for w in p.weights if w.layers)
    return sizes


def _layer_gradients(p: Plan) -> float:
    """Gradients of all layers, which the loop over them stacks up."""
    trained_layers = [w for w in p.weights if w.layers and w.trained]
    if p.layout.gather_at == "step":
        return p.c * sum(w.used for w in trained_layers)
    return WIDE * sum(w.stored for w in trained_layers) / p.config.pipeline.repeats


def _logits(p: Plan) -> float:
    """Bytes of the logits of one chunk, in float32."""
    return WIDE * p.n / p.config.loss.chunks * _head_weight(p).used / p.config.model.embed_dim


def _scores(p: Plan) -> float:
    """Bytes of attention's scores of one layer, or of the chunk that is held of them, in float32."""
    options, batch = p.layout.attention, p.config.batch
    keys = batch.sequence_length
    heads = p.config.model.num_heads / p.layout.size("heads")
    if options.backend in ("splash", "cudnn"):
        return 0.0  # in blocks, on the chip
    queries = p.n
    if options.backend == "chunked":
        queries = p.n * min(1, options.chunk / batch.sequence_length)
    if options.backend in ("ring", "all_gather"):  # a chunk of queries, a piece of keys
        keys = keys / (2 * p.layout.size("seq"))
        queries = p.n * min(1, options.chunk / (2 * keys))
    return WIDE * queries * heads * keys


def _head(p: Plan) -> Sizes:
    """A chunk of the head: its logits, the weight in use, the sum of its gradients."""
    weight, habits = _head_weight(p), p.habits
    wide = habits.wide_head and p.config.loss.chunks > 1 and _is_moved(p, weight)
    copies = WIDE * weight.used * wide
    return {
        "logits": habits.logits * _logits(p),
        "gradients": WIDE * weight.used * (1 + (habits.head_product and p.config.loss.chunks > 1)),
        "workspace": copies or _held_head(p),
    }


def _is_moved(p: Plan, weight: Weight) -> bool:
    """Whether a weight in use is another array than the one that rests, or was gathered before."""
    return p.c < WIDE or (weight.used > weight.stored and p.layout.gather_at == "layer")


def _held_head(p: Plan) -> float:
    """The head in use, or on CPU the table: held while layers run."""
    weight = _head_weight(p)
    if p.habits.wide_later and p.config.loss.chunks > 1:
        return WIDE * weight.used * _is_moved(p, weight)
    return p.c * weight.used * (_is_moved(p, weight) and p.layout.gather_at == "layer")


def _hidden(p: Plan) -> float:
    """Hidden states that meet the head, in chunks, and their gradients."""
    return 2 * p.c * p.n * p.config.model.embed_dim


@dataclasses.dataclass(frozen=True)
class Array:
    """An activation of one layer that autodiff asks for."""

    name: str  # as remat.names and reports have it
    bytes: float
    product: bool = False  # remat.policy=dots keeps it


def _layer(p: Plan) -> list[Array]:
    """What the backward pass of a layer reads, where nothing is recomputed."""
    model, layout, c = p.config.model, p.layout, p.c
    D, C = model.embed_dim, -(-model.head_dim // p.habits.lanes) * p.habits.lanes
    H, K = model.num_heads / layout.size("heads"), model.num_kv_heads / layout.size("kv_heads")
    if p.config.remat.policy == "none" and layout.dim_axes("heads") != layout.dim_axes("kv_heads"):
        K = H  # copied to every query head (attention/xla.py)
    n, m, operand = p.n, p.m, _operand(p)
    named = "attention" if layout.attention.backend in ("xla", "chunked", "cudnn") else "heads"
    arrays = [
        Array("norms", (4 * WIDE * m + 2 * operand * n) * D),
        Array("query", c * n * H * C, True),
        Array("key", c * n * K * C, True),
        Array("value", c * n * K * C, True),
        Array(named, c * n * H * C),
        Array("projections", c * m * D, True),
        *_attention(p, H, K),
        *_mlp(p),
    ]
    if layout.gather_at == "layer":
        arrays.append(
            Array("weights", operand * sum(w.used / w.layers for w in p.weights if w.layers))
        )
    return arrays


def _operand(p: Plan) -> int:
    """Bytes of an element of a product's operand, which TPUs round to bfloat16."""
    return 2 if p.target.platform == "tpu" else p.c


def _attention(p: Plan, H: float, K: float) -> list[Array]:
    """What a backend keeps for its backward pass."""
    length, backend = p.config.batch.sequence_length, p.layout.attention.backend
    C = -(-p.config.model.head_dim // p.habits.lanes) * p.habits.lanes
    if backend == "xla":
        return [
            Array(
                "scores",
                p.n * H * length * (2 * WIDE if p.target.platform == "gpu" else WIDE + p.c),
            )
        ]
    if backend == "splash":
        return [Array("attention", p.c * p.n * H * C + WIDE * p.n * H)]
    return [Array("attention", WIDE * p.n * H)]


def _mlp(p: Plan) -> list[Array]:
    """Of an MLP or of routed experts."""
    model, c = p.config.model, p.c
    if hasattr(model, "num_experts"):
        return _experts(p, model)
    F = model.mlp_dim / p.layout.size("mlp")
    if model.family == "gpt2":
        return [Array("mlp", c * p.n * F, True), Array("hidden", (2 * c + _operand(p)) * p.n * F)]
    return [Array("mlp", 2 * c * p.n * F, True), Array("hidden", (3 * c + _operand(p)) * p.n * F)]


def _experts(p: Plan, model) -> list[Array]:
    R = _rows(p)
    F, D = model.expert_mlp_dim / p.layout.size("mlp"), model.embed_dim
    return [
        Array("mlp", 2 * p.c * R * F, True),
        Array("hidden", 4 * p.c * R * F),
        Array("rows", 3 * p.c * R * D),
    ]


def _rows(p: Plan) -> float:
    """Rows of a buffer that takes whatever the peers may send (parallel/experts.py)."""
    model, peers = p.config.model, p.layout.size("experts")
    held = model.num_experts / peers
    return p.n * (
        peers * min(model.experts_per_token, held) if peers > 1 else model.experts_per_token
    )


def _keeps(p: Plan, array: Array) -> bool:
    remat = p.config.remat
    if remat.policy == "none":
        return True
    if remat.policy == "dots":
        return array.product
    return remat.policy == "names" and array.name in remat.names


def _saved(p: Plan) -> Sizes:
    """What the forward pass of all layers leaves for the backward pass."""
    model, remat = p.config.model, p.config.remat
    sizes: Sizes = {}
    if remat.policy != "none":
        sizes["saved/block input"] = p.layers * p.c * p.m * model.embed_dim
    for array in _layer(p):
        if _keeps(p, array) and array.name not in remat.offload:
            name = f"saved/{'residuals' if remat.policy == 'none' else array.name}"
            sizes[name] = sizes.get(name, 0.0) + p.layers * array.bytes
    return sizes


def _layer_workspace(p: Plan, mapped: bool, forward: bool = False) -> Sizes:
    """One layer at work: weights in use, activations and their gradients on the way."""
    habits, model = p.habits, p.config.model
    stacked = [w.used / w.layers for w in p.weights if w.layers]
    weights = 0.0 if p.layout.gather_at == "step" else p.c * sum(stacked)
    work = (habits.scores + mapped) * _scores(p) + p.c * p.n * habits.stream * model.embed_dim
    if hasattr(model, "num_experts"):
        work += _experts_workspace(p) * (0.5 if forward else 1)
    else:
        work += p.c * p.n * habits.mlp * model.mlp_dim / p.layout.size("mlp")
    return {"workspace": work + weights + 2 * WIDE * max(stacked)}


def _experts_workspace(p: Plan) -> float:
    model, held = p.config.model, p.config.model.num_experts / p.layout.size("experts")
    F, D = model.expert_mlp_dim / p.layout.size("mlp"), model.embed_dim
    (rows_f, rows_d), (masked_f, masked_d) = p.habits.rows, p.habits.masked
    masked = (p.habits.masked_bytes or p.c) * held * (masked_f * F + masked_d * D)
    recomputed = p.habits.rows_always or p.config.remat.policy != "none"
    return _rows(p) * (masked + p.c * (rows_f * F + rows_d * D) * recomputed)
