"""The commands of Hugging Face directories: one into a run (import), and a run into one (export).

A family file says which tensor is which (name_map.py) and translates config.json; read.py and
write.py are what families share.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import yaml

from jaxlm import checkpoint, configfile, devices, run
from jaxlm import config as cfg
from jaxlm.data import load_tokenizer
from jaxlm.interop import carried
from jaxlm.interop.read import load_params, read_model
from jaxlm.interop.safetensors_files import inside
from jaxlm.interop.write import new_directory, save_params
from jaxlm.mesh import open_mesh
from jaxlm.state import State, model_structure, trained
from jaxlm.yaml_values import yaml_text

PathLike = str | os.PathLike[str]


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
    learned = configfile.model_class(model["family"])(**model).learned_positions
    longest = hf.get("max_position_embeddings") or learned or 1024
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
            config = configfile.load(file, [*overrides, f"run.dir={yaml_text(str(out))}"])
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
