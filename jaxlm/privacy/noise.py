"""Gaussian noise on the sum of clipped gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.keys_outer import Privacy

Arrays = dict[str, jax.Array]


@jax.named_scope("noise")
def add_noise(privacy: Privacy, grads: Arrays, words: jax.Array) -> Arrays:
    """grads + N(0, (noise_multiplier * clip_norm)^2) for each element, where the gradients rest.

    `words`: the two of the step's key. The same numbers on every mesh, to rounding.
    """
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    std = privacy.noise_multiplier * privacy.clip_norm

    def one(index: int, grad: jax.Array) -> jax.Array:
        spec = jax.typeof(grad).sharding.spec
        noise = jax.random.normal(
            jax.random.fold_in(key, index), grad.shape, grad.dtype, out_sharding=spec
        )
        return grad + jnp.asarray(std, grad.dtype) * noise

    return {name: one(i, grads[name]) for i, name in enumerate(sorted(grads))}
