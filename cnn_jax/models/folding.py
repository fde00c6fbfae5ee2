"""BatchNorm folded into the convolutions before it: fewer operations for a network that is done."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax.models.classifier import Classifier
from cnn_jax.models.modern_cnn import ModernCNN
from cnn_jax.models.normalization import BATCH_NORMS, BatchNorm
from cnn_jax.typing import Images

Path: TypeAlias = tuple[str, ...]


def fold_batch_norms(
    model: Classifier, variables: Mapping[str, Any], images: Images | jax.ShapeDtypeStruct
) -> tuple[Classifier, Mapping[str, Any]]:
    """Returns the model without its BatchNorms, and variables with which it evaluates alike.

    With `f = scale / sqrt(var + epsilon)`, in float64, a convolution `W * x + b` becomes
    `f W * x + (b - mean) f + bias`: the same numbers but for rounding. A BatchNorm can go if its
    input is what a convolution returns. Where one cannot, or there is none, model and variables are
    returned as they are.

    Args:
      model, variables: the network.
      images: normalised, [b, h, w, c], or their shape and dtype.
    """
    if model.norm not in BATCH_NORMS:
        return model, variables
    leaves: dict[Path, Any] = flatten_dict(variables)  # pyright: ignore[reportAssignmentType]
    for convolution, norm, epsilon in _normalized_convolutions(model, variables, images):
        kernel, bias = ("params", *convolution, "kernel"), ("params", *convolution, "bias")
        scale, shift = (_take(leaves, ("params", *norm, name)) for name in ("scale", "bias"))
        mean, var = (_take(leaves, ("batch_stats", *norm, name)) for name in ("mean", "var"))
        factor = scale / np.sqrt(var + epsilon)
        shift += (_take(leaves, bias, 0.0) - mean) * factor
        leaves[kernel] = np.asarray(_take(leaves, kernel) * factor, np.float32)
        leaves[bias] = np.asarray(shift, np.float32)
    without: dict[str, Any] = {"norm": "none", "batch_norm_group_size": None}
    if isinstance(model, ModernCNN):
        without["zero_init_last"] = False  # a matter of how training starts
    folded = model.clone(**without)
    expected = jax.eval_shape(
        lambda images: folded.init(jax.random.key(0), images, train=False), images
    )
    if leaves.keys() != flatten_dict(expected).keys():
        return model, variables
    return folded, unflatten_dict(leaves)


def _take(leaves: dict[Path, Any], path: Path, *default: float) -> np.ndarray:
    return np.array(leaves.pop(path, *default), np.float64)


def _normalized_convolutions(
    model: Classifier, variables: Mapping[str, Any], images: Any
) -> list[tuple[Path, Path, float]]:
    """Returns the paths of each convolution and the BatchNorm that it feeds, and its epsilon."""
    convolutions: list[tuple[Path, Any]] = []
    found: list[tuple[Path, Path, float]] = []

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, BatchNorm):
            found.extend(
                (path, module.path, module.epsilon)
                for path, output in convolutions
                if output is args[0]
            )
        output = call(*args, **kwargs)
        if isinstance(module, nn.Conv):
            convolutions.append((module.path, output))
        return output

    with nn.intercept_methods(watch):
        jax.eval_shape(
            lambda variables, images: model.apply(variables, images, train=False),
            variables,
            images,
        )
    return found
