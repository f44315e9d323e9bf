"""Attention backends against a float64 oracle and each other, and which one is chosen where.

Shapes: B batch, S queries, T keys, H query heads, K kv heads, C head_dim.
"""

import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxlm import attention, configfile
from jaxlm import config as cfg
from jaxlm.attention import chunked, splash, xla
from jaxlm.mesh import make_mesh
from jaxlm.sharding import make_layout
from jaxlm.validate import resolve_mesh

LLAMA = Path(__file__).parent / "configs/llama.yaml"
BACKENDS = {
    "xla": xla.attend,
    "chunked": chunked.attend,
    "splash": lambda *args: splash.attend(*args, interpret=True),
}


def open_layout(heads: int, kv_heads: int, width: int, *mesh: str, chunk: int = 48):
    """(mesh, layout) of a Llama with these heads; chunk 48 divides none of the lengths below."""
    model = (
        f"model.num_heads={heads}",
        f"model.num_kv_heads={kv_heads}",
        f"model.head_dim={width}",
    )
    config = configfile.load(LLAMA, [*model, f"attention.chunk={chunk}", *mesh])
    sizes = {axis: max(1, size) for axis, size in vars(config.mesh).items() if axis != "dcn"}
    count = int(np.prod(list(sizes.values())))
    sizes = resolve_mesh(config.mesh, count)
    mesh = make_mesh(sizes, {}, jax.devices()[:count])
    return mesh, make_layout(config, sizes, config.attention)


def make_inputs(mesh, layout, shape, kv_heads: int, segments: bool, dtype=jnp.float32):
    """q, k, v, the output's cotangent, and segments (lengths of no particular multiple) or None."""
    batch, length, heads, width = shape
    rng = np.random.default_rng(0)
    place = lambda x, dims: jax.device_put(x, NamedSharding(mesh, layout.spec(dims)))
    array = lambda count, dims: place(
        jnp.asarray(rng.normal(size=(batch, length, count, width)), dtype), f"batch seq {dims} _"
    )
    arrays = array(heads, "heads"), array(kv_heads, "kv_heads"), array(kv_heads, "kv_heads")
    ids = np.cumsum(rng.random((batch, length)) < 0.03, axis=1).astype(np.int32)
    return *arrays, array(heads, "heads"), place(ids, "batch seq") if segments else None


def forward_and_gradients(attend, inputs, layout, softcap: float, window: int = 0):
    """Output, dq, dk, dv as numpy arrays."""
    q, k, v, cotangent, ids = inputs

    @jax.jit
    def run(q, k, v, cotangent, ids):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, ids, layout, softcap, window), q, k, v)
        return out, *pull(cotangent)

    return [np.asarray(x, np.float64) for x in run(q, k, v, cotangent, ids)]


def oracle(inputs, softcap: float, window: int = 0) -> np.ndarray:
    """softmax(q k / sqrt(C)) v in numpy float64."""
    q_BSHC, k_BTKC, v_BTKC = (np.asarray(x, np.float64) for x in inputs[:3])
    groups, length = q_BSHC.shape[2] // k_BTKC.shape[2], q_BSHC.shape[1]
    k_BTHC, v_BTHC = (np.repeat(x, groups, axis=2) for x in (k_BTKC, v_BTKC))
    scores = np.einsum("bshc,bthc->bhst", q_BSHC, k_BTHC) / q_BSHC.shape[-1] ** 0.5
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    mask = np.tri(length, dtype=bool) & (np.tri(length, k=-window) == 0 if window else True)
    mask = mask[None]
    if inputs[4] is not None:
        ids = np.asarray(inputs[4])
        mask = mask & (ids[:, :, None] == ids[:, None, :])
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhst,bthc->bshc", weights, v_BTHC)


CASES = {  # heads, kv_heads, width, length, segments, softcap, window, mesh
    "plain": (2, 2, 64, 128, False, 0.0, 0, []),
    "segments": (2, 2, 64, 256, True, 0.0, 0, []),
    "grouped heads": (4, 2, 64, 128, True, 0.0, 0, []),
    "one kv head": (4, 1, 64, 128, False, 0.0, 0, []),
    "softcap": (2, 1, 128, 128, True, 2.0, 0, []),
    "window": (2, 1, 64, 256, True, 0.0, 50, []),
    "window of one chunk, softcap": (2, 2, 64, 128, False, 2.0, 17, []),
    "data x tensor": (4, 2, 64, 128, True, 0.0, 0, ["mesh.data=2", "mesh.tensor=2"]),
    "2 kv heads on tensor=4": (4, 2, 64, 128, True, 2.0, 0, ["mesh.tensor=4"]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_backend_is_exact(case, backend):
    heads, kv_heads, width, length, segments, softcap, window, axes = CASES[case]
    mesh, layout = open_layout(heads, kv_heads, width, *axes)
    with jax.set_mesh(mesh):
        inputs = make_inputs(mesh, layout, (2, length, heads, width), kv_heads, segments)
        got = forward_and_gradients(BACKENDS[backend], inputs, layout, softcap, window)
        np.testing.assert_allclose(got[0], oracle(inputs, softcap, window), rtol=1e-5, atol=2e-6)
        if backend != "xla":
            expected = forward_and_gradients(xla.attend, inputs, layout, softcap, window)
            for one, other in zip(got, expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_xla_gradients_are_exact(softcap):
    """Against finite differences of the float64 oracle."""
    mesh, layout = open_layout(2, 1, 8)
    with jax.set_mesh(mesh):
        inputs = make_inputs(mesh, layout, (1, 16, 2, 8), 1, True)
        _, *gradients = forward_and_gradients(xla.attend, inputs, layout, softcap)
    rng, cotangent = np.random.default_rng(1), np.asarray(inputs[3], np.float64)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        shifted = lambda t, i=i, d=direction: [
            np.asarray(x, np.float64) + t * d if j == i else x for j, x in enumerate(inputs)
        ]
        change = oracle(shifted(1e-5), softcap) - oracle(shifted(-1e-5), softcap)
        expected = np.sum(cotangent * change) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-4)


@pytest.mark.parametrize("length, chunk", [(127, 32), (128, 128), (128, 7), (100, 512), (5, 1)])
def test_any_chunk_gives_the_same(length, chunk):
    mesh, layout = open_layout(4, 2, 8, chunk=chunk)
    with jax.set_mesh(mesh):
        inputs = make_inputs(mesh, layout, (2, length, 4, 8), 2, True)
        got = forward_and_gradients(chunked.attend, inputs, layout, 0.0)
        expected = forward_and_gradients(xla.attend, inputs, layout, 0.0)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)


def test_chunks_lose_no_precision_in_bfloat16():
    """Gradients of k and v are sums over 32 chunks: in bfloat16 the error would be 1.85 times."""
    mesh, layout = open_layout(2, 1, 32, chunk=16)
    with jax.set_mesh(mesh):
        inputs = make_inputs(mesh, layout, (1, 512, 2, 32), 1, False, jnp.bfloat16)
        exact = [None if x is None else x.astype(jnp.float32) for x in inputs]
        exact = forward_and_gradients(xla.attend, exact, layout, 0.0)
        error = lambda attend: [
            np.linalg.norm(got - true) / np.linalg.norm(true)
            for got, true in zip(
                forward_and_gradients(attend, inputs, layout, 0.0), exact, strict=True
            )
        ]
        for got, reference in zip(error(chunked.attend), error(xla.attend), strict=True):
            assert got < 1.3 * reference


def temporary_bytes(attend, length: int) -> int:
    """Scratch memory of a compiled forward and backward pass."""
    mesh, layout = open_layout(2, 1, 8, chunk=32)
    shape = lambda count: jax.ShapeDtypeStruct((1, length, count, 8), jnp.float32)

    def run(q, k, v, ids):
        loss = lambda q, k, v: jnp.sum(attend(q, k, v, ids, layout, 0.0, 0) ** 2)
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    with jax.set_mesh(mesh):
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jax.jit(run).lower(shape(2), shape(1), shape(1), ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_chunked_memory_grows_linearly():
    lengths = (512, 1024, 2048)
    flat = [temporary_bytes(chunked.attend, n) for n in lengths]
    whole = [temporary_bytes(xla.attend, n) for n in lengths]
    for small, large in zip(flat, flat[1:], strict=False):
        assert large < 2.2 * small, flat
    assert whole[-1] > 10 * whole[0], whole  # four times the length; three or four arrays of scores
    assert flat[-1] < whole[-1] / 20


def test_chunked_makes_masks_chunk_by_chunk_and_transposes_no_scores():
    """Masks depend on no input that has a gradient: autodiff would make all of them early."""
    mesh, layout = open_layout(2, 1, 8, chunk=32)
    with jax.set_mesh(mesh):
        q, k, v, _, ids = make_inputs(mesh, layout, (1, 512, 2, 8), 1, True)

        def loss(q, k, v):
            layer = lambda q, _: (chunked.attend(q, k, v, ids, layout, 0.0, 0), None)
            return jnp.sum(jax.lax.scan(layer, q, length=2)[0])

        text = jax.jit(jax.grad(loss)).lower(q, k, v).as_text()
    size = lambda shapes: max(math.prod(map(int, shape.split("x"))) for shape in shapes)
    assert size(re.findall(r"tensor<([0-9x]+)xi1>", text)) == 2 * 32 * 512
    assert size(re.findall(r"stablehlo.transpose.*-> tensor<([0-9x]+)xf32>", text)) <= q.size


def test_blocks_of_splash_divide_and_stay_few():
    for length in range(128, 65536 + 1, 128):
        blocks = splash.block_sizes(length, 256)
        sizes = [blocks.block_q, blocks.block_kv, blocks.block_q_dkv, blocks.block_kv_dkv]
        assert all(length % n == 0 and n % 128 == 0 for n in sizes)
        assert blocks.block_kv_dkv % blocks.block_kv_dkv_compute == 0
        assert blocks.block_kv % blocks.block_kv_compute == 0
        assert not blocks.use_fused_bwd_kernel or length <= 8 * blocks.block_kv_dkv
    fused = lambda *case: splash.block_sizes(*case).use_fused_bwd_kernel
    assert fused(8192, 512) and fused(16384, 256)
    assert not fused(8192, 1024) and not fused(32768, 256)


DEVICES = {
    "cpu": SimpleNamespace(platform="cpu", device_kind="cpu"),
    "v5e": SimpleNamespace(platform="tpu", device_kind="TPU v5 lite"),
    "h100": SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0"),
    "v100": SimpleNamespace(platform="gpu", device_kind="NVIDIA V100", compute_capability="7.0"),
}


def choose(kind: str, *overrides: str, monkeypatch=None, caplog=None, context: int = 1):
    """(backend, log line) on a mesh of one kind of device that is present, with its library."""
    monkeypatch.setattr(attention.cudnn, "_is_here", lambda device: True)
    devices = np.array([DEVICES[kind]], dtype=object)
    shape = dict.fromkeys(cfg.AXES, 1) | {"context": context}
    mesh = SimpleNamespace(devices=devices, shape=shape)
    config = configfile.load(LLAMA, ["precision.compute=bfloat16", *overrides])
    with caplog.at_level(logging.INFO, "jaxlm"):
        return attention.choose(config, mesh).backend, caplog.messages[-1]


AUTO = {
    "short on cpu": ("cpu", [], "xla", "are small"),
    "long on cpu": ("cpu", ["batch.sequence_length=2048"], "chunked", "2048 tokens"),
    "tpu": ("v5e", ["batch.sequence_length=2048"], "splash", "TPU v5 lite"),
    "tpu, odd length": ("v5e", ["batch.sequence_length=2000"], "chunked", "multiple of 128"),
    "tpu, wide heads": (
        "v5e", ["batch.sequence_length=2048", "model.head_dim=264"], "chunked", "above 256",
    ),
    "tpu, short odd length": ("v5e", [], "xla", "multiple of 128"),
    "gpu": ("h100", ["data.segments=false"], "cudnn", "H100"),
    "gpu, segments": ("h100", ["batch.sequence_length=2048"], "chunked", "data.segments=true"),
    "gpu, float32": (
        "h100", ["data.segments=false", "precision.compute=float32"], "xla", "float32",
    ),
    "gpu, softcap": (
        "h100", ["data.segments=false", "model.attention_softcap=5"], "xla", "softcap=5",
    ),
    "gpu, wide heads": ("h100", ["data.segments=false", "model.head_dim=264"], "xla", "up to 256"),
    "old gpu": ("v100", ["data.segments=false"], "xla", "7.0"),
}  # fmt: skip


SPLIT = {
    "ring": ("v5e", [], "ring", "attention.context=ring"),
    "plain jax": ("h100", ["attention.backend=chunked"], "ring", "mesh.context=2"),
    "gathered": ("cpu", ["attention.context=all_gather"], "all_gather", "=all_gather"),
    "whole on tpu": (
        "v5e", ["attention.context=all_to_all", "batch.sequence_length=2048"], "splash", "=all_to",
    ),
    "whole on gpu": (
        "h100", ["attention.context=all_to_all", "data.segments=false"], "cudnn", "=all_to_all",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLIT)
def test_a_split_sequence_is_named(case, monkeypatch, caplog):
    kind, overrides, backend, why = SPLIT[case]
    got, line = choose(kind, *overrides, monkeypatch=monkeypatch, caplog=caplog, context=2)
    assert got == backend and why in line and "mesh.context=2" in line, line


@pytest.mark.parametrize("case", AUTO)
def test_auto(case, monkeypatch, caplog):
    kind, overrides, backend, why = AUTO[case]
    got, line = choose(kind, *overrides, monkeypatch=monkeypatch, caplog=caplog)
    assert got == backend and why in line, line


REFUSED = {
    "splash on cpu": ("cpu", ["attention.backend=splash"], 1, "auto or xla or chunked"),
    "splash on gpu": ("h100", ["attention.backend=splash"], 1, "TPU kernel"),
    "cudnn on tpu": ("v5e", ["attention.backend=cudnn"], 1, "mesh is of tpu"),
    "cudnn with segments": ("h100", ["attention.backend=cudnn"], 1, "data.segments=true"),
    "splash on a split sequence": (
        "v5e", ["attention.backend=splash", "batch.sequence_length=128"], 2, "mesh.context=2",
    ),
    "cudnn with a window": (
        "h100", ["attention.backend=cudnn", "model.sliding_window=8"], 1, "sliding_window=8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, monkeypatch, caplog):
    kind, overrides, context, words = REFUSED[case]
    with pytest.raises(cfg.UserError) as error:
        choose(kind, *overrides, monkeypatch=monkeypatch, caplog=caplog, context=context)
    message = str(error.value)
    assert overrides[0] in message and words in message and "use attention.backend=" in message


def test_cudnn_without_its_library_is_not_compiled_for_an_absent_gpu(monkeypatch):
    monkeypatch.setattr(attention.cudnn, "_has_library", lambda: False)
    mesh = SimpleNamespace(
        devices=np.array([DEVICES["h100"]], dtype=object), shape=dict.fromkeys(cfg.AXES, 1)
    )
    config = configfile.load(LLAMA, ["precision.compute=bfloat16", "data.segments=false"])
    assert "cuDNN library" in attention.obstacle("cudnn", config, mesh)


def test_a_kernel_saves_its_residuals_under_the_name_attention():
    """With remat.names=[attention] the backward pass does not run the forward kernel again."""
    mesh, layout = open_layout(2, 2, 64)
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    with jax.set_mesh(mesh):
        inputs = make_inputs(mesh, layout, (1, 128, 2, 64), 2, True)

        def loss(q, policy):
            attend = lambda q: BACKENDS["splash"](q, *inputs[1:3], inputs[4], layout, 0.0, 0)
            return jnp.sum(jax.checkpoint(lambda q: attend(2 * q), policy=policy)(q) ** 2)

        def loops(policy):  # an interpreted kernel is a loop
            lowered = jax.jit(jax.grad(loss), static_argnums=1).lower(inputs[0], policy)
            return lowered.as_text().count("stablehlo.while")

        assert loops(policy) < loops(None)
