"""What a run carries from step to step: arrays only."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer

from cnn_jax.errors import nearest
from cnn_jax.training.miscompile import warn_if_exposed
from cnn_jax.typing import Images


@flax.struct.dataclass
class TrainState:
    """The tree that is trained, sharded, checkpointed and compiled ahead of time.

    Attributes:
      step: int32 scalar, optimiser steps done.
      params: float32 parameters.
      batch_stats: float32 running statistics; empty without BatchNorm.
      opt_state: of the optimiser.
      ema: moving averages of `params` and `batch_stats`, under these names; empty without.
    """

    step: Any  # an array, or what stands for one in an abstract state, like all others
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any = flax.struct.field(default_factory=dict)

    def averaged(self) -> "TrainState":
        """Returns the state with the moving averages in the place of what they average.

        Raises ValueError where it has none.
        """
        if not self.ema:
            raise ValueError("the state has no moving averages: make it by init_state(ema=True)")
        return dataclasses.replace(
            self, params=self.ema["params"], batch_stats=self.ema["batch_stats"]
        )

    def map_statistics(self, change: Callable[..., Any], *others: "TrainState") -> "TrainState":
        """Returns the state with `change` of its running statistics, and of their averages.

        `change` is given those of the `others` as well.
        """
        batch_stats = change(self.batch_stats, *(each.batch_stats for each in others))
        if not self.ema:
            return dataclasses.replace(self, batch_stats=batch_stats)
        averages = change(self.ema["batch_stats"], *(each.ema["batch_stats"] for each in others))
        ema = {**self.ema, "batch_stats": averages}
        return dataclasses.replace(self, batch_stats=batch_stats, ema=ema)


def init_state(
    model: Any,
    tx: optax.GradientTransformation,
    images: Images,
    key: jax.Array,
    *,
    weights: Mapping[str, Any] | None = None,
    ema: bool = False,
) -> TrainState:
    """Returns the state at step 0; only the shape and dtype of `images` matter.

    Variables in `weights`, all or some of them, take the place of the random ones that the model
    starts with, in the dtype of these. With `ema` the state has moving averages, which begin at
    these. Warns where programs on this machine may be wrong, see `cnn_jax.training.miscompile`,
    unless `images` are traced, as the commands have it: they compile in a way that avoids it.

    Raises ValueError for weights that the model does not have, or has in another shape.
    """
    if not isinstance(images, Tracer):
        warn_if_exposed()
    variables = model.init(key, images, train=False)
    if weights:
        variables = _with(variables, weights)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    values = {"params": params, "batch_stats": batch_stats}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, values) if ema else {},  # copies: the state is donated
    )


def _with(variables: Mapping[str, Any], weights: Mapping[str, Any]) -> Mapping[str, Any]:
    leaves: Any = flatten_dict(dict(variables), sep="/")
    given: Any = flatten_dict(dict(weights), sep="/")
    problems = []
    for path, leaf in given.items():
        if path not in leaves:
            problems.append(f"{path}: the model has none{nearest(path, leaves)}")
        elif leaf.shape != leaves[path].shape:
            problems.append(f"{path}: {leaf.shape}, must be {leaves[path].shape}")
    if problems:
        whole = "" if set(weights) <= set(variables) else "; they are {'params': ...} as a whole"
        raise ValueError("\n  ".join([f"the weights do not fit the model{whole}:", *problems]))
    found = {path: jnp.asarray(leaf, leaves[path].dtype) for path, leaf in given.items()}
    return {**variables, **unflatten_dict({**leaves, **found}, sep="/")}


def skip_step(state: TrainState) -> TrainState:
    """Returns the state after a step that changes nothing but the number of the step."""
    return dataclasses.replace(state, step=_next(state.step))


@jax.jit
def _next(step: jax.Array) -> jax.Array:
    return step + 1


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
    """Returns whether every number of the state is finite, a bool scalar."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state)]))
