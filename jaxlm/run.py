"""A run's directory: its config, its tokenizer, the state to continue from, its model at a step."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlm import checkpoint, configfile
from jaxlm import config as cfg
from jaxlm.data import (
    Split,
    Tokenizer,
    corpus_path,
    decode,
    load,
    load_tokenizer,
    prepare_corpus,
    separators,
)
from jaxlm.data.shards import read_tokens
from jaxlm.interop import carried
from jaxlm.mesh import open_mesh
from jaxlm.sharding import Layout, place
from jaxlm.state import (
    Arrays,
    State,
    Structure,
    create_state,
    init_params,
    model_structure,
    trained,
)
from jaxlm.yaml_values import yaml_text

logger = logging.getLogger("jaxlm")
EXAMPLE_TOKENS = 24  # read from a document for a prompt to suggest


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model of a run on a mesh, without an optimizer."""

    config: cfg.Config
    mesh: Mesh
    layout: Layout
    structure: Structure
    params: Arrays
    fixed: Arrays
    step: int


def config_path(path: str | os.PathLike) -> Path:
    """The YAML file itself, or that of a run directory."""
    path = Path(path)
    if not os.path.isdir(path):
        return path
    if not (path / "config.yaml").is_file():
        raise cfg.UserError(f"{path} is not a run directory: it has no config.yaml")
    return path / "config.yaml"


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> cfg.Config:
    """The config of a YAML file, or of a run directory.

    A run directory may have been moved, and made by other processes: `run.dir` is where it is now.
    """
    path = Path(path)
    if not os.path.isdir(path):
        return configfile.load(path, overrides)
    where = f"./{path}" if str(path).startswith("~") else str(path)  # not a home directory
    here = [f"run.dir={yaml_text(where)}"]
    here += ["devices.coordinator=", "devices.num_processes=0", "devices.process_id=0"]
    return configfile.load(config_path(path), [*here, *overrides])


def write_config(config: cfg.Config) -> Path:
    """Make the run directory and write its resolved config; returns the directory."""
    run_dir = cfg.run_dir(config)
    if jax.process_index() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            _replace(run_dir / "config.yaml", configfile.dump(config).encode())
        except OSError as error:
            raise cfg.UserError(
                f"run.dir={run_dir}: cannot write there: {error.strerror}; choose another run.dir"
            ) from error
    return run_dir


def keep_tokenizer(run_dir: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer and its separators into the run directory, so that it moves alone."""
    if jax.process_index() == 0:
        around = separators.as_json(tokenizer.separators, tokenizer.sha256)
        _replace(run_dir / separators.FILE, around)
        _replace(run_dir / "tokenizer.json", tokenizer.data)


def training_tokenizer(config: cfg.Config) -> Tokenizer:
    """The tokenizer of a run's dataset, with the ends of text of the model that it starts from.

    An imported model may have several tokens that end a text; documents end with one of them.
    """
    tokenizer = load_tokenizer(config.data.path)
    first = [config.checkpoint.start_from] if config.checkpoint.start_from else []
    for directory in (cfg.run_dir(config), *map(Path, first)):
        if not (directory / separators.FILE).is_file():
            continue
        if (before := load_tokenizer(directory)).sha256 == tokenizer.sha256:
            ends = (before.eos, *before.separators.stop)
            stop = tuple(end for end in ends if end not in (None, tokenizer.eos))
            around = dataclasses.replace(tokenizer.separators, stop=stop)
            return dataclasses.replace(tokenizer, separators=around)
    return tokenizer


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def example_prompt(config: cfg.Config, tokenizer: Tokenizer, training: Split) -> str:
    """A prompt that fits a run's data: the first words of its first document."""
    if Path(config.data.path).name == config.data.corpus == "python-stdlib":
        return "def main("
    shard = training.shards[0]
    ids = read_tokens(shard, 0, min(EXAMPLE_TOKENS, int(shard.ends_D[0])))
    words = [word for word in decode(tokenizer, ids).split() if "\ufffd" not in word]
    return " ".join(words[:3])


def find_tokenizer(config: cfg.Config) -> Tokenizer:
    """The tokenizer of a run, or of its data; UserError where neither has one."""
    found = tokenizer_place(config)
    if found is None:
        raise cfg.UserError(
            f"run.dir={cfg.run_dir(config)} has no tokenizer.json; import the model from a "
            "directory that has one; for a run of your own, name its dataset with data.path"
        )
    return load_tokenizer(found)


def tokenizer_place(config: cfg.Config) -> Path | None:
    """The directory with the tokenizer of a run: its own, or that of the data it was trained on.

    An imported model was not trained on data.path, so a tokenizer there is not its own.
    """
    run_dir = cfg.run_dir(config)
    places = [run_dir] if carried.find(run_dir) else [run_dir, Path(config.data.path)]
    return next((each for each in places if (each / "tokenizer.json").is_file()), None)


@contextlib.contextmanager
def open_model(config: cfg.Config, step: int | None = None) -> Iterator[LoadedModel]:
    """The model of a run on the mesh that the config names, at a step (None: the newest)."""
    directory = cfg.run_dir(config) / "checkpoints"
    if step is None and checkpoint.latest(directory) is None:
        raise cfg.UserError(f"run.dir={cfg.run_dir(config)} has no checkpoint; train it first")
    mesh, layout = open_mesh(config)
    with jax.set_mesh(mesh):
        structure = model_structure(config.model, layout)
        abstract = place(mesh, jax.eval_shape(lambda: init_params(config, layout)))
        read = lambda step: checkpoint.restore_params(directory, step, *abstract)
        if step is None:
            newest = checkpoint.read_newest(directory, read, checkpoint.MODEL)
            assert newest is not None
            found, (params, fixed) = newest
        else:
            if step in checkpoint.steps(directory):
                checkpoint.verify(directory, step, checkpoint.MODEL)
            found, (params, fixed) = step, read(step)
        yield LoadedModel(config, mesh, layout, structure, params, fixed, found)


def prepare_data(config: cfg.Config) -> None:
    """Build the built-in corpus that data.corpus names, if data.path is the place of that corpus.

    Any other data.path is a dataset of the user: where it does not exist, UserError.
    """
    corpus, path = config.data.corpus, Path(config.data.path)
    if corpus == "none" or path.exists():
        return
    own = corpus_path(corpus)
    if os.path.realpath(path) != os.path.realpath(own):
        raise cfg.UserError(
            f"data.path={path} does not exist, and data.corpus={corpus} is made at {own} only;"
            f" correct the path, use data.path={own}, or make the corpus there with"
            f" `jaxlm data prepare --corpus {corpus} --out {shlex.quote(str(path))}`"
        )
    if jax.process_index() == 0:
        prepare_corpus(corpus, path)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("prepared data")
        if not path.exists():  # no shared file system: the same corpus again
            prepare_corpus(corpus, path)


def first_state(
    config: cfg.Config, layout: Layout, optimizer: optax.GradientTransformation, mesh: Mesh,
    training: Split, restore: Callable[[Path, int], Any], begin: Callable[[State], Any],
) -> tuple[Any, int]:  # fmt: skip
    """The newest state of the run, or a new one, possibly with another run's parameters.

    `restore` reads the state of a checkpoint (directory, step); `begin` takes a new one. Either may
    be at a later step than that: an island goes on where the others are.
    """
    directory = cfg.run_dir(config) / "checkpoints"

    def read(step: int):
        data_state = checkpoint.read_data(directory, step)
        load.check_data_state(data_state, step, training, config.batch, config.seed)
        return restore(directory, step)

    newest = checkpoint.read_newest(directory, read, put_aside=True)
    if newest is not None:
        return newest[1], int(newest[1].step)
    state = create_state(config, layout, optimizer, mesh)
    if config.checkpoint.start_from:
        state = _with_parameters(state, config, layout, mesh, training)
    state = begin(state)
    return state, int(state.step)


def _with_parameters(
    state: State, config: cfg.Config, layout: Layout, mesh: Mesh, training: Split
) -> State:
    """A new state with the parameters of checkpoint.start_from; says what differs there."""
    source = Path(config.checkpoint.start_from)
    directory = source / "checkpoints"
    shapes = place(mesh, jax.eval_shape(lambda: state.params | state.fixed))
    weights = model_structure(config.model, layout).weights

    def read(step: int) -> tuple[Arrays, Arrays]:
        old = checkpoint.read_config(directory, step)
        for key, there, here in configfile.differences(old, config, "numbers"):
            if key.startswith("model.") and key != "model.init_std":
                logger.warning("checkpoint.start_from: %s=%s there, %s here", key, there, here)
        params = trained(weights, old["optimizer"]["train"])
        return checkpoint.restore_params(
            directory, step,
            {name: shape for name, shape in shapes.items() if name in params},
            {name: shape for name, shape in shapes.items() if name not in params},
        )  # fmt: skip

    found = checkpoint.read_newest(directory, read, checkpoint.MODEL)
    if found is None:
        what = "has no checkpoint" if source.is_dir() else "does not exist"
        raise cfg.UserError(
            f"checkpoint.start_from={source} {what}; name the directory of a run that"
            " `jaxlm train` or `jaxlm import` made"
        )
    if (source / "tokenizer.json").is_file():
        if load_tokenizer(source).sha256 != training.tokenizer_sha256:
            logger.warning("checkpoint.start_from: its tokenizer is not that of data.path")
    _, (params, fixed) = found
    arrays = params | fixed
    take = lambda names: {name: arrays[name] for name in names}
    return State(state.step, take(state.params), take(state.fixed), state.opt)
