"""Arrays on the wire: parts of arrays in a format of wire.py, in payloads of bounded size.

A part is the box of an array that one process holds, "embed|0:128,0:64"; in its payload stand the
arrays of its format, "embed|0:128,0:64|values". Receiver and sender decode with the same program,
so that the error which the sender keeps is what the receiver misses, to the bit.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from jaxlm.outer import records, wire
from jaxlm.outer.records import Damaged

PAYLOAD = 64 << 20  # bytes of float32 after which a payload ends; an array is never cut
Index = tuple[slice, ...]
Part = tuple[str, Index]

_encode = jax.jit(wire.encode, static_argnums=1)
_decode = jax.jit(wire.decode, static_argnums=(1, 2))


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Compute on the CPU of this process, whatever mesh its devices form; where jax has no CPU
    device, on its default device."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield


def key_of(part: Part) -> str:
    """The text of a part: its array and box."""
    name, index = part
    return f"{name}|{','.join(f'{each.start}:{each.stop}' for each in index)}"


def part_of(key: str) -> Part:
    """The part of a text; ValueError where it is none."""
    name, _, box = key.rpartition("|")
    bounds = [each.split(":") for each in box.split(",")] if box else []
    return name, tuple(slice(int(start), int(stop)) for start, stop in bounds)


def whole(name: str, shape: tuple[int, ...]) -> Part:
    """The part that is a whole array."""
    return name, tuple(slice(0, size) for size in shape)


def box_shape(index: Index) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(each.stop - each.start for each in index)


def encode(x: np.ndarray, form: str) -> dict[str, np.ndarray]:
    """The payload arrays of a float32 array of any shape."""
    flat_N = np.ascontiguousarray(x, np.float32).reshape(-1)
    if wire.exact(form):
        return {"values": flat_N}
    padded_N = np.pad(flat_N, (0, -flat_N.size % wire.group(form)))
    with on_cpu():
        return jax.device_get(_encode(padded_N, form))


def decode(payload: dict[str, np.ndarray], shape: tuple[int, ...], form: str) -> np.ndarray:
    """The float32 array of this shape that `encode` made a payload of.

    Raises Damaged where the payload is not of this shape and format.
    """
    count = math.prod(shape)
    padded = count + -count % wire.group(form)
    if {name: (x.shape, x.dtype) for name, x in payload.items()} != _layout(padded, form):
        raise Damaged(f"arrays that are not {form} of shape {shape}")
    if wire.exact(form):
        return payload["values"].reshape(shape)
    with on_cpu():
        return np.asarray(_decode(payload, padded, form))[:count].reshape(shape)


@functools.lru_cache(maxsize=1024)
def _layout(padded: int, form: str) -> dict[str, tuple]:
    """Shapes and types of the arrays of a payload."""
    coded = jax.eval_shape(lambda x: wire.encode(x, form), np.zeros(padded, np.float32))
    return {name: (x.shape, x.dtype) for name, x in coded.items()}


def send(x: np.ndarray, error: np.ndarray | None, form: str):
    """(payload arrays, what arrives, error to keep), as wire.send; None: no error is kept."""
    sent = x if error is None else x + error
    payload = encode(sent, form)
    if wire.exact(form):
        return payload, sent, None
    arrives = decode(payload, x.shape, form)
    return payload, arrives, sent - arrives


def packed(record: str, coded: Iterable[tuple[Part, dict[str, np.ndarray]]]) -> Iterator[bytes]:
    """Payloads of a record, each of parts one after another until it is large."""
    group: dict[str, np.ndarray] = {}
    size = 0
    for part, fields in coded:
        group |= {f"{key_of(part)}|{field}": array for field, array in fields.items()}
        size += 4 * math.prod(box_shape(part[1]))
        if size >= PAYLOAD:
            yield records.pack(record, group)
            group, size = {}, 0
    if group:
        yield records.pack(record, group)


def grouped(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a payload by the text of their part: key -> field -> array."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        key, _, field = name.rpartition("|")
        found.setdefault(key, {})[field] = array
    return found


@functools.lru_cache(maxsize=4096)
def checked_part(key: str, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Part:
    """The part of a text, which lies in one of these arrays; Damaged where it does not."""
    try:
        name, index = part_of(key)
    except ValueError:
        raise Damaged(f"no part of an array: {key[:100]!r}") from None
    shape = dict(shapes).get(name)
    inside = (
        shape is not None
        and len(shape) == len(index)
        and all(
            0 <= each.start <= each.stop <= size for each, size in zip(index, shape, strict=True)
        )
    )
    if not inside:
        raise Damaged(f"a part outside of the model: {key[:100]!r}")
    return name, index
