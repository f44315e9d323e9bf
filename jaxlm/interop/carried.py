"""What a Hugging Face directory says beyond its weights: kept by a run, given back by an export.

RUN/hugging_face/ holds config.json and the other small files as they were, never weights, code or
pickles. An export writes them again, changed only where the run has changed the fact.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxlm import config as cfg
from jaxlm.data import Tokenizer, load_tokenizer
from jaxlm.interop.safetensors_files import inside, read_json
from jaxlm.interop.tokenizer_files import PathLike, token_ids, write_json, write_tokenizer
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
ROPE = "rope_"  # what the keys of rotary positions start with, in all their spellings


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
    _clear(run_dir / FOLDER)
    kept = find(source) if config.checkpoint.start_from else None
    if kept is None:
        return
    about = read_json(kept, CONFIG)
    if about.get("model_type") not in family_module(config.model.family).MODEL_TYPES:
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


def _clear(folder: Path) -> None:
    """Remove what a start that saved nothing has kept; UserError for what no run has kept there."""
    if not folder.is_dir():
        return
    own = {folder / TEMPLATES, *(place / name for place, name in _files(folder))}
    other = next((path for path in folder.rglob("*") if path not in own), None)
    if other is not None or folder.is_symlink():
        raise cfg.UserError(
            f"run.dir={folder.parent}: a run keeps files of its own in {folder}, and there is "
            f"{other or 'a link'}; move it away, or choose another run.dir"
        )
    shutil.rmtree(folder)


def _separate(folder: Path, tokenizer: Tokenizer) -> None:
    """Name the tokens that the documents of the run begin and end with, in the files kept.

    Not in tokenizer_config.json: an export writes them there.
    """
    ids = token_ids(tokenizer)
    texts = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    texts = {k: tokenizer.engine.id_to_token(t) for k, t in texts.items() if t is not None}
    for name, facts in ((CONFIG, ids), (GENERATION, ids), (SPECIAL, texts)):
        if (folder / name).is_file():
            write_json(folder / name, read_json(folder, name) | facts)


def find(directory: str | Path) -> Path | None:
    """The files that the run in this directory has kept."""
    kept = Path(directory) / FOLDER
    return kept if (kept / CONFIG).is_file() else None


def positions(config: cfg.Config) -> int:
    """The longest text that the imported model of a run is made for, tokens; 0: not known.

    The table of learned positions is no matter of this: nothing beyond it can be computed.
    """
    kept = find(cfg.run_dir(config))
    if kept is None and config.checkpoint.start_from:
        kept = find(config.checkpoint.start_from)
    longest = read_json(kept, CONFIG).get("max_position_embeddings") if kept else None
    learned = config.model.learned_positions
    return longest if isinstance(longest, int) and not learned else 0


def beyond(config: cfg.Config, what: str, length: int) -> Iterator[str]:
    """A line of warning where texts are longer than what the imported model is made for."""
    longest = positions(config)
    if 0 < longest < length:
        yield (
            f"{what} is above max_position_embeddings={longest} of the imported model: beyond "
            "those positions it is likely to compute nonsense until it is trained on them"
        )


def length_beyond(config: cfg.Config) -> Iterator[str]:
    """The same of batch.sequence_length."""
    length = config.batch.sequence_length
    yield from beyond(config, f"batch.sequence_length={length}", length)


def warn_of_length(config: cfg.Config) -> None:
    """Log the same."""
    for line in length_beyond(config):
        logger.warning("warning: %s", line)


@functools.cache
def warn_once(line: str) -> None:
    """Log a warning that would come again with every sample of a training."""
    logger.warning("warning: %s", line)


def give_back(
    directory: Path, kept: Path | None, tokenizer: PathLike | None, ours: dict[str, Any],
    model: cfg.Model, trained_length: int,
) -> None:  # fmt: skip
    """Write all of an export but the weights: config.json is `ours`, over what was kept.

    `trained_length` is that of the longest text in training, tokens; 0: nothing was trained.
    """
    if kept is None:
        ours |= write_tokenizer(directory, tokenizer)
    else:
        for place, name in _files(kept):
            target = directory / place.relative_to(kept) / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(inside(place, name).read_bytes())
        about = None
        if (kept / TOKENIZER).is_file():
            about = read_json(kept, TOKENIZER)
            about.pop("auto_map", None)
            write_json(directory / TOKENIZER, about)
        ids = write_tokenizer(directory, tokenizer, about)
        ours = _merge(read_json(kept, CONFIG), ours, model, trained_length)
        ours |= {key: token for key, token in ids.items() if ours.get(key) is None}
    write_json(directory / CONFIG, ours)
    ids = {key: ours.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if not (directory / GENERATION).exists() and ids["eos_token_id"] is not None:
        if ids["pad_token_id"] is None:  # what generation pads with then; said, it does not warn
            ends = ids["eos_token_id"]
            ids["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
        write_json(directory / GENERATION, ids)


def _merge(
    kept: dict[str, Any], ours: dict[str, Any], model: cfg.Model, trained_length: int
) -> dict[str, Any]:
    """config.json as it was, except for what the run has changed.

    That is what its model and the model in config.json are translated to differently: a fact that
    was not changed keeps its spelling.
    """
    kept = {key: value for key, value in kept.items() if key not in NOT_CARRIED}
    family, longest = family_module(model.family), kept.get("max_position_embeddings")
    before = type(model)(**family.from_hugging_face(kept))
    before = family.to_hugging_face(before, ours.get("max_position_embeddings", 0))
    changed = {key: value for key, value in ours.items() if before.get(key, ...) != value}
    if any(key.startswith(ROPE) for key in changed):
        kept = {key: value for key, value in kept.items() if not key.startswith(ROPE)}
        changed |= {key: value for key, value in ours.items() if key.startswith(ROPE)}
    if isinstance(longest, int) and not model.learned_positions:
        changed["max_position_embeddings"] = max(longest, trained_length)
    return kept | changed | {key: ours[key] for key in ("architectures", "torch_dtype")}
