"""The vocabulary of shapes: `b` images, `h` by `w` pixels, `c` channels, `k` classes."""

from collections.abc import Mapping
from typing import TypeAlias

import jax
import numpy as np
from jaxtyping import Float, Int, Num, UInt8

Array: TypeAlias = jax.Array | np.ndarray

Images: TypeAlias = Num[Array, "b h w c"]
"""A batch of images, channels last; uint8 pixels before the step, normalised floats inside it."""

RawImages: TypeAlias = UInt8[Array, "b h w c"]

FeatureMap: TypeAlias = Float[Array, "b _ _ _"]
"""Height, width and channels change from layer to layer; the batch does not."""

Logits: TypeAlias = Float[Array, "b k"]
PerClass: TypeAlias = Float[Array, "b k"]
Labels: TypeAlias = Int[Array, " b"]
Targets: TypeAlias = Labels | PerClass
"""A class for each example, or the share of every class where images are mixed."""

PerExample: TypeAlias = Float[Array, " b"]

Batch: TypeAlias = Mapping[str, Array]
"""`image` uint8 [b h w c] and `label` int32 [b]; `index` and `epoch` int32 [b] name each example
for its augmentation when training; `mask` float32 [b] is 0 for the padding of an evaluation."""

Metrics: TypeAlias = Mapping[str, jax.Array]
"""Sums over the examples of a batch; `count` is the number of examples they sum over."""
