"""Reading a Hugging Face directory: config.json into `model:`, tensors into our arrays."""

from __future__ import annotations

import functools
import itertools
import os
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlm import config as cfg
from jaxlm.configfile import model_class
from jaxlm.interop.name_map import Tensor, from_theirs, tensors
from jaxlm.interop.safetensors_files import first, open_tensors, read_json
from jaxlm.models import family_module
from jaxlm.sharding import Layout
from jaxlm.state import Arrays, Structure

READABLE = {"F32", "BF16", "F16"}
HEAD = "lm_head.weight"
PathLike = str | os.PathLike[str]


def read_model(source: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values of our `model:` section, config.json) of a Hugging Face directory."""
    directory = Path(source)
    if not directory.is_dir():
        raise cfg.UserError(f"{directory}: no such directory; download the model there first")
    hf, where = read_json(directory, "config.json"), directory / "config.json"
    family = find_family(hf.get("model_type"), where)
    if hf.get("quantization_config"):
        raise cfg.UserError(f"{where}: quantization_config: quantized weights are not supported")
    try:
        model = family.from_hugging_face(hf)
        for name, value in model.items():
            if not isinstance(value, bool | int | float | str):
                raise ValueError(f"model.{name}={value!r} would be no plain value")
        return model, hf
    except KeyError as error:
        raise cfg.UserError(f"{where}: {error.args[0]} is missing") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise cfg.UserError(f"{where}: {error}") from None


def find_family(model_type: Any, where: Path) -> ModuleType:
    """The family that has this model_type."""
    families = {kind: f for f in map(family_module, cfg.FAMILIES) for kind in f.MODEL_TYPES}
    if not isinstance(model_type, str) or model_type not in families:
        known = ", ".join(sorted(families))
        raise cfg.UserError(
            f"{where}: model_type={model_type} is not supported; these are: {known}"
        )
    return families[model_type]


def load_params(hf_dir: PathLike, structure: Structure, layout: Layout, mesh: Mesh) -> Arrays:
    """The parameters of a Hugging Face directory, float32, each device's shard read alone."""
    model, _ = read_model(hf_dir)
    not_needed = [*family_module(model["family"]).IGNORED, *[HEAD] * model["tie_embeddings"]]
    with open_tensors(Path(hf_dir), not_needed) as found:
        if model["num_layers"] > len(found):
            raise cfg.UserError(
                f"{hf_dir}: {len(found)} tensors are too few for {model['num_layers']} layers"
            )
        expected = tensors(model_class(model["family"])(**model), structure.shapes)
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
