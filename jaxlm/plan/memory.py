"""Bytes on one device at the peak of a train step, from formulas: before anything is traced.

A step is a handful of phases (the head, a layer's backward pass, the embedding's gradient, the
update), each of which holds what was made before it and is needed after it. The largest is the
peak. What a phase holds follows from the source of the step; what a compiler adds to that (casts
before a loop, constants of masks, dense products of experts) was read off the programs that it
makes, buffer by buffer, and stands in habits.py.

Letters: n tokens of a microbatch, m those of the residual stream (tensor may split its sequence),
D embed, H query heads, K kv heads, C head_dim, F mlp, V vocabulary, E experts, R rows of a buffer
of experts; all of one device. S is the sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from jaxlm import config as cfg
from jaxlm.hardware.target import Target
from jaxlm.models import moe
from jaxlm.optim import MIN_FACTORED, is_matrix, sides, takes_muon
from jaxlm.pipeline import Schedule
from jaxlm.plan.habits import WIDE, Habits, find_habits
from jaxlm.sharding import Layout
from jaxlm.state import Structure, trained

Sizes = dict[str, float]  # class of cost.MEMORY -> bytes


@dataclasses.dataclass(frozen=True)
class Weight:
    """A variable of the model on one device, in elements."""

    name: str
    stored: int  # at rest
    used: int  # gathered, all layers
    padding: float  # elements in memory at rest, for each that there is
    layers: int  # 0: it belongs to no layer
    trained: bool
    waits: bool  # its gradient is summed over some axes once, at the end of the step


@dataclasses.dataclass(frozen=True)
class Run:
    """What the formulas need to know."""

    config: cfg.Config
    layout: Layout
    habits: Habits
    weights: tuple[Weight, ...]
    n: float
    m: float
    c: int  # bytes of an element of the compute type
    layers: int  # that run forward before the first of them runs backward

    @property
    def per_layer(self) -> bool:
        """Weights are gathered layer by layer, not once a step."""
        return self.layout.gather_at == "layer"

    @property
    def early(self) -> bool:
        """Tables are gathered at the start; with repeats they are in a branch of each tick."""
        return self.habits.tables_early and self.config.pipeline.repeats == 1

    @property
    def stacked(self) -> list[Weight]:
        """The weights of layers."""
        return [w for w in self.weights if w.layers]

    @property
    def gradients(self) -> float:
        """Bytes of the gradients at rest."""
        return WIDE * sum(w.stored for w in self.weights if w.trained)

    def of(self, *names: str) -> list[Weight]:
        """The weights with these names."""
        return [w for w in self.weights if w.name in names]

    @property
    def head(self) -> Weight:
        """The output matrix."""
        return self.of("embed" if self.config.model.tie_embeddings else "head")[0]


def memory(config: cfg.Config, layout: Layout, structure: Structure, target: Target) -> Sizes:
    """Class of memory (cost.MEMORY) -> bytes at the moment of the peak."""
    return largest(phases(config, layout, structure, target).values())


def largest(moments: Iterable[Sizes]) -> Sizes:
    """The moment at which most is held."""
    return max(moments, key=lambda sizes: sum(sizes.values()))


def phases(
    config: cfg.Config, layout: Layout, structure: Structure, target: Target
) -> dict[str, Sizes]:
    """What every phase of the step holds."""
    run = _run(config, layout, structure, find_habits(target))
    make = _pipeline if layout.size("layers") > 1 else _microbatches
    state = _state(run, structure)
    return {name: state | _off_chip(run, sizes) for name, sizes in make(run).items()}


def _off_chip(run: Run, sizes: Sizes) -> Sizes:
    """Temporaries in the fuller of two memories: a compiler reports the larger of their peaks."""
    spare = max(0.0, sum(sizes.values()) - run.habits.fast)
    moved = min(sizes["workspace"], run.habits.fast, spare)
    return sizes | {"workspace": sizes["workspace"] - moved}


def _run(config: cfg.Config, layout: Layout, structure: Structure, habits: Habits) -> Run:
    chosen, batch = trained(structure.weights, config.optimizer.train), config.batch
    tokens = batch.sequences * batch.sequence_length / batch.microbatches / layout.size("batch")
    return Run(
        config, layout, habits,
        tuple(
            _weight(name, structure, layout, habits.lanes, name in chosen)
            for name in structure.dims
        ),
        n=tokens / layout.size("seq"), m=tokens / layout.size("residual_seq"),
        c=2 if layout.compute == "bfloat16" else 4,
        layers=config.model.num_layers // (layout.size("layers") * config.pipeline.repeats),
    )  # fmt: skip


def _weight(
    name: str, structure: Structure, layout: Layout, lanes: int, is_trained: bool
) -> Weight:
    shape, dims, sizes = structure.shapes[name], structure.dims[name], dict(layout.axes)
    rest, total = layout.stored_axes(dims), math.prod(shape)
    padding, kinds = 1.0, dims.split()
    if "head_dim" in kinds:  # a last one stays the last; of `output` the better of two is
        padding = _up(shape[kinds.index("head_dim")], lanes) / shape[kinds.index("head_dim")]
        if kinds[-1] == "embed":
            others = {axis for kind in kinds[:-1] for axis in layout.dim_axes(kind)}
            here = shape[-1] / math.prod(sizes[axis] for axis in rest - others)
            padding = min(padding, _up(math.ceil(here), lanes) / here)
    return Weight(
        name,
        stored=total // math.prod(sizes[axis] for axis in rest),
        used=total // math.prod(layout.size(dim) for dim in dims.split()),
        padding=padding,
        layers=shape[0] if dims.startswith("layers ") else 0,
        trained=is_trained,
        waits=bool(layout.summed(structure.over[name], layout.spec(dims)) - rest),
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _sum(*parts: Sizes) -> Sizes:
    total: Sizes = {}
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0.0) + size
    return total


def _state(run: Run, structure: Structure) -> Sizes:
    """What lives through the whole step: the state, which is donated and updated in place."""
    batch, arrays = run.config.batch, 4 + run.config.data.segments
    ways = run.layout.size("batch") * run.layout.size("seq")
    moments = (_moments(run, w, structure) * w.padding for w in run.weights if w.trained)
    return {
        "parameters": WIDE * sum(w.stored * w.padding for w in run.weights),
        "optimizer": WIDE * sum(moments),
        "batch": 4 * arrays * batch.sequences * batch.sequence_length / ways,
    }


def _moments(run: Run, weight: Weight, structure: Structure) -> float:
    """Elements of the optimizer's state for a weight (optim.py)."""
    name, dims = run.config.optimizer.name, structure.dims[weight.name]
    if name in ("adamw", "lion"):
        return weight.stored * (2 if name == "adamw" else 1)
    if name == "muon":
        return weight.stored * (1 if takes_muon(dims) else 2)
    _, embed, other = sides(dims)
    shape = structure.shapes[weight.name]
    rows, columns = (math.prod(shape[i] for i in side) for side in (embed, other))
    if not is_matrix(dims) or min(rows, columns) < MIN_FACTORED:
        return weight.stored
    # Means over a side rest split like what is left of the weight.
    sizes, entries = dict(run.layout.axes), run.layout.stored(dims)
    axes = lambda entry: (entry,) if isinstance(entry, str) else entry or ()
    ways = [math.prod(sizes[axis] for axis in axes(entry)) for entry in entries]
    split = lambda side: math.prod(ways[i] for i in side)
    return weight.stored * (split(other) / columns + split(embed) / rows)


def _microbatches(run: Run) -> dict[str, Sizes]:
    """Phases of a step without stages."""
    many = run.config.batch.microbatches > 1
    carried: Sizes = {"workspace": 0.0}
    if many:  # the loop over microbatches sums in float32
        sums = WIDE * sum(w.used for w in run.weights if w.trained)
        carried["gradients"] = run.gradients if run.per_layer else sums
    if not run.per_layer:
        carried["workspace"] = run.c * sum(w.used for w in run.weights)
    elif run.habits.cast_all and run.c < WIDE:
        carried["workspace"] = run.c * sum(w.stored for w in run.stacked)
    found = _turn(run, many, False) | {"update": {"gradients": run.gradients, "workspace": 0.0}}
    if run.habits.reduces_aside:
        found["reduction"] = _reduction(run, many)
    return {name: _sum(carried, _idle(run), sizes) for name, sizes in found.items()}


def _pipeline(run: Run) -> dict[str, Sizes]:
    """Phases of a tick (pipeline/): one chunk forward, the head, another backward."""
    config = run.config
    schedule = Schedule(
        run.layout.size("layers"), config.pipeline.repeats, config.batch.microbatches
    )
    stream = run.c * run.m * config.model.embed_dim
    carried: Sizes = {
        "gradients": run.gradients,
        "saved/block input": schedule.slots * stream,
        "workspace": 4 * stream,  # the input and the cotangent, and those of the next tick
    }
    if schedule.repeats > 1:  # weights that moved to their stages
        carried["workspace"] += WIDE * sum(w.stored for w in run.stacked)
    return {n: _sum(carried, _idle(run), sizes) for n, sizes in _turn(run, True, True).items()}


def _reduction(run: Run, many: bool) -> Sizes:
    """Gradients that wait, and their sums over devices; tables are whole where it is just done."""
    size = lambda w: WIDE * (w.stored if run.per_layer else w.used)
    sums = sum(size(w) for w in (run.weights if many else run.stacked) if w.trained and w.waits)
    if many:  # the loop has reduced the rest, and carries all
        return {"gradients": sums, "workspace": 0.0}
    tables = WIDE * sum(w.used for w in run.weights if w.trained and not w.layers)
    return {"gradients": _layer_gradients(run) + sums + 2 * tables, "workspace": 0.0}


def _idle(run: Run) -> Sizes:
    """Constants that are made at the start and held to the end."""
    zeros = sum(w.used for w in run.of("embed") if w.used > w.stored)
    return {
        "workspace": run.habits.idle_scores * _scores(run),
        "gradients": WIDE * zeros * run.early,
    }


def _turn(run: Run, looped: bool, ticks: bool) -> dict[str, Sizes]:
    """Phases of a microbatch; `looped`: in a loop over microbatches or ticks."""
    habits, saved = run.habits, _saved(run)
    if ticks:
        saved = {name: size * (1 + habits.zeros_twice) for name, size in saved.items()}
    head_sum, table = WIDE * run.head.used, _gathered(run, *run.of("embed"))
    held = {"gradients": head_sum + _layer_gradients(run), "workspace": _held_head(run)}
    if ticks and run.early:  # zeros of both sums beside them
        held = _sum(held, {"gradients": held["gradients"], "workspace": table})
    masks = {"logits": habits.idle_logits * _logits(run)}
    # The head's sum is not reduced yet, and the tables' comes beside it; in a loop it is then added
    # to zeros of its own.
    tables = WIDE * sum(w.used for w in run.of("embed", "positions"))
    sums = 1 + (looped and run.per_layer) + (ticks and run.early)
    early = table + _held_head(run) * run.early
    last: Sizes = {
        "gradients": head_sum + _layer_gradients(run) + tables * sums,
        "workspace": early * looped,
    }
    chunked = run.config.loss.chunks > 1  # else the masks are not made before their use
    losses: Sizes = {
        "logits": habits.loss_logits * _logits(run) * chunked,
        "workspace": _gathered(run, run.head) + run.c * run.n * run.config.model.embed_dim,
    }
    stays = saved if ticks or (looped and habits.turn_stays) else {}
    return {
        "forward": _sum(saved, held, masks, _layer(run, ticks, forward=True)),
        "losses": _sum(saved, losses),
        "head": _sum(saved, masks, _head(run)),
        "backward": _sum(saved, held, _layer(run, ticks)),
        "embedding": _sum(stays, last),
    }


def _layer_gradients(run: Run) -> float:
    """Gradients of the layers that run backward together, as their loop stacks them."""
    layers = [w for w in run.stacked if w.trained]
    if run.per_layer:
        return WIDE * sum(w.stored * w.padding for w in layers) / run.config.pipeline.repeats
    return run.c * sum(w.used for w in layers)


def _gathered(run: Run, *weights: Weight) -> float:
    """Weights in use, in the compute type, where they are not what rests or is there for a step."""
    moved = (w.used for w in weights if w.used > w.stored or run.c < WIDE)
    return run.c * sum(moved) * run.per_layer


def _held_head(run: Run) -> float:
    """The head in use while layers run."""
    if run.habits.wide_head_stays and run.config.loss.chunks > 1:
        return _wide_head(run)
    return _gathered(run, run.head)


def _wide_head(run: Run) -> float:
    return WIDE * run.head.used * (run.c < WIDE or _gathered(run, run.head) > 0)


def _head(run: Run) -> Sizes:
    """A chunk of the head: its logits, the weight in use, the sum of its gradients."""
    habits, chunked = run.habits, run.config.loss.chunks > 1
    weight = _wide_head(run) if habits.wide_head and chunked else _gathered(run, run.head)
    hidden = 2 * run.c * run.n * run.config.model.embed_dim  # in chunks, and their gradients
    return {
        "logits": habits.logits * _logits(run),
        "gradients": WIDE * run.head.used * (1 + (habits.head_product and chunked)),
        "workspace": weight + hidden,
    }


def _logits(run: Run) -> float:
    vocab = run.head.used / run.config.model.embed_dim
    return WIDE * run.n / run.config.loss.chunks * vocab


def _layer(run: Run, mapped: bool, forward: bool = False) -> Sizes:
    """One layer at work: weights in use, activations and gradients on their way.

    Under the map over stages each has a mask of its own microbatch, as large as the weights.
    """
    habits, model = run.habits, run.config.model
    weights = run.c * sum(w.used / w.layers for w in run.stacked) * run.per_layer
    sparse = isinstance(model, moe.Config)
    # Two gradients before their reduction; grouped products give them in the compute type.
    gradients = 2 * (run.c if sparse else WIDE) * max(w.used / w.layers for w in run.stacked)
    narrow = run.c / WIDE if habits.narrow_scores else 1.0
    scores = habits.scores - 1 + narrow + mapped * narrow
    work = scores * _scores(run) + run.c * run.n * habits.stream * model.embed_dim
    if isinstance(model, moe.Config):
        work += _experts(run, model) * (0.5 if forward else 1)  # the backward pass has twice both
    else:
        work += run.c * run.n * habits.mlp * model.mlp_dim / run.layout.size("mlp")
    return {"workspace": work + weights + gradients}


def _scores(run: Run) -> float:
    """Scores of a layer, or of the chunk of them that exists at a time, in float32."""
    options, keys = run.layout.attention, run.config.batch.sequence_length
    if options.backend in ("splash", "cudnn"):
        return 0.0  # block by block, on the chip
    part = 1.0
    if options.backend == "chunked":
        part = min(1.0, options.chunk / keys)
    elif options.backend in ("ring", "all_gather"):  # a chunk of a piece's queries, a piece of keys
        keys = keys / (2 * run.layout.size("seq"))
        part = min(1.0, options.chunk / (2 * keys))
    heads = run.config.model.num_heads / run.layout.size("heads")
    return WIDE * run.n * part * heads * keys


def _rows(run: Run, model: moe.Config) -> float:
    """Rows of a buffer that takes whatever the peers may send (models/experts.py)."""
    length = run.config.batch.sequence_length
    if model.dispatch == "capacity":
        _, stride = moe.slots_per_expert(model, length, run.layout)
        return run.n * run.layout.size("seq") / length * model.num_experts * stride
    return run.n * moe.dropless_rows(model, run.layout)


def _experts(run: Run, model: moe.Config) -> float:
    habits, held = run.habits, model.num_experts / run.layout.size("experts")
    F, D = model.expert_mlp_dim / run.layout.size("mlp"), model.embed_dim
    many = held * (model.dispatch == "dropless")
    masked = many * (habits.masked[0] * F + habits.masked[1] * D)
    again = habits.rows_always or run.config.remat.policy != "none"
    exchanged = habits.exchanged * bool(run.layout.dim_axes("experts"))
    rows = (habits.rows[0] * F + (habits.rows[1] + exchanged) * D) * again
    return _rows(run, model) * ((habits.masked_bytes or run.c) * masked + run.c * rows)


def _saved(run: Run) -> Sizes:
    """What the forward pass of all layers leaves for the backward pass."""
    remat, sizes = run.config.remat, {}
    if remat.policy != "none":
        sizes["saved/block input"] = run.c * run.m * run.config.model.embed_dim
    for name, size, product in _activations(run):
        if remat.policy == "none":
            name = "residuals"
        elif not (product if remat.policy == "dots" else name in remat.names):
            continue
        if name not in remat.offload:
            sizes[f"saved/{name}"] = sizes.get(f"saved/{name}", 0.0) + size
    return {name: run.layers * size for name, size in sizes.items()}


def _activations(run: Run) -> list[tuple[str, float, bool]]:
    """(name, bytes, whether remat.policy=dots keeps it) of what a layer's gradient reads."""
    model, layout, c, n, m = run.config.model, run.layout, run.c, run.n, run.m
    backend, operand = layout.attention.backend, min(c, run.habits.operand_bytes)
    D, C = model.embed_dim, _up(model.head_dim, run.habits.lanes)
    H, K = model.num_heads / layout.size("heads"), model.num_kv_heads / layout.size("kv_heads")
    if run.config.remat.policy == "none" and layout.dim_axes("heads") != layout.dim_axes(
        "kv_heads"
    ):
        K = H  # copied to every query head (attention/xla.py)
    named = backend not in ("splash", "ring", "all_gather")  # those name what they need themselves
    found = [
        ("norms", (4 * WIDE * m + 2 * operand * n) * D, False),
        ("query", c * n * H * C, True), ("key", c * n * K * C, True),
        ("value", c * n * K * C, True), ("attention" if named else "heads", c * n * H * C, False),
        ("projections", c * m * D, True),
    ]  # fmt: skip
    if backend == "splash":
        found.append(("attention", c * n * H * C, False))
    if backend == "xla":
        found.append(("scores", _scores(run) * (1 + c / WIDE), False))  # with its weight
    else:
        found.append(("attention", WIDE * n * H, False))  # logs of the sums
    if model.qk_norm:
        found.append(("norms", 2 * WIDE * n * (H + K) * C, False))
    if run.per_layer:
        found.append(("weights", operand * sum(w.used / w.layers for w in run.stacked), False))
    return found + _mlp_activations(run, operand)


def _mlp_activations(run: Run, operand: int) -> list[tuple[str, float, bool]]:
    """Of an MLP (gated in all families but one), or of routed experts."""
    model, c, n, split = run.config.model, run.c, run.n, run.layout.size("mlp")
    if not isinstance(model, moe.Config):
        F, gated = model.mlp_dim / split, model.family != "gpt2"
        hidden = (2 + gated) * c + operand
        return [("mlp", (1 + gated) * c * n * F, True), ("hidden", hidden * n * F, False)]
    R, F, D = _rows(run, model), model.expert_mlp_dim / split, model.embed_dim
    shared = n * model.shared_expert_dim / split
    return [
        ("mlp", 2 * c * (R * F + shared), True), ("hidden", 4 * c * (R * F + shared), False),
        ("rows", 3 * c * R * D, False), ("router", 4 * WIDE * run.m * model.num_experts, False),
    ]  # fmt: skip
