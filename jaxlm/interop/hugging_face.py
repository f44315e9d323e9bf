"""Hugging Face directories: config.json and safetensors into a run, and a run into those.

A family file says which tensor is which (NAMES, with patterns such as "dhc->(hc)d": our dimensions,
then theirs) and translates config.json; here is everything that families share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import yaml
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError

from jaxlm import checkpoint, configfile, devices, run
from jaxlm import config as cfg
from jaxlm.data import load_tokenizer
from jaxlm.interop import carried
from jaxlm.interop.safetensors_files import (
    INDEX,
    SINGLE,
    first,
    inside,
    open_tensors,
    read_json,
    save_tensors,
)
from jaxlm.interop.tokenizer_files import write_json
from jaxlm.mesh import open_mesh
from jaxlm.models import family_module
from jaxlm.sharding import Layout, partitions
from jaxlm.state import Arrays, State, Structure, model_structure, trained

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
READABLE = {"F32", "BF16", "F16"}
HEAD = "lm_head.weight"
LEADS = ("layer", "expert")  # what our leading dimensions are called in the names of theirs
PathLike = str | os.PathLike[str]


# Which of their tensors is which part of our arrays.


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor, and the part of our array that it is."""

    name: str  # Hugging Face's
    ours: str
    place: tuple[int, ...]  # leading indices into our array: layer and expert, where stacked
    pattern: str  # our dimensions -> theirs
    sizes: tuple[int, ...]  # of our dimensions, the vocabulary without its padding

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that Hugging Face gives it."""
        letters, groups = parse_pattern(self.pattern)
        sizes = dict(zip(letters, self.sizes, strict=True))
        return tuple(math.prod(sizes[letter] for letter in group) for group in groups)


@functools.cache
def parse_pattern(pattern: str) -> tuple[str, list[str]]:
    """ "dhc->(hc)d" -> ("dhc", ["hc", "d"])."""
    letters, theirs = pattern.split("->")
    return letters, [group or letter for group, letter in re.findall(r"\((\w+)\)|(\w)", theirs)]


def tensors(family: str, shapes: Mapping[str, tuple[int, ...]], vocab_size: int) -> list[Tensor]:
    """Every Hugging Face tensor of a model whose arrays have these shapes."""
    names, found = family_module(family).NAMES, []
    for ours, shape in shapes.items():
        if ours not in names:
            raise cfg.UserError(f"{ours}: Hugging Face's {family} has no such parameter")
        pattern, template = names[ours]
        letters, _ = parse_pattern(pattern)
        lead, sizes = shape[: -len(letters)], shape[-len(letters) :]
        sizes = tuple(vocab_size if x == "v" else n for x, n in zip(letters, sizes, strict=True))
        for place in itertools.product(*map(range, lead)):
            name = template.format(**dict(zip(LEADS, place)))  # noqa: B905
            found.append(Tensor(name, ours, place, pattern, sizes))
    return found


def to_theirs(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Our part of an array, padding cut off, as Hugging Face's tensor."""
    letters, groups = parse_pattern(tensor.pattern)
    array = array[tuple(slice(size) for size in tensor.sizes)]
    return array.transpose([letters.index(x) for x in "".join(groups)]).reshape(tensor.shape)


def from_theirs(source: Any, tensor: Tensor, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """The block [low, high) of each of our dimensions, read from Hugging Face's tensor.

    Only that block is read where it is contiguous in theirs, else whole dimensions of theirs.
    """
    letters, groups = parse_pattern(tensor.pattern)
    wanted, sizes = dict(zip(letters, bounds)), dict(zip(letters, tensor.sizes))  # noqa: B905
    ranges, held = [], {}
    for group in groups:
        shape, box = [sizes[x] for x in group], [wanted[x] for x in group]
        start = int(np.ravel_multi_index([low for low, _ in box], shape))
        stop = int(np.ravel_multi_index([high - 1 for _, high in box], shape)) + 1
        if stop - start != math.prod(high - low for low, high in box):
            start, stop, box = 0, math.prod(shape), [(0, size) for size in shape]
        ranges.append(slice(start, stop))
        held |= dict(zip(group, box, strict=True))
    order = "".join(groups)
    block = np.asarray(source[tuple(ranges)]).astype(np.float32)
    block = block.reshape([held[x][1] - held[x][0] for x in order])
    block = block.transpose([order.index(x) for x in letters])
    cut = [(wanted[x][0] - held[x][0], wanted[x][1] - held[x][0]) for x in letters]
    return block[tuple(slice(low, high) for low, high in cut)]


# Reading.


def read_model(source: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values of our `model:` section, config.json) of a Hugging Face directory."""
    directory = Path(source)
    if not directory.is_dir():
        raise cfg.UserError(f"{directory}: no such directory; download the model there first")
    hf, where = read_json(directory, "config.json"), directory / "config.json"
    family = hf.get("model_type")
    if family not in cfg.FAMILIES:
        known = ", ".join(cfg.FAMILIES)
        raise cfg.UserError(f"{where}: model_type={family} is not supported; these are: {known}")
    if hf.get("quantization_config"):
        raise cfg.UserError(f"{where}: quantization_config: quantized weights are not supported")
    try:
        model = family_module(family).from_hugging_face(hf)
        for name, value in model.items():
            if not isinstance(value, bool | int | float | str):
                raise ValueError(f"model.{name}={value!r} would be no plain value")
        return model, hf
    except KeyError as error:
        raise cfg.UserError(f"{where}: {error.args[0]} is missing") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise cfg.UserError(f"{where}: {error}") from None


def load_params(hf_dir: PathLike, structure: Structure, layout: Layout, mesh: Mesh) -> Arrays:
    """The parameters of a Hugging Face directory, float32, each device's shard read alone."""
    model, _ = read_model(hf_dir)
    not_needed = [*family_module(model["family"]).IGNORED, *[HEAD] * model["tie_embeddings"]]
    with open_tensors(Path(hf_dir), not_needed) as found:
        if model["num_layers"] > len(found):
            raise cfg.UserError(
                f"{hf_dir}: {len(found)} tensors are too few for {model['num_layers']} layers"
            )
        expected = tensors(model["family"], structure.shapes, model["vocab_size"])
        sources = _match(hf_dir, expected, found, model)
        parts: dict[str, dict[tuple[int, ...], Tensor]] = {name: {} for name in structure.dims}
        for tensor in expected:
            parts[tensor.ours][tensor.place] = tensor
        return {
            name: jax.make_array_from_callback(
                structure.shapes[name],
                NamedSharding(mesh, layout.stored(dims)),
                functools.partial(_read_shard, sources, parts[name], structure.shapes[name]),
            )
            for name, dims in structure.dims.items()
        }


def _match(hf_dir: PathLike, expected: list[Tensor], found: dict, model: dict) -> dict[str, Any]:
    """Tensor name -> slice, or a UserError that names what is missing, extra or unlike."""
    family = family_module(model["family"])
    keep = lambda name: not any(fnmatchcase(name, pattern) for pattern in family.IGNORED)
    found = {name: source for name, source in found.items() if keep(name)}
    if not any(name.startswith(family.PREFIX) for name in found):  # files of the bare model
        found = {n if n == HEAD else family.PREFIX + n: source for n, source in found.items()}
    if model["tie_embeddings"]:
        name, head = family.NAMES["embed"][1], found.pop(HEAD, None)
        if name not in found and head is not None:  # the two are one: either may be stored
            found[name] = head
        if head is not None and not _same(head, found[name]):
            raise cfg.UserError(
                f"{hf_dir}: tie_word_embeddings is true in config.json, but {HEAD} is not the "
                "embedding; if the head is its own, write false there, else take it out of the file"
            )
    names = {tensor.name for tensor in expected}
    kinds = {tensor.name: (list(tensor.shape), READABLE) for tensor in expected}
    there = {name: (list(s.get_shape()), str(s.get_dtype())) for name, s in found.items()}
    both = [name for name in kinds if name in there]
    problems = {
        "missing": [name for name in kinds if name not in there],
        "unexpected": sorted(there.keys() - names),
        "of a type other than F32, BF16, F16": [
            f"{n} ({there[n][1]})" for n in both if there[n][1] not in READABLE
        ],
        "of the wrong shape": [
            f"{n} ({there[n][0]}, not {kinds[n][0]})" for n in both if there[n][0] != kinds[n][0]
        ],
    }
    wrong = [f"{first(named)}: {what}" for what, named in problems.items() if named]
    if wrong:
        raise cfg.UserError(f"{hf_dir}: not the tensors of its config.json: {'; '.join(wrong)}")
    return found


def _same(one: Any, other: Any, rows: int = 4096) -> bool:
    """Whether two tensors hold the same, compared a few rows at a time."""
    if one is other:
        return True
    if one.get_shape() != other.get_shape():
        return False
    count = one.get_shape()[0]
    blocks = (slice(start, min(start + rows, count)) for start in range(0, count, rows))
    return all(np.array_equal(one[block], other[block]) for block in blocks)


def _read_shard(
    sources: dict[str, Any], parts: dict[tuple[int, ...], Tensor], shape: tuple[int, ...], index
) -> np.ndarray:
    """One device's part of our array; padding of the vocabulary is zero."""
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    shard = np.zeros([high - low for low, high in bounds], np.float32)
    lead = len(next(iter(parts)))
    for place in itertools.product(*(range(low, high) for low, high in bounds[:lead])):
        tensor = parts[place]
        real = [
            (low, min(high, size))
            for (low, high), size in zip(bounds[lead:], tensor.sizes, strict=True)
        ]
        if any(high <= low for low, high in real):
            continue
        to = [at - low for at, (low, _) in zip(place, bounds[:lead], strict=True)]
        to += [slice(high - low) for low, high in real]
        shard[tuple(to)] = from_theirs(sources[tensor.name], tensor, real)
    return shard


# Writing.


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
    shapes = _shapes(type(model_config)(**imported), sharding.mesh)
    expected = tensors(model_config.family, shapes, model_config.vocab_size)
    if lost := params.keys() - shapes.keys():
        raise cfg.UserError(f"{first(sorted(lost))}: Hugging Face's model has no such parameter")
    expected.sort(key=lambda tensor: tensor.place[0] if tensor.place else -1)
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


def _fetch(params: Arrays, shapes, ours: str, layer: int | None) -> np.ndarray:
    """One layer of an array on the host; zeros for biases that only Hugging Face's model has."""
    if ours not in params:
        return np.zeros(shapes[ours] if layer is None else shapes[ours][1:], np.float32)
    array = params[ours] if layer is None else _take_layer(params[ours], layer)
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@jax.jit
def _take_layer(array: jax.Array, layer: jax.Array) -> jax.Array:
    if partitions(jax.typeof(array).sharding.spec)[:1] in ((), (None,)):
        return jax.lax.dynamic_index_in_dim(array, layer, 0, keepdims=False)
    # Split over stages: a sum to which all layers but one add zero.
    here = jnp.expand_dims(jnp.arange(array.shape[0]) == layer, tuple(range(1, array.ndim)))
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


# The commands.


def import_run(source: PathLike, out: PathLike, overrides: Sequence[str]) -> None:
    """`jaxlm import`: a run directory with these weights as step 0 and no optimizer state."""
    source = Path(source)
    model, hf = read_model(source)
    devices.start(_run_config(source, out, model, hf, overrides, sequences=1).devices)
    sequences = math.lcm(8, jax.device_count())  # divides over every mesh
    config = _run_config(source, out, model, hf, overrides, sequences)
    with new_directory(out) as directory:
        mesh, layout = open_mesh(config)
        with jax.set_mesh(mesh):
            structure = model_structure(config.model, layout)
            arrays = load_params(source, structure, layout, mesh)
            chosen = trained(structure.weights, config.optimizer.train)
            params = {name: array for name, array in arrays.items() if name in chosen}
            fixed = {name: array for name, array in arrays.items() if name not in chosen}
            state = State(jnp.zeros((), jnp.int32), params, fixed, ())
        if jax.process_index() == 0:
            text = configfile.dump(config)
            (directory / "config.yaml").write_text(text, encoding="utf-8")
            carried.keep(source, directory)
            if (source / "tokenizer.json").exists():
                run.keep_tokenizer(directory, load_tokenizer(inside(source, "tokenizer.json")))
        manager = checkpoint.open_manager(directory / "checkpoints", config.checkpoint)
        with contextlib.closing(manager):
            checkpoint.save(manager, 0, state, {}, configfile.to_dict(config))
            checkpoint.finish(manager)
    carried.warn_of_length(config)


def _run_config(
    source: Path, out: PathLike, model: dict, hf: dict, overrides: Sequence[str], sequences: int
) -> cfg.Config:
    """A config for the imported run: its model, the least that training needs, and overrides."""
    longest = hf.get("max_position_embeddings") or model.get("max_positions") or 1024
    length = min(longest, 1024) if isinstance(longest, int) and longest > 1 else 1024
    values = {
        "name": Path(os.path.abspath(out)).name,
        "steps": 1000,
        "model": model,
        "batch": {"sequences": sequences, "sequence_length": length},
        "loss": {"chunks": 4 if length % 4 == 0 else 1},
        "optimizer": {"learning_rate": 1e-5},
        "data": {"path": "data"},
    }
    if not any(override.startswith("mesh.") for override in overrides):
        values["mesh"] = {"fsdp": -1}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        try:
            config = configfile.load(
                file, [*overrides, f"run.dir={configfile.yaml_text(str(out))}"]
            )
        except cfg.UserError as error:
            text = re.sub(re.escape(str(file)) + r"(:\d+)?", f"{source}/config.json", str(error))
            raise cfg.UserError(text) from None
    for name, value in model.items():
        if getattr(config.model, name) != value:
            raise cfg.UserError(
                f"model.{name}={getattr(config.model, name)}: {source}/config.json says {value}"
            )
    return config


def export_run(
    config: cfg.Config, out: PathLike, step: int | None = None, dtype: str = "float32",
    shard_gb: float = 5.0,
) -> None:  # fmt: skip
    """`jaxlm export`: a checkpoint (None: the newest) as a Hugging Face directory."""
    if not 0 < shard_gb < math.inf:
        raise cfg.UserError(f"--shard-gb={shard_gb:g} must be above 0, as in 5")
    kept = carried.find(cfg.run_dir(config))
    with run.open_model(config, step) as model:
        untrained = kept is not None and model.step == 0
        save_params(
            out, model.params | model.fixed, config.model,
            tokenizer=run.tokenizer_place(config), dtype=dtype, shard_bytes=int(shard_gb * 1e9),
            kept=kept, trained_length=0 if untrained else config.batch.sequence_length,
        )  # fmt: skip
