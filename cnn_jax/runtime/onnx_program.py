"""A function of images as an ONNX model, by jax2onnx.

The converter knows neither a branch for each platform nor pooling with padding, and puts functions
of its own in the place of some of Flax's. So it is given the primitives of a function one by one,
those in plainer words that it does not know.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

INPUT, OUTPUT = "images", "probabilities"


def convert_to_onnx(
    function: Callable[[Any], jax.Array],
    image_shape: Sequence[int],
    metadata: Mapping[str, Any],
) -> bytes:
    """Returns an ONNX model of a function of uint8 images [batch, h, w, c], of any batch size.

    Args:
      function: gives an array [batch, ...] of images.
      image_shape: (h, w, c).
      metadata: written into the model by name, each as JSON.
    """
    import jax2onnx  # pyright: ignore[reportMissingImports]
    import onnx  # pyright: ignore[reportMissingImports]

    images = _Shaped(("batch", *image_shape), jnp.dtype(jnp.uint8))
    with _silence(), jax.numpy_rank_promotion("allow"):
        model = jax2onnx.to_onnx(
            in_plain_words(function), [images], input_names=[INPUT], output_names=[OUTPUT]
        )
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    onnx.helper.set_model_props(model, texts)
    return model.SerializeToString()


def run_onnx(model: bytes, images: np.ndarray) -> np.ndarray:
    """Returns what onnxruntime computes with such a model, on the CPU."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([OUTPUT], {INPUT: images})[0])


def in_plain_words(function: Callable[[Any], jax.Array]) -> Callable[[Any], jax.Array]:
    """Returns the same function without what the converter does not know; see `RULES`."""

    def plain(images: Any) -> jax.Array:
        (output,) = _evaluate(jax.make_jaxpr(function)(images), images)
        return output

    return plain


class _Shaped:
    """What jax2onnx reads of an argument: a name stands for a size that is left open."""

    def __init__(self, shape: tuple[int | str, ...], dtype: Any) -> None:
        self.shape = shape
        self.dtype = dtype


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The converter prints what it looks at, and logs examples of its own that it cannot import."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _evaluate(closed: ClosedJaxpr, *inputs: Any) -> list[Any]:
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, inputs, strict=True)

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        arguments = [value(atom) for atom in equation.invars]
        rule = RULES.get(equation.primitive.name)
        if rule is not None:
            outputs = rule(equation.params, *arguments)
        else:
            outputs = equation.primitive.bind(*arguments, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values |= zip(equation.outvars, outputs, strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _platform_index(params: Mapping[str, Any]) -> list[int]:
    """The branch that is for no platform in particular."""
    return [list(params["platforms"]).index(None)]


def _cond(params: Mapping[str, Any], index: int, *arguments: Any) -> list[Any]:
    return _evaluate(params["branches"][index], *arguments)


def _inner(name: str) -> Callable[..., list[Any]]:
    """Returns the rule of a primitive that only wraps others, in its parameter of this name."""
    return lambda params, *arguments: _evaluate(params[name], *arguments)


def _max_pool(params: Mapping[str, Any], x: Any) -> list[jax.Array]:
    padded = jnp.pad(x, params["padding"], constant_values=-jnp.inf)
    return [nn.max_pool(padded, **_window(params))]


def _sum_pool(params: Mapping[str, Any], x: Any) -> list[jax.Array]:
    window = _window(params)
    pixels = window["window_shape"][0] * window["window_shape"][1]
    return [nn.avg_pool(jnp.pad(x, params["padding"]), **window) * jnp.asarray(pixels, x.dtype)]


def _window(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of Flax's pools, by name as the converter's own take them."""
    return {
        "window_shape": tuple(params["window_dimensions"][1:3]),
        "strides": tuple(params["window_strides"][1:3]),
        "padding": "VALID",
    }


RULES: dict[str, Callable[..., list[Any]]] = {
    "platform_index": _platform_index,
    "cond": _cond,
    "custom_jvp_call": _inner("call_jaxpr"),
    "jit": _inner("jaxpr"),
    "pjit": _inner("jaxpr"),
    "reduce_window_max": _max_pool,
    "reduce_window_sum": _sum_pool,
}
"""What stands for the primitives that the converter does not know, or knows in part."""
