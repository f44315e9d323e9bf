"""Proof that a layout trains the same model: the config, shrunk, on each mesh against one device.

Widths, layers and vocabulary become small; what makes the program what it is stays: the family,
heads and experts, remat, microbatches, chunks, segments, rules. Compared are the initial parameters
(bit for bit), loss, gradient norm, metrics, every gradient, three updates of SGD and of AdamW, and
the fixed variables that these steps change.
What differs in float32 (a mistake, a long sum, a token whose experts are nearly tied) is computed
again in float64, where rounding is a 1e-9th of it and a mistake is as large as before.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from jaxlm import config as cfg
from jaxlm import optim
from jaxlm.attention import SHORT
from jaxlm.data.pack import FIELDS
from jaxlm.loss import UPDATE, update_fixed
from jaxlm.sharding import Layout, batch_shardings, sequence_order
from jaxlm.state import State, create_state, model_structure, open_mesh
from jaxlm.train import loss_and_grads, make_updates
from jaxlm.validate import validate

TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
FLOOR = 1e-4  # of the global norm: a smaller tensor is compared with this
STEPS = 3
LARGEST = 64  # devices of the config's own mesh that are simulated; above, its axes shrink to 2
MOST = 512  # devices of a mesh that is asked for
FAST = {"xla_backend_optimization_level": "0"}  # the same HLO, compiled in half the time
Numbers = dict[str, dict[str, np.ndarray]]  # what -> name -> array
Sizes = dict[str, int]  # of the axes of a mesh


@dataclasses.dataclass(frozen=True)
class Result:
    """One mesh against one device."""

    mesh: str
    devices: int
    equal: bool
    precision: str  # that of the verdict: float64 where float32 was not enough
    errors: dict[str, float]  # largest error of each kind in float32
    worst: dict[str, str]  # its tensor
    first: str  # the first tensor that differs, and by how much; empty if none does


def verify_layout(config: cfg.Config, meshes: Sequence[Sizes]) -> Iterator[Result]:
    """Compare each mesh with one device; needs as many devices as the largest mesh has."""
    small = shrink(config, meshes)
    one = replace_mesh(small, {})
    reference = functools.cache(lambda double: measure(one, double))
    for sizes in meshes:
        yield verify_mesh(replace_mesh(small, sizes), reference)


def verify_mesh(config: cfg.Config, reference) -> Result:
    """Compare a config as it is, on its mesh, with `reference(double)`: `measure` on one device."""
    sizes = {axis: size for axis in cfg.AXES if (size := getattr(config.mesh, axis)) > 1}
    found = measure(config, False)
    ranked = list(errors(reference(False), found))
    worst: dict[str, tuple[float, str]] = {}
    for what, name, error in ranked:
        if what not in worst or not error <= worst[what][0]:
            worst[what] = error, name
    precision, bad = "float32", _first(ranked, "float32")
    if bad and bad[0] != "initial":
        precision = "float64"
        bad = _first(errors(reference(True), measure(config, True)), "float64")
    return Result(
        mesh=",".join(f"{axis}={size}" for axis, size in sizes.items()) or "one device",
        devices=math.prod(sizes.values()), equal=not bad, precision=precision,
        errors={what: error for what, (error, _) in worst.items()},
        worst={what: name for what, (_, name) in worst.items()},
        first=f"{bad[0]} of {bad[1]} by {bad[2]:.2g} in {precision}" if bad else "",
    )  # fmt: skip


def _first(found: Iterable[tuple[str, str, float]], precision: str) -> tuple | None:
    """The first error above the tolerance; not a number counts as above."""
    above = lambda what, error: not error <= (0 if what == "initial" else TOLERANCE[precision])
    return next((each for each in found if above(each[0], each[2])), None)


def errors(expected: Numbers, found: Numbers) -> Iterator[tuple[str, str, float]]:
    """(what, name, error) of every array: |a - b| / max(|b|, FLOOR x global norm), L2 norms.

    Initial values differ by 0 or by 1. AdamW divides a gradient by its own size, so that of one
    that is rounding alone it makes a full step: there elements count whose gradient is above half
    the root mean square of its tensor, in tensors above the floor.
    """
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))
    for what, arrays in expected.items():
        total = norm([norm(b) for b in arrays.values()])
        for name, b in arrays.items():
            a = found[what][name]
            if what == "initial":
                yield what, name, float(a.tobytes() != b.tobytes())
                continue
            if what.startswith("AdamW"):
                keep = expected["significant"][name]
                a, b = np.where(keep, a, 0), np.where(keep, b, 0)
            if what != "significant":
                floor = FLOOR if what == "metric" else FLOOR * total
                yield what, name, norm(a - b) / max(norm(b), floor, 1e-30)


def measure(config: cfg.Config, double: bool) -> Numbers:
    """What a config computes on the first devices, as many as its mesh has."""
    sizes = [getattr(config.mesh, axis) for axis in cfg.AXES]
    mesh, layout = open_mesh(config, jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh):
        state = create_state(config, layout, optax.identity(), mesh)
        places = {name: array.sharding for name, array in (state.params | state.fixed).items()}
        initial = {name: np.asarray(array) for name, array in (state.params | state.fixed).items()}
        kind = np.float64 if double else np.float32
        start = {name: unlike(name, array).astype(kind) for name, array in initial.items()}
        with jax.enable_x64(double):
            if double:
                layout = dataclasses.replace(layout, compute="float64", reduce="float64")
            put = lambda names: {n: jax.device_put(start[n], places[n]) for n in names}
            state = State(state.step, put(state.params), put(state.fixed), ())
            return {"initial": initial} | _steps(config, layout, mesh, state)


def _steps(config: cfg.Config, layout: Layout, mesh, start: State) -> Numbers:
    """Gradients at the start, then three updates of each optimizer."""
    structure = model_structure(config.model, layout)
    shardings = batch_shardings(config, layout, mesh)
    batches = [
        {n: jax.device_put(a[n], s) for n, s in shardings.items()}
        for a in map(functools.partial(make_batch, config, layout), range(STEPS))
    ]

    @functools.partial(jax.jit, compiler_options=FAST)
    def gradients(state: State, batch):
        loss, weight, grads, aux = loss_and_grads(config, structure, state, batch, layout)
        fixed, _ = update_fixed(config.model, state.fixed, aux)
        mean = lambda tree: jax.tree.map(lambda x: x / weight, tree)
        metrics = {"loss": loss / weight, **mean(aux)}
        return mean(grads), metrics, optim.global_norm(mean(grads)), fixed

    found: Numbers = {}
    for kind, optimizer in _optimizers(config, structure.dims).items():

        @functools.partial(jax.jit, compiler_options=FAST)
        def advance(state: State, grads, fixed, optimizer=optimizer):
            updates, opt, _ = make_updates(config.optimizer, optimizer, state, grads)
            params = jax.tree.map(jnp.add, state.params, updates)
            return updates, State(state.step + 1, params, fixed, opt)

        state = dataclasses.replace(start, opt=jax.jit(optimizer.init)(start.params))
        for step, batch in enumerate(batches):
            grads, aux, norm, fixed = gradients(state, batch)
            host = {name: np.asarray(g) for name, g in grads.items()}
            if not found:
                found = {"loss": {"loss": np.asarray(aux.pop("loss"))}, "gradient": host}
                found["gradient norm"] = {"all gradients": np.asarray(norm)}
                found["metric"] = {name: np.asarray(value) for name, value in aux.items()}
            if kind == "AdamW":
                found["significant"] = _significant(host, found.get("significant"))
            changed = [n.removeprefix(UPDATE) for n in aux if n.startswith(UPDATE)]
            found["fixed"] = {
                f"{name}, step {step}, {kind}": np.asarray(fixed[name]) for name in changed
            } | found.get("fixed", {})
            updates, state = advance(state, grads, fixed)
            found[f"{kind} update"] = {
                f"{name}, step {step}": np.asarray(update) for name, update in updates.items()
            } | found.get(f"{kind} update", {})
    keep = found["significant"]
    found["significant"] = {
        name: keep[name.rpartition(", step ")[0]] for name in found["AdamW update"]
    }
    return found


def _significant(grads: dict[str, np.ndarray], before: dict | None) -> dict[str, np.ndarray]:
    """Elements whose gradient is not rounding alone, in every step so far."""
    norms = {name: np.linalg.norm(g.astype(np.float64)) for name, g in grads.items()}
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    keep = {
        name: (abs(g) > 0.5 * norms[name] / math.sqrt(g.size)) & (norms[name] > FLOOR * total)
        for name, g in grads.items()
    }
    return keep if before is None else {name: keep[name] & before[name] for name in keep}


def _optimizers(config: cfg.Config, dims: dict[str, str]) -> dict[str, Any]:
    adamw = dataclasses.replace(
        config.optimizer, name="adamw", schedule="constant", warmup_steps=0, learning_rate=1e-3
    )
    return {"SGD": optax.sgd(0.1), "AdamW": optim.make_optimizer(adamw, STEPS, dims)}


def unlike(name: str, initial: np.ndarray) -> np.ndarray:
    """Constant arrays (norms, biases) made unlike everywhere: else nobody sees a misplaced one."""
    if initial.size < 2 or np.ptp(initial) > 0:
        return initial
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return initial + np.float32(0.1) * rng.standard_normal(initial.shape, np.float32)


def make_batch(config: cfg.Config, layout: Layout, step: int) -> dict[str, np.ndarray]:
    """A batch of random documents, some cut at the end, some tokens without weight; seeded."""
    rng = np.random.default_rng([config.seed, step])
    shape = B, S = config.batch.sequences, config.batch.sequence_length
    made: dict[str, np.ndarray] = {name: np.zeros(shape, dtype) for name, dtype in FIELDS.items()}
    made["tokens"] = rng.integers(0, config.model.vocab_size, shape, np.int32)
    made["targets"] = rng.integers(0, config.model.vocab_size, shape, np.int32)
    made["weights"] = (rng.random(shape) < 0.9).astype(np.float32)
    made["positions"][:] = np.arange(S)
    made["segments"][:] = 1
    for row in range(B if config.data.segments else 0):
        cuts = np.sort(rng.choice(np.arange(1, S), size=min(3, S - 1), replace=False))
        made["segments"][row] = 1 + np.searchsorted(cuts, np.arange(S), side="right")
        starts = np.concatenate([[0], cuts])
        made["positions"][row] = np.arange(S) - starts[made["segments"][row] - 1]
        if row % 2:  # padding
            for name in ("weights", "segments", "positions"):
                made[name][row, cuts[-1] :] = 0
    order = sequence_order(layout, S)
    return {name: array[:, order] for name, array in made.items()}


# The small config.


def replace_mesh(config: cfg.Config, sizes: Sizes) -> cfg.Config:
    """The config on another mesh; `dcn` stays where the mesh still has its factors."""
    dcn = {a: n for a, n in config.mesh.dcn.items() if sizes.get(a, 1) % n == 0}
    every = {axis: sizes.get(axis, 1) for axis in cfg.AXES}
    mesh = dataclasses.replace(cfg.Mesh(), dcn=dcn, **every)
    pipeline = config.pipeline if mesh.stage > 1 else cfg.Pipeline()
    return dataclasses.replace(config, mesh=mesh, pipeline=pipeline)


def own_mesh(config: cfg.Config) -> Sizes:
    """The config's mesh, with -1 filled up to 8 devices; a large mesh has axes of 2."""
    fill = max(1, 8 // math.prod(max(1, getattr(config.mesh, a)) for a in cfg.AXES))
    sizes = {axis: getattr(config.mesh, axis) for axis in cfg.AXES}
    sizes = {axis: fill if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) > LARGEST:
        sizes = {axis: min(size, 2) for axis, size in sizes.items()}
    return sizes


def shrink(config: cfg.Config, meshes: Sequence[Sizes]) -> cfg.Config:
    """The config in float32 with the smallest sizes that all the meshes divide."""
    for sizes in meshes:
        validate(replace_mesh(config, sizes), math.prod(sizes.values()))
    unit = functools.partial(_unit, config, meshes)
    m, b = config.model, config.batch
    microbatches = min(b.microbatches, 2 * max(sizes.get("stage", 1) for sizes in meshes))
    chunks = min(config.loss.chunks, 4)
    length = math.lcm(2 * unit("seq"), unit("residual_seq"), unit("seq") * chunks)
    length *= -(-32 // length)
    multiple = math.lcm(unit("vocab"), 8)
    fields = {field.name for field in dataclasses.fields(m)}
    width = math.lcm(unit("embed") * unit("layers"), unit("norm"), 16)  # generation: over both
    embed = width * -(-32 // width)
    head = math.lcm(unit("head_dim"), 8)
    smaller = dict(
        num_layers=_layers(config, meshes), embed_dim=embed, head_dim=head,
        mlp_dim=math.lcm(unit("mlp"), 16) * 3, vocab_multiple=multiple,
        vocab_size=multiple * max(2, -(-64 // multiple)) - 3,
        init_std=m.init_std * math.sqrt(max(1.0, m.embed_dim / embed)),
        sliding_window=min(m.sliding_window, length // 3),
    )  # fmt: skip
    for name in ("expert_mlp_dim", "shared_expert_dim"):
        if vars(m).get(name):
            smaller[name] = math.lcm(unit("mlp"), 16)
    if "max_positions" in fields:
        smaller["max_positions"] = math.lcm(length, unit("positions"))
    kernels = config.attention.backend in ("splash", "cudnn")
    whole = config.attention.backend == "xla" or (
        config.attention.backend == "auto" and b.sequence_length <= SHORT
    )
    sequences = math.lcm(unit("batch"), 2) * microbatches
    return dataclasses.replace(
        config,
        model=dataclasses.replace(m, **smaller),
        batch=cfg.Batch(
            sequences=sequences, sequence_length=length, microbatches=microbatches
        ),
        attention=dataclasses.replace(
            config.attention, backend="xla" if whole and not kernels else "chunked",
            chunk=max(1, length // 4),
        ),
        precision=cfg.Precision(compute="float32"),
        loss=dataclasses.replace(config.loss, chunks=chunks),
        sample=cfg.Sample(),
    )  # fmt: skip


def _unit(config: cfg.Config, meshes: Sequence[Sizes], dim: str) -> int:
    """What a dimension must be a multiple of, in use and at rest, on every mesh."""
    axes = (cfg.RULES | config.rules).get(dim, ()), (cfg.STORAGE | config.storage).get(dim, ())
    count = lambda sizes: math.prod(sizes.get(axis, 1) for axis in {*axes[0], *axes[1]})
    return math.lcm(*(count(sizes) for sizes in meshes))


def _layers(config: cfg.Config, meshes: Sequence[Sizes]) -> int:
    """At least two layers, and as many as the stages take."""
    unit = _unit(config, meshes, "layers") * config.pipeline.repeats
    return unit * (1 if unit > 1 else min(2, config.model.num_layers))


# The command.


def parse_mesh(text: str) -> Sizes:
    """fsdp=2,tensor=4 as sizes."""
    sizes = {}
    for part in text.split(","):
        axis, equals, size = part.strip().partition("=")
        if axis not in cfg.AXES or not equals or not size.isdecimal() or int(size) < 1:
            raise cfg.UserError(
                f"MESH {text!r}: {part!r} is not axis=size; write fsdp=2,tensor=4, of the axes "
                f"{', '.join(cfg.AXES)}"
            )
        if axis in sizes:
            raise cfg.UserError(f"MESH {text!r}: axis {axis} is given twice; once is enough")
        sizes[axis] = int(size)
    return sizes


def is_mesh(text: str) -> bool:
    """Whether an argument is a mesh, and not an override such as mesh.fsdp=2 or steps=5."""
    return text.split("=")[0].strip() in cfg.AXES


def chosen_meshes(config: cfg.Config, texts: Sequence[str]) -> list[Sizes]:
    """The meshes that a command names, or the config's own."""
    meshes = [parse_mesh(text) for text in texts] or [own_mesh(config)]
    for sizes in meshes:
        if (count := math.prod(sizes.values())) > MOST:
            raise cfg.UserError(
                f"a mesh of {count} devices is too large to simulate; give at most {MOST}: what "
                "an axis does wrong, it does at a size of 2 or 4"
            )
    return meshes


def run(config: cfg.Config, meshes: Sequence[Sizes], as_json: bool) -> bool:
    """`jaxlm verify-layout`: print a row for each mesh; whether all are equal."""
    results = list(verify_layout(config, meshes))
    if as_json:
        print(json.dumps([dataclasses.asdict(result) for result in results]))
    else:
        _print_table(results)
    return all(result.equal for result in results)


def _print_table(results: list[Result]) -> None:
    table = Table("mesh", "devices", title="largest relative difference to one device, float32")
    kinds = [kind for kind in results[0].errors if kind != "initial"]
    for kind in ("initial values", *kinds, "verdict"):
        table.add_column(kind)
    for r in results:
        initial = "same bits" if not r.errors["initial"] else "differ"
        verdict = "same run" if r.equal else "DIFFERS"
        if r.precision == "float64" and r.equal:
            verdict += " (float64: below 1e-9)"
        shown = [f"{r.errors[kind]:.1e}" for kind in kinds]
        table.add_row(r.mesh, str(r.devices), initial, *shown, verdict)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    for r in results:
        if not r.equal:
            console.print(f"{r.mesh}: {r.first}", markup=False, soft_wrap=True)
