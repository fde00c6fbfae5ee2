"""Where in a step the first number appears that is not finite."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.training.state import TrainState
from cnn_jax.typing import Batch

Probe = Callable[[Any, str, bool], Any]


def first_not_finite(
    step: Callable[[TrainState, Batch, jax.Array], Any],
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    of_all_processes: Callable[[set[str]], set[str]] = lambda places: places,
) -> str:
    """Returns the first place where `step(state, batch, key)` makes a number that is not finite.

    The places, in this order: the weights before the step; the images that enter the model; the
    output of each layer, as they run; the gradient at each layer's output, as it runs back; the
    loss; the weights after the step. A layer is any linen module, named by its path and class.

    `step` is traced once more, its layers watched from outside, and nothing is donated. Compiled
    in another way it may round otherwise, so a number at the very edge of float32 may turn out
    finite; then the answer says so.

    JAX tells one process alone what it has seen: `of_all_processes` returns the union of the places
    that each was told, and all have the same answer.
    """
    path = _first_leaf(state)
    if path:
        return f"{path} is not finite before the step"
    forward: list[str] = []
    backward: list[str] = []
    seen: set[str] = set()

    def probe(value: Any, place: str, backwards: bool) -> Any:
        (backward if backwards else forward).append(place)
        return _watch(value, place, seen, backwards)

    def watched(state: TrainState, batch: Batch, key: jax.Array) -> Any:
        with _watching(probe):
            return step(state, batch, key)

    new_state, sums = jax.block_until_ready(jax.jit(watched)(state, batch, key))
    jax.effects_barrier()
    seen_by_any = of_all_processes(seen)
    for place in (*forward, *reversed(backward)):
        if place in seen_by_any:
            return f"{place} is the first that is not finite"
    if not np.isfinite(jax.device_get(sums["loss"])):
        return "the loss is the first that is not finite"
    path = _first_leaf(new_state)
    if path:
        return f"all layers and their gradients are finite, {path} is not after the update"
    return "every layer, its gradient and the weights after the step are finite, looked at singly"


@contextlib.contextmanager
def _watching(probe: Probe) -> Iterator[None]:
    """Hands what enters the model, and what leaves each layer, to `probe` while it is traced."""

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        module = context.module
        if not module.path:
            args = probe(args, "what enters the model (the images as augmented)", False)
        name = f"{'/'.join(module.path) or 'the whole model'} ({type(module).__name__})"
        value = probe(call(*args, **kwargs), f"the output of {name}", False)
        return probe(value, f"the gradient at the output of {name}", True)

    with nn.intercept_methods(intercept):
        yield


def _watch(value: Any, place: str, seen: set[str], backwards: bool) -> Any:
    """Returns `value`; running it, or its gradient back, notes the place if it is not finite."""

    def note(finite: Any) -> None:
        if not finite:
            seen.add(place)

    def look(tree: Any) -> None:
        jax.debug.callback(note, _finite(tree))

    if not backwards:
        look(value)
        return value

    @jax.custom_vjp
    def identity(value: Any) -> Any:
        return value

    def back(_: None, cotangent: Any) -> tuple[Any]:
        look(cotangent)
        return (cotangent,)

    identity.defvjp(lambda value: (value, None), back)
    return identity(value)


def _finite(tree: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves] or [jnp.array(True)]))


@jax.jit
def _finite_leaves(state: TrainState) -> Any:
    return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), state)


def _first_leaf(state: TrainState) -> str:
    """Returns the path of the first array of the state that is not finite, or ""."""
    finite = jax.tree.leaves_with_path(jax.device_get(_finite_leaves(state)))
    paths = (path for path, each in finite if not each)
    return next((jax.tree_util.keystr(path, simple=True, separator="/") for path in paths), "")
