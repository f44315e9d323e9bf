"""Optimizers against independent float64 implementations, and against themselves on any mesh."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny
import torch
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlm import config, optim

SIZES = dict(vocab=32, positions=8, layers=4, parts=2, norm=16, embed=16, heads=4)
SIZES |= dict(kv_heads=2, head_dim=4, mlp=24)
DIMS = {
    "embed.table": "vocab embed",
    "embed.positions": "positions embed",
    "groups.0.q": "layers embed heads head_dim",
    "groups.0.q_bias": "layers heads head_dim",
    "groups.0.kv": "layers parts embed kv_heads head_dim",
    "groups.0.out": "layers heads head_dim embed",
    "groups.0.gate_up": "layers parts embed mlp",
    "groups.0.down": "layers mlp embed",
    "groups.0.norm": "layers norm",
    "norm": "norm",
}
# Written out, not computed: reduction and output dimensions of the matrices that take Muon.
MUON = {
    "groups.0.q": ((1,), (2, 3)),
    "groups.0.kv": ((2,), (3, 4)),
    "groups.0.out": ((1, 2), (3,)),
    "groups.0.gate_up": ((2,), (3,)),
    "groups.0.down": ((1,), (2,)),
}
DECAYED = {*MUON, "embed.table", "embed.positions"}
AXES = dict(embed="fsdp", heads="tensor", kv_heads="tensor", mlp="tensor", vocab="tensor")
AXES |= dict(layers="stage")
MESHES = [
    dict(data=8),
    dict(fsdp=8),
    dict(fsdp=2, tensor=4),
    dict(data=2, fsdp=2, tensor=2),
    dict(stage=2, fsdp=2, tensor=2),
]
NAMES = ["adamw", "lion", "adafactor", "muon"]
STEPS = 50
# Rounding of a float32 sum of 50 updates, of the largest distance moved; measured: 9e-7.
TOLERANCE = STEPS * 2**-24
PEAK, WARMUP, FINAL, DECAY = 0.02, 5, 0.1, 0.1


@pytest.fixture(autouse=True)
def factor_small_matrices(monkeypatch):
    """All matrices but the 16 x 8 ones, which stay whole."""
    monkeypatch.setattr(optim, "MIN_FACTORED", 9)


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = {name: [SIZES[dim] for dim in dims.split()] for name, dims in DIMS.items()}
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shape.items()}


def initial() -> dict[str, np.ndarray]:
    """Small against the distance they move, so that their own rounding does not count."""
    return {name: x * np.float32(0.05) for name, x in arrays(0).items()}


def gradients(step: int) -> dict[str, np.ndarray]:
    """Noise around a mean, of a size that differs per layer and changes with the step."""
    mean, noise = arrays(1), arrays(step + 100)
    size = 0.01 * (1.5 + np.sin(step)) * np.logspace(0, 2, SIZES["layers"])
    out = {}
    for name, g in noise.items():
        stacked = DIMS[name].startswith("layers")
        scale = size.reshape([-1] + [1] * (g.ndim - 1)) if stacked else 0.01
        out[name] = ((g + mean[name]) * scale).astype(np.float32)
    return out


def optimizer(name: str, steps: int = STEPS, **changes):
    settings = dict(learning_rate=PEAK, warmup_steps=WARMUP, final_fraction=FINAL)
    settings |= dict(weight_decay=DECAY, b2=0.95, momentum=0.95)
    section = config.Optimizer(name=name, **(settings | changes))
    return optim.make_optimizer(section, steps, DIMS)


def rate(step: int) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    progress = (step - WARMUP) / (STEPS - 1 - WARMUP)
    return PEAK * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * progress)))


def spec(name: str) -> P:
    """As parameters rest on the mesh in context; heads that do not divide are replicated."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = {dim: axis for dim, axis in AXES.items() if axis in mesh.shape}
    fitting = {dim: axis for dim, axis in axes.items() if SIZES[dim] % mesh.shape[axis] == 0}
    return P(*(fitting.get(dim) for dim in DIMS[name].split()))


def place(values: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {name: jnp.asarray(x) for name, x in values.items()}
    return {name: jax.device_put(x, spec(name)) for name, x in values.items()}


def make_mesh(shape: dict[str, int]):
    return jax.make_mesh(tuple(shape.values()), tuple(shape), (AxisType.Explicit,) * len(shape))


def run(name: str, steps: int, dtype=np.float32) -> dict[str, np.ndarray]:
    tx = optimizer(name)

    def cast(values):
        return place({name: x.astype(dtype) for name, x in values.items()})

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params = cast(initial())
    state = jax.jit(tx.init)(params)
    for i in range(steps):
        before = jax.tree.map(jax.typeof, (params, state)) if i else None
        old = params
        params, state = step(params, state, cast(gradients(i)))
        assert before in (None, jax.tree.map(jax.typeof, (params, state)))
        assert all(x.is_deleted() for x in old.values())
    return {name: np.asarray(x) for name, x in params.items()}


def check(actual: dict, expected: dict, tolerance: float):
    """Compare the distances moved, relative to the largest of each array."""
    for name, start in initial().items():
        want = np.asarray(expected[name], np.float64) - start
        error = np.abs(np.asarray(actual[name], np.float64) - start - want).max()
        assert error <= tolerance * np.abs(want).max(), (name, error / np.abs(want).max())


def torch_adamw(names) -> dict[str, np.ndarray]:
    params = {name: torch.tensor(initial()[name], dtype=torch.float64) for name in names}
    groups = [
        dict(params=[x for n, x in params.items() if n in DECAYED], weight_decay=DECAY),
        dict(params=[x for n, x in params.items() if n not in DECAYED], weight_decay=0.0),
    ]
    adam = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), eps=1e-8)
    for i in range(STEPS):
        for group in adam.param_groups:
            group["lr"] = rate(i)
        for name, g in gradients(i).items():
            if name in params:
                params[name].grad = torch.tensor(g, dtype=torch.float64)
        adam.step()
    return {name: x.numpy() for name, x in params.items()}


def optax_float64(tx_of, values: dict, gradients_of) -> dict[str, np.ndarray]:
    """Apply scale_by-like transformations in float64, with decay and learning rate by hand."""
    with jax.enable_x64(True):
        params = {name: jnp.asarray(x, jnp.float64) for name, x in values.items()}
        tx = tx_of(params)
        state, update = tx.init(params), jax.jit(tx.update)
        for i in range(STEPS):
            grads = {name: jnp.asarray(g, jnp.float64) for name, g in gradients_of(i).items()}
            updates, state = update(grads, state, params)
            for name, x in params.items():
                decay = DECAY if name.split("/")[0] in DECAYED else 0.0
                params[name] = x - rate(i) * (updates[name] + decay * x)
        return {name: np.asarray(x) for name, x in params.items()}


def test_sgd_subtracts_the_gradient_and_the_decay():
    expected = {name: x.astype(np.float64) for name, x in initial().items()}
    for i in range(STEPS):
        for name, g in gradients(i).items():
            decay = DECAY if name in DECAYED else 0.0
            expected[name] = expected[name] - rate(i) * (g + decay * expected[name])
    check(run("sgd", STEPS), expected, TOLERANCE)


def test_adamw_is_torch():
    check(run("adamw", STEPS), torch_adamw(DIMS), TOLERANCE)


def test_lion_is_algorithm_2():
    """arXiv:2302.06675, algorithm 2."""
    params = {name: x.astype(np.float64) for name, x in initial().items()}
    momentum = {name: np.zeros_like(x) for name, x in params.items()}
    for i in range(STEPS):
        for name, g in gradients(i).items():
            direction = np.sign(0.9 * momentum[name] + (1 - 0.9) * g.astype(np.float64))
            decay = DECAY if name in DECAYED else 0.0
            params[name] = params[name] - rate(i) * (direction + decay * params[name])
            momentum[name] = 0.95 * momentum[name] + (1 - 0.95) * g
    check(run("lion", STEPS), params, TOLERANCE)


def alone(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every matrix, norm and bias of every layer as an array of its own, matrices with ndim 2."""
    out = {}
    for name, x in values.items():
        dims = DIMS[name].split()
        count = math.prod(SIZES[d] for d in dims if d in ("layers", "parts"))
        side = SIZES["embed"] if dims[-1] == "embed" else -1
        shape = (count, -1, side) if dims[-1] == "embed" else (count, SIZES["embed"], -1)
        flat = x.reshape(shape if name in DECAYED else (count, -1))
        out |= {f"{name}/{i}": matrix for i, matrix in enumerate(flat)}
    return out


def test_adafactor_is_optax_on_each_matrix_alone():
    """torch.optim.Adafactor multiplies by the parameter's scale, which cannot be turned off."""
    expected = optax_float64(
        lambda _: optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=9), optax.clip_by_block_rms(1.0)
        ),
        alone(initial()),
        lambda i: alone(gradients(i)),
    )
    whole = {}
    for name, x in initial().items():
        parts = [v for key, v in expected.items() if key.split("/")[0] == name]
        whole[name] = np.stack(parts).reshape(x.shape)
    check(run("adafactor", STEPS), whole, TOLERANCE)


def test_muon_is_optax_and_adam():
    """torch.optim.Muon rounds its Newton-Schulz to bf16, and does not correct bias."""
    longer = {"groups.0.gate_up": 24, "groups.0.down": 24}
    scale = {name: 0.2 * math.sqrt(longer.get(name, 16)) for name in MUON}
    numbers = {n: optax.contrib.MuonDimensionNumbers(*sides) for n, sides in MUON.items()}
    expected = optax_float64(
        lambda _: optax.chain(
            optax.contrib.scale_by_muon(beta=0.95, weight_dimension_numbers=numbers),
            optax.stateless(lambda updates, _: {n: x * scale[n] for n, x in updates.items()}),
        ),
        {name: initial()[name] for name in MUON},
        lambda i: {name: gradients(i)[name] for name in MUON},
    )
    expected |= torch_adamw([name for name in DIMS if name not in MUON])
    check(run("muon", STEPS), expected, TOLERANCE)


def test_muon_updates_have_the_rms_of_adam():
    """arXiv:2502.16982, section 2.2: about 0.2 for a matrix of full rank, whatever its shape."""
    matrices = {name: initial()[name] for name in MUON}
    updates = jax.jit(lambda matrices: optim.orthogonalize(matrices, DIMS))(matrices)
    for name, update in updates.items():
        assert 0.15 < float(jnp.sqrt(jnp.mean(update**2))) < 0.25, name


@functools.cache
def run_on_one_device(name: str, dtype) -> dict[str, np.ndarray]:
    return run(name, 5, dtype)


# Muon on the other meshes, and closer: the test in float64.
@pytest.mark.parametrize(
    "name, shape",
    [(name, shape) for shape in MESHES for name in NAMES[:-1]]
    + [("muon", MESHES[3]), *(tiny.nightly("muon", m) for m in MESHES if m != MESHES[3])],
    ids=str,
)
def test_same_on_every_mesh(name, shape):
    """Muon: products are summed in another order, and Newton-Schulz multiplies that rounding."""
    single = run_on_one_device(name, np.float32)
    with jax.set_mesh(make_mesh(shape)):
        sharded = run(name, 5)
    check(sharded, single, 3.4445**5 * 2**-24 if name == "muon" else 1e-6)


@pytest.mark.parametrize("shape", [*map(tiny.nightly, MESHES[:3]), *MESHES[3:]], ids=str)
def test_muon_in_float64_is_the_same_on_every_mesh(shape):
    """What float32 shows between layouts is rounding alone."""
    with jax.enable_x64(True):
        single = run_on_one_device("muon", np.float64)
        with jax.set_mesh(make_mesh(shape)):
            sharded = run("muon", 5, np.float64)
    check(sharded, single, 1e-12)


def collectives(text: str) -> dict[str, int]:
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return dict(collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", text)))


MUON_COLLECTIVES = [
    {"all-gather": 3},
    {"all-to-all": 6},
    {"all-to-all": 6, "all-gather": 1},  # the kv heads do not divide: copies over tensor
    {"all-to-all": 6, "all-gather": 3},
    {"all-to-all": 6},
]


def test_muon_of_fewer_matrices_than_devices_that_cut_them():
    """The smallest program that XLA:CPU refused: one matrix on each stage, in four pieces."""
    dims, x = {"w": "layers embed mlp"}, np.random.default_rng(0).standard_normal((2, 32, 48))
    update = jax.jit(lambda w: optim.orthogonalize({"w": w + w}, dims)["w"])
    single = np.asarray(update(jnp.float32(x)))
    with jax.set_mesh(make_mesh(dict(stage=2, fsdp=2, tensor=2))):
        sharded = update(jax.device_put(jnp.float32(x), P("stage", "fsdp", "tensor")))
    np.testing.assert_allclose(np.asarray(sharded), single, atol=3.4445**5 * 2**-24)


@pytest.mark.parametrize("shape, expected", list(zip(MESHES, MUON_COLLECTIVES, strict=True)))
def test_muon_collectives(shape, expected):
    """Three shapes, 16 x 16, 8 x 16 and 16 x 24: each goes there and back once."""
    with jax.set_mesh(make_mesh(shape)):
        tx, params = optimizer("muon"), place(initial())
        state = jax.jit(tx.init)(params)
        text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    assert collectives(text) == expected


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_elementwise_rules_do_not_communicate(name):
    with jax.set_mesh(make_mesh(MESHES[3])):
        tx, params = optimizer(name), place(initial())
        state = jax.jit(tx.init)(params)
        text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    assert collectives(text) == {}


@pytest.mark.parametrize("name", NAMES)
def test_abstract_state_is_sharded_as_the_state(name):
    with jax.set_mesh(make_mesh(MESHES[3])):
        tx, params = optimizer(name), place(initial())
        abstract = jax.eval_shape(tx.init, params)
        actual = jax.tree.map(jax.typeof, jax.jit(tx.init)(params))
    for got, want in zip(jax.tree.leaves(abstract), jax.tree.leaves(actual), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert (got.sharding.spec if got.sharding else P()) == want.sharding.spec
    moments = {"adamw": ("mu", "nu"), "lion": ("mu",), "muon": ("momentum",), "adafactor": ()}
    for moment in moments[name]:
        for param, x in getattr(abstract[0], moment).items():
            assert jax.typeof(x) == jax.typeof(params[param])
    if name == "adafactor":
        q = "groups.0.q"
        assert (abstract[0].row[q].shape, abstract[0].column[q].shape) == ((4, 16), (4, 4, 4))
        assert abstract[0].row[q].sharding.spec == P(None, "fsdp")
        assert abstract[0].column[q].sharding.spec == P(None, "tensor", None)
        assert set(abstract[0].full) == {n for n in DIMS if n not in DECAYED} | {
            "groups.0.kv",
            "embed.positions",
        }


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_checkpoint(name, tmp_path):
    state = optimizer(name).init(place(initial()))
    state = jax.tree.map(lambda x: x + 1, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("name", NAMES)
def test_only_matrices_decay(name):
    tx, params = optimizer(name, schedule="constant", warmup_steps=0), place(initial())
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zero, jax.jit(tx.init)(params), params)
    for param, x in params.items():
        expected = -PEAK * DECAY * x if param in DECAYED else jnp.zeros_like(x)
        np.testing.assert_allclose(updates[param], expected, rtol=1e-6)


def test_sides():
    assert optim.sides("layers parts embed kv_heads head_dim") == ((0, 1), (2,), (3, 4))
    assert optim.sides("layers experts embed mlp") == ((0, 1), (2,), (3,))
    assert optim.sides("layers embed experts") == ((0,), (1,), (2,))
    assert optim.is_matrix("layers embed experts") and not optim.is_matrix("layers norm")
    assert not optim.is_matrix("layers experts mlp") and not optim.is_matrix("layers parts embed")


def test_matrices_without_embed():
    """Latent and low-rank projections are matrices; what heads and their width share is a bias."""
    assert optim.sides("layers rank heads head_dim") == ((0,), (1,), (2, 3))
    assert optim.sides("layers heads head_dim rank") == ((0,), (1, 2), (3,))
    assert optim.sides("layers experts rank mlp") == ((0, 1), (2,), (3,))
    for dims in ("rank heads head_dim", "layers kv_heads head_dim rank", "experts rank mlp"):
        assert optim.is_matrix(dims) and optim.takes_muon(dims), dims
    for dims in ("layers heads head_dim", "kv_heads head_dim", "heads norm", "layers", "rank", "_"):
        assert not optim.is_matrix(dims) and not optim.takes_muon(dims), dims
    for dims in ("vocab embed", "positions embed", "layers embed experts", "vocab rank"):
        assert optim.is_matrix(dims) and not optim.takes_muon(dims), dims


def test_a_low_rank_matrix_takes_its_rule():
    """Decay, Muon's momentum and Adafactor's two means of a matrix without `embed`."""
    dims, x = {"w": "layers rank heads head_dim"}, {"w": jnp.ones((2, 16, 4, 4))}
    make = lambda name: optim.make_optimizer(
        config.Optimizer(name=name, learning_rate=0.1), 10, dims
    )
    updates, _ = make("adamw").update({"w": 0 * x["w"]}, make("adamw").init(x), x)
    assert (updates["w"] < 0).all()
    assert make("muon").init(x)[0].momentum.keys() == {"w"}
    state = make("adafactor").init(x)[0]
    assert (state.row["w"].shape, state.column["w"].shape) == ((2, 16), (2, 4, 4))


def test_an_unknown_name_has_no_rule():
    with pytest.raises(KeyError, match="rmsprop"):
        optim.make_optimizer(config.Optimizer(name="rmsprop", learning_rate=0.1), 10, DIMS)
    with pytest.raises(KeyError, match="step"):
        optim.schedule(config.Optimizer(schedule="step", learning_rate=0.1), 10)


def make_schedule(name: str, steps: int, **changes):
    settings = dict(learning_rate=PEAK, warmup_steps=10, final_fraction=FINAL) | changes
    return jax.jit(optim.schedule(config.Optimizer(schedule=name, **settings), steps))


@pytest.mark.parametrize(
    "name, at",
    list(
        {
            "constant": {10: 1, 55: 1, 100: 1},
            "linear": {10: 1, 55: 0.55, 100: 0.1},
            "cosine": {10: 1, 55: 0.55, 100: 0.1, 40: 0.1 + 0.9 * 0.75},
            "wsd": {10: 1, 79: 1, 80: 1, 90: 0.55, 100: 0.1},
        }.items()
    ),
)
def test_schedule(name, at):
    """101 steps: ten of warm-up, the last number 100; WSD decays over the last 20."""
    values = make_schedule(name, 101)
    for step, fraction in ({0: 0.1, 1: 0.2, 9: 1.0} | at).items():
        np.testing.assert_allclose(values(step), PEAK * fraction, rtol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
    for name in ("constant", "linear", "cosine", "wsd"):
        assert float(make_schedule(name, 10, warmup_steps=0)(0)) == np.float32(PEAK)
        assert float(make_schedule(name, 1, warmup_steps=0)(0)) == np.float32(PEAK)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_schedule_of_a_billion_steps(name):
    steps = 1_000_000_000
    values = make_schedule(name, steps, warmup_steps=1_000_000)
    np.testing.assert_allclose(values(0), PEAK / 1e6, rtol=1e-6)
    np.testing.assert_allclose(values(steps - 1), PEAK * FINAL, rtol=1e-6)
    middle = [float(values(s)) for s in (20_000_000, 700_000_000, 900_000_000, 950_000_000)]
    assert middle == sorted(middle, reverse=True) and middle[2] > middle[3]


def test_global_norm_and_clip():
    grads = gradients(0)
    expected = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
    for shape in MESHES:
        with jax.set_mesh(make_mesh(shape)):
            sharded = place(grads)
            compiled = jax.jit(optim.global_norm).lower(sharded).compile()
            norm = compiled(sharded)
            assert norm.sharding.is_fully_replicated and norm.dtype == jnp.float32
            text = compiled.as_text()
            assert collectives(text) == ({} if shape == dict(data=8) else {"all-reduce": 1})
            np.testing.assert_allclose(norm, expected, rtol=1e-6)
            clipped = optim.clip_by_norm(sharded, norm, expected / 4)
            assert jax.tree.map(jax.typeof, clipped) == jax.tree.map(jax.typeof, sharded)
        for name, g in grads.items():
            np.testing.assert_allclose(clipped[name], g / 4, rtol=1e-6)


def test_clip_leaves_small_gradients_alone():
    grads = place(gradients(0))
    zero = jax.tree.map(jnp.zeros_like, grads)
    for given, norm, limit in [(grads, 2.0, 2.0), (zero, 0.0, 1.0)]:
        clipped = optim.clip_by_norm(given, jnp.float32(norm), limit)
        jax.tree.map(np.testing.assert_array_equal, clipped, given)
