"""What travels between islands: arrays of float32 in few bits, with the error kept for next time.

Every format works on a flat array, padded to whole groups. Letters: N elements, G groups of g.

- bfloat16: rounded.
- int8, int4: symmetric integers, a scale for each group of 128: its largest magnitude over 127
  or 7.
- int2: the four levels that are best for a normal distribution (Max, "Quantizing for minimum
  distortion", 1960, table I), a scale for each group of 128: its root mean square.
- topk: the 64 largest of each 4,096 as bfloat16, with their places (SparseLoCo, arXiv:2508.15706,
  sends as many; its values have 2 bits).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Payload = dict[str, jax.Array]

GROUP = 128  # elements that share a scale of 2 bytes: an eighth of a bit each
CHUNK, KEPT = 4096, 64  # of topk
LEVELS = (0.4528, 1.510)  # of int2, in standard deviations; what is below the border is the first
BORDER = 0.9816
INTEGERS = {"int8": (8, 127), "int4": (4, 7), "int2": (2, 0)}  # bits, largest integer


def exact(wire: str) -> bool:
    """Whether a format keeps every bit, so that there is no error to keep."""
    return wire == "float32"


def group(wire: str) -> int:
    """Elements that a format takes together: an array is padded with zeros to a multiple."""
    return {"float32": 1, "bfloat16": 1, "topk": CHUNK}.get(wire, GROUP)


def encode(x_N: jax.Array, wire: str) -> Payload:
    """A flat float32 array [N] in a format; N is a multiple of its `group`."""
    if wire == "float32":
        return {"values": x_N}
    if wire == "bfloat16":
        return {"values": x_N.astype(jnp.bfloat16)}
    if wire == "topk":
        x_Gg = x_N.reshape(-1, CHUNK)
        _, places_Gk = jax.lax.top_k(jnp.abs(x_Gg), KEPT)
        values_Gk = jnp.take_along_axis(x_Gg, places_Gk, axis=1)
        return {
            "values": values_Gk.astype(jnp.bfloat16).reshape(-1),
            "places": places_Gk.astype(jnp.uint16).reshape(-1),
        }
    bits, largest = INTEGERS[wire]
    x_Gg = x_N.reshape(-1, GROUP)
    if wire == "int2":
        scale_G = _scale(jnp.sqrt(jnp.mean(jnp.square(x_Gg), axis=1)))
        large_Gg = jnp.abs(x_Gg) > BORDER * scale_G[:, None]
        codes_Gg = jnp.where(x_Gg < 0, 1, 0) + jnp.where(large_Gg, 2, 0)
    else:
        scale_G = _scale(jnp.max(jnp.abs(x_Gg), axis=1) / largest)
        steps_Gg = jnp.round(x_Gg / jnp.where(scale_G > 0, scale_G, 1.0)[:, None])
        codes_Gg = jnp.clip(steps_Gg, -largest, largest) + largest
    return {
        "values": _pack(codes_Gg.astype(jnp.uint8).reshape(-1), bits),
        "scales": scale_G.astype(jnp.bfloat16),
    }


def decode(payload: Payload, count: int, wire: str) -> jax.Array:
    """The float32 array [N], N = `count`, that `encode` made a payload of."""
    values = payload["values"]
    if wire in ("float32", "bfloat16"):
        return values.astype(jnp.float32)
    if wire == "topk":
        values_Gk = values.astype(jnp.float32).reshape(-1, KEPT)
        places_Gk = payload["places"].astype(jnp.int32).reshape(-1, KEPT)
        rows_G1 = jnp.arange(count // CHUNK)[:, None]
        zeros = jnp.zeros((count // CHUNK, CHUNK), jnp.float32)
        return zeros.at[rows_G1, places_Gk].set(values_Gk).reshape(-1)
    bits, largest = INTEGERS[wire]
    codes_Gg = _unpack(values, bits).reshape(-1, GROUP)
    scale_G1 = payload["scales"].astype(jnp.float32)[:, None]
    if wire == "int2":
        size_Gg = jnp.where(codes_Gg & 2, LEVELS[1], LEVELS[0])
        return (jnp.where(codes_Gg & 1, -size_Gg, size_Gg) * scale_G1).reshape(-1)
    return ((codes_Gg.astype(jnp.float32) - largest) * scale_G1).reshape(-1)


def send(x_N: jax.Array, error_N: jax.Array | None, wire: str):
    """(payload, error): x and the error so far are sent; what the format loses is the new error.

    Error feedback of Seide et al. (2014) and Karimireddy et al. (arXiv:1901.09847). An exact format
    has no error: None goes in and comes out.
    """
    if exact(wire):
        return encode(x_N, wire), None
    whole_N = x_N if error_N is None else x_N + error_N
    payload = encode(whole_N, wire)
    return payload, whole_N - decode(payload, x_N.size, wire)


def num_bytes(count: int, wire: str) -> int:
    """Bytes of the payload of `count` elements."""
    whole = -(-count // group(wire)) * group(wire)
    shapes = jax.eval_shape(lambda: encode(jnp.zeros(whole), wire))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes.values())


def _scale(scale_G: jax.Array) -> jax.Array:
    """A scale as it arrives, so that sender and receiver compute with the same."""
    return scale_G.astype(jnp.bfloat16).astype(jnp.float32)


def _pack(codes_N: jax.Array, bits: int) -> jax.Array:
    """Codes below 2^bits, several to a byte, the first in the lowest bits."""
    parts = codes_N.reshape(-1, 8 // bits)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    return jnp.sum(parts << shifts, axis=1, dtype=jnp.uint8)


def _unpack(packed: jax.Array, bits: int) -> jax.Array:
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    return ((packed[:, None] >> shifts) & (2**bits - 1)).reshape(-1)
