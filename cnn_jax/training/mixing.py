"""What is done to normalised images and their labels: erasing, then mixup or cutmix.

An image is mixed with the one before it in the global batch, the first with the last. The order of
a batch is random already, so this is a random pairing, and between devices only one image moves.
The share is drawn for every example, by its own key (the papers draw one for a batch).
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key

from cnn_jax.errors import require_between
from cnn_jax.training.augment import Keys, example_keys, fold_in
from cnn_jax.training.losses import shares_of
from cnn_jax.typing import FeatureMap, Labels, PerClass, PerExample, Targets

Mix: TypeAlias = Callable[
    [FeatureMap, Targets, Key[Array, ""], Labels, Labels], tuple[FeatureMap, PerClass]
]
"""`mix(images, labels, root key, epoch, index)` returns images and the shares of the classes."""

AREA = (0.02, 0.33)
RATIO = (0.3, 3.3)
ATTEMPTS = 10


def random_erase(images: FeatureMap, keys: Keys, *, probability: float) -> FeatureMap:
    """Returns each image with a rectangle of zeros, the mean colour, with this probability.

    torchvision's RandomErasing (Zhong et al. 2017, arXiv:1708.04896): 2 to 33 % of the area, sides
    in a ratio of 0.3 to 3.3, the first of ten draws that fits.
    """
    height, width = images.shape[1:3]

    def draw(key: Key[Array, ""], low: float, high: float) -> Float[Array, " n"]:
        return jax.random.uniform(key, (ATTEMPTS,), minval=low, maxval=high)

    def inside(key: Key[Array, ""]) -> Bool[Array, "h w"]:
        coin, area_key, ratio_key, top_key, left_key = jax.random.split(key, 5)
        area = height * width * draw(area_key, *AREA)
        ratio = jnp.exp(draw(ratio_key, *map(math.log, RATIO)))
        heights = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
        widths = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
        fits = (heights < height) & (widths < width)
        first = jnp.argmax(fits)
        rows, columns = heights[first], widths[first]
        top = jax.random.randint(top_key, (), 0, height - rows + 1)
        left = jax.random.randint(left_key, (), 0, width - columns + 1)
        erased = jax.random.bernoulli(coin, probability) & fits.any()
        return erased & _rectangle(height, width, top, top + rows, left, left + columns)

    return jnp.where(jax.vmap(inside)(keys)[..., None], jnp.zeros_like(images), images)


def mixup(images: FeatureMap, targets: PerClass, share: PerExample) -> tuple[FeatureMap, PerClass]:
    """Returns `share` of each image and target plus the rest of its partner's.

    Zhang et al. 2017, arXiv:1710.09412.
    """
    own = share[:, None, None, None]
    mixed = own * images + (1.0 - own) * _partner(images)
    return mixed.astype(images.dtype), _mix_targets(targets, share)


def cutmix(
    images: FeatureMap, targets: PerClass, share: PerExample, keys: Keys
) -> tuple[FeatureMap, PerClass]:
    """Returns each image with a rectangle of its partner's, and targets by the areas.

    The rectangle has `1 - share` of the area, less where it reaches over the edge, the image's
    proportions, and its middle anywhere (Yun et al. 2019, arXiv:1905.04899).
    """
    height, width = images.shape[1:3]

    def inside(share: jax.Array, key: Key[Array, ""]) -> Bool[Array, "h w"]:
        y_key, x_key = jax.random.split(key)
        half = 0.5 * jnp.sqrt(1.0 - share)
        rows = jnp.floor(half * height).astype(jnp.int32)
        columns = jnp.floor(half * width).astype(jnp.int32)
        y = jax.random.randint(y_key, (), 0, height)
        x = jax.random.randint(x_key, (), 0, width)
        return _rectangle(height, width, y - rows, y + rows, x - columns, x + columns)

    cut = jax.vmap(inside)(jnp.asarray(share), keys)
    left = 1.0 - jnp.mean(cut, axis=(1, 2))
    return jnp.where(cut[..., None], _partner(images), images), _mix_targets(targets, left)


def make_mix(
    *,
    num_classes: int,
    erase_probability: float = 0.0,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
) -> Mix:
    """Returns the chosen changes of normalised images as one function.

    Shares are of a Beta(alpha, alpha) distribution; 0 is never. With both alphas an example is
    mixed the one way or the other, with probability one half. Raises ValueError for a number below
    0 or a probability above 1.
    """
    require_between(0, 1, erase_probability=erase_probability)
    require_between(0, math.inf, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)

    def mix(
        images: FeatureMap, labels: Targets, key: Key[Array, ""], epoch: Labels, index: Labels
    ) -> tuple[FeatureMap, PerClass]:
        keys = example_keys(key, epoch, index)
        if erase_probability:
            images = random_erase(images, fold_in(keys, 4), probability=erase_probability)
        targets = shares_of(labels, (len(labels), num_classes))
        if not mixup_alpha and not cutmix_alpha:
            return images, targets
        cuts = jax.vmap(jax.random.bernoulli)(fold_in(keys, 7))
        if not mixup_alpha or not cutmix_alpha:
            cuts = jnp.full_like(cuts, cutmix_alpha > 0)
        alphas = jnp.where(cuts, cutmix_alpha, mixup_alpha)
        shares = jax.vmap(jax.random.beta)(fold_in(keys, 5), alphas, alphas)
        if not cutmix_alpha:
            return mixup(images, targets, shares)
        cut_images, cut_targets = cutmix(images, targets, shares, fold_in(keys, 6))
        if not mixup_alpha:
            return cut_images, cut_targets
        images, targets = mixup(images, targets, shares)
        return (
            jnp.where(cuts[:, None, None, None], cut_images, images),
            jnp.where(cuts[:, None], cut_targets, targets),
        )

    return mix


def _partner(of: ArrayLike) -> jax.Array:
    return jnp.roll(of, 1, axis=0)


def _mix_targets(targets: PerClass, share: PerExample) -> PerClass:
    return share[:, None] * targets + (1.0 - share[:, None]) * _partner(targets)


def _rectangle(
    height: int, width: int, top: jax.Array, bottom: jax.Array, left: jax.Array, right: jax.Array
) -> jax.Array:
    """Returns where (y, x) lies inside, bool [h w]."""
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)
