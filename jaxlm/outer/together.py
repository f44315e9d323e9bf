"""Islands in one job: each runs the ordinary train step, and nothing crosses between merges."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm import checkpoint, metrics
from jaxlm import config as cfg
from jaxlm.outer import merge
from jaxlm.outer.exchange import Memory, Programs, make_programs, new_memory, saved_specs
from jaxlm.outer.fleet import (
    Fleet,
    join,
    join_abstract,
    on_island,
    open_fleet,
    rows_of_island,
    split,
    whole_of,
)
from jaxlm.outer.fragments import due, last_merge, waits
from jaxlm.outer.meeting import Meeting
from jaxlm.outer.relocate import compile_for
from jaxlm.program import Program
from jaxlm.state import Arrays, State, abstract_state

logger = logging.getLogger("jaxlm")


class Whole(NamedTuple):
    """Before the islands part: one state on the whole mesh."""

    step: int
    state: State


class Parted(NamedTuple):
    """What a loop over islands keeps. Arrays of `shared` and `memory` are on the whole mesh."""

    step: int
    islands: dict[int, State]  # those that have devices of this process
    weights: dict[int, list]  # of the loss in the last outer.every steps, numbers on its devices
    shared: dict[str, Arrays]  # params: merged ones; fixed: those that the forward changes, merged
    memory: Memory  # of the rule and of the wire
    pending: dict[int, tuple]  # fragment -> (its update, why refused [K])
    verdicts: tuple = ()  # (step, why refused [K]) of merges that are not in the log yet


def meet(config: cfg.Config, whole: Program) -> Meeting:
    """Islands along mesh.replica, from outer.start_step on; before, one ordinary program."""
    fleet = open_fleet(config, whole)
    programs = make_programs(fleet)
    compiled: list[Any] = []

    def begin(state: State) -> Whole | Parted:
        return Whole(0, state) if config.outer.start_step else part(fleet, state, 0)

    def step(state: Whole | Parted, batch: Arrays):
        if isinstance(state, Whole):
            new, values = whole.train_step(state.state, batch)
            done = state.step + 1
            parting = done == config.outer.start_step
            return (part(fleet, new, done) if parting else Whole(done, new)), values
        like = {name: rows_of_island(fleet, array) for name, array in batch.items()}
        rows = split(fleet, batch, like)
        if not compiled:
            meshes = [fleet.meshes[k] for k in fleet.own]
            arguments = [(state.islands[k], rows[k]) for k in fleet.own]
            compiled.extend(compile_for(fleet.island.train_step, meshes, arguments))
        made = {
            k: run(state.islands[k], rows[k]) for k, run in zip(fleet.own, compiled, strict=True)
        }
        values = {k: each[1] for k, each in made.items()}
        state = state._replace(
            step=state.step + 1, islands={k: each[0] for k, each in made.items()},
            weights={k: [*state.weights[k][1:], values[k]["weight"]] for k in fleet.own},
        )  # fmt: skip
        return log_refusals(merge_due(fleet, programs, state), config.steps), values

    return Meeting(
        begin, functools.partial(restore, fleet, programs), step, functools.partial(read, fleet),
        functools.partial(merged, fleet), functools.partial(saved, fleet, programs),
    )  # fmt: skip


def part(fleet: Fleet, state: State, step: int) -> Parted:
    """The islands start from the state of the whole mesh."""
    logger.info(
        "%d islands of %d devices each part at step %d and are merged every %d steps",
        fleet.count, fleet.meshes[0].size, step, fleet.config.outer.every,
    )  # fmt: skip
    shared = {"params": state.params, "fixed": {n: state.fixed[n] for n in fleet.changed}}
    with jax.set_mesh(fleet.whole.mesh):  # a copy: the islands' steps donate their arrays
        shared = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(shared)
    islands = split(fleet, state, fleet.abstract)
    none = np.zeros(fleet.config.outer.every, np.float32)
    weights = {k: [on_island(fleet, k, x) for x in none] for k in fleet.own}
    return Parted(step, islands, weights, shared, new_memory(fleet), {})


def merge_due(fleet: Fleet, programs: Programs, state: Parted) -> Parted:
    """Take in what has waited long enough, and merge the fragment whose turn it is.

    After the last step all fragments are merged at once.
    """
    outer, last = fleet.config.outer, state.step == fleet.config.steps
    for fragment in list(state.pending):
        if last or state.step - (last_merge(outer, state.step, fragment) or 0) >= outer.overlap:
            state = take(fleet, programs, state, fragment)
    turn = due(outer, state.step)
    for fragment in range(outer.fragments) if last else [] if turn is None else [turn]:
        thetas = join(fleet, {k: island.params for k, island in state.islands.items()})
        tokens_K = of_weights(fleet, state, _total)  # trained on in the last outer.every steps
        with jax.set_mesh(fleet.whole.mesh):
            update, memory, verdict = programs.exchange(
                thetas, state.shared["params"], state.memory, fragment, tokens_K
            )
        pending = state.pending | {fragment: (update, verdict.refused)}
        verdicts = (*state.verdicts, (state.step, verdict.refused))
        state = state._replace(memory=memory, pending=pending, verdicts=verdicts)
        if last or not outer.overlap:
            state = take(fleet, programs, state, fragment)
    return state


def take(fleet: Fleet, programs: Programs, state: Parted, fragment: int) -> Parted:
    """Take the update of a fragment in."""
    thetas = join(fleet, {k: island.params for k, island in state.islands.items()})
    fixed = join(fleet, {k: _changed(fleet, island) for k, island in state.islands.items()})
    with jax.set_mesh(fleet.whole.mesh):
        thetas, params, fixed, means = programs.adopt(
            thetas, state.shared["params"], fixed, *state.pending[fragment], fragment
        )
    params_k = split(fleet, thetas, fleet.abstract.params)
    fixed_k = split(fleet, fixed, _changed(fleet, fleet.abstract))
    islands = {
        k: dataclasses.replace(island, params=params_k[k], fixed=island.fixed | fixed_k[k])
        for k, island in state.islands.items()
    }
    pending = {f: update for f, update in state.pending.items() if f != fragment}
    shared = {"params": params, "fixed": means}
    return state._replace(islands=islands, shared=shared, pending=pending)


def log_refusals(state: Parted, steps: int) -> Parted:
    """Name in the log whom the merges of two steps ago refused; at the end, all of them.

    Two steps later, as the loop is one step ahead of the devices: nobody waits for the answer.
    """
    late = state.step if state.step == steps else state.step - 2
    for step, refused_K in state.verdicts:
        if step <= late and jax.process_index() == 0:
            for k, why in enumerate(np.asarray(refused_K)):
                if why:
                    logger.warning("step %d: island %d is refused: %s", step, k, merge.REASONS[why])
    return state._replace(verdicts=tuple(each for each in state.verdicts if each[0] > late))


@jax.jit
def _stack(numbers: list[jax.Array]) -> jax.Array:
    return jnp.stack(numbers)


@jax.jit
def _total(numbers: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(numbers), keepdims=True)


def of_weights(fleet: Fleet, state: Parted, function) -> jax.Array:
    """A function [outer.every] -> [n] of the loss weights of each island, as one array [K n]."""
    made = {}
    for k in fleet.own:
        with jax.set_mesh(fleet.meshes[k]):
            made[k] = function(state.weights[k])
    return join(fleet, made)


def merged(fleet: Fleet, state: Whole | Parted) -> State:
    """The merged model; without an optimizer once the islands have parted."""
    if isinstance(state, Whole):
        return state.state
    frozen = {k: {n: x for n, x in island.fixed.items() if n not in fleet.changed}
              for k, island in state.islands.items()}  # fmt: skip
    counter, fixed = whole_of(fleet, {k: (state.islands[k].step, frozen[k]) for k in fleet.own})
    return State(counter, state.shared["params"], fixed | state.shared["fixed"], ())


def read(fleet: Fleet, values: dict) -> dict[str, float]:
    """Metrics: means over all islands by the weight of their losses. All processes call it."""
    if "loss" in values:  # of a step on the whole mesh
        return metrics.numbers(values)
    numbers = {k: metrics.numbers(each) for k, each in values.items()}
    if fleet.count == 1:
        return numbers[0]
    here, names = jax.process_index(), list(numbers[fleet.own[0]])
    # An island that several processes share is counted by the one that has its first device.
    mine = [k for k in fleet.own if fleet.meshes[k].devices.flat[0].process_index == here]
    sums = np.array([[n[name] * n["weight"] for name in names] for n in (numbers[k] for k in mine)])
    weight = sum(numbers[k]["weight"] for k in mine)
    row = np.append(np.reshape(sums, (-1, len(names))).sum(0), weight)
    if jax.process_count() > 1:
        row = multihost_utils.process_allgather(row).sum(0)
    means = dict(zip(names, (row[:-1] / (row[-1] or 1.0)).tolist(), strict=True))
    return means | {"weight": float(row[-1])}


def saved(fleet: Fleet, programs: Programs, state: Whole | Parted) -> tuple[State, Arrays]:
    """What a checkpoint keeps: the merged model, the optimizers of all islands, and `outer`."""
    if isinstance(state, Whole):
        return state.state, {}
    opt = join(fleet, {k: island.opt for k, island in state.islands.items()})
    mine = {k: (i.params, _changed(fleet, i)) for k, i in state.islands.items()}
    params, fixed = join(fleet, mine)
    refused = np.zeros((fleet.config.outer.fragments, fleet.count), np.int32)
    with jax.set_mesh(fleet.whole.mesh):
        groups = programs.save_memory(state.memory) | {"island": params, "fixed": fixed}
        if fleet.config.outer.overlap:
            held = jax.tree.map(jnp.zeros_like, state.shared["params"])
            for fragment, (update, why_K) in state.pending.items():
                held = programs.hold(held, update, fragment)
                refused[fragment] = np.asarray(why_K)
            groups |= {"pending": held}
    weights = of_weights(fleet, state, _stack)
    flat = _flat(groups) | {"weights": weights, "refused": _everyone(fleet, refused)}
    return dataclasses.replace(merged(fleet, state), opt=opt), flat


def restore(fleet: Fleet, programs: Programs, directory: Any, step: int) -> Whole | Parted:
    """The state of a checkpoint; UserError where it was saved by other islands."""
    config, outer, mesh = fleet.config, fleet.config.outer, fleet.whole.mesh
    with jax.set_mesh(mesh):
        whole = abstract_state(config, fleet.whole.layout, fleet.whole.optimizer, mesh)
    parted = checkpoint.has_outer(directory, step)
    if parted != (step > outer.start_step):
        was = "parted before" if parted else "had not parted by"
        raise cfg.UserError(
            f"outer.start_step={outer.start_step}: the islands of {directory}/{step} {was} that "
            "step; use the value that the run was started with"
        )
    there = checkpoint.read_config(directory, step)["mesh"]["replica"]
    if parted and there not in (-1, fleet.count):
        raise cfg.UserError(
            f"mesh.replica={fleet.count}: {directory}/{step} is of {there} islands that have "
            f"parted; use mesh.replica={there}, or start another run from their merged model with "
            f"checkpoint.start_from={directory.parent}"
        )
    if not parted:
        state = checkpoint.restore_state(directory, step, whole)
        return Whole(step, state) if step < outer.start_step else part(fleet, state, step)
    whole = dataclasses.replace(whole, opt=join_abstract(fleet, fleet.abstract.opt))
    groups = _abstract_groups(fleet)
    row = jax.ShapeDtypeStruct((outer.every,), jnp.float32, sharding=NamedSharding(mesh, P()))
    bad = (outer.fragments, fleet.count)
    flat = _flat(groups) | {"weights": join_abstract(fleet, row)}
    flat["refused"] = jax.ShapeDtypeStruct(bad, jnp.int32, sharding=row.sharding)
    arrays = checkpoint.restore_outer(directory, step, flat)
    state = checkpoint.restore_state(directory, step, whole)
    group = lambda name: {n: arrays[f"{name}.{n}"] for n in groups[name]}
    with jax.set_mesh(mesh):
        memory = programs.load_memory({each: group(each) for each in saved_specs(fleet)})
        waiting = [f for f in range(outer.fragments) if waits(outer, step, f)]
        held = {f: programs.release(group("pending"), f) for f in waiting}
    pending = {f: (update, arrays["refused"][f]) for f, update in held.items()}
    islands = _islands(fleet, step, group("island"), group("fixed"), state)
    rows = split(fleet, arrays["weights"], row)
    weights = {k: [on_island(fleet, k, x) for x in np.asarray(rows[k])] for k in fleet.own}
    shared = {"params": state.params, "fixed": {n: state.fixed[n] for n in fleet.changed}}
    return Parted(step, islands, weights, shared, memory, pending)


def _abstract_groups(fleet: Fleet) -> dict[str, dict]:
    """Shapes of the arrays of `outer` in a checkpoint, by group and name."""
    like, mesh = fleet.abstract.params, fleet.whole.mesh

    def merged_like(n: str, spec: P):
        home = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(like[n].shape, jnp.float32, sharding=home)

    groups = {
        each: join_abstract(fleet, like) if each == "error"
        else {n: merged_like(n, spec) for n, spec in specs.items()}
        for each, specs in saved_specs(fleet).items()
    }  # fmt: skip
    if fleet.config.outer.overlap:
        groups["pending"] = {n: merged_like(n, fleet.homes[n]) for n in like}
    island, fixed = join_abstract(fleet, (like, _changed(fleet, fleet.abstract)))
    return groups | {"island": island, "fixed": fixed}


def _islands(fleet: Fleet, step: int, params: Arrays, fixed: Arrays, state: State):
    """Island -> its state, from what a checkpoint keeps of all."""
    steps = join(fleet, {k: on_island(fleet, k, np.int32(step)) for k in fleet.own})
    frozen = {n: x for n, x in state.fixed.items() if n not in fleet.changed}
    like = fleet.abstract
    apart = split(fleet, State(steps, params, fixed, state.opt),
                  State(like.step, like.params, _changed(fleet, like), like.opt))  # fmt: skip
    rest = split(fleet, frozen, {n: like.fixed[n] for n in frozen})
    return {
        k: dataclasses.replace(island, fixed={n: (island.fixed | rest[k])[n] for n in like.fixed})
        for k, island in apart.items()
    }


def _changed(fleet: Fleet, state: State) -> Arrays:
    return {n: state.fixed[n] for n in fleet.changed}


def _flat(groups: dict[str, Arrays]) -> Arrays:
    return {f"{name}.{n}": x for name, group in groups.items() for n, x in group.items()}


def _everyone(fleet: Fleet, value: np.ndarray) -> jax.Array:
    """A value of the host on every device."""
    home = NamedSharding(fleet.whole.mesh, P())
    return jax.make_array_from_callback(value.shape, home, lambda index: value[index])
