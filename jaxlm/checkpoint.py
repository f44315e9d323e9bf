"""Checkpoints: <run>/checkpoints/<step>/ holds params, fixed, opt, data and config, each alone.
Where islands have parted, params and fixed are the merged model, and `outer` is what each has.

Arrays are saved whole and by name, stacked layers in the model's order, so that any mesh and any
number of processes can read them. The optimizer's state is flat too, named by its place in the
tree ("0.mu.embed.table"); an item without arrays is not written. A step that is listed is complete:
Orbax writes into <step>.orbax-checkpoint-tmp and renames it at the end. The last file before that
is the manifest, by which all others are checked before they are read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jaxlm import __version__, configfile, manifest
from jaxlm import config as cfg
from jaxlm.state import Arrays, State
from jaxlm.yaml_values import yaml_text

FORMAT = 2  # of a checkpoint; a reader refuses a newer one. 1 had no manifest
ARRAYS, JSON = ("params", "fixed", "opt", "outer"), ("data", "config")
MODEL = ("params", "fixed", "config")  # the items of a model alone
PathLike = str | os.PathLike[str]
T = TypeVar("T")
logger = logging.getLogger("jaxlm")

# Orbax logs its progress, and every error that it also raises. After a read that failed, asyncio
# complains that the event loop is closed.
logging.getLogger("absl").addFilter(lambda record: "orbax/checkpoint" not in record.pathname)
for _name in ("asyncio", "concurrent.futures"):
    logging.getLogger(_name).addFilter(
        lambda record: "Event loop is closed" not in str((record.exc_info or (0, 0))[1])
    )


class Damaged(cfg.UserError):
    """The files of a checkpoint are not those that were written."""


class Manager(ocp.CheckpointManager):
    """Orbax's manager, and what the manifest of the save under way says beside hashes."""

    about: dict[str, Any] = {}  # "step", "finite" and others

    def seal(self) -> None:
        """Write the manifest: all items are written, and the step has no name yet."""
        (directory,) = Path(self.directory).glob(f"{self.about['step']}.orbax-checkpoint-tmp*")
        manifest.write(directory, self.about)

    def is_finite(self, step: int) -> bool:
        """Whether a checkpoint, or the one that is being saved, has no NaN and no infinity."""
        if step == self.about.get("step"):
            return self.about["finite"]
        return is_finite(self.directory, step)


class LastFinite(checkpoint_managers.PreservationPolicy):
    """Keep the newest checkpoint without NaN or infinity: those after it are of no use."""

    def __init__(self, is_finite: Callable[[int], bool]):
        self.is_finite = is_finite

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [each.step for each in checkpoints]
        newest = next((step for step in sorted(steps, reverse=True) if self.is_finite(step)), None)
        return [step == newest for step in steps]


def open_manager(
    directory: PathLike, checkpoint: cfg.Checkpoint, read_only: bool = False
) -> Manager:
    """Open a checkpoint directory, for writing by default: it is made, and leftovers are removed.

    All processes must call it. Raises UserError where the directory cannot be made or read.
    """
    keep: list[Any] = [
        checkpoint_managers.LatestN(checkpoint.keep),
        LastFinite(lambda step: manager.is_finite(step)),
    ]
    if checkpoint.keep_every:
        keep.append(checkpoint_managers.EveryNSteps(checkpoint.keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
        create=False,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        # Directories are made before `save` returns: when that fails in the background, Orbax's
        # other threads wait for them until a time-out of many minutes.
        async_options=ocp.AsyncOptions(
            create_directories_asynchronously=False,
            post_finalization_callback=lambda: manager.seal(),
        ),
        save_root_metadata=False,
    )
    # Cutting copies into a slice per device would compile programs and take device memory.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    handlers = {name: ocp.PyTreeCheckpointHandler(type_handler_registry=types) for name in ARRAYS}
    handlers |= {name: ocp.JsonCheckpointHandler() for name in JSON}
    path = os.path.abspath(directory)
    try:
        if not read_only:
            os.makedirs(path, exist_ok=True)  # in every process, so that all report a failure
        manager = Manager(path, options=options, item_handlers=handlers)
        return manager
    except OSError as error:
        raise cfg.UserError(
            f"{directory}: cannot keep checkpoints there: {_reason(error)}; choose another run.dir"
        ) from error


def save(
    manager: Manager, step: int, state: State, data: dict[str, Any],
    config: dict[str, Any], outer: Arrays | None = None,
) -> None:  # fmt: skip
    """Copy the state off the devices and write it in the background; it may be donated at once.

    Raises UserError, and has saved nothing, if the save before this one failed (call it again), if
    this one cannot begin, or if the step is there already.
    """
    finish(manager)
    path = f"{manager.directory}/{step}"
    if step in manager.all_steps():
        raise cfg.UserError(f"{path} is there already and is never overwritten; move it away")
    arrays = {"params": state.params, "fixed": state.fixed, "opt": _named(state.opt)}
    arrays["outer"] = outer or {}
    about = {"format": FORMAT, "jaxlm": __version__, "step": step, "config": config}
    manager.about = {
        "step": step, "finite": _all_finite(arrays), "mesh": config.get("mesh"),
        "versions": {"jaxlm": __version__, "jax": jax.__version__, "orbax": ocp.__version__},
        "next_item": data.get("next_item"),
    }  # fmt: skip
    items: dict[str, Any] = {n: ocp.args.PyTreeSave(item) for n, item in arrays.items() if item}
    for name, item in (("data", data), ("config", about)):
        items[name] = ocp.args.JsonSave(json.loads(json.dumps(item)))  # copied: written later
    try:
        # `force`: our loop decides when to save, not Orbax.
        manager.save(step, args=ocp.args.Composite(**items), force=True)
    except (OSError, ValueError) as error:  # the latter is TensorStore's
        raise _not_saved(path, error) from error


@jax.jit
def _finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()


def _all_finite(items: dict[str, Arrays]) -> bool:
    """Whether no array has a NaN or an infinity. Islands have arrays on other devices."""
    floats = (
        [x for x in item.values() if jnp.issubdtype(x.dtype, jnp.inexact)]
        for item in items.values()
    )
    return all([bool(_finite(arrays)) for arrays in floats if arrays])


def is_finite(directory: PathLike, step: int) -> bool:
    """Whether a checkpoint has no NaN and no infinity, as its manifest says; True without one."""
    try:
        return bool(manifest.read(Path(directory, str(step))).get("finite", True))
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def finish(manager: ocp.CheckpointManager) -> None:
    """Wait until the save under way is complete; raises UserError, once, if it failed."""
    listed, errors = set(manager.all_steps()), []
    for wait in (manager.wait_until_finished, manager.check_for_errors):  # either may raise
        try:
            wait()
        except Exception as error:
            errors.append(error)
    if not errors:
        return
    failed = listed - set(manager.all_steps())
    manager.reload()  # Orbax has struck out the steps that this save was to replace
    if failed & set(manager.all_steps()):
        raise cfg.UserError(
            f"{manager.directory}: older checkpoints cannot be removed: {_reason(errors[0])}"
        ) from errors[0]
    raise _not_saved(f"{manager.directory}/{max(failed, default='?')}", errors[0]) from errors[0]


def steps(directory: PathLike) -> list[int]:
    """The complete checkpoints of a directory, oldest first; none where there is no directory."""
    if not os.path.isdir(directory):
        return []
    found = ocp.path.step.standard_name_format().find_all(os.path.abspath(directory))
    return sorted(metadata.step for metadata in found)


def latest(directory: PathLike) -> int | None:
    """The newest complete checkpoint of a directory."""
    return max(steps(directory), default=None)


def read_newest(
    directory: PathLike, read: Callable[[int], T], items: Collection[str] = (),
    put_aside: bool = False, quiet: bool = False,
) -> tuple[int, T] | None:  # fmt: skip
    """(step, what `read` gives for it) of the newest sound checkpoint; None where there is none.

    The files of `items` (none: all) are checked before. Where an older step is used, a warning
    (unless `quiet`) names the damaged ones, which `put_aside` renames. All processes must call it,
    but for items without arrays. Raises UserError where there are checkpoints and all are damaged.
    """
    damaged: dict[int, str] = {}
    while (step := max(set(steps(directory)) - set(damaged), default=None)) is not None:
        # A run that still trains may remove the newest meanwhile; then it has a newer one. Of
        # several processes all must read the same.
        gone = lambda step=step: step not in steps(directory) and jax.process_count() == 1
        try:
            verify(directory, step, items)
        except Damaged as error:
            if not gone():
                damaged[step] = str(error)
            continue
        for other, text in damaged.items():
            where = f"; it is now {_put_aside(directory, other)}" if put_aside else ""
            if not quiet:
                logger.warning("warning: %s%s; step %d is used", text, where, step)
        try:
            return step, read(step)
        except cfg.UserError:
            if not gone():
                raise
    if damaged:
        raise cfg.UserError(
            f"{damaged[max(damaged)]}; no older step is sound: put one back from a copy, or, to "
            f"begin anew, move {directory} away"
        )
    return None


def verify(directory: PathLike, step: int, items: Collection[str] = ()) -> None:
    """Check the files of some items (none: all) of a checkpoint against its manifest.

    Items of arrays: all processes must call it, and each checks a part of the files. Raises
    Damaged, naming the first bad file.
    """
    path = Path(os.path.abspath(directory), str(step))
    count = 1 if items and set(items) <= set(JSON) else jax.process_count()
    text = _problem(path, step, items, slice(jax.process_index() % count, None, count))
    if count > 1:
        bad = np.asarray(multihost_utils.process_allgather(np.int32(bool(text))))
        text = text or (f"process {int(bad.argmax())} says where" if bad.any() else "")
    if text:
        raise Damaged(f"{directory}/{step}: damaged: {text}")


def _problem(path: Path, step: int, items: Collection[str], share: slice = slice(None)) -> str:
    """What is wrong with a checkpoint, in a few words; empty: nothing."""
    try:
        body = manifest.read(path)
        if body.get("step") != step:
            return f"{manifest.FILE} is of step {body.get('step')}: something was renamed"
        return manifest.problem(path, body, items, share)
    except FileNotFoundError as error:
        with contextlib.suppress(Exception):  # what jaxlm wrote before it wrote manifests
            about = ocp.JsonCheckpointHandler().restore(path / "config")  # pyright: ignore
            if isinstance(about, dict) and about["format"] == 1:
                return ""
        return str(error)
    except (OSError, ValueError) as error:
        return _reason(error)


def _put_aside(directory: PathLike, step: int) -> str:
    """Rename a damaged checkpoint, so that no start stumbles over it again; its new name."""
    names = [f"{step}.damaged", *(f"{step}.damaged.{i}" for i in range(2, 100))]
    name = next(name for name in names if not Path(directory, name).exists())
    if jax.process_index() == 0:
        try:
            os.rename(Path(directory, str(step)), Path(directory, name))
        except OSError as error:
            raise cfg.UserError(
                f"{directory}/{step} is damaged and cannot be put aside: {_reason(error)}; move it "
                "away"
            ) from error
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoint {step} was put aside")
    return name


def restore_state(where: ocp.CheckpointManager | PathLike, step: int, abstract: State) -> State:
    """A saved state on the mesh of `abstract` (shapes and shardings, from `abstract_state`).

    All processes must call it. Raises UserError if the checkpoint is missing, damaged, of a newer
    format, or of another model or optimizer.
    """
    directory = where.directory if isinstance(where, ocp.CheckpointManager) else Path(where)
    config = read_config(directory, step)
    params = _restore(directory, step, "params", abstract.params, config)
    fixed = _restore(directory, step, "fixed", abstract.fixed, config)
    flat = _restore(directory, step, "opt", _named(abstract.opt), config)
    opt = jax.tree.unflatten(jax.tree.structure(abstract.opt), flat.values())
    value = np.asarray(step, abstract.step.dtype)
    counter = jax.make_array_from_callback((), abstract.step.sharding, lambda _: value)
    return State(counter, params, fixed, opt)


def has_outer(directory: PathLike, step: int) -> bool:
    """Whether a checkpoint is of islands that have parted."""
    return _item(directory, step, "outer").is_dir()


def restore_outer(directory: PathLike, step: int, abstract: dict[str, Any]) -> Arrays:
    """What islands keep beside the merged model; raises UserError as `restore_state` does."""
    return _restore(directory, step, "outer", abstract, read_config(directory, step))


def restore_params(
    directory: PathLike, step: int, params: dict[str, Any], fixed: dict[str, Any]
) -> tuple[Arrays, Arrays]:
    """A saved model's (params, fixed) on the mesh of these abstract arrays; reads nothing else.

    All processes must call it. Raises UserError as `restore_state` does.
    """
    config = read_config(directory, step)
    restored = _restore(directory, step, "params", params, config)
    return restored, _restore(directory, step, "fixed", fixed, config)


def read_config(directory: PathLike, step: int | None = None) -> dict[str, Any]:
    """The resolved config that a checkpoint (None: the newest) was saved with.

    Raises UserError if there is none, if it is damaged, or if it is of a newer format.
    """
    step = latest(directory) if step is None else step
    if step is None:
        raise cfg.UserError(f"{directory}: no checkpoint there; train first, or check run.dir")
    about = _read_json(directory, step, "config")
    version = about.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise cfg.UserError(
            f"{directory}/{step}: written by jaxlm {about.get('jaxlm')} in checkpoint format "
            f"{version}; this is jaxlm {__version__}, which knows {FORMAT}; update it"
        )
    with _reading(directory, step, "config"):
        known = isinstance(version, int) and 1 <= version <= FORMAT
        if not known or not isinstance(about.get("config"), dict):
            raise ValueError("its format or config is missing")
        if about.get("step") != step:
            raise ValueError(f"it is of step {about.get('step')}: a directory was renamed")
    return about["config"]


def read_data(directory: PathLike, step: int) -> dict[str, Any]:
    """Where the sample stream stood, and which it was; raises UserError as `read_config` does."""
    return _read_json(directory, step, "data")


def refuse_other_run(
    run_dir: PathLike, config: cfg.Config, data_facts: dict[str, Any]
) -> list[tuple[str, Any, Any]]:
    """What changed since the newest checkpoint of a run and alters losses: (key, old, new).

    Raises UserError if the run is of another model, optimizer or tokenizer.
    """
    directory = Path(run_dir) / "checkpoints"
    read = lambda step: (read_config(directory, step), read_data(directory, step))
    found = read_newest(directory, read, JSON, quiet=True)  # who restores a state says it
    if found is None:
        return []
    _, (old, facts) = found
    changes = configfile.differences(old, config, "checkpoint")
    if not facts:
        raise cfg.UserError(
            f"run.dir={run_dir} holds imported weights; to train them choose another run.dir, "
            f"with checkpoint.start_from={run_dir}"
        )
    there = facts.get("tokenizer_sha256")
    here = data_facts["tokenizer_sha256"]
    if there != here:
        changes.append(("tokenizer", str(there)[:12], here[:12]))
    if changes:
        text = yaml_text
        different = _first([f"{key}={text(a)} there, {text(b)} here" for key, a, b in changes])
        raise cfg.UserError(
            f"run.dir={run_dir} holds a run of another model: {different}; choose another run.dir"
        )
    return configfile.differences(old, config, "numbers")


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their dotted place in it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    assert len(named) == len(leaves)
    return named


def _restore(
    directory: PathLike, step: int, item: str, abstract: dict[str, Any], config: dict[str, Any]
) -> Arrays:
    """The arrays of one item, placed as `abstract` says and in its order."""
    path = _item(directory, step, item)
    saved = {}
    if item != "fixed" or path.is_dir():
        with _reading(directory, step, item):
            saved = dict(ocp.PyTreeCheckpointHandler().metadata(path).tree)
    _compare(f"{directory}/{step}: {item}", saved, abstract, config)
    if not abstract:
        return {}
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    restore = ocp.args.PyTreeRestore(abstract, restore_args=arguments)
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    with _reading(directory, step, item), contextlib.closing(reader):
        arrays = reader.restore(path, args=restore)
    return {name: arrays[name] for name in abstract}


def _compare(what: str, saved: dict, abstract: dict, config: dict[str, Any]) -> None:
    """Raise UserError naming the first arrays that only one side has or that differ."""
    kind = lambda array: f"{np.dtype(array.dtype)}{list(array.shape)}"
    there, here = ({n: kind(x) for n, x in side.items()} for side in (saved, abstract))
    differ = [
        f"{name} is {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        for name in here | there
        if there.get(name) != here.get(name)
    ]
    if differ:
        optimizer = config.get("optimizer", {})
        raise cfg.UserError(
            f"{what} does not fit this config: {_first(differ)}; it was saved with "
            f"optimizer.name={optimizer.get('name')} optimizer.train={optimizer.get('train')}: "
            "use the config of that run, or another run.dir"
        )


def _read_json(directory: PathLike, step: int, item: str) -> dict[str, Any]:
    with _reading(directory, step, item):
        value = ocp.JsonCheckpointHandler().restore(_item(directory, step, item))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value


def _item(directory: PathLike, step: int, item: str) -> Any:
    """The path of an item: absolute, as TensorStore wants it; Any, as Orbax has its own type."""
    return Path(os.path.abspath(directory), str(step), item)


@contextlib.contextmanager
def _reading(directory: PathLike, step: int, item: str) -> Iterator[None]:
    """Report what damaged files make Orbax raise, of any type, as one UserError."""
    try:
        yield
    except (cfg.UserError, jax.errors.JaxRuntimeError, MemoryError):
        raise  # not about the files
    except Exception as error:
        found = steps(directory)
        if step not in found:
            has = f"there are steps {', '.join(map(str, found))}" if found else "train first"
            raise cfg.UserError(f"{directory}: no checkpoint of step {step}; {has}") from error
        text = (
            f"{directory}/{step}: {item} cannot be read: {_reason(error)}; there is no older step"
        )
        if older := [str(other) for other in found if other < step]:
            text = text.replace("there is no older step", f"older steps: {', '.join(older)}")
            text += f"; to resume from {older[-1]}, move {step} away"
        raise cfg.UserError(text) from error


def _not_saved(path: str, error: Exception) -> cfg.UserError:
    return cfg.UserError(f"{path}: the checkpoint was not saved: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """The cause of an exception in a few words; of TensorStore's essays, the code and the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    text = " ".join(str(error).split())
    code = re.search(r"[^:]+(?= \[os_error_code)", text) or re.match(r"[A-Z_]+(?=: )", text)
    files = re.findall(r'"(/[^"\\]*)', text)
    if code and files:
        text = f"{code[0].strip()} ({files[-1]})"
    return (text if len(text) <= 200 else text[:200] + "...") or type(error).__name__


def _first(differences: list[str]) -> str:
    more = [f"and {len(differences) - 4} more"] if len(differences) > 4 else []
    return "; ".join([*differences[:4], *more])
