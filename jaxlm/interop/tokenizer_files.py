"""The tokenizer of an exported directory: its AutoTokenizer reads a prompt as `generate` does."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.data import Tokenizer, load_tokenizer, separators

PathLike = str | os.PathLike[str]
AS_IT_IS = "PreTrainedTokenizerFast"  # the class of transformers that follows tokenizer.json


def write_tokenizer(
    directory: Path, source: PathLike | None, carried: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json; returns config.json's part, the ids.

    `carried` is the tokenizer_config.json that an imported run came with: of it stays what a run
    does not decide. A chat template may lie in `directory` already.
    """
    if source is None:
        return {"bos_token_id": None, "eos_token_id": None}
    tokenizer = load_tokenizer(source)
    around, carried = tokenizer.separators, dict(carried or {})
    if around.prompt is not None and carried:  # the tokenizer of an import, as it came
        # Classes of their own put the rules of a model family in place of tokenizer.json's.
        data, about = tokenizer.data, _names(tokenizer) | carried | {"tokenizer_class": AS_IT_IS}
    else:
        chat = "chat_template" in carried or any(directory.glob("chat_template.*"))
        data, about = _with_prompt(tokenizer), carried | _about(tokenizer, chat)
    (directory / "tokenizer.json").write_bytes(data)
    nulls = carried if around.prompt is not None else {}  # they too were said
    about = {key: value for key, value in about.items() if value is not None or key in nulls}
    write_json(directory / "tokenizer_config.json", about)
    return token_ids(tokenizer)


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json's bos_token_id, and its eos_token_id: all tokens at which generation ends."""
    bos, around = tokenizer.bos, tokenizer.separators
    if bos is None and around.prompt is not None:
        bos = next(iter(around.prompt.alone), None)
    ends = [end for end in (tokenizer.eos, *around.stop) if end is not None]
    return {"bos_token_id": bos, "eos_token_id": ends if len(ends) > 1 else tokenizer.eos}


def _around_prompt(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that `generate` puts before and after a prompt."""
    own = tokenizer.separators.prompt
    if own is not None:
        return own.before, own.after
    return (() if tokenizer.bos is None else (tokenizer.bos,)), ()


def _with_prompt(tokenizer: Tokenizer) -> bytes:
    """tokenizer.json that puts around a text what `generate` does; as it is where it does so."""
    before, after = _around_prompt(tokenizer)
    if separators.surroundings(tokenizer.engine) == (before, after):
        return tokenizer.data
    piece = lambda token: {
        "SpecialToken": {"id": tokenizer.engine.id_to_token(token), "type_id": 0}
    }
    text = lambda name, kind: {"Sequence": {"id": name, "type_id": kind}}
    single = [*map(piece, before), text("A", 0), *map(piece, after)]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", 1)],
        "special_tokens": {
            name: {"id": name, "ids": [token], "tokens": [name]}
            for token in (*before, *after)
            for name in [tokenizer.engine.id_to_token(token)]
        },
    }
    values = json.loads(tokenizer.data)
    values["post_processor"] = template
    return json.dumps(values, indent=2, ensure_ascii=False).encode()


def _about(tokenizer: Tokenizer, chat: bool) -> dict[str, Any]:
    """What tokenizer_config.json must say; None: nothing of this key.

    Text that looks like a special token is text, as in training, but where there is a chat
    template, which writes special tokens so.
    """
    own = tokenizer.separators.prompt
    special = chat if own is None else own.special
    return _names(tokenizer) | {
        "tokenizer_class": AS_IT_IS,
        "add_bos_token": None,  # tokenizer.json says it
        "add_eos_token": None,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": None if special else True,
    }


def _names(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    name = tokenizer.engine.id_to_token
    return {key: None if token is None else name(token) for key, token in ids.items()}


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file that people read."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
