"""What is minimised."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from cnn_jax.typing import Logits, PerClass, PerExample, Targets

Loss: TypeAlias = Callable[[Logits, Targets], PerExample]


def cross_entropy(logits: Logits, labels: Targets, *, label_smoothing: float = 0.0) -> PerExample:
    """Returns `-sum_k q_k log softmax(logits)_k` for each example, in nats.

    `q` is `1 - label_smoothing` on the label plus `label_smoothing / K` on each of the K classes
    (Szegedy et al. 2015, arXiv:1512.00567), torch's `CrossEntropyLoss(label_smoothing=...)`; of
    shares of classes likewise. In float32 at least. NaN for a label that is no class, such as the
    -100 that torch leaves out. Raises ValueError for labels of another shape or kind.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = shares_of(labels, logits.shape, logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def binary_cross_entropy(
    logits: Logits,
    labels: Targets,
    *,
    label_smoothing: float = 0.0,
    threshold: float | None = None,
) -> PerExample:
    """Returns the mean over classes of `-q log p - (1 - q) log (1 - p)` in nats, p the sigmoid.

    torch's `BCEWithLogitsLoss`: each class is a question of its own, and an image that is mixed of
    two may be both (Wightman et al. 2021, "ResNet strikes back", arXiv:2110.00476). `q` is smoothed
    as in `cross_entropy`; with a `threshold` it is 1 where it is larger and 0 elsewhere. In float32
    at least. NaN and ValueError as in `cross_entropy`.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    shares = shares_of(labels, logits.shape, logits.dtype)
    targets = optax.smooth_labels(shares, label_smoothing)
    if threshold is not None:
        targets = jnp.where(jnp.isnan(targets), targets, targets > threshold)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)


def shares_of(labels: Targets, shape: tuple[int, ...], dtype: Any = jnp.float32) -> PerClass:
    """Returns the share of every class, of that `shape` [b, k], in classes or in shares.

    NaN for a number that is no class. Raises ValueError for labels of another shape or kind.
    """
    if labels.shape == shape:
        return jnp.asarray(labels, dtype)
    if labels.shape != shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels of shape {labels.shape} and {labels.dtype}: must be whole numbers "
            f"{shape[:-1]}, or the share of every class {shape}"
        )
    is_class = (labels >= 0) & (labels < shape[-1])
    of_classes = jax.nn.one_hot(labels, shape[-1], dtype=dtype)
    return jnp.where(is_class[..., None], of_classes, jnp.nan)


LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}
