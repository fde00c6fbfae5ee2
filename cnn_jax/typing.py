"""The vocabulary of shapes: `b` images, `h` by `w` pixels, `c` channels, `k` classes."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Float, Int, Num, UInt8

Images: TypeAlias = Num[Array, "b h w c"]
"""A batch of images, channels last; uint8 pixels before the step, normalised floats inside it."""

RawImages: TypeAlias = UInt8[Array, "b h w c"]
FeatureMap: TypeAlias = Float[Array, "b h w c"]
Logits: TypeAlias = Float[Array, "b k"]
Labels: TypeAlias = Int[Array, " b"]
PerExample: TypeAlias = Float[Array, " b"]

Batch: TypeAlias = Mapping[str, jax.Array]
"""`image` uint8 [b h w c] and `label` int32 [b]; `index` and `epoch` int32 [b] name each example
for its augmentation when training; `mask` float32 [b] is 0 for the padding of an evaluation."""

Metrics: TypeAlias = Mapping[str, jax.Array]
"""Sums over the examples of a batch; `count` is the number of examples they sum over."""

Variables: TypeAlias = Mapping[str, Any]
"""What `nn.Module.init` returns: `params` and, with BatchNorm, `batch_stats`."""
