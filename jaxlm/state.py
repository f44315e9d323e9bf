"""State(step, params, fixed, opt): all that a step reads and writes, as flat dicts of arrays.

Parameters are named by their place in the model ("groups.0.0.attention.q"); the module itself is
only a way to write the forward pass and is put together from the arrays inside the step.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxlm import config as cfg
from jaxlm.models import staged_group
from jaxlm.models.decoder import Decoder
from jaxlm.sharding import Layout, place, stacked_dims

Arrays = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "fixed", "opt"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class State:
    """The training state; `params` are trained, `fixed` are not."""

    step: jax.Array
    params: Arrays
    fixed: Arrays
    opt: Any


@dataclasses.dataclass(frozen=True)
class Structure:
    """A model without its arrays: names, dimension names, and how to put it together."""

    treedef: Any
    shapes: dict[str, tuple[int, ...]]  # name -> shape
    dims: dict[str, str]  # name -> dimension names, with a leading `layers` where stacked
    over: dict[str, str]  # name -> dimensions of the activations that the weight meets
    weights: tuple[str, ...]  # the names that may be trained; other variables never are
    beside: frozenset[str]  # the names of layers that are on no stage, where there are stages

    def home(self, name: str, layout: Layout) -> Layout:
        """The layout of an array of the model, where that of the model is `layout`."""
        return layout.beside_stages() if name in self.beside else layout

    def merge(self, *parts: Arrays) -> Decoder:
        """The module that holds these arrays."""
        arrays = {name: array for part in parts for name, array in part.items()}
        return jax.tree.unflatten(self.treedef, [arrays[name] for name in self.dims])


def model_structure(model_config: cfg.Model, layout: Layout) -> Structure:
    """The structure of a model, without making any array."""
    model = jax.eval_shape(lambda: Decoder(model_config, layout, jax.random.key(0)))
    named = _variables(model)
    staged = f"groups.{staged_group(model_config)}."
    layers = {name for name in named if name.startswith("groups.")}
    on_stages = {name for name in layers if name.startswith(staged)}
    return Structure(
        treedef=jax.tree.structure(model),
        shapes={name: variable.get_value().shape for name, variable in named.items()},
        dims={name: stacked_dims(variable) for name, variable in named.items()},
        over={name: variable.get_metadata("over") for name, variable in named.items()},
        weights=_weights(named),
        beside=frozenset(layers - on_stages if layout.size("layers") > 1 else ()),
    )


def _variables(model: Decoder) -> dict[str, nnx.Variable]:
    leaves = jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    return {_name(path): variable for path, variable in leaves}


def _weights(named: dict[str, nnx.Variable]) -> tuple[str, ...]:
    return tuple(name for name, variable in named.items() if isinstance(variable, nnx.Param))


def _name(path) -> str:
    parts = (getattr(p, "name", getattr(p, "key", getattr(p, "idx", None))) for p in path)
    return ".".join(str(part) for part in parts)


def trained(names, patterns: tuple[str, ...]) -> set[str]:
    """The names that `optimizer.train` selects, of those of weights."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise cfg.UserError(
                f"optimizer.train={pattern!r} matches no parameter; there are: "
                + ", ".join(sorted(names))
            )
    return {name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)}


def init_params(config: cfg.Config, layout: Layout) -> tuple[Arrays, Arrays]:
    """Initial (params, fixed); one seed, the same bits on every mesh. Run it under jit."""
    model = Decoder(config.model, layout, jax.random.key(config.seed))
    named = _variables(model)
    arrays = {name: variable.get_value() for name, variable in named.items()}
    chosen = trained(_weights(named), config.optimizer.train)
    params = {name: array for name, array in arrays.items() if name in chosen}
    return params, {name: array for name, array in arrays.items() if name not in chosen}


def init_state(
    config: cfg.Config, layout: Layout, optimizer: optax.GradientTransformation
) -> State:
    """The state at step 0. Run it under jit."""
    params, fixed = init_params(config, layout)
    return State(jnp.zeros((), jnp.int32), params, fixed, optimizer.init(params))


def abstract_state(config, layout: Layout, optimizer, mesh: Mesh) -> State:
    """Shapes and shardings of the state, no arrays: for restoring, planning and `create_state`."""
    return place(mesh, jax.eval_shape(lambda: init_state(config, layout, optimizer)))


def create_state(config, layout: Layout, optimizer, mesh: Mesh) -> State:
    """The state at step 0 on the mesh; every array is born sharded."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, layout, optimizer, mesh))
    return jax.jit(lambda: init_state(config, layout, optimizer), out_shardings=shardings)()
