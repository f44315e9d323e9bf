"""Mixtures of experts: against loops over tokens, on many meshes, and what keeps the load even."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jaxlm import checkpoint
from jaxlm import config as cfg
from jaxlm import train as train_module
from jaxlm.cli import main
from jaxlm.data import load, open_split
from jaxlm.mesh import open_mesh
from jaxlm.metrics import flops_per_token
from jaxlm.models import experts, family_module, moe
from jaxlm.program import loss_and_grads, make_program, trace_train_step
from jaxlm.sharding import batch_shardings
from jaxlm.state import abstract_state, create_state, init_params, model_structure
from jaxlm.validate import validate
from jaxlm.verify import make_batch
from jaxlm.xla import find_collectives, mesh_axes, parse

DEEPSEEK = [
    "model.router=sigmoid", "model.balance=bias", "model.balance_coefficient=0.01",
    "model.shared_expert_dim=32", "model.router_z_loss=0.01",
]  # fmt: skip
CAPACITY = ["model.dispatch=capacity", "model.capacity_factor=0.75", "model.router_z_loss=0.01"]
CASES = {
    "mixtral": ("mixtral", ["model.balance_coefficient=0.1"]),
    # The balance loss is of a microbatch: it depends on which rows are together.
    "mixtral, parts": ("mixtral", ["model.balance_coefficient=0.1", "batch.microbatches=2"]),
    "qwen3_moe, capacity": ("qwen3_moe", CAPACITY),
    "qwen3_moe, as DeepSeek": ("qwen3_moe", DEEPSEEK),
    "qwen3_moe, capacity, as DeepSeek": ("qwen3_moe", CAPACITY + DEEPSEEK),
}
LAYOUTS = [  # those of test_every_layout.py apart
    tiny.nightly("mixtral, parts", 8, ["mesh.tensor=4", "mesh.data=2", "gather_at=step"]),
    tiny.nightly("qwen3_moe, capacity", 8, ["mesh.expert=2", "mesh.tensor=2", "mesh.data=2"]),
    tiny.nightly("qwen3_moe, as DeepSeek", 8, ["mesh.expert=2", "mesh.tensor=2", "mesh.fsdp=2"]),
    ("qwen3_moe, capacity, as DeepSeek", 8, ["mesh.expert=2", "mesh.tensor=2", "mesh.fsdp=2"]),
]


def make_config(case, data, *overrides):
    family, own = CASES[case]
    return tiny.config(family, f"data.path={data}", *own, *overrides)


# One layer, against loops.


def run_layer(count, *overrides, skew=0.0, segments=None, double=False):
    """(output, aux, gradients of a sum, x, weights) of one layer of experts on some mesh."""
    kind = np.float64 if double else np.float32
    config = tiny.config("mixtral", "model.router_z_loss=0.1", *overrides)
    mesh, layout = open_mesh(config, jax.devices()[:count])
    shape = (8, config.batch.sequence_length, config.model.embed_dim)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32)
    x[..., 0] += skew  # the first row of the router then favours some experts everywhere
    if double:
        layout = dataclasses.replace(layout, compute="float64", reduce="float64")
    with jax.set_mesh(mesh):
        layer = jax.jit(lambda: moe.MoE(config.model, layout, jax.random.key(1)))()
    with jax.set_mesh(mesh), jax.enable_x64(double):
        layer = jax.tree.map(lambda w: 5 * w.astype(kind), layer)  # so that experts differ
        place = lambda array, dims: jax.device_put(
            array, jax.sharding.NamedSharding(mesh, layout.spec(dims))
        )
        ids = None if segments is None else place(segments, "batch seq")

        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def loss(layer, x):
            y, aux = layer(x, ids, layout)
            return jnp.sum(jnp.sin(y)), (y, aux)

        (_, (y, aux)), grads = jax.jit(loss)(layer, place(x.astype(kind), "batch residual_seq _"))
        names = ("router", "gate", "up", "down")
        weights = {n: np.asarray(getattr(layer, n).get_value(), np.float64) for n in names}
    grads = {n: np.asarray(getattr(grads[0], n).get_value()) for n in names} | {
        "x": np.asarray(grads[1])
    }
    return np.asarray(y), {n: np.asarray(v) for n, v in aux.items()}, grads, x, weights


def by_hand(x, weights, limit=math.inf, segments=None, k=2):
    """The layer by loops over tokens, float64: (output, aux)."""
    x = x.astype(np.float64)
    logits = x @ weights["router"]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, -1, kind="stable")[..., :k]
    y, dropped = np.zeros_like(x), 0
    silu = lambda a: a / (1 + np.exp(-a))
    real = np.ones(x.shape[:2], bool) if segments is None else segments > 0
    for b in range(x.shape[0]):
        taken = np.zeros(p.shape[-1], int)
        for choice in range(k):
            for s in range(x.shape[1]):
                e = order[b, s, choice]
                if (limit < math.inf and not real[b, s]) or taken[e] >= limit:
                    dropped += real[b, s]
                    continue
                taken[e] += 1
                gate = p[b, s, e] / p[b, s, order[b, s]].sum()
                hidden = silu(x[b, s] @ weights["gate"][e]) * (x[b, s] @ weights["up"][e])
                y[b, s] += gate * (hidden @ weights["down"][e])
    load = np.array([(order[real] == e).sum() for e in range(p.shape[-1])])
    count, p, logits = real.sum(), p[real], logits[real]
    balance = len(load) * (load / count * p.mean(0)).sum()
    aux = {
        "router/balance_loss": 0.01 * balance,
        "router/z_loss": 0.1 * np.mean(np.log(np.exp(logits).sum(-1)) ** 2),
        "router/entropy": -np.mean((p * np.log(p)).sum(-1)),
        "peak/router/load_max": load,
        "router/dropped": dropped / (k * count),
    }
    return y, aux


def padded_segments():
    segments = np.ones((8, 32), np.int32)
    segments[::2, 25:] = 0
    segments[:, 10:20] *= 2
    return segments


@pytest.mark.parametrize("count, mesh", [(1, []), (8, ["mesh.expert=4", "mesh.tensor=2"])])
@pytest.mark.parametrize("factor", [0, 0.75, 1.0])
def test_a_layer_is_a_loop_over_tokens(factor, count, mesh):
    dispatch = ["model.dispatch=capacity", f"model.capacity_factor={factor}"] if factor else []
    segments = padded_segments()
    y, aux, _, x, weights = run_layer(
        count, *dispatch, *mesh, skew=1.0, segments=segments, double=True
    )
    limit = math.ceil(factor * 32 * 2 / 4) if factor else math.inf
    expected, expected_aux = by_hand(x, weights, limit, segments)
    assert np.abs(y - expected).max() < 1e-12 * np.abs(expected).max()
    assert aux.keys() == expected_aux.keys()
    for name, value in expected_aux.items():
        np.testing.assert_allclose(aux[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
    assert (expected_aux["router/dropped"] > 0.05) == bool(factor)


def ragged_all_to_all(rows, out, start, size, there, received, *, axis_name):
    """jax.lax.ragged_all_to_all, which XLA for CPU lacks: every device reads what it is sent."""
    # jax gives the result the type of `out`: if that did not vary, gradients would be summed.
    assert jax.typeof(out).mat.varying == jax.typeof(rows).mat.varying
    me, place = jax.lax.axis_index(axis_name), jnp.arange(out.shape[0])
    peers = [jax.lax.all_gather(x, axis_name) for x in (rows, start, size, there)]
    for p in range(peers[0].shape[0]):
        theirs, begin, count, to = peers[0][p], *(x[p, me] for x in peers[1:])
        i = place - to
        here = (i >= 0) & (i < count)
        found = theirs.at[begin + i].get(mode="clip")
        found = jnp.where(count == received[p], found, jnp.nan)
        out = jnp.where(here[:, None], found, out)
    return out


@pytest.mark.parametrize("mesh", ["mesh.tensor=2", "mesh.data=2"])
def test_a_ragged_exchange_is_the_padded_one(mesh, monkeypatch):
    """Output and gradients of a layer; experts are unlike in their load."""
    y, _, grads, *_ = run_layer(8, "mesh.expert=4", mesh, skew=1.0)
    monkeypatch.setattr(experts, "choose", lambda mesh: "ragged")
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    own_y, _, own_grads, *_ = run_layer(8, "mesh.expert=4", mesh, skew=1.0)
    np.testing.assert_allclose(own_y, y, atol=1e-6 * np.abs(y).max())
    for name, grad in grads.items():
        np.testing.assert_allclose(own_grads[name], grad, atol=1e-5 * np.abs(grad).max())


def test_slots_go_to_first_choices_then_to_earlier_tokens(monkeypatch):
    """Of one expert with two slots; in the order in which tokens stand in their sequence."""
    config = tiny.config("mixtral")
    mesh, layout = open_mesh(config, jax.devices()[:1])
    expert_BSK = np.array([[[1, 0], [0, 1], [0, 1], [0, 2]]], np.int32)
    real_BS = np.ones((1, 4), bool)
    slots = lambda: np.asarray(
        jax.jit(lambda e, r: experts.slots(e, r, layout, 3, 2, 10))(expert_BSK, real_BS)
    )
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(slots()[0], [[10, 30], [0, 11], [1, 30], [30, 20]])
        reverse = lambda layout, length: jnp.arange(length)[::-1]
        monkeypatch.setattr(experts, "sequence_order", reverse)
        np.testing.assert_array_equal(slots()[0], [[10, 30], [30, 30], [1, 11], [0, 20]])


# Whole models, on many meshes.


def place_arrays(config, program, arrays):
    """The state at step 0 with these weights; to be called in the context of the mesh."""
    shapes = abstract_state(config, program.layout, program.optimizer, program.mesh)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)  # so AdamW starts
    for own in (state.params, state.fixed):
        own |= {name: arrays[name] for name in own}
    return jax.tree.map(lambda x, own: jax.device_put(x, own.sharding), state, shapes)


def gradients(config, count, arrays, made):
    """Loss, every gradient and aux of a batch at these weights, means over its tokens."""
    program = make_program(config, jax.devices()[:count])
    mesh, layout, structure, *_ = program
    with jax.set_mesh(mesh):
        state = place_arrays(config, program, arrays)
        shardings = batch_shardings(config, layout, mesh)
        batch = {name: jax.device_put(made[name], place) for name, place in shardings.items()}
        sums = jax.jit(lambda s, b: loss_and_grads(config, structure, s, b, layout))
        loss, weight, grads, aux = jax.device_get(sums(state, batch))
    return loss / weight, {n: g / weight for n, g in grads.items()}, {
        n: a / weight for n, a in aux.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def references(data):
    return functools.cache(lambda case: tiny.run_and_gradients(make_config(case, data), 1))


def assert_same_gradients(found, expected):
    norm = np.sqrt(sum(float(np.sum(np.float64(g) ** 2)) for g in expected[1].values()))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for name, grad in expected[1].items():
        error = np.abs(found[1][name] - grad).max() / max(np.abs(grad).max(), 1e-4 * norm)
        assert error < 1e-5, (name, error)
    for name, value in expected[2].items():
        np.testing.assert_allclose(found[2][name], value, rtol=1e-5, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("case, count, mesh", LAYOUTS)
def test_every_layout_is_the_same_run(case, count, mesh, data, references):
    config = make_config(case, data, *mesh)
    (expected, initial, _, state), expected_grads = references(case)
    (losses, own, _, own_state), grads = tiny.run_and_gradients(config, count)
    for name, value in initial.items():
        np.testing.assert_array_equal(own[name], value, err_msg=name)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert expected[-1] < expected[0]
    assert_same_gradients(grads, expected_grads)
    for name, value in state.fixed.items():  # biases moved, and alike
        assert name.endswith("moe.bias") and np.abs(value).max() > 0
        np.testing.assert_allclose(own_state.fixed[name], value, atol=1e-6)
    assert bool(state.fixed) == ("DeepSeek" in case)


@functools.cache
def unlike_rows(case):
    """(weights, batch, gradients of the whole batch at once) of one device.

    Rows have more or less padding, and tokens whose targets do not count, as documents' ends.
    Then parts of a batch have unlike numbers of tokens, and means of parts are not the batch's.
    """
    config = make_config(case, "unread")
    mesh, layout, _, optimizer, *_ = make_program(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = create_state(config, layout, optimizer, mesh)
    arrays = jax.device_get(state.params | state.fixed)
    batch = make_batch(config, layout, 0)
    weights = batch["weights"] * (np.arange(8) + 1)[:, None]
    batch["weights"] = (weights > np.arange(32) / 8).astype(np.float32)
    return arrays, batch, gradients(config, 1, arrays, batch)


# Mixtral's balance loss is that of the case with a capacity, its experts are those of the other.
PARTS = [(1, ["batch.microbatches=8"]), (2, ["batch.microbatches=4", "mesh.stage=2"])]
EACH_DAY = [("qwen3_moe, capacity", *PARTS[0]), ("qwen3_moe, as DeepSeek", *PARTS[1])]
MORE = itertools.product(("qwen3_moe, as DeepSeek", "qwen3_moe, capacity", "mixtral"), PARTS)


@pytest.mark.parametrize(
    "case, count, overrides",
    EACH_DAY + [tiny.nightly(c, *p) for c, p in MORE if (c, *p) not in EACH_DAY],
)
def test_microbatches_change_nothing_but_the_balance_loss(case, count, overrides):
    arrays, batch, expected = unlike_rows(case)
    config = make_config(case, "unread", *overrides)
    found = gradients(config, count, arrays, batch)
    name = "router/balance_loss"
    alike = found[2][name] == pytest.approx(expected[2][name], rel=1e-6)
    assert alike != config.model.microbatches_change_numbers
    if alike:
        assert_same_gradients(found, expected)
    else:
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        for other in expected[2].keys() - {name}:
            np.testing.assert_allclose(
                found[2][other], expected[2][other], rtol=1e-5, err_msg=other
            )


def test_grouped_products_are_loops_over_groups_mapped_over_stages_or_not():
    """And their gradients; with one operand not mapped, over a mesh axis and over none."""
    config = tiny.config("mixtral", "mesh.stage=2", "mesh.data=2")
    mesh, _ = open_mesh(config, jax.devices()[:4])
    rng = np.random.default_rng(0)
    x_ZRX, w_ZeXY = (rng.standard_normal(s) for s in ((2, 16, 4), (2, 3, 4, 6)))
    sizes_Ze = np.array([[3, 0, 5], [1, 4, 2]], np.int32)  # for each 8 rows; one is in no group
    x_ZRX[1, 7::8] = 0

    def expected(w_eXY, x_RX, sizes_e):
        group_R = np.resize(np.repeat(np.arange(4), [*sizes_e, 8 - sizes_e.sum()]), 16)
        w_RXY = np.concatenate([w_eXY, np.zeros_like(w_eXY[:1])])[group_R]
        y_RY = np.einsum("rx,rxy->ry", x_RX, w_RXY)
        dw_RXY = np.einsum("rx,ry->rxy", x_RX, np.cos(y_RY))
        dw = np.stack([dw_RXY[group_R == e].sum(0) for e in range(len(w_eXY))])
        return y_RY, dw, np.einsum("ry,rxy->rx", np.cos(y_RY), w_RXY)

    def one(x_RX, w_eXY, sizes_e, rows):
        def layer(x_RX, w_eXY):
            def local(x_RX, w_eXY, sizes_e):
                return experts.grouped(x_RX, jax.lax.pcast(w_eXY, "data", to="varying"), sizes_e)

            specs = (rows, P(), P())
            return jax.shard_map(local, in_specs=specs, out_specs=rows)(x_RX, w_eXY, sizes_e)

        y_RY, pull = jax.vjp(layer, x_RX, w_eXY)
        return y_RY, *pull(jnp.cos(y_RY))[::-1]

    with jax.set_mesh(mesh):
        for stage, shared in (("stage", False), ("stage", True), (None, False)):
            own_ZeXY = np.broadcast_to(w_ZeXY[:1], w_ZeXY.shape) if shared else w_ZeXY
            put = lambda x, *spec: jax.device_put(
                x.astype(np.float32) if x.dtype == np.float64 else x,
                jax.sharding.NamedSharding(mesh, P(*spec)),
            )
            w = put(w_ZeXY[0]) if shared else put(w_ZeXY, stage)
            arrays = put(x_ZRX, stage, "data"), w, put(sizes_Ze, stage)
            run = jax.vmap(functools.partial(one, rows=P("data")), (0, None if shared else 0, 0))
            found = jax.device_get(jax.jit(run)(*arrays))
            for i, sizes_e in enumerate(sizes_Ze):
                for a, b in zip(found, expected(own_ZeXY[i], x_ZRX[i], sizes_e), strict=True):
                    np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly  # "as DeepSeek" on stages is above, each expert's bias in test_pipeline.py
def test_dropless_experts_and_biases_under_stages_are_the_same_run(data, references):
    """Microbatches change nothing here (above), so that the reference has none."""
    mesh = ["batch.microbatches=2", "mesh.stage=2", "mesh.expert=2", "mesh.tensor=2"]
    config = make_config("qwen3_moe, as DeepSeek", data, *mesh)
    (expected, *_, state), gradients_there = references("qwen3_moe, as DeepSeek")
    (losses, *_, own_state), grads = tiny.run_and_gradients(config, 8)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_same_gradients(grads, gradients_there)
    ((name, bias),) = state.fixed.items()
    assert len(np.unique(bias)) > 2 and not np.array_equal(bias[0], bias[1])  # it can fail
    np.testing.assert_allclose(own_state.fixed[name], bias, atol=1e-6)


def test_tokens_travel_there_and_back_and_gradients_of_experts_stay(data):
    config = make_config("mixtral", data, "mesh.expert=4", "remat.policy=none")
    program = make_program(config, jax.devices()[:4])
    found = find_collectives(parse(trace_train_step(config, program).lower().compile().as_text()))
    travel = [c for c in found if c.kind == "all-to-all"]
    axes = program.mesh.shape
    assert all(mesh_axes(c.groups, axes) == ("expert",) and c.loops for c in travel)
    sizes = [c.bytes for c in travel]
    # Rows there and back, as many in the backward pass, and each time the rows' gates once.
    assert sorted(size // min(sizes) for size in sizes) == [1, 1] + [config.model.embed_dim] * 4
    E, D, F = 1, config.model.embed_dim, config.model.expert_mlp_dim
    own = {f"f32[{E},{D},{F}]", f"f32[{E},{F},{D}]", f"f32[2,{E},{D},{F}]", f"f32[2,{E},{F},{D}]"}
    moved = [c for c in found if c.kind != "all-to-all" and own & set(c.shapes)]
    assert not moved


def test_remat_keeps_what_its_policy_names(data):
    """Products with weights, as of a dense MLP: with `dots`, and with the name `mlp`."""
    # Each is a custom_vmap_call; jax prints the body that they share once.
    count = {}
    for policy in ("none", "full", "dots", "names"):
        names = ["remat.names=[mlp]"] if policy == "names" else []
        config = make_config("mixtral", data, f"remat.policy={policy}", *names)
        program = make_program(config, jax.devices()[:1])
        count[policy] = str(trace_train_step(config, program).jaxpr).count("custom_vmap_call[")
    assert count["full"] == count["none"] + 2  # not `down`: its output is not needed
    assert count["dots"] == count["names"] == count["none"]


# What keeps the load even.


def test_a_bias_evens_a_skewed_router(data):
    config = tiny.config("mixtral", "model.balance=bias", "model.balance_coefficient=0.005").model
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((512, 4)) + np.array([1.5, 1.0, 0.0, -1.5])
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    bias, history = np.zeros((1, 4), np.float32), []
    for _ in range(80):
        chosen = np.argsort(-(scores + bias), -1)[:, :2]
        load = np.array([[(chosen == e).sum() for e in range(4)]], np.float32)
        history.append(load.max() / load.mean())
        bias = np.asarray(moe.update_fixed(config, "groups.0.0.moe.bias", bias, load))
    assert history[0] > 1.7 and max(history[-5:]) < 1.1, history


def test_the_balance_of_a_run_improves(data):
    """With the loss, with the bias, and not without; from a start that prefers two experts."""
    last, arrays = {}, {}
    for balance, rate in (("bias", 0.01), ("loss", 0.1), ("none", 0.1)):
        config = tiny.config(
            "mixtral", f"data.path={data}", f"model.balance={balance}",
            f"model.balance_coefficient={rate}", "optimizer.train=['*router*']", "steps=30",
        )  # fmt: skip
        program = make_program(config, jax.devices()[:1])
        with jax.set_mesh(program.mesh):
            if not arrays:
                state = create_state(config, program.layout, program.optimizer, program.mesh)
                arrays = jax.tree.map(np.array, state.params | state.fixed)
                arrays["embed"][:, 0] += 0.02
                arrays["groups.0.0.moe.router"] *= 10
                arrays["groups.0.0.moe.router"][:, 0] += [1.0, 1.0, -1.0, -1.0]
            state = place_arrays(config, program, arrays)
            shardings = batch_shardings(config, program.layout, program.mesh)
            batches = load.batches(open_split(data, "train"), config.batch, 0, shardings)
            history = []
            for _ in range(config.steps):
                state, metrics = program.train_step(state, next(batches))
                history.append(float(metrics["router/load_max"]))
            assert program.train_step._cache_size() == 1
        assert history[0] > 1.6
        last[balance] = np.mean(history[-3:])
    assert max(last["loss"], last["bias"]) < 1.3 and last["none"] > 1.5, last


# The whole program.


def test_a_run_logs_its_routers_restores_its_biases_and_generates(data, tmp_path, capsys):
    overrides = [f"data.path={data}", f"run.dir={tmp_path / 'run'}", "steps=4", *DEEPSEEK]
    overrides += ["mesh.expert=2", "mesh.fsdp=4", "checkpoint.every=2", "eval.every=4"]
    config = tiny.config("qwen3_moe", *overrides)
    train_module.train(config)
    records = [r for r in tiny.records(tmp_path / "run") if "loss" in r]
    for record in records:
        assert record["router/load_max"] >= 1 and record["router/dropped"] == 0
        assert 0 < record["router/entropy"] <= math.log(4) + 1e-6
        assert record["router/balance_loss"] == 0 < record["router/z_loss"]
        assert not [name for name in record if name.startswith(("update", "group"))]
    one = tiny.config("qwen3_moe", *overrides, "mesh.expert=1", "mesh.fsdp=1")
    mesh, layout = open_mesh(one, jax.devices()[:1])
    program = make_program(one, jax.devices()[:1])
    with jax.set_mesh(mesh):
        abstract = abstract_state(one, layout, program.optimizer, mesh)
        state = checkpoint.restore_state(tmp_path / "run" / "checkpoints", 4, abstract)
    (bias,) = state.fixed.values()
    np.testing.assert_allclose(np.unique(np.abs(np.asarray(bias)) % 0.02).max(), 0.0, atol=0.0101)
    assert np.abs(bias).max() > 0 and "groups.0.0.moe.bias" not in state.params
    assert (
        main(
            [
                "generate",
                str(tmp_path / "run"),
                "--prompt",
                "mesh",
                "--tokens",
                "4",
                "mesh.expert=1",
                "mesh.fsdp=8",
            ]
        )
        == 0
    )
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 2
    assert "model.router=sigmoid" in capsys.readouterr().err


def test_flops_count_the_experts_that_a_token_meets():
    config = tiny.config("mixtral")
    mesh, layout = open_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        structure = model_structure(config.model, layout)
    D, F, E, H, K, C, S = 32, 64, 4, 4, 2, 8, 32
    layer = D * C * (2 * H + 2 * K) + D * E + 2 * 3 * D * F
    seen = H * C * (S + 1)  # on average half of the keys and half of itself, twice
    assert flops_per_token(config.model, structure, S) == 6 * (384 * D + 2 * layer + 2 * seen)


def test_muon_takes_stacks_of_experts():
    """They are put together as a dense matrix is; a router is no matrix that Muon takes."""
    rng, updates = np.random.default_rng(0), []
    for count, mesh in ((1, []), (4, ["mesh.expert=2", "mesh.fsdp=2"])):
        config = tiny.config("mixtral", "data.path=unread", "optimizer.name=muon", *mesh)
        mesh, layout, _, optimizer, *_ = make_program(config, jax.devices()[:count])
        with jax.set_mesh(mesh):
            params = abstract_state(config, layout, optimizer, mesh).params
            if count == 1:
                arrays = {n: rng.standard_normal(x.shape, np.float32) for n, x in params.items()}
            params = {n: jax.device_put(arrays[n], x.sharding) for n, x in params.items()}
            state = jax.jit(optimizer.init)(params)
            updates.append(jax.device_get(jax.jit(optimizer.update)(params, state, params)[0]))
    momentum = state[0].momentum
    assert "groups.0.0.moe.down" in momentum and "groups.0.0.moe.router" not in momentum
    for name, update in updates[0].items():
        np.testing.assert_allclose(
            updates[1][name], update, atol=3.4445**5 * 2**-24 * np.abs(update).max(), err_msg=name
        )


MISTAKES = {
    "more than there are": (["model.experts_per_token=5"], "model.num_experts=4"),
    "do not divide": (["mesh.expert=8"], "model.num_experts=4 is not divisible by mesh.expert=8"),
    "width": (["model.expert_mlp_dim=65", "mesh.tensor=2"], "model.expert_mlp_dim=65"),
    "shared width": (["model.shared_expert_dim=65", "mesh.tensor=2"], "model.shared_expert_dim=65"),
    "no slots": (["model.dispatch=capacity", "model.capacity_factor=0"], "model.capacity_factor"),
    "batch": (["rules.batch=[data]", "mesh.expert=2"], "rules.experts: axis expert"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case):
    overrides, words = MISTAKES[case]
    config = tiny.config("mixtral", *overrides)
    with pytest.raises(cfg.UserError) as caught:
        validate(config)
    assert words in str(caught.value)


def test_a_bias_cannot_be_trained():
    config = tiny.config("mixtral", "model.balance=bias", "optimizer.train=['*moe.bias']")
    mesh, layout = open_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh), pytest.raises(cfg.UserError, match="matches no parameter"):
        jax.eval_shape(lambda: init_params(config, layout))


UNSUPPORTED = {
    "mixtral": [dict(router_jitter_noise=0.1), dict(hidden_act="gelu")],
    "qwen3_moe": [
        dict(decoder_sparse_step=2), dict(mlp_only_layers=[0]), dict(use_sliding_window=True),
        dict(attention_bias=True), dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_configs_name_the_key(family):
    module = family_module(family)
    hf = module.to_hugging_face(tiny.config(family).model)
    assert module.from_hugging_face(hf)["family"] == family
    for change in UNSUPPORTED[family]:
        with pytest.raises(cfg.UserError, match=next(iter(change))):
            module.from_hugging_face(hf | change)
