"""Pooling: windows of a feature map, and the whole of it."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax.models.batch_statistics import anew
from cnn_jax.models.layers import Size, pair
from cnn_jax.typing import Array, FeatureMap

Pair: TypeAlias = tuple[int, int]
"""(height, width)."""

Places: TypeAlias = Callable[[Any, Pair, Pair, tuple[Pair, Pair], float], list[jax.Array]]
"""A way to say, for each place in a window, which pixels stand there: `places_of_slices`."""


def max_pool(
    x: FeatureMap, *, window: Size, strides: Size, padding: Size = 0, ceil_mode: bool = False
) -> FeatureMap:
    """Returns the largest value of each window; padding counts as minus infinity.

    With `ceil_mode`, a last window that reaches over the edge is kept, as torch does.
    """
    sides: Any = _sides(x, window, strides, padding, ceil_mode)

    def pool(x: Any) -> Any:
        return _windows(x, -jnp.inf, jax.lax.max, pair(window), pair(strides), sides)

    def remembering(x: Any, places: Places) -> Any:
        return _max_pool(x, pair(window), pair(strides), tuple(sides), places)

    # A TPU scatters quickly, and has to move what is shifted by a pixel. XLA's CPU compiler (jaxlib
    # 0.10.2) computes wrong gradients of GoogLeNet with the image in parts.
    return jax.lax.platform_dependent(
        x,
        tpu=pool,
        cuda=functools.partial(remembering, places=places_of_parts),
        default=functools.partial(remembering, places=places_of_slices),
    )


def _windows(
    x: Any, start: float, join: Callable[..., Any], window: Pair, strides: Pair, sides: Any
) -> jax.Array:
    """Returns what `nn.pool` does, which converters to ONNX replace by their own."""
    around = (0, 0)
    return jax.lax.reduce_window(
        x, start, join, (1, *window, 1), (1, *strides, 1), (around, *sides, around)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _max_pool(
    x: Array, window: Pair, strides: Pair, sides: tuple[Pair, Pair], places: Places
) -> jax.Array:
    """Returns the largest value of each window; its gradient goes to the first that reaches it.

    XLA scatters the gradient into windows one by one. The rule below remembers which pixel of its
    window was the largest, a byte for each output, and adds up what each place of a window sends
    back.
    """
    return _windows(x, -jnp.inf, jax.lax.max, window, strides, sides)


@_max_pool.defjvp
def _max_pool_jvp(
    window: Pair,
    strides: Pair,
    sides: tuple[Pair, Pair],
    places: Places,
    primals: Any,
    tangents: Any,
) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    views = places(x, window, strides, sides, -jnp.inf)
    number_dtype = jnp.int8 if len(views) <= jnp.iinfo(jnp.int8).max else jnp.int32
    largest, place = views[0], jnp.zeros(views[0].shape, number_dtype)
    for number, view in enumerate(views[1:], start=1):
        place = jnp.where(view > largest, jnp.asarray(number, number_dtype), place)
        largest = jnp.maximum(largest, view)
    largest, place = anew(largest, place)
    tangents = places(tangent, window, strides, sides, 0.0)
    chosen = [jnp.where(place == number, view, 0) for number, view in enumerate(tangents)]
    return largest, functools.reduce(jax.lax.add, chosen)


def places_of_slices(
    x: Array, window: Pair, strides: Pair, sides: tuple[Pair, Pair], fill: float
) -> list[jax.Array]:
    """Returns for each place in a window, row by row, the pixels that stand there, [b h' w' c]."""
    padded = jnp.pad(x, ((0, 0), *sides, (0, 0)), constant_values=fill)
    steps = [(padded.shape[1 + i] - window[i]) // strides[i] for i in (0, 1)]
    return [
        jax.lax.slice(
            padded,
            (0, row, column, 0),
            (
                x.shape[0],
                row + steps[0] * strides[0] + 1,
                column + steps[1] * strides[1] + 1,
                x.shape[3],
            ),
            (1, *strides, 1),
        )
        for row in range(window[0])
        for column in range(window[1])
    ]


def places_of_parts(
    x: Array, window: Pair, strides: Pair, sides: tuple[Pair, Pair], fill: float
) -> list[jax.Array]:
    """Returns what `places_of_slices` does, of an image that is first split into parts.

    A part has the pixels of one remainder of row and column after division by the strides. What
    places send back is then added up in each part and the parts put side by side; of what strided
    slices send back, every pixel would ask whether it is meant.
    """
    (batch, *size, channels), filling = x.shape, jnp.asarray(fill, x.dtype)
    blocks = [-(-size[i] // strides[i]) for i in (0, 1)]
    outputs = [(sum(sides[i]) + size[i] - window[i]) // strides[i] + 1 for i in (0, 1)]

    def padded(x: Any, edges: list[Pair]) -> Any:
        return jax.lax.pad(x, filling, [(0, 0, 0), *((*edge, 0) for edge in edges), (0, 0, 0)])

    whole = padded(x, [(0, blocks[i] * strides[i] - size[i]) for i in (0, 1)])
    whole = whole.reshape(batch, blocks[0], strides[0], blocks[1], strides[1], channels)
    parts = [
        [
            part.reshape(batch, *blocks, channels)
            for part in jax.lax.split(rows, (1,) * strides[1], axis=4)
        ]
        for rows in jax.lax.split(whole, (1,) * strides[0], axis=2)
    ]

    def pixels(*place: int) -> Any:
        part: Any = parts
        edges = []
        for i in (0, 1):
            block, remainder = divmod(place[i] - sides[i][0], strides[i])
            edges.append((-block, block + outputs[i] - blocks[i]))
            part = part[remainder]
        return padded(part, edges)

    return [pixels(*place) for place in itertools.product(*map(range, window))]


def average_pool(
    x: FeatureMap,
    *,
    window: Size,
    strides: Size,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> FeatureMap:
    """Returns the mean of each window, by torch's rules.

    `count_include_pad` counts the zeros of `padding` as pixels; what `ceil_mode` adds never counts.
    """
    sides = _sides(x, window, strides, padding, ceil_mode)

    def sums(values: Array, padding: Any) -> jax.Array:
        return _windows(values, 0.0, jax.lax.add, pair(window), pair(strides), padding)

    pixels, padded = jnp.ones((1, *x.shape[1:3], 1), x.dtype), sides
    if count_include_pad:
        edges = [(before, before) for before, _ in sides]
        pixels = jnp.pad(pixels, [(0, 0), *edges, (0, 0)], constant_values=1)
        padded = [(0, after - before) for before, after in sides]
    return sums(x, sides) / sums(pixels, padded)


def _sides(
    x: FeatureMap, window: Size, strides: Size, padding: Size, ceil_mode: bool
) -> list[tuple[int, int]]:
    """Returns the pixels before and behind each image axis; ValueError where no window fits."""
    sides = []
    for size, extent, stride, edge in zip(
        x.shape[1:3], pair(window), pair(strides), pair(padding), strict=True
    ):
        if min(extent, stride) < 1 or not 0 <= 2 * edge <= extent:
            raise ValueError(
                f"window={window}, strides={strides}, padding={padding}: window and strides must "
                "be >= 1, and padding between 0 and half the window"
            )
        rest = size + 2 * edge - extent
        if rest < 0:
            raise ValueError(
                f"window={window}, padding={padding}: must not be larger than the feature map of "
                f"{x.shape[1]} x {x.shape[2]} pixels with its padding"
            )
        behind = edge
        if ceil_mode:
            steps = math.ceil(rest / stride)
            if steps * stride >= size + edge:  # the window would see padding alone
                steps -= 1
            behind += max(0, steps * stride - rest)
        sides.append((edge, behind))
    return sides


def blur_pool(x: FeatureMap, *, strides: int = 2, kernel_size: int = 3) -> FeatureMap:
    """Returns x blurred by a binomial filter, then every `strides`-th pixel of it.

    Zhang 2019, "Making Convolutional Networks Shift-Invariant Again" (arXiv:1904.11486); the edges
    are reflected. A strided convolution aliases: its output jumps when the image moves by a pixel.
    """
    if kernel_size < 2 or strides < 1:
        raise ValueError(
            f"kernel_size={kernel_size}, strides={strides}: must be >= 2 and >= 1 pixels"
        )
    taps = [math.comb(kernel_size - 1, k) / 2 ** (kernel_size - 1) for k in range(kernel_size)]
    edge = (strides - 1 + kernel_size - 1) // 2
    if min(x.shape[1:3]) <= edge:
        raise ValueError(
            f"a feature map of {x.shape[1]} x {x.shape[2]} pixels: must be larger than the "
            f"{edge} pixels that are reflected"
        )
    channels = x.shape[-1]
    kernel = jnp.outer(jnp.asarray(taps, x.dtype), jnp.asarray(taps, x.dtype))
    return jax.lax.conv_general_dilated(
        jnp.pad(x, [(0, 0), (edge, edge), (edge, edge), (0, 0)], mode="reflect"),
        jnp.tile(kernel[:, :, None, None], (1, 1, 1, channels)),
        window_strides=(strides, strides),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )


def global_average_pool(x: FeatureMap) -> jax.Array:
    """Returns the mean over height and width, [b, c]; in float32 at least."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


def global_max_pool(x: FeatureMap) -> jax.Array:
    """Returns the largest value over height and width, [b, c]; in float32 at least."""
    return largest(x, (1, 2)).astype(jnp.promote_types(x.dtype, jnp.float32))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest(x: Array, axes: Sequence[int]) -> jax.Array:
    """Returns the maximum along neighbouring axes, its gradient that of the first that reaches it.

    `jnp.max` divides the gradient by the number of elements that equal the maximum. Where a
    compiler computes x twice and rounds differently none does, and the gradient is 0 / 0.
    """
    return jnp.max(x, axis=tuple(axes))


@largest.defjvp
def _largest_jvp(axes: Sequence[int], primals: Any, tangents: Any) -> Any:
    (x,), (tangent,) = primals, tangents
    merged = (*x.shape[: axes[0]], -1, *x.shape[axes[-1] + 1 :])
    flat = x.reshape(merged)
    first = jnp.argmax(flat, axis=axes[0], keepdims=True)
    position = jax.lax.broadcasted_iota(first.dtype, flat.shape, axes[0])
    chosen = jnp.where(position == first, tangent.reshape(merged), 0)
    return largest(x, axes), jnp.sum(chosen, axis=axes[0])


class GeneralizedMeanPool(nn.Module):
    """`mean(max(x, epsilon) ** p) ** (1 / p)` over height and width, with a learned p.

    Radenovic et al. 2018 (arXiv:1711.02512): p = 1 is the average, a large p the maximum.

    Attributes:
      power: p to start from.
      epsilon: the least value that counts, so that the power is defined.
    """

    power: float = 3.0
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: FeatureMap) -> jax.Array:
        """Returns [b, c] in float32 at least."""
        power = self.param("power", nn.initializers.constant(self.power), (1,), jnp.float32)
        x = jnp.maximum(x.astype(jnp.promote_types(x.dtype, jnp.float32)), self.epsilon)
        mean = jnp.mean(x ** power.reshape(1, 1, 1, 1), axis=(1, 2))
        return mean ** (1 / power).reshape(1, 1)


POOLS: dict[str, Callable[[Any], jax.Array] | type[nn.Module]] = {
    "average": global_average_pool,
    "max": global_max_pool,
    "generalized_mean": GeneralizedMeanPool,
}
