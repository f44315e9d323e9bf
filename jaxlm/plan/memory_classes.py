"""The memory of a compiled train step by class: what its peak is made of, its largest buffers.

`jaxlm.xla` says which buffers are live at the peak; here each gets its class from the names of the
step's arguments, from the scopes of the instructions that write it, and from its part in the
program: what the forward pass writes and the backward pass reads is saved.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from jaxlm import config as cfg
from jaxlm.plan.cost import MEMORY, PARTS
from jaxlm.sharding import Layout
from jaxlm.state import Structure
from jaxlm.xla import Liveness, Module, Shape, Value, compiler_peak, lost_bytes, simulate

ARGUMENTS = {
    "state.params": "parameters", "state.fixed": "parameters", "state.opt": "optimizer",
    "state.step": "optimizer", "batch": "batch",
}  # fmt: skip
PACKING = "fragmentation"  # gaps between the temporaries, where the peak is that of their block
UNEXPLAINED = "unexplained"


class Buffer(NamedTuple):
    """A buffer that is live at the peak."""

    bytes: int
    kind: str  # its class, as in Peak.classes
    name: str  # a parameter, or the part of the model that makes it
    shape: str  # bf16[2,1024,512] on one device
    source: str  # the line that made it, "jaxlm/models/llama.py:94"
    scope: str  # the compiler's op_name


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes of one device at the peak, by class; they sum to the compiler's peak."""

    classes: dict[str, float]
    buffers: tuple[Buffer, ...]  # the largest first
    code: float  # of the program itself: beside the peak, the compilers do not count it


class Shapes(NamedTuple):
    """Sizes on one device, by which arrays of the model are told from one another."""

    weights: dict[tuple[int, ...], str]  # dimensions, sorted and without ones -> a parameter
    vocab: int  # rows of the vocabulary
    stream: tuple[int, ...]  # the residual stream of a microbatch


def classify(
    module: Module, memory: Any, layout: Layout, structure: Structure, config: cfg.Config
) -> Peak:
    """Classify every buffer that is live at the peak; what is not found is `unexplained`."""
    liveness = simulate(module)
    shapes = local_shapes(layout, structure, config)
    buffers = [
        describe(module, liveness, members, shapes)
        for members in liveness.live(liveness.time).values()
    ]
    classes: dict[str, float] = {}
    for one in buffers:
        classes[one.kind] = classes.get(one.kind, 0.0) + one.bytes
    peak, packed = compiler_peak(memory)
    if packed:
        classes[PACKING] = lost_bytes(liveness)
    classes[UNEXPLAINED] = peak - sum(classes.values())
    order = [*MEMORY, PACKING, UNEXPLAINED]
    rank = lambda kind: (order.index(kind.split("/")[0]), kind)
    return Peak(
        {kind: classes[kind] for kind in sorted(classes, key=rank)},
        tuple(sorted(buffers, key=lambda one: -one.bytes)),
        float(memory.generated_code_size_in_bytes),
    )


def local_shapes(layout: Layout, structure: Structure, config: cfg.Config) -> Shapes:
    """What the arrays of a model are on one device, at rest and in use, one layer or stacked."""
    weights: dict[tuple[int, ...], str] = {}
    for name in structure.weights:
        dims, shape = structure.dims[name], structure.shapes[name]
        for spec in (layout.stored(dims), layout.spec(dims)):
            local = layout.local_shape(spec, shape)
            for one in (local, local[1:] if dims.startswith("layers ") else local):
                if len(_key(one)) > 1:
                    weights.setdefault(_key(one), name)
    batch = config.batch
    stream = (
        max(1, batch.sequences // batch.microbatches), batch.sequence_length,
        config.model.embed_dim,
    )  # fmt: skip
    vocab = (cfg.padded_vocab(config.model),)
    return Shapes(
        weights, layout.local_shape("vocab", vocab)[0],
        _key(layout.local_shape("batch residual_seq _", stream)),
    )  # fmt: skip


def _key(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in dims if n > 1))


def describe(module: Module, liveness: Liveness, members: list[Value], shapes: Shapes) -> Buffer:
    """One buffer, from all the values that lie in it during the program."""
    argument = next((value for value in members if value.argument), None)
    if argument is not None:
        op_name = argument.instruction.op_name
        place, name = _argument(op_name)
        return Buffer(
            argument.bytes, ARGUMENTS.get(place, "workspace"), name, _text(argument.shape), "",
            op_name,
        )  # fmt: skip
    first = max(members, key=lambda value: value.bytes)
    writers = liveness.writers(members)
    maker = next((value for value in writers if _part(value.scope)), (writers or [first])[0])
    readers = liveness.readers.get(first.buffer, set())
    weight = shapes.weights.get(_key(first.shape.dims), "")
    kind = _kind(writers, readers, weight, _part(maker.scope))
    head = any(_in_head(value.instruction.op_name) for value in members)
    if head and not weight and shapes.vocab in first.shape.dims:
        kind = "logits"
    if kind.startswith("saved/") and liveness.carried(members) and _is_stream(first, shapes):
        kind = "saved/block input"
    name = weight or _part(maker.scope) or "other"
    source = _source(module, maker)
    return Buffer(first.bytes, kind, name, _text(first.shape), source, maker.scope)


def _argument(op_name: str) -> tuple[str, str]:
    """state.params['embed'] as (state.params, embed); of the optimizer, the moment as well."""
    place = next((one for one in ARGUMENTS if op_name.startswith(one)), "")
    keys = re.findall(r"\['([^']*)'\]", op_name)
    moment = re.search(r"\.(mu|nu|count|\w+)\[", op_name.removeprefix(place))
    name = keys[-1] if keys else op_name
    return place, f"{moment[1]} {name}" if moment and place == "state.opt" else name


def _kind(writers: list[Value], readers: set[str], weight: str, part: str) -> str:
    """The class of a temporary; `weight`: the parameter whose shape it has, `part`: its maker."""
    scopes = [value.scope for value in writers]
    forward = any(map(_in_forward, scopes))
    used = any(map(_in_forward, readers)) or any(
        value.origin.opcode.startswith("all-gather") or value.scope.startswith("state.")
        for value in writers
    )
    if weight and not forward and not used and not any("optimizer" in scope for scope in scopes):
        return "gradients"
    if not forward or not any("transpose(" in reader for reader in readers):
        return "workspace"
    return "saved/weights" if weight else f"saved/{part or 'residuals'}"


def _in_forward(scope: str) -> bool:
    return "jvp(" in scope and "transpose(" not in scope


def _in_head(scope: str) -> bool:
    return re.search(r"[(/]head[)/]", scope) is not None


def _is_stream(value: Value, shapes: Shapes) -> bool:
    """Whether it is the residual stream, or a stack of it."""
    key = _key(value.shape.dims)
    return key == shapes.stream or any(_without(key, n) == shapes.stream for n in key)


def _without(key: tuple[int, ...], number: int) -> tuple[int, ...]:
    left = list(key)
    left.remove(number)
    return tuple(left)


def _part(scope: str) -> str:
    """The innermost part of the model that a scope names; empty: none."""
    known = {*PARTS, "embedding"} - {"optimizer", "other"}
    found = [word for word in re.split(r"[/()]", scope) if word in known]
    return found[-1] if found else ""


def _text(shape: Shape) -> str:
    return f"{shape.dtype}[{','.join(map(str, shape.dims))}]"


def _source(module: Module, value: Value) -> str:
    """The innermost line of jaxlm that made a value; where there is none, the innermost line."""
    places = module.source(value.origin)
    own = [(file, line) for file, line in places if "/jaxlm/" in file and "/site-" not in file]
    for file, line in own or places[:1]:
        return f"{'jaxlm/' + file.rsplit('/jaxlm/', 1)[1] if own else file}:{line}"
    return ""
