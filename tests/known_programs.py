"""Small programs with known FLOPs and traffic."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

KNOWN = ("dense", "scan", "nested", "grad", "remat", "fsdp", "tensor", "ring", "experts")
N, L, K = 256, 5, 3  # width, layers, microbatches


def programs(mesh: Mesh) -> dict:
    """Name -> (function, argument shapes with shardings)."""
    array = lambda *shape, spec=None: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, spec or P())
    )
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    run = lambda x, ws: jax.lax.scan(layer, x, ws)[0]
    remat = lambda x, ws: jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, ws)[0]
    nested = lambda xs, ws: jax.lax.map(lambda x: run(x, ws), xs)
    total = lambda f: lambda x, ws: jnp.sum(f(x, ws) ** 2)
    gathered = lambda x, ws: jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ reshard(w, P(None, None))), None), x, ws
    )[0]

    def tensor(x, ws):
        def one(x, w):
            up, down = w
            h = jnp.tanh(jnp.einsum("bd,df->bf", x, up, out_sharding=P(None, "x")))
            return jnp.einsum("bf,fd->bd", h, down, out_sharding=P(None, None)), None

        return jax.lax.scan(one, x, ws)[0]

    def ring(x):
        pairs = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]
        hop = lambda _, x: jax.lax.ppermute(x, "x", pairs) * 1.5
        local = lambda x: jax.lax.fori_loop(0, L, hop, x)
        return jax.shard_map(local, in_specs=P("x"), out_specs=P("x"))(x)

    def experts(x, ws):
        """Rows to the device of their expert, through its weights, and back."""
        swap = lambda x, to, back: jax.lax.all_to_all(x, "x", to, back, tiled=True)
        local = lambda x, w: swap(jnp.tanh(swap(x, 1, 0) @ w[0]), 0, 1)
        specs = P("x", None), P("x", None, None)
        return jax.shard_map(local, in_specs=specs, out_specs=P("x", None))(x, ws)

    weights, rows, part = array(L, N, N), array(N, N, spec=P("x", None)), N // mesh.size
    return {
        "dense": (lambda x, w: x @ w, (array(N, N), array(N, 2 * N))),
        "scan": (run, (array(N, N), weights)),
        "nested": (nested, (array(K, N, N), weights)),
        "grad": (jax.grad(total(run), (0, 1)), (array(N, N), weights)),
        "remat": (jax.grad(total(remat), (0, 1)), (array(N, N), weights)),
        "fsdp": (gathered, (rows, array(L, N, N, spec=P(None, "x", None)))),
        "tensor": (
            tensor,
            (array(N, N), (array(L, N, N, spec=P(None, None, "x")),
                           array(L, N, N, spec=P(None, "x", None)))),
        ),
        "ring": (ring, (rows,)),
        "experts": (experts, (rows, array(mesh.size, part, part, spec=P("x", None, None)))),
    }  # fmt: skip


def trace_known(name: str, devices: list) -> jax.stages.Traced:
    """One of them on these devices."""
    mesh = Mesh(np.array(devices), ("x",), axis_types=(AxisType.Explicit,))
    function, arguments = programs(mesh)[name]
    # TPU would send bfloat16.
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        return jax.jit(function).trace(*arguments)
