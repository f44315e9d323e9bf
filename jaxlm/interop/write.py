"""Writing a Hugging Face directory: our arrays as tensors, a few at a time, and config.json."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError

from jaxlm import config as cfg
from jaxlm.interop import carried
from jaxlm.interop.name_map import Tensor, tensors, to_theirs
from jaxlm.interop.safetensors_files import INDEX, SINGLE, first, save_tensors
from jaxlm.interop.tokenizer_files import write_json
from jaxlm.models import family_module
from jaxlm.sharding import Layout, partitions
from jaxlm.state import Arrays, model_structure

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
PathLike = str | os.PathLike[str]


def save_params(
    out_dir: PathLike, params: Arrays, model_config: cfg.Model, *,
    tokenizer: PathLike | None = None, dtype: str = "float32", shard_bytes: int = 5 * 10**9,
    kept: Path | None = None, trained_length: int = 2048,
) -> None:  # fmt: skip
    """Write a Hugging Face directory; all processes call it, process 0 holds one file at a time.

    `kept` and `trained_length` are as in carried.give_back.
    """
    family = family_module(model_config.family)
    hf = family.to_hugging_face(model_config, trained_length)
    imported = family.from_hugging_face(hf) | {"vocab_multiple": model_config.vocab_multiple}
    sharding = next(iter(params.values())).sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    like = type(model_config)(**imported)
    shapes = _shapes(like, sharding.mesh)
    expected = tensors(like, shapes)
    if lost := params.keys() - shapes.keys():
        raise cfg.UserError(f"{first(sorted(lost))}: Hugging Face's model has no such parameter")
    expected.sort(key=lambda tensor: tensor.layer)
    files = _split(expected, np.dtype(DTYPES[dtype]).itemsize, shard_bytes)
    with new_directory(out_dir) as directory:
        if jax.process_index() == 0:  # first: a mistake in them costs no time then
            hf["torch_dtype"] = dtype
            carried.give_back(directory, kept, tokenizer, hf, model_config, trained_length)
        fetch = functools.lru_cache(maxsize=1)(functools.partial(_fetch, params, shapes))
        for name, members in files.items():
            held = {t.name: _cast(fetch, t, dtype) for t in members}
            if jax.process_index() == 0:
                save_tensors(directory / name, held)
            del held
        if jax.process_index() == 0 and list(files) != [SINGLE]:
            size = np.dtype(DTYPES[dtype]).itemsize * sum(math.prod(t.shape) for t in expected)
            weight_map = {t.name: name for name, members in files.items() for t in members}
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(directory / INDEX, index)


def _shapes(model: cfg.Model, mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """Shapes of the model that an import of the directory would make."""
    axes, rules = tuple((axis, 1) for axis in cfg.AXES), tuple((dim, ()) for dim in cfg.DIMS)
    with jax.set_mesh(mesh):
        return model_structure(model, Layout(axes, rules, ())).shapes


def _split(expected: list[Tensor], itemsize: int, shard_bytes: int) -> dict[str, list[Tensor]]:
    """File name -> its tensors; no file is larger than shard_bytes unless one tensor is."""
    files, size = [[]], 0
    for tensor in expected:
        own = itemsize * math.prod(tensor.shape)
        if files[-1] and size + own > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += own
    if len(files) == 1:
        return {SINGLE: files[0]}
    count = len(files)
    return {f"model-{i:05}-of-{count:05}.safetensors": f for i, f in enumerate(files, 1)}


def _fetch(params: Arrays, shapes, ours: str, repeat: int | None) -> np.ndarray:
    """One layer of an array on the host; zeros for biases that only Hugging Face's model has."""
    if ours not in params:
        return np.zeros(shapes[ours] if repeat is None else shapes[ours][1:], np.float32)
    array = params[ours] if repeat is None else _take_repeat(params[ours], repeat)
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@jax.jit
def _take_repeat(array: jax.Array, repeat: jax.Array) -> jax.Array:
    if partitions(jax.typeof(array).sharding.spec)[:1] in ((), (None,)):
        return jax.lax.dynamic_index_in_dim(array, repeat, 0, keepdims=False)
    # Split over stages: a sum to which all layers but one add zero.
    here = jnp.expand_dims(jnp.arange(array.shape[0]) == repeat, tuple(range(1, array.ndim)))
    return jnp.sum(jnp.where(here, array, jnp.zeros_like(array)), axis=0)


def _cast(fetch, tensor: Tensor, dtype: str) -> np.ndarray:
    """Hugging Face's tensor from our arrays, in its type; empty where this process writes none."""
    array = fetch(tensor.ours, tensor.place[0] if tensor.place else None)
    if jax.process_index():
        return np.zeros(0, np.float32)
    array = to_theirs(array[tensor.place[1:]], tensor)
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array.astype(DTYPES[dtype]))
    if dtype == "float16" and np.isinf(cast).any() and np.isfinite(array).all():
        raise cfg.UserError(f"dtype=float16 cannot hold {tensor.name}; use bfloat16 or float32")
    return cast


@contextlib.contextmanager
def new_directory(out: PathLike) -> Iterator[Path]:
    """A directory to fill, which becomes `out` at the end or, on an error, nothing at all."""
    out = Path(os.path.abspath(out))
    temporary = out.with_name(f".{out.name}.unfinished")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise cfg.UserError(f"{out}: is there already and is never overwritten; move it away")
    writes = jax.process_index() == 0
    try:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _wait("made a directory")
        yield temporary
        _wait("filled a directory")
        if writes:
            os.replace(temporary, out)
        _wait("renamed a directory")
    except BaseException as error:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # the latter hides the former
            reason = getattr(error, "strerror", None) or error
            raise cfg.UserError(f"{out}: cannot write there: {reason}") from error
        raise


def _wait(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
