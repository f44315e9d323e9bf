"""What a Hugging Face directory says beyond its weights: kept by a run, given back by an export.

RUN/hugging_face/ holds config.json and the other small files as they were, never weights, code or
pickles. An export writes them again, changed only where the run has changed the fact.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxlm import config as cfg
from jaxlm.data import Tokenizer, load_tokenizer
from jaxlm.interop.safetensors_files import inside, read_json
from jaxlm.models import family_module

logger = logging.getLogger("jaxlm")
FOLDER = "hugging_face"
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
SPECIAL, TEMPLATES = "special_tokens_map.json", "additional_chat_templates"
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
OF_TOKENS = (
    TOKENIZER, SPECIAL, "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
)  # fmt: skip
LIMIT = 1 << 26  # bytes of one file
# Of config.json: what is another's, or would no longer be true. Both spellings of the type are
# struck out, as one of them is written anew.
NOT_CARRIED = ("_name_or_path", "auto_map", "quantization_config", "dtype", "torch_dtype")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


def keep(source: Path, run_dir: Path, names: tuple[str, ...] = ()) -> None:
    """Copy the small files of a Hugging Face directory, or those of these names, into a run.

    Raises UserError for one that is too large or leads out of the directory.
    """
    for place, name in _files(source):
        if names and name not in names:
            continue
        file = inside(place, name)
        if file.stat().st_size > LIMIT:
            raise cfg.UserError(
                f"{file}: has {file.stat().st_size} bytes, and at most {LIMIT} are kept with a "
                "run; move it away"
            )
        target = run_dir / FOLDER / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())


def _files(source: Path) -> Iterator[tuple[Path, str]]:
    """(directory, name) of each small file that is there."""
    there = {path.name for path in source.iterdir()}
    yield from ((source, n) for n in (CONFIG, GENERATION, *LICENCES, *OF_TOKENS) if n in there)
    folder = source / TEMPLATES
    if not folder.is_dir():
        return
    if folder.resolve().parent != source.resolve():
        raise cfg.UserError(f"{source}: {TEMPLATES} is a link that leads out of it")
    names = sorted(path.name for path in folder.iterdir())
    yield from ((folder, name) for name in names if name.endswith(".jinja"))


def take_along(config: cfg.Config, tokenizer: Tokenizer) -> None:
    """At the start of a run: keep what the run of checkpoint.start_from has kept and is still true.

    `tokenizer` is that of the new run; with another one, nothing that is about tokens is kept.
    """
    run_dir, source = cfg.run_dir(config), Path(config.checkpoint.start_from)
    if jax.process_index():
        return
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)  # of a start that saved nothing
    kept = source / FOLDER
    if not config.checkpoint.start_from or not (kept / CONFIG).is_file():
        return
    about = read_json(kept, CONFIG)
    if about.get("model_type") != config.model.family:
        logger.warning(
            "checkpoint.start_from: %s is not carried along: model_type=%s there, and "
            "model.family=%s here", kept, about.get("model_type"), config.model.family,
        )  # fmt: skip
        return
    old = load_tokenizer(source) if (source / "tokenizer.json").is_file() else None
    if old is None or old.sha256 != tokenizer.sha256:
        keep(kept, run_dir, (CONFIG, *LICENCES))
        facts = {key: value for key, value in about.items() if key not in IDS}
        write_json(run_dir / FOLDER / CONFIG, facts)
        logger.warning(
            "checkpoint.start_from: of %s, only config.json without its token ids is carried "
            "along: the tokenizer of data.path is not the tokenizer of that run", kept,
        )  # fmt: skip
        return
    keep(kept, run_dir)
    if (old.bos, old.eos) != (tokenizer.bos, tokenizer.eos):
        _separate(run_dir / FOLDER, tokenizer)


def _separate(folder: Path, tokenizer: Tokenizer) -> None:
    """Name the tokens that the documents of the run begin and end with, in the files kept."""
    for name in (CONFIG, GENERATION):
        if (folder / name).is_file():
            write_json(folder / name, read_json(folder, name) | token_ids(tokenizer))
    for name in (TOKENIZER, SPECIAL):
        if (folder / name).is_file():
            write_json(folder / name, read_json(folder, name) | token_texts(tokenizer))


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """bos_token_id, and eos_token_id: all tokens at which generation ends."""
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}


def token_texts(tokenizer: Tokenizer) -> dict[str, Any]:
    """bos_token and eos_token, null where there is none."""
    ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    return {
        name: None if token is None else tokenizer.engine.id_to_token(token)
        for name, token in ids.items()
    }


def positions(config: cfg.Config) -> int:
    """The longest text that the imported model of a run is made for, tokens; 0: not known."""
    for directory in (cfg.run_dir(config), Path(config.checkpoint.start_from or cfg.run_dir(config))):
        kept = directory / FOLDER
        if (kept / CONFIG).is_file():
            longest = read_json(kept, CONFIG).get("max_position_embeddings")
            return longest if isinstance(longest, int) else 0
    return 0


def merge_config(kept: Path, ours: dict[str, Any], model: cfg.Model) -> dict[str, Any]:
    """config.json of an export: as it was, except for what `ours` says otherwise.

    What the run changed is what its model and the model in config.json are translated to
    differently, so that a fact that was not changed keeps its spelling.
    """
    about = {k: v for k, v in read_json(kept, CONFIG).items() if k not in NOT_CARRIED}
    family = family_module(model.family)
    longest = about.get("max_position_embeddings", ours.get("max_position_embeddings", 0))
    before = type(model)(**family.from_hugging_face(about))
    before = family.to_hugging_face(before, longest)
    changed = {key: value for key, value in ours.items() if before.get(key, ...) != value}
    if changed.keys() & set(ROPE):
        about = {key: value for key, value in about.items() if key not in ROPE}
        changed |= {key: ours[key] for key in ROPE if key in ours}
    return about | changed | {"architectures": ours["architectures"]}


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write a JSON file as Hugging Face does."""
    file.write_text(json.dumps(values, indent=2) + "\n")
