"""Islands in one job, against islands trained one by one and merged by numpy in float64."""

import dataclasses
import json
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm import checkpoint, configfile, outer
from jaxlm.cli import main
from jaxlm.data import load, open_split
from jaxlm.outer import exchange, fleet, merge, together
from jaxlm.outer.relocate import compile_for
from jaxlm.program import make_program, program_on
from jaxlm.sharding import batch_shardings, sequence_order
from jaxlm.state import create_state
from jaxlm.validate import validate

STEPS = 12
# Islands have the same devices in every test, and rows of equal weight.
ISLANDS = ["mesh.replica=2", "mesh.fsdp=2", "data.segments=false"]
SGD = ["optimizer.name=sgd", "optimizer.learning_rate=0.1", "optimizer.clip_norm=0",
       "optimizer.weight_decay=0", "loss.z_loss=0"]  # fmt: skip
PROGRAMS: dict = {}


def once(key, make):
    """What `make` returns, made once for a key: compiling takes most of the time of these tests."""
    if key not in PROGRAMS:
        PROGRAMS[key] = make()
    return PROGRAMS[key]


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    """Tests whose islands run the same config on the same devices share the compiled step."""
    make_step = program_on
    monkeypatch.setattr(fleet, "program_on", lambda config, mesh, layout: once(
        (repr(config), mesh), lambda: make_step(config, mesh, layout)))  # fmt: skip
    monkeypatch.setattr(together, "compile_for", lambda step, meshes, arguments: once(
        (step, tuple(meshes)), lambda: compile_for(step, meshes, arguments)))  # fmt: skip


def program_of(config, devices: int):
    """The program of a config; that of one without islands is made once."""
    make = lambda: make_program(config, jax.devices()[:devices])
    return make() if config.outer.every else once((repr(config), devices), make)


def config(data, *overrides, optimizer=SGD):
    return tiny.config("llama", f"data.path={data}", f"steps={STEPS}", *optimizer, *overrides)


def stream(config, program, start: int = 0):
    mesh, layout = program.mesh, program.layout
    return load.batches(
        open_split(config.data.path, "train"), config.batch, config.seed,
        batch_shardings(config, layout, mesh), start, segments=config.data.segments,
        order=sequence_order(layout, config.batch.sequence_length),
    )  # fmt: skip


def train(config, devices: int, stop: int = STEPS, keep: tuple = (), resume: tuple = ()):
    """(losses, merged parameters, loop state) of a run; `keep` and `resume`: (directory, step)."""
    program = program_of(config, devices)
    meeting = outer.meet(config, program)
    with jax.set_mesh(program.mesh):
        if resume:
            state, start = meeting.restore(*resume), resume[1]
        else:
            state = create_state(config, program.layout, program.optimizer, program.mesh)
            state, start = meeting.begin(state), 0
        batches, losses = stream(config, program, start), []
        for step in range(start, stop):
            state, values = meeting.step(state, next(batches))
            losses.append(meeting.read(values)["loss"])
            if keep and step + 1 == keep[1]:
                manager = checkpoint.open_manager(keep[0], config.checkpoint)
                kept, islands = meeting.saved(state)
                checkpoint.save(manager, keep[1], kept, {}, configfile.to_dict(config), islands)
                checkpoint.finish(manager)
        params = jax.tree.map(np.asarray, meeting.merged(state).params)
    return losses, params, state


def without_islands(config, sequences: int):
    """The same run on the devices of one island, of so many rows; and its program."""
    batch = dataclasses.replace(config.batch, sequences=sequences)
    mesh = dataclasses.replace(config.mesh, replica=1)
    own = dataclasses.replace(config, mesh=mesh, batch=batch, outer=type(config.outer)())
    return own, program_of(own, mesh.fsdp)


def oracle(config) -> tuple[list[float], dict]:
    """(losses, merged parameters) of islands, each a run of its own on its rows."""
    o, count = config.outer, config.mesh.replica
    rows = config.batch.sequences // count
    together, whole = without_islands(config, config.batch.sequences)
    alone, program = without_islands(config, rows)
    wide = lambda tree: {n: np.asarray(x, np.float64) for n, x in tree.items()}
    losses, pending = [], {}
    with jax.set_mesh(program.mesh):
        state = create_state(alone, program.layout, program.optimizer, program.mesh)
        batches = stream(together, whole)
        for _ in range(o.start_step):
            state, values = whole.train_step(state, next(batches))
            losses.append(float(values["loss"]))
        homes = batch_shardings(alone, program.layout, program.mesh)
        states = [jax.tree.map(lambda x: x.copy(), state) for _ in range(count)]
        base = wide(state.params)
        momentum = {n: np.zeros_like(x) for n, x in base.items()}
        for step in range(o.start_step + 1, STEPS + 1):
            batch = {n: np.asarray(x) for n, x in next(batches).items()}
            found = []
            for k in range(count):
                own = slice(k * rows, (k + 1) * rows)
                mine = {n: jax.device_put(x[own], homes[n]) for n, x in batch.items() if n in homes}
                states[k], values = program.train_step(states[k], mine)
                found.append(float(values["loss"]))
            losses.append(np.mean(found))
            thetas = [wide(s.params) for s in states]
            for f in merges(o, step, late=True) & set(pending):
                take(o, f, base, thetas, pending.pop(f))
            for f in merges(o, step):
                update = learnt(o, f, base, thetas, momentum)
                if o.overlap and step < STEPS:
                    pending[f] = update
                else:
                    take(o, f, base, thetas, update)
            for k, theta in enumerate(thetas):
                placed = {n: jax.device_put(np.float32(x), states[k].params[n].sharding)
                          for n, x in theta.items()}  # fmt: skip
                states[k] = dataclasses.replace(states[k], params=placed)
    return losses, base


def merges(o, step: int, late: bool = False) -> set[int]:
    """The fragments that are merged after a step, or (late) taken in; all at the end of the run."""
    local = step - o.start_step - (o.overlap if late else 0)
    turns = {f: (f + 1) * o.every // o.fragments for f in range(o.fragments)}
    due = {f for f, turn in turns.items() if local >= turn and (local - turn) % o.every == 0}
    return set(turns) if step == STEPS else due


def learnt(o, f: int, base: dict, thetas: list[dict], momentum: dict) -> dict:
    """The update of a fragment: rows f, f + P, ... of every array."""
    rows, update = slice(f, None, o.fragments), {}
    for n, b in base.items():
        update[n] = np.mean([b[rows] - theta[n][rows] for theta in thetas], axis=0)
        if o.rule == "diloco":
            momentum[n][rows] = o.momentum * momentum[n][rows] + update[n]
            update[n] = o.learning_rate * (update[n] + o.momentum * momentum[n][rows])
    return update


def take(o, f: int, base: dict, thetas: list[dict], update: dict) -> None:
    rows = slice(f, None, o.fragments)
    for n, b in base.items():
        b[rows] -= update[n]
        for theta in thetas:
            theta[n][rows] = o.mix * theta[n][rows] + (1 - o.mix) * b[rows]


def close(actual: dict, expected: dict):
    """Within 1e-6 of the largest element of each array; the least that any moves is 1e-3 of it."""
    for name, x in expected.items():
        error = np.abs(actual[name] - x).max()
        assert error <= 1e-6 * np.abs(x).max(), (name, error, np.abs(x).max())


def same(one: dict, other: dict):
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def plain(data):
    """(losses, parameters) of the ordinary run of all rows on two devices."""
    return train(config(data, "mesh.fsdp=2", "data.segments=false"), 2)[:2]


@pytest.mark.parametrize(
    "overrides",
    [
        ["outer.every=5", "outer.rule=average"],
        ["outer.every=1", "outer.learning_rate=1", "outer.momentum=0"],
        ["outer.every=4", "outer.rule=average", "outer.fragments=3", "outer.mix=0.25"],
        ["outer.every=3", "outer.rule=average", "outer.start_step=5"],
    ],
)
def test_one_island_is_the_plain_run_bit_for_bit(data, plain, overrides):
    own = ["mesh.fsdp=2", "data.segments=false", *overrides]
    losses, params, _ = train(config(data, *own), 2)
    assert losses == plain[0]
    close(params, plain[1])  # the merged ones are the first, less all that was learnt


def test_one_local_step_of_sgd_is_data_parallelism(data, plain):
    """The mean of the islands' steps is the step of the mean gradient, where weights are equal."""
    own = ["outer.every=1", "outer.rule=average", "outer.defend=none"]
    losses, params, _ = train(config(data, *ISLANDS, *own), 4)
    np.testing.assert_allclose(losses, plain[0], rtol=1e-6)
    close(params, plain[1])


CASES = {
    "average": ["outer.rule=average", "outer.every=3"],
    "Nesterov": ["outer.every=3"],
    "fragments": ["outer.every=4", "outer.fragments=2", "outer.momentum=0.5"],
    "overlap": ["outer.every=4", "outer.fragments=2", "outer.overlap=1", "outer.mix=0.5",
                "outer.start_step=1"],
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.nightly] * (case in ("Nesterov", "fragments")))
     for case in CASES],
)  # fmt: skip
def test_islands_are_trained_alone_and_merged(data, case):
    islands = config(data, *ISLANDS, "outer.defend=none", *CASES[case])
    losses, params, _ = train(islands, 4)
    expected, merged = oracle(islands)
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    close(params, merged)


EVERYTHING = ["outer.every=4", "outer.fragments=2", "outer.overlap=2", "outer.mix=0.25",
              "outer.wire=[int4,int8]", "outer.start_step=1"]  # fmt: skip


def test_a_resumed_run_goes_on_bit_for_bit(data, tmp_path):
    """With an update under way, errors of both wires, momentum, and tokens of a part of a round."""
    islands = config(data, *ISLANDS, *EVERYTHING)
    losses, params, _ = train(islands, 4, keep=(tmp_path, 6))
    more, again, state = train(islands, 4, resume=(tmp_path, 6))
    assert more == losses[6:]
    same(again, params)
    assert all(np.any(x) for kept in ("momentum", "error", "sent")
               for x in state.memory[kept].values())  # fmt: skip
    other = config(data, *ISLANDS, *EVERYTHING, "mesh.replica=4", "mesh.fsdp=1")
    text = tiny.message(train, other, 4, resume=(tmp_path, 6))
    assert "mesh.replica=4" in text and "use mesh.replica=2" in text and "start_from" in text


@pytest.mark.nightly
def test_a_resumed_run_goes_on_on_another_mesh(data, tmp_path):
    own = [*EVERYTHING, "outer.wire=float32"]  # others have groups of a shard, which is another one
    losses, _, _ = train(config(data, *ISLANDS, *own), 4, keep=(tmp_path, 6))
    other = config(data, *ISLANDS, *own, "mesh.fsdp=1", "mesh.tensor=2")
    more, _, _ = train(other, 4, resume=(tmp_path, 6))
    np.testing.assert_allclose(more, losses[6:], rtol=1e-5)


@pytest.mark.parametrize("mesh", ["fsdp", "tensor"])
def test_memory_is_the_same_in_a_checkpoint_of_any_mesh(data, mesh):
    """Momentum and errors go to the devices and back: each element is kept, once."""
    own = ["mesh.replica=2", f"mesh.{mesh}=2", *EVERYTHING]
    islands = config(data, *own)
    found = fleet.open_fleet(islands, program_of(islands, 4))
    programs, rng, saved = exchange.make_programs(found), np.random.default_rng(0), {}
    for kept, specs in exchange.saved_specs(found).items():
        saved[kept] = {}
        for name, spec in specs.items():
            first, *rest = found.abstract.params[name].shape
            shape = (first * (2 if kept == "error" else 1), *rest)
            home = NamedSharding(found.whole.mesh, spec)
            saved[kept][name] = jax.device_put(rng.normal(size=shape).astype(np.float32), home)
    assert saved.keys() == {"momentum", "error", "sent"}
    with jax.set_mesh(found.whole.mesh):
        again = programs.save_memory(programs.load_memory(saved))
    for kept in saved:
        same(jax.tree.map(np.asarray, again[kept]), jax.tree.map(np.asarray, saved[kept]))


def test_two_processes_of_an_island_each_are_one_process_of_both(data, tmp_path, capsys):
    """Losses are means over islands; what is evaluated and kept is the merged model."""
    own = [*SGD, *ISLANDS, *EVERYTHING, f"steps={STEPS}", f"data.path={data}"]
    losses, params, state = train(config(data, *ISLANDS, *EVERYTHING), 4)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    own += [f"run.dir={tmp_path}", "devices.simulate=2", "devices.num_processes=2"]
    own += [f"devices.coordinator=localhost:{port}", "checkpoint.every=6", "eval.every=6"]
    llama = tiny.CONFIGS / "llama.yaml"
    processes = [tiny.command("train", llama, *own, f"devices.process_id={i}") for i in (0, 1)]
    for process in processes:
        tiny.finish(process)
    assert list(tiny.losses(tmp_path).values()) == pytest.approx(losses, rel=1e-6)
    plans = [r["plan/target"] for r in tiny.records(tmp_path) if "plan/target" in r]
    assert plans == ["cpu:2"]  # an island's devices
    where = {n: x.sharding for n, x in state.shared["params"].items()}
    like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[n]) for n, x in params.items()}
    with jax.set_mesh(jax.tree.leaves(where)[0].mesh):
        kept, _ = checkpoint.restore_params(tmp_path / "checkpoints", STEPS, like, {})
    close(jax.tree.map(np.asarray, kept), params)
    logged = [r["eval/loss"] for r in tiny.records(tmp_path) if "eval/loss" in r]
    assert main(["eval", str(tmp_path), "--json", "devices.simulate=0", "mesh.data=2"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(logged[-1], rel=1e-5)


@pytest.mark.parametrize("bad", ["nan", "away"])
def test_a_refused_island_starts_again_from_the_merged_model(data, bad):
    """Its contribution counts for nothing, and what it could not send is forgotten."""
    own = ["mesh.replica=4", "mesh.fsdp=2", "outer.every=4", "outer.rule=average"]
    islands = config(data, *own, "outer.defend=cosine", "outer.wire=[int8,float32]")
    found = fleet.open_fleet(islands, program_of(islands, 8))
    programs, rng = exchange.make_programs(found), np.random.default_rng(0)
    before, thetas = {}, {}
    for name, leaf in found.abstract.params.items():
        before[name] = rng.normal(size=leaf.shape).astype(np.float32)
        step = 0.1 * (rng.normal(size=leaf.shape) + 0.3 * rng.normal(size=(4, *leaf.shape)))
        step[2] = np.nan if bad == "nan" and name == "embed" else -step[2]
        thetas[name] = (before[name] - step).astype(np.float32)
    whole = lambda arrays: {
        n: jax.device_put(x, NamedSharding(found.whole.mesh, found.homes[n]))
        for n, x in arrays.items()
    }
    joined = lambda arrays: {
        n: jax.device_put(x.reshape(-1, *x.shape[2:]), leaf.sharding)
        for (n, x), leaf in zip(
            arrays.items(), fleet.join_abstract(found, found.abstract.params).values(), strict=True
        )
    }
    with jax.set_mesh(found.whole.mesh):
        tokens = jax.device_put(
            np.ones(4, np.float32), NamedSharding(found.whole.mesh, P("replica"))
        )
        update, memory, verdict = programs.exchange(
            joined(thetas), whole(before), exchange.new_memory(found), 0, tokens
        )
        after, merged, _, _ = programs.adopt(
            joined(thetas), whole(before), {}, update, verdict.refused, 0
        )
    assert [merge.REASONS[i] for i in verdict.refused] == [
        "", "", {"nan": merge.REASONS[2], "away": merge.REASONS[3]}[bad], "",
    ]  # fmt: skip
    for name, x in merged.items():
        own = np.asarray(after[name]).reshape(thetas[name].shape)
        np.testing.assert_array_equal(own[2], x)
        assert np.isfinite(own).all()
        error = np.asarray(memory["error"][name]).reshape(4, 2, -1)  # islands, devices, elements
        assert not error[2].any() and all(error[k].any() for k in (0, 1, 3))


def test_a_refused_island_is_named_in_the_log(data, caplog):
    """Nobody waits for it: two steps later, when the merge is done."""
    islands = config(data, *ISLANDS, "outer.defend=none", *CASES["average"])
    program = program_of(islands, 4)
    meeting = outer.meet(islands, program)
    with jax.set_mesh(program.mesh):
        whole = create_state(islands, program.layout, program.optimizer, program.mesh)
        state, batches, said = meeting.begin(whole), stream(islands, program), []
        lost = lambda x: jax.device_put(np.full(x.shape, np.nan, x.dtype), x.sharding)
        params = jax.tree.map(lost, state.islands[1].params)
        broken = dataclasses.replace(state.islands[1], params=params)
        state = state._replace(islands=state.islands | {1: broken})
        for _ in range(5):
            state, values = meeting.step(state, next(batches))
            said.append("step 3: island 1 is refused: it is not finite" in caplog.text)
    assert said == [False, False, False, False, True]
    assert caplog.text.count("refused") == 1
    assert np.isfinite(meeting.read(values)["loss"])


def test_a_program_is_compiled_once_for_all_islands():
    """And each is of its own devices: nothing in it can cross islands."""
    devices, kinds = jax.devices(), (AxisType.Explicit,)
    meshes = [jax.make_mesh((2,), ("fsdp",), kinds, devices=devices[k : k + 2]) for k in (0, 2, 4)]
    step = jax.jit(lambda x, y: (x + jnp.sum(y), jnp.sum(x)), donate_argnums=0)
    place = lambda mesh, x: jax.device_put(x, NamedSharding(mesh, P("fsdp")))
    x, y = np.arange(8.0), np.arange(4.0)
    compiles = []
    count = lambda event, *_, **__: compiles.append(event)
    jax.monitoring.register_event_duration_secs_listener(count)
    made = compile_for(step, meshes, [(place(mesh, x), place(mesh, y)) for mesh in meshes])
    jax.monitoring.unregister_event_duration_listener(count)
    assert sum("backend_compile" in event for event in compiles) == 1
    for k, (run, mesh) in enumerate(zip(made, meshes, strict=True)):
        own, total = run(place(mesh, x + k), place(mesh, y))
        assert own.sharding.device_set == set(mesh.devices.flat) == total.sharding.device_set
        np.testing.assert_array_equal(own, x + k + 6)
        assert total == np.sum(x + k)


MISTAKES = {
    "outer.wire: 'int3' is not a format": ["outer.wire=int3"],
    "outer.fragments=5 with outer.every=4": ["outer.fragments=5"],
    "outer.overlap=4 with outer.every=4": ["outer.overlap=4"],
    "outer.start_step=12 is not below steps=12": ["outer.start_step=12"],
    "have no effect with outer.rule=average": ["outer.rule=average", "outer.momentum=0.5"],
    "outer.rule=delayed is for islands that are jobs": ["outer.rule=delayed"],
    "outer.island=paris has no effect without outer.store": ["outer.island=paris"],
    "outer.quorum=2 has no effect without outer.store": ["outer.quorum=2"],
    "mesh.replica=2 with outer.store": ["outer.store=meet", "outer.island=paris"],
    "outer.island='' must be a name": ["outer.store=meet", "mesh.replica=1"],
    "outer.mix=0.5 has no effect with outer.every=0": ["outer.every=0", "outer.mix=0.5"],
    "all islands would train on the same rows": ["rules.batch=[data,fsdp]"],
    "storage.embed=['replica', 'fsdp']": ["storage.embed=[replica,fsdp]"],
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_named_before_anything_is_traced(data, text):
    wrong = config(data, "mesh.replica=2", "outer.every=4", *MISTAKES[text])
    assert text in tiny.message(validate, wrong)


def test_fragments_that_cut_through_shards_are_refused(data):
    own = ["mesh.replica=2", "mesh.tensor=2", "outer.every=5", "outer.fragments=5"]
    wrong = config(data, *own)
    text = tiny.message(outer.meet, wrong, program_of(wrong, 4))
    assert "outer.fragments=5 does not divide the 192 rows of embed" in text
    assert "use outer.fragments=4" in text
