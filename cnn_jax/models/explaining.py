"""What a network looks at: the outputs of its modules, what they see and where evidence lies.

For any linen module called as `model(images, train=False)`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from cnn_jax.typing import Array, FeatureMap, Images

METHODS = {"grad_cam": "Grad-CAM", "grad_cam++": "Grad-CAM++"}
"""Of class activation maps, with their names in print."""

Maps = Float[Array, "b _ _"]


def feature_maps(
    model: nn.Module, variables: Mapping[str, Any], images: Images
) -> dict[str, FeatureMap]:
    """Returns the feature maps [b, h, w, c] of all modules by path, in the order of their ends.

    Paths are such as "stage1_block1/conv1"; of a module that is called twice, the last output.
    """
    found: dict[str, Any] = {}

    def keep(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.path and _is_map(output):
            path = "/".join(context.module.path)
            found.pop(path, None)
            found[path] = output
        return output

    with nn.intercept_methods(keep):
        model.apply(variables, images, train=False)
    return found


def effective_receptive_field(
    model: nn.Module, variables: Mapping[str, Any], images: Images, *, layer: str
) -> Maps:
    """Returns how strongly each pixel [b, h, w] of an image moves the middle of a feature map.

    `mean_c |d sum_k A_k[i, j] / d x_c|` of the layer's channels `A_k` and the image's `x_c`, with
    (i, j) = (height // 2, width // 2) of the feature map (Luo et al. 2016, arXiv:1701.04128).
    `layer` is the path of a module as in `feature_maps`; ValueError where there is no such.
    """
    _refuse_unknown(layer, feature_shapes(model, variables, images))

    def middle(images: Images) -> jax.Array:
        maps = feature_maps(model, variables, images)[layer]
        return jnp.sum(maps[:, maps.shape[1] // 2, maps.shape[2] // 2])

    return jnp.mean(jnp.abs(jax.grad(middle)(images)), axis=-1)


def class_activation_map(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Images,
    classes: Int[Array, " b"],
    *,
    layer: str | None = None,
    method: str = "grad_cam",
) -> Maps:
    """Returns where on the feature map [b, h, w] of a layer the evidence for a class lies, >= 0.

    `relu(sum_k w_k A_k)` of the layer's channels `A_k`. With `g_k` the gradient of the logit of the
    class by `A_k`, Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) has `w_k = mean_ij g_k`, and
    Grad-CAM++ (Chattopadhay et al. 2018, arXiv:1710.11063) `w_k = sum_ij a_k relu(g_k)` with
    `a_k = g_k**2 / (2 g_k**2 + g_k**3 sum_ij A_k)`, 0 where that is 0 / 0: its equation 19, but for
    a factor that is the same everywhere.

    Args:
      model, variables: the network.
      images: normalised, [b, h, w, c].
      classes: one for each image; of one that does not exist the map is NaN.
      layer: path of a module as in `feature_maps`; by default the last outermost one with a map.
      method: one of `METHODS`.

    Raises ValueError for an unknown method or layer, a model that gives no logits, or another
    number of classes than images.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(map(repr, METHODS))}")
    shapes = feature_shapes(model, variables, images)
    layer = last_stage(shapes) if layer is None else layer
    _refuse_unknown(layer, shapes)
    classes = jnp.asarray(classes)
    if classes.shape != images.shape[:1]:
        raise ValueError(f"classes of shape {classes.shape}: must be one for each image")

    def logits_of_classes(change: Any) -> tuple[jax.Array, tuple[FeatureMap, jax.Array]]:
        seen = []

        def add(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            output = call(*args, **kwargs)
            if "/".join(context.module.path) != layer or context.method_name != "__call__":
                return output
            seen.append(output)
            return output + change

        with nn.intercept_methods(add):
            logits: Any = model.apply(variables, images, train=False)
        if getattr(logits, "ndim", 0) != 2:
            raise ValueError("the model gives no logits [b, k]; it has features_only=True, perhaps")
        is_class = (classes >= 0) & (classes < logits.shape[1])
        chosen = jnp.take_along_axis(logits, jnp.where(is_class, classes, 0)[:, None], axis=1)
        return jnp.sum(chosen), (seen[-1], is_class)

    zeros = jnp.zeros(shapes[layer].shape, shapes[layer].dtype)
    gradient, (maps, is_class) = jax.grad(logits_of_classes, has_aux=True)(zeros)
    weights = _weights(maps, gradient, method)
    found = jax.nn.relu(jnp.sum(weights * maps, axis=-1))
    return jnp.where(is_class[:, None, None], found, jnp.nan)


def _refuse_unknown(layer: str, shapes: Mapping[str, Any]) -> None:
    if layer not in shapes:
        raise ValueError(f"layer={layer!r}: must be one of {', '.join(map(repr, shapes))}")


def feature_shapes(
    model: nn.Module, variables: Mapping[str, Any], images: Images
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of what `feature_maps` returns, in the same order."""
    order: list[str] = []

    def maps(images: Images) -> dict[str, FeatureMap]:
        found = feature_maps(model, variables, images)
        order.extend(found)
        return found

    shapes = jax.eval_shape(maps, images)  # which sorts by name
    return {path: shapes[path] for path in order}


def _weights(maps: Array, gradient: Array, method: str) -> jax.Array:
    if method == "grad_cam":
        return jnp.mean(gradient, axis=(1, 2), keepdims=True)
    total = jnp.sum(maps, axis=(1, 2), keepdims=True)
    below = 2 * gradient**2 + gradient**3 * total
    shares = jnp.where(below == 0, 0.0, gradient**2 / jnp.where(below == 0, 1.0, below))
    return jnp.sum(shares * jax.nn.relu(gradient), axis=(1, 2), keepdims=True)


def _is_map(output: Any) -> bool:
    return isinstance(output, jax.Array) and output.ndim == 4


def last_stage(shapes: Mapping[str, Any]) -> str:
    """Returns the path of the last outermost module with a feature map, of `feature_shapes`.

    Raises ValueError where there is none.
    """
    outermost = [path for path in shapes if "/" not in path]
    if not outermost:
        raise ValueError(
            "model: must have a module whose output is [batch, height, width, channels]"
        )
    return outermost[-1]
