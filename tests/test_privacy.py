"""Norms of rows' gradients and clipped sums against rows one by one, on every kind of mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from jax_privacy import clipping

from jaxlm import ghost, verify
from jaxlm.keys import UserError
from jaxlm.loss import batch_losses
from jaxlm.mesh import open_mesh
from jaxlm.models import llama
from jaxlm.program import loss_and_grads
from jaxlm.sharding import Layout, batch_shardings
from jaxlm.state import State, create_state, model_structure, trained

PRIVATE = ("privacy.clip_norm=1.4", "privacy.noise_multiplier=1.0")
GEMMA = ["model.sliding_window=5", "model.locals_per_global=1", "model.attention_softcap=2.0"]
GEMMA += ["model.logit_softcap=3.0", "batch.sequence_length=16", "remat.policy=names"]
GEMMA += ["remat.names=[query,mlp]"]
QWEN = ["model.qkv_biases=true", "model.tie_embeddings=false", "batch.sequence_length=16"]
CASES = {  # name -> mesh, family, overrides
    "tied, GQA, chunks, fsdp x tensor": ("fsdp=2,tensor=2", "llama", ["remat.policy=full"]),
    "biases, positions, data": ("data=4", "gpt2", ["batch.microbatches=2", "remat.policy=dots"]),
    "norms, soft caps, fsdp": ("fsdp=4", "gemma", GEMMA),
    "untied, context x tensor": ("context=2,tensor=2", "qwen", QWEN),
}  # fmt: skip
MORE = {  # nightly
    "some weights, expert x context": (
        "expert=2,context=2",
        "llama",
        ["optimizer.train=[embed, '*.gate']", "gather_at=step"],
    ),
    "one device": ("fsdp=1", "llama", []),
    "every axis but stage": ("data=2,fsdp=2,context=2", "llama", ["loss.chunks=1"]),
    "few key heads, tensor": ("tensor=4,replica=2", "llama", ["data.segments=false"]),
    "positions over context": ("context=2,fsdp=2,tensor=2", "gpt2", ["loss.chunks=4"]),
    "norms over tensor": ("tensor=2,data=4", "gemma", GEMMA),
    "all keys gathered": ("context=4", "qwen", [*QWEN, "attention.context=all_gather"]),
}


def make_config(mesh: str, family: str, overrides):
    """The tiny config of a case, private, on a mesh."""
    config = tiny.config(family, *PRIVATE, *overrides)
    return verify.replace_mesh(config, verify.parse_mesh(mesh))


def start_values(config) -> dict[str, np.ndarray]:
    """Initial values in float64, no array constant."""
    mesh, layout = open_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = create_state(config, layout, optax.identity(), mesh)
    arrays = state.params | state.fixed
    return {n: verify.unlike(n, np.asarray(a)).astype(np.float64) for n, a in arrays.items()}


@functools.cache
def rows_one_by_one(family: str, *overrides: str):
    """(initial values, gradient of each row's loss by name, [B, ...]) on one device in float64."""
    config = make_config("fsdp=1", family, [*overrides, "remat.policy=none", "remat.names=[]"])
    values = start_values(config)
    names = trained(list(values), config.optimizer.train)
    mesh, layout = open_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh), jax.enable_x64(True):
        layout = dataclasses.replace(layout, compute="float64", reduce="float64")
        structure = model_structure(config.model, layout)
        batch = verify.make_batch(config, layout, 0)
        batch = {name: batch[name] for name in batch_shardings(config, layout, mesh)}
        gradient = jax.jit(jax.grad(functools.partial(row_loss, config, structure, layout)))
        params = {name: jnp.asarray(values[name]) for name in names}
        fixed = {name: jnp.asarray(values[name]) for name in values.keys() - names}
        rows = [
            jax.device_get(gradient(params, fixed, {n: x[r : r + 1] for n, x in batch.items()}))
            for r in range(config.batch.sequences)
        ]
    return values, {name: np.stack([row[name] for row in rows]) for name in sorted(names)}


def row_loss(config, structure, layout, params, fixed, row):
    """What privacy.clip_norm bounds the gradient of, of one row, as docs/privacy.md says it."""
    nll, z, _ = batch_losses(config, structure.merge(params, fixed), row, layout)
    sums = jnp.sum((nll + config.loss.z_loss * z) * row["weights"])
    return sums / config.batch.sequence_length


def on_mesh(config, values, compute: str = "float64") -> dict[str, np.ndarray]:
    """The sums of gradients that loss_and_grads gives on the mesh of a config."""
    mesh, layout = open_mesh(config, jax.devices()[: verify._devices(config)])
    with jax.set_mesh(mesh):
        state = create_state(config, layout, optax.identity(), mesh)
        structure = model_structure(config.model, layout)
        with jax.enable_x64(compute == "float64"):
            layout = dataclasses.replace(layout, compute=compute, reduce=compute)
            put = lambda arrays: {
                n: jax.device_put(values[n].astype(compute), a.sharding) for n, a in arrays.items()
            }
            state = State(state.step, put(state.params), put(state.fixed), ())
            batch = verify.make_batch(config, layout, 0)
            shardings = batch_shardings(config, layout, mesh)
            batch = {n: jax.device_put(batch[n], s) for n, s in shardings.items()}

            sums = lambda state, batch: loss_and_grads(config, structure, state, batch, layout)[2]
            return jax.device_get(jax.jit(sums, compiler_options=verify.FAST)(state, batch))


def clipped_sum(gradients: dict[str, np.ndarray]):
    """(the second smallest norm of a row, the sum of rows scaled down to it), in numpy."""
    square_B = sum(np.sum(np.square(g), tuple(range(1, g.ndim))) for g in gradients.values())
    norm_B = np.sqrt(square_B)
    limit = float(np.sort(norm_B)[1])
    factor_B = np.minimum(1, limit / norm_B)
    assert factor_B.min() < 0.99 and sum(factor_B == 1) == 2
    return limit, {n: np.tensordot(factor_B, g, 1) for n, g in gradients.items()}


def far(found: dict, expected: dict) -> float:
    """The largest distance of two gradients, over the norm of all."""
    total = np.sqrt(sum(np.sum(np.square(x)) for x in expected.values()))
    return max(float(np.linalg.norm(found[n] - expected[n])) / total for n in expected)


def check(case) -> None:
    mesh, family, overrides = case
    config = make_config(mesh, family, overrides)
    values, gradients = rows_one_by_one(family, *overrides)
    limit, expected = clipped_sum(gradients)
    privacy = dataclasses.replace(config.privacy, clip_norm=limit)
    found = on_mesh(dataclasses.replace(config, privacy=privacy), values)
    assert found.keys() == expected.keys() and far(found, expected) < 1e-10


@pytest.mark.parametrize("name", [*CASES, *map(tiny.nightly, MORE)])
def test_norms_and_clipped_sums_are_those_of_rows_one_by_one(name):
    check((CASES | MORE)[name])


def test_clipped_sums_are_those_of_jax_privacy():
    """On fsdp x tensor in float32, against the clipping of another library on one device."""
    mesh, family, overrides = CASES["tied, GQA, chunks, fsdp x tensor"]
    config = make_config(mesh, family, overrides)
    values, _ = rows_one_by_one(family, *overrides)
    one = make_config("fsdp=1", family, overrides)
    plain, layout = open_mesh(one, jax.devices()[:1])
    with jax.set_mesh(plain):
        structure = model_structure(one.model, layout)
        batch = verify.make_batch(one, layout, 0)
        names = batch_shardings(one, layout, plain)
        params = {n: jnp.asarray(x, jnp.float32) for n, x in values.items()}
        loss = lambda params, row: row_loss(one, structure, layout, params, {}, row)
        sums = clipping.clipped_grad(loss, l2_clip_norm=config.privacy.clip_norm)
        expected = jax.device_get(jax.jit(sums)(params, {n: jnp.asarray(batch[n]) for n in names}))
    assert far(on_mesh(config, values, "float32"), expected) < 1e-5


# The uses of a weight.


def probed(shape, rows: int, **more) -> ghost.Probed:
    return ghost.Probed("w", jnp.ones(shape), jnp.zeros(rows), **more)


@pytest.mark.parametrize(
    "equation, x, w",
    [
        ("bsd,df->bsf", (3, 4, 16), (16, 24)),  # pairs of tokens
        ("bsd,df->bsf", (3, 24, 4), (4, 6)),  # the product
        ("bsd,zdhc->zbshc", (3, 4, 16), (2, 16, 2, 8)),
        ("bshc,hcd->bsd", (3, 4, 4, 8), (4, 8, 24)),
        ("abz,z->abz", (3, 5, 7), (7,)),
        ("abcz,z->abcz", (3, 5, 2, 7), (7,)),
        ("bshr,hrc->bshc", (3, 4, 2, 6), (2, 6, 5)),  # a matrix for each head
    ],
)
def test_products(equation, x, w, monkeypatch):
    """Both ways of summing, for few rows and for many, against numpy in float64."""
    rng = np.random.default_rng(0)
    inputs, out = equation.split("->")
    term, weight = inputs.split(",")
    with (
        jax.enable_x64(True),
        jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])),
    ):
        x = jnp.asarray(rng.standard_normal(x))
        y = jax.eval_shape(lambda: jnp.einsum(equation, x, jnp.ones(w)))
        grad = jnp.asarray(rng.standard_normal(y.shape))
        rows = np.einsum(f"{term},{out}->{term[0]}{weight}", np.asarray(x), np.asarray(grad))
        expected = np.sum(np.square(rows), tuple(range(1, rows.ndim)))
        for small in (0, 1 << 30):
            monkeypatch.setattr(ghost, "SMALL", small)
            found = jax.jit(functools.partial(ghost.row_squares, equation))(x, grad)
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_lookups_of_a_token_are_added_before_they_are_squared():
    index = np.array([[1, 1, 0, 2], [3, 3, 3, 3]])
    grad = np.arange(16.0, dtype=np.float32).reshape(2, 4, 2)
    table = np.zeros((2, 5, 2))
    for row in range(2):
        np.add.at(table[row], index[row], grad[row])
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        found = ghost.lookup_squares(jnp.asarray(index), jnp.asarray(grad))
    np.testing.assert_allclose(found, np.sum(np.square(table), (1, 2)), rtol=1e-6)


def test_a_use_that_nobody_knows_is_refused():
    x, weight = jnp.ones((2, 3, 4)), probed((4, 5), 2)
    for use in (
        lambda: jnp.einsum("bsd,df->bsf", x, weight),
        lambda: x @ weight,
        lambda: x[..., 0, :, None] * weight,
        lambda: jnp.sum(weight) + 1,
    ):
        assert "the weight w is used by an operation" in tiny.message(use)


def test_a_second_use_is_refused():
    x, weight = jnp.ones((2, 3, 4)), probed((4, 5), 2)
    ghost.einsum("bsd,df->bsf", x, weight)
    again = lambda: ghost.einsum("bsd,df->bsf", x, weight.astype(jnp.float32))
    assert "the weight w is used more than once" in tiny.message(again)


def test_a_use_in_a_loop_that_is_not_given_the_weight_is_refused():
    x, weight = jnp.ones((2, 3, 4)), probed((4, 4), 2)
    turn = lambda x, _: (ghost.einsum("bsd,df->bsf", x, weight), None)
    assert "in a loop that is not given it" in tiny.message(jax.lax.scan, turn, x, None, 3)


@pytest.mark.parametrize("mistake", ["around the verbs", "twice"])
def test_a_family_that_uses_a_weight_otherwise_is_refused(monkeypatch, mistake):
    """As a new family may: it is told, and not left unclipped."""

    def around(x_BSD, weights, layout: Layout, activation=jax.nn.silu):
        gate, up, down = (layout.gather(weight) for weight in weights)
        hidden = activation(layout.dot("bsd,df->bsf", x_BSD, gate))
        hidden = hidden * layout.dot("bsd,df->bsf", x_BSD, gate if mistake == "twice" else up)
        if mistake == "twice":
            return layout.dot("bsf,fd->bsd", hidden, down)
        return jnp.einsum("bsf,fd->bsd", hidden, down)

    monkeypatch.setattr(llama, "gated_mlp", around)
    config = make_config("fsdp=1", "llama", ())
    with pytest.raises(UserError, match="privacy: the weight groups.0.0.(down|gate) is used"):
        on_mesh(config, start_values(config), "float32")


@pytest.mark.parametrize(
    "family, override, words",
    [
        ("mixtral", "batch.sequences=8", "model.family=mixtral with privacy.clip_norm"),
        ("llama", "mesh.stage=2", "mesh.stage=2 with privacy.clip_norm"),
        ("llama", "outer.every=4", "outer.every=4 with privacy.clip_norm"),
        ("llama", "privacy.noise_multiplier=0", "without noise clipped gradients are not private"),
        ("llama", "privacy.clip_norm=0", "privacy.noise_multiplier=1 has no effect"),
        ("llama", "privacy.delta=0", "privacy.delta=0 must be between 0 and 1"),
    ],
)
def test_what_cannot_be_private_is_refused(family, override, words):
    from jaxlm.validate import validate

    config = tiny.config(family, *PRIVATE, override)
    assert words in tiny.message(validate, config)


def test_a_sharding_at_rest_does_not_change_the_noise():
    """The same numbers on one device and on eight, to rounding; another step has others."""
    from jaxlm.privacy.noise import add_noise

    config = tiny.config("llama", *PRIVATE)
    words = jnp.asarray([3, 4], jnp.uint32)
    found = []
    for count, spec in ((1, P()), (8, P(None, "fsdp"))):
        mesh, _ = open_mesh(verify.replace_mesh(config, {"fsdp": count}), jax.devices()[:count])
        with jax.set_mesh(mesh):
            zeros = {"w": jnp.zeros((16, 64), jnp.float32, out_sharding=spec)}
            noise = jax.jit(functools.partial(add_noise, config.privacy))
            found += [np.asarray(noise(zeros, w)["w"]) for w in (words, words + 1)]
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)
    assert abs(np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1]) < 0.15
