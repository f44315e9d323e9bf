"""Proof that a layout trains the same model: the config, shrunk, on each mesh against one device.

shrink.py makes the small config. Compared are the initial parameters (bit for bit), loss, gradient
norm, metrics, every gradient, three updates of SGD and of the config's own optimizer, and the fixed
variables that these steps change. Those of the first batch are compared once more with another
number of microbatches on the mesh, unless the model declares that it changes numbers.
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
from jaxlm.data.pack import FIELDS
from jaxlm.loss import UPDATE, update_fixed
from jaxlm.mesh import open_mesh
from jaxlm.program import loss_and_grads, make_updates
from jaxlm.sharding import Layout, batch_shardings, sequence_order
from jaxlm.shrink import MeshSizes, own_mesh, replace_mesh, shrink
from jaxlm.state import State, create_state, model_structure
from jaxlm.validate import validate

TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
FLOOR = 1e-4  # of the global norm: a smaller tensor is compared with this
STEPS = 3
MOST = 512  # devices of the largest mesh that may be asked for
FAST = {"xla_backend_optimization_level": "0"}  # the same HLO, compiled in half the time
Numbers = dict[str, dict[str, np.ndarray]]  # what -> name -> array
OPTIMIZERS = {
    "adamw": "AdamW",
    "adafactor": "Adafactor",
    "lion": "Lion",
    "muon": "Muon",
    "sgd": "SGD",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One mesh against one device."""

    mesh: str
    devices: int
    microbatches: tuple[int, ...]  # the config's number, and the other that was tried
    equal: bool
    precision: str  # that of the verdict: float64 where float32 was not enough
    errors: dict[str, float]  # largest error of each kind in float32
    worst: dict[str, str]  # its tensor
    first: str  # the first tensor that differs, and by how much; empty if none does


def verify_layout(config: cfg.Config, meshes: Sequence[MeshSizes]) -> Iterator[Result]:
    """Compare each mesh with one device; needs as many devices as the largest mesh has."""
    small = shrink(config, meshes)
    one = replace_mesh(small, {})
    reference = functools.cache(lambda double: measure(one, double))
    for sizes in meshes:
        on_mesh = replace_mesh(small, sizes)
        yield verify_mesh(on_mesh, reference, other_microbatches(on_mesh))


def other_microbatches(config: cfg.Config) -> int:
    """A number of microbatches that the mesh allows and that must give the same numbers; or 0."""
    if config.model.microbatches_change_numbers:
        return 0
    own, stages = config.batch.microbatches, config.mesh.stage
    for count in (1, 2, stages, 2 * stages):
        if count != own and _allows(config, count):
            return count
    return 0


def _allows(config: cfg.Config, count: int) -> bool:
    try:
        validate(replace_microbatches(config, count), _devices(config))
    except cfg.UserError:
        return False
    return True


def replace_microbatches(config: cfg.Config, count: int) -> cfg.Config:
    """The config with another number of microbatches."""
    return dataclasses.replace(config, batch=dataclasses.replace(config.batch, microbatches=count))


def _devices(config: cfg.Config) -> int:
    return math.prod(getattr(config.mesh, axis) for axis in cfg.AXES)


def verify_mesh(config: cfg.Config, reference, other: int = 0) -> Result:
    """Compare a config as it is, on its mesh, with `reference(double)`: `measure` on one device.

    Then again with `other` microbatches, if that is not 0: of the first batch alone.
    """
    sizes = {axis: size for axis in cfg.AXES if (size := getattr(config.mesh, axis)) > 1}
    ranked, bad, precision = _compare(config, reference, False)
    if not bad and other:
        changed = replace_microbatches(config, other)
        more, bad, second = _compare(changed, reference, True)
        precision = max(precision, second)  # float64 where either needs it
        rename = lambda each: (each[0], f"{each[1]} in {other} microbatches", each[2])
        ranked, bad = ranked + [rename(each) for each in more], bad and rename(bad)
    worst: dict[str, tuple[float, str]] = {}
    for what, name, error in ranked:
        if what not in worst or not error <= worst[what][0]:
            worst[what] = error, name
    return Result(
        mesh=",".join(f"{axis}={size}" for axis, size in sizes.items()) or "one device",
        devices=math.prod(sizes.values()),
        microbatches=(config.batch.microbatches, *([other] if other else [])),
        equal=not bad, precision=precision,
        errors={what: error for what, (error, _) in worst.items()},
        worst={what: name for what, (_, name) in worst.items()},
        first=f"{bad[0]} of {bad[1]} by {bad[2]:.2g} in {precision}" if bad else "",
    )  # fmt: skip


def _compare(config: cfg.Config, reference, start_only: bool) -> tuple[list, tuple | None, str]:
    """(errors in float32, the first that is too large or None, the precision that decided)."""
    ranked = list(errors(reference(False), measure(config, False, start_only)))
    bad = _first(ranked, "float32")
    if not bad or bad[0] == "initial":
        return ranked, bad, "float32"
    found = measure(config, True, start_only)
    return ranked, _first(errors(reference(True), found), "float64"), "float64"


def _first(found: Iterable[tuple[str, str, float]], precision: str) -> tuple | None:
    """The first error above the tolerance; not a number counts as above."""
    above = lambda what, error: not error <= (0 if what == "initial" else TOLERANCE[precision])
    return next((each for each in found if above(each[0], each[2])), None)


def errors(expected: Numbers, found: Numbers) -> Iterator[tuple[str, str, float]]:
    """(what, name, error) of every array found: |a - b| / max(|b|, FLOOR x global norm), L2 norms.

    Initial values differ by 0 or by 1. All optimizers but SGD divide a gradient by its own size, so
    that of one that is rounding alone they make a full step: there elements count whose gradient is
    above half the root mean square of its tensor, in tensors above the floor.
    """
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))
    for what in found:
        arrays = expected[what]
        total = norm([norm(b) for b in arrays.values()])
        for name, b in arrays.items():
            a = found[what][name]
            if what == "initial":
                yield what, name, float(a.tobytes() != b.tobytes())
                continue
            if what.endswith("update") and what != "SGD update":
                keep = expected["significant"][name]
                a, b = np.where(keep, a, 0), np.where(keep, b, 0)
            if what != "significant":
                floor = FLOOR if what == "metric" else FLOOR * total
                yield what, name, norm(a - b) / max(norm(b), floor, 1e-30)


def measure(config: cfg.Config, double: bool, start_only: bool = False) -> Numbers:
    """What a config computes on the first devices, as many as its mesh has.

    With `start_only` loss, metrics and gradients of the first batch alone.
    """
    mesh, layout = open_mesh(config, jax.devices()[: _devices(config)])
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
            if start_only:
                return _at_start(*_gradients(config, layout, mesh)(state, 0)[:3])
            return {"initial": initial} | _steps(config, layout, mesh, state)


def _gradients(config: cfg.Config, layout: Layout, mesh):
    """(state, number of the batch) -> gradients, metrics with the loss, their norm, new `fixed`."""
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

    # Without the optimizer's state, which differs between optimizers: one program serves both.
    return lambda state, number: gradients(dataclasses.replace(state, opt=()), batches[number])


def _at_start(grads: dict, metrics: dict, norm: jax.Array) -> Numbers:
    """What one call of `_gradients` found."""
    return {
        "loss": {"loss": np.asarray(metrics["loss"])},
        "gradient": {name: np.asarray(g) for name, g in grads.items()},
        "gradient norm": {"all gradients": np.asarray(norm)},
        "metric": {name: np.asarray(v) for name, v in metrics.items() if name != "loss"},
    }


def _steps(config: cfg.Config, layout: Layout, mesh, start: State) -> Numbers:
    """Gradients at the start, then three updates of each optimizer."""
    gradients = _gradients(config, layout, mesh)
    found: Numbers = {}
    for kind, optimizer in _optimizers(config, model_structure(config.model, layout).dims).items():

        @functools.partial(jax.jit, compiler_options=FAST)
        def advance(state: State, grads, fixed, optimizer=optimizer):
            updates, opt, _ = make_updates(config.optimizer, optimizer, state, grads)
            params = jax.tree.map(jnp.add, state.params, updates)
            return updates, State(state.step + 1, params, fixed, opt)

        state = dataclasses.replace(start, opt=jax.jit(optimizer.init)(start.params))
        for step in range(STEPS):
            grads, aux, norm, fixed = gradients(state, step)
            host = {name: np.asarray(g) for name, g in grads.items()}
            if not found:
                found = _at_start(grads, aux, norm)
            if kind != "SGD":
                found["significant"] = _significant(host, found.get("significant"))
            changed = [n.removeprefix(UPDATE) for n in aux if n.startswith(UPDATE)]
            found["fixed"] = {
                f"{name}, step {step}, {kind}": np.asarray(fixed[name]) for name in changed
            } | found.get("fixed", {})
            updates, state = advance(state, grads, fixed)
            found[f"{kind} update"] = {
                f"{name}, step {step}": np.asarray(update) for name, update in updates.items()
            } | found.get(f"{kind} update", {})
    keep = found["significant"]  # of the last kind
    found["significant"] = {
        name: keep[name.rpartition(", step ")[0]] for name in found[f"{kind} update"]
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
    """SGD, whose updates are the gradients, and the config's own."""
    own = dataclasses.replace(
        config.optimizer, schedule="constant", warmup_steps=0, learning_rate=1e-3
    )
    kind = OPTIMIZERS[own.name]
    return {"SGD": optax.sgd(0.1), kind: optim.make_optimizer(own, STEPS, dims)}


def unlike(name: str, initial: np.ndarray) -> np.ndarray:
    """Constant arrays (norms, biases) with unequal elements, so that a misplaced one is seen."""
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


# The command.


def parse_mesh(text: str) -> MeshSizes:
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


def chosen_meshes(config: cfg.Config, texts: Sequence[str]) -> list[MeshSizes]:
    """The meshes that a command names, or the config's own."""
    meshes = [parse_mesh(text) for text in texts] or [own_mesh(config)]
    for sizes in meshes:
        if (count := math.prod(sizes.values())) > MOST:
            raise cfg.UserError(
                f"a mesh of {count} devices is too large to simulate; give at most {MOST}: what "
                "an axis does wrong, it does at a size of 2 or 4"
            )
    return meshes


def run(config: cfg.Config, meshes: Sequence[MeshSizes], as_json: bool) -> bool:
    """`jaxlm verify-layout`: print a row for each mesh; whether all are equal."""
    results = list(verify_layout(config, meshes))
    if as_json:
        print(json.dumps([to_dict(result) for result in results], allow_nan=False))
    else:
        _print_table(results)
    return all(result.equal for result in results)


def to_dict(result: Result) -> dict[str, Any]:
    """A result as plain data; null for an error that is no number, as NaN is."""
    finite = {name: e if math.isfinite(e) else None for name, e in result.errors.items()}
    return dataclasses.asdict(result) | {"errors": finite}


def _print_table(results: list[Result]) -> None:
    table = Table(
        "mesh",
        "devices",
        "microbatches",
        title="largest relative difference to one device, float32",
    )
    kinds = [kind for kind in results[0].errors if kind != "initial"]
    for kind in ("initial values", *kinds, "verdict"):
        table.add_column(kind)
    for r in results:
        initial = "same bits" if not r.errors["initial"] else "differ"
        verdict = "same run" if r.equal else "DIFFERS"
        if r.precision == "float64" and r.equal:
            verdict += " (float64: below 1e-9)"
        shown = [f"{r.errors[kind]:.1e}" for kind in kinds]
        counts = " and ".join(map(str, r.microbatches))
        table.add_row(r.mesh, str(r.devices), counts, initial, *shown, verdict)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    for r in results:
        if not r.equal:
            console.print(f"{r.mesh}: {r.first}", markup=False, soft_wrap=True)
