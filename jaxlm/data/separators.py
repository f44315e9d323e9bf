"""Which tokens begin and end a text: separators.json beside a tokenizer.json, or other files there.

A run keeps separators.json: training writes what the documents of its dataset begin and end with,
import what the files of the model say.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer as Engine
from tokenizers.models import WordLevel

from jaxlm.config import UserError, check_text

FILE = "separators.json"
END_OF_TEXT = "<|endoftext|>"
BEGINS = ("<|begin_of_text|>", "<s>", END_OF_TEXT)  # usual names, the likeliest first
ENDS = ("<|end_of_text|>", "</s>", END_OF_TEXT)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What an imported tokenizer itself makes of a prompt, as transformers shows it."""

    before: tuple[int, ...]  # tokens put before the text
    after: tuple[int, ...]  # tokens put after it
    alone: tuple[int, ...]  # in place of a prompt without any token
    special: bool  # a special token that is written in the text is that token


@dataclasses.dataclass(frozen=True)
class Separators:
    """Ids of tokens around texts."""

    bos: int | None  # starts a document; None: absent
    eos: int | None  # ends a document; equal to bos where one token does both; None: absent
    stop: tuple[int, ...] = ()  # further tokens at which generation ends
    prompt: Prompt | None = None  # None: a prompt begins as a document does, and all of it is text


def find(directory: Path, engine: Engine, sha256: str) -> Separators:
    """The separators of the tokenizer.json in a directory, which has this checksum.

    Raises UserError where a file names a token that the tokenizer lacks.
    """
    if (directory / FILE).is_file():
        return _read(directory / FILE, engine, sha256)
    manifest = read_json(directory / "manifest.json") or _manifest_of_run(directory, sha256)
    if "bos" in manifest and "eos" in manifest:
        bos, eos = (_known(engine, manifest[k], k, "manifest.json") for k in ("bos", "eos"))
        return Separators(bos, eos)
    return _of_model(directory, engine)


def as_json(separators: Separators, sha256: str) -> bytes:
    """The contents of separators.json, for the tokenizer.json of this checksum."""
    values = {"tokenizer_sha256": sha256, **dataclasses.asdict(separators)}
    if separators.prompt is None:
        del values["prompt"]
    return json.dumps(values, indent=1).encode() + b"\n"


def named(engine: Engine, name: str, flag: str) -> int | None:
    """The id of the token that a flag names; None for "none"."""
    if name == "none":
        return None
    check_text(flag, name)
    token = engine.token_to_id(name)
    if token is None:
        raise UserError(
            f"{flag}={name}: the tokenizer has no such token; name one that it has, or none"
        )
    return token


def _read(file: Path, engine: Engine, sha256: str) -> Separators:
    """The separators in a file that training or import wrote."""
    values = read_json(file)
    if values.get("tokenizer_sha256", sha256) != sha256:
        raise UserError(
            f"{file}: was written for another tokenizer.json than the one beside it; put that back"
        )
    try:
        bos, eos = (_known(engine, values[key], key, file) for key in ("bos", "eos"))
        prompt = values.get("prompt")
        if prompt is not None:
            ids = {key: _ids(prompt, key, file) for key in ("before", "after", "alone")}
            prompt = Prompt(**ids, special=bool(prompt["special"]))
        return Separators(bos, eos, _ids(values, "stop", file), prompt)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: is damaged: {type(error).__name__} {error}; it has ids bos, eos, stop"
        ) from None


def _manifest_of_run(directory: Path, sha256: str) -> dict[str, Any]:
    """The manifest of a run's dataset, for runs made before they kept separators.json."""
    file = directory / "config.yaml"
    if not file.is_file():
        return {}
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
        manifest = read_json(Path(config["data"]["path"], "manifest.json"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}  # whoever needs the config says what is wrong with it
    return manifest if manifest.get("tokenizer_sha256") == sha256 else {}


def _of_model(directory: Path, engine: Engine) -> Separators:
    """The separators that the files of a Hugging Face model name, or else usual names.

    tokenizer_config.json names the tokens of documents. generation_config.json, or else config.json
    has the ids at which transformers ends a text, and that from which it starts without a prompt;
    the tokenizer may lack some of them.
    """
    files = ("tokenizer_config.json", "config.json", "generation_config.json")
    about, model, generation = (read_json(directory / name) for name in files)
    bos, eos = (_text_id(engine, about, key, directory) for key in ("bos_token", "eos_token"))
    begins, ends = (
        _ids(generation, key, directory / files[2]) or _ids(model, key, directory / files[1])
        for key in ("bos_token_id", "eos_token_id")
    )
    if bos is None and eos is None:
        bos = next((token for token in begins if _has(engine, token)), None)
    if eos is None:
        eos = next((token for token in ends if _has(engine, token)), None)
    if bos is None and eos is None:
        known = [[engine.token_to_id(name) for name in names] for names in (BEGINS, ENDS)]
        bos, eos = (next((token for token in ids if token is not None), None) for ids in known)
    stop = tuple(token for token in ends if token != eos)
    if not (directory / "config.json").is_file():
        return Separators(bos, eos, stop)
    before, after = surroundings(engine)  # add_bos_token is not read beside a tokenizer.json
    alone = begins[:1] or (() if bos is None else (bos,))
    special = not about.get("split_special_tokens", False)
    return Separators(bos, eos, stop, Prompt(before, after, alone, special))


def surroundings(engine: Engine) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that tokenizer.json itself puts before and after a text."""
    if not engine.num_special_tokens_to_add(False):
        return (), ()
    text = next(iter(engine.get_vocab())) if isinstance(engine.model, WordLevel) else "a"
    encoding = engine.encode(text, add_special_tokens=True)
    mask = encoding.special_tokens_mask
    places = [place for place, special in enumerate(mask) if not special] or [len(mask)]
    return tuple(encoding.ids[: places[0]]), tuple(encoding.ids[places[-1] + 1 :])


def _text_id(engine: Engine, about: Mapping[str, Any], key: str, directory: Path) -> int | None:
    """The id of a token that tokenizer_config.json writes as text or as an object."""
    value = about.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    token = engine.token_to_id(value) if isinstance(value, str) else None
    if value is not None and token is None:
        raise UserError(
            f"{directory / 'tokenizer_config.json'}: {key}: separator {value!r} is not in"
            " tokenizer.json; correct the file, or (data prepare) choose with --bos and --eos"
        )
    return token


def _ids(facts: Mapping[str, Any], key: str, file: Path) -> tuple[int, ...]:
    """The ids under a key: null, an id, or a list of ids; negative ones stand for none."""
    value = facts.get(key)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token < 2**31 for token in listed):
        raise UserError(f"{file}: {key}={value!r} must be the id of a token, a list of ids or null")
    return tuple(dict.fromkeys(token for token in listed if token >= 0))


def _has(engine: Engine, token: Any) -> bool:
    return type(token) is int and 0 <= token < 2**31 and engine.id_to_token(token) is not None


def _known(engine: Engine, token: Any, key: str, file: Any) -> int | None:
    """A token id or None, as it is; UserError where the tokenizer has no such token."""
    if token is not None and not _has(engine, token):
        raise UserError(f"{file}: {key}: token {token!r} is not in the tokenizer.json beside it")
    return token


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from None
    return facts if isinstance(facts, dict) else {}
