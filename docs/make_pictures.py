"""Draws the pictures of the concept pages: `python docs/make_pictures.py [DIRECTORY]`."""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from cnn_jax import (
    BottleneckBlock,
    ConvBlock,
    InceptionBlock,
    ResidualBlock,
    create_model,
    init_state,
    make_train_step,
)
from cnn_jax.data.builders.fashion_mnist import read_idx, read_subset
from cnn_jax.data.datasets import FASHION_MNIST_CLASSES
from cnn_jax.models.geometry import layers
from cnn_jax.models.initialization import TORCH
from cnn_jax.models.normalization import no_norm
from cnn_jax.models.pooling import average_pool, global_average_pool, max_pool
from cnn_jax.runtime.compiler import compile_program
from cnn_jax.training.miscompile import MiscompileWarning

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

BLUE, ORANGE, PURPLE, GREY = "#1f77b4", "#d95f02", "#7570b3", "#888888"
SOBEL = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4


subset = cache(read_subset)  # unpacked once for all pictures


def photographs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images of Fashion-MNIST in [0, 1], [n, 28, 28, 1], and their labels."""
    files = subset()
    images = read_idx(files["train-images-idx3-ubyte"])[:count, :, :, None] / 255
    labels = read_idx(files["train-labels-idx1-ubyte"])[:count]
    return images.astype(np.float32), labels.astype(np.int32)


def boot() -> np.ndarray:
    """Returns the first ankle boot, [28, 28]."""
    images, labels = photographs(200)
    return images[np.argmax(labels == 9), :, :, 0]


def filtered(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Returns the map of one kernel, through a ConvBlock."""
    layer = ConvBlock(1, kernel_size=3, norm=no_norm, act=None)
    weights = {"kernel": jnp.asarray(kernel)[:, :, None, None], "bias": jnp.zeros(1)}
    y = layer.apply(
        {"params": {"conv": weights}}, jnp.asarray(image)[None, :, :, None], train=False
    )
    return np.asarray(y)[0, :, :, 0]


def show(axes: Any, values: np.ndarray, title: str, *, signed: bool = False) -> None:
    """Draws an image, or a map whose zero is white."""
    limit = np.abs(values).max()
    colours = {"cmap": "RdBu", "vmin": -limit, "vmax": limit} if signed else {"cmap": "gray"}
    axes.imshow(values, **colours)
    without_ticks(axes, title)


def without_ticks(axes: Any, title: str) -> None:
    """Gives a panel its title and takes away its scales."""
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def jacobian(layer: nn.Module, shape: tuple[int, ...], **arguments: Any) -> np.ndarray:
    """Returns the derivative of every output of a new layer by every input, without the batch."""
    x = jnp.zeros(shape)

    def derivative(key: jax.Array) -> jax.Array:
        variables = layer.init(key, x[None], **arguments)
        return jax.jacobian(lambda x: layer.apply(variables, x[None], **arguments)[0])(x)

    return np.asarray(jax.jit(derivative)(jax.random.key(0)))


def local() -> Any:
    """Returns the figure of the pixels that outputs of two layers depend on."""
    convolution = jacobian(
        ConvBlock(1, kernel_size=3, norm=no_norm, act=None), (9, 9, 1), train=False
    )
    dense = jacobian(Flat(nn.Dense(81)), (9, 9, 1)).reshape(9, 9, 9, 9)
    panels = {
        "convolution, $Y_{4,4}$": convolution[4, 4, 0, :, :, 0],
        "convolution, $Y_{1,7}$": convolution[1, 7, 0, :, :, 0],
        "dense, $Y_{4,4}$": dense[4, 4],
    }
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.6))
    for place, (name, derivative) in zip(axes, panels.items(), strict=True):
        show(place, derivative, name, signed=True)
        place.set_xticks(np.arange(-0.5, 9), labels=[])
        place.set_yticks(np.arange(-0.5, 9), labels=[])
        place.tick_params(length=0)
        place.grid(color=GREY, lw=0.3)
    return figure


class Flat(nn.Module):
    """A layer on the pixels as one vector."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x.reshape(len(x), -1))


def sharing() -> Any:
    """Returns the figure of the matrices that three layers multiply the pixels by."""
    side = 6
    shape, pixels = (side, side, 1), side * side
    matrices = {
        "dense": jacobian(Flat(nn.Dense(pixels)), shape),
        "local": jacobian(nn.ConvLocal(1, (3, 3), padding=1), shape),
        "convolution": jacobian(ConvBlock(1, norm=no_norm, act=None), shape, train=False),
    }
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.7))
    for place, (name, matrix) in zip(axes, matrices.items(), strict=True):
        matrix = matrix.reshape(pixels, pixels)
        different = len(np.unique(matrix[matrix != 0]))
        show(place, matrix, f"{name}: {different:,} weights", signed=True)
    axes[0].set_ylabel("outputs")
    axes[1].set_xlabel("pixels")
    return figure


def equivariance() -> Any:
    """Returns the figure of a moved image and its moved map."""
    image = np.pad(boot(), 6)
    moved = np.roll(image, (4, 6), axis=(0, 1))
    figure, axes = plt.subplots(1, 4, figsize=(8, 2.3))
    for pair, picture, name in ((axes[:2], image, "X"), (axes[2:], moved, "T X")):
        edges = filtered(picture, SOBEL)
        show(pair[0], picture, name)
        show(pair[1], edges, f"f({name}), max {edges.max():.2f}", signed=True)
    return figure


def kernels() -> Any:
    """Returns the figure of one image under four kernels."""
    chosen = {
        "vertical edges": SOBEL,
        "horizontal edges": SOBEL.T,
        "blur": np.outer([1, 2, 1], [1, 2, 1]) / 16,
        "spots": np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]]) / 4,
    }
    figure, axes = plt.subplots(1, 5, figsize=(8, 2.1))
    show(axes[0], boot(), "image")
    for place, (name, kernel) in zip(axes[1:], chosen.items(), strict=True):
        show(place, filtered(boot(), kernel), name, signed=name != "blur")
    return figure


def channels() -> Any:
    """Returns the figure of the input channels that each output channel depends on."""
    chosen = {
        "3 x 3": {},
        "1 x 1": {"kernel_size": 1, "padding": 0},
        "3 x 3, 4 groups": {"groups": 4},
        "3 x 3, depthwise": {"groups": 8},
    }
    figure, axes = plt.subplots(1, 4, figsize=(8, 3.6))
    for place, (name, arguments) in zip(axes, chosen.items(), strict=True):
        layer = ConvBlock(16, norm=no_norm, act=None, **arguments)
        (row,) = layers(layer, (5, 5, 8))
        middle = jacobian(layer, (5, 5, 8), train=False)[2, 2]
        seen = np.abs(middle).sum(axis=(1, 2))
        place.imshow(seen > 0, cmap="Blues", vmin=0, vmax=2)
        without_ticks(place, f"{name}\n{row.parameters - 16:,} weights")
        place.set_xticks(np.arange(-0.5, 8), labels=[])
        place.set_yticks(np.arange(-0.5, 16), labels=[])
        place.tick_params(length=0)
        place.grid(color="white", lw=1)
        place.set_xlabel("8 inputs")
    axes[0].set_ylabel("16 outputs")
    return figure


def strides() -> Any:
    """Returns the figure of windows over a padded image, and of how much of it each has seen."""
    ones = {"params": {"conv": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}}

    def windows(image: jax.Array, padding: int) -> jax.Array:
        layer = ConvBlock(1, strides=2, padding=padding, norm=no_norm, act=None)
        return layer.apply(ones, image[None, :, :, None], train=False)[0, :, :, 0]

    image = jnp.ones((5, 5))
    padded = jnp.pad(image, 1)
    seen = np.asarray(jax.jacobian(windows)(padded, 0))  # of the zeros too
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.4), width_ratios=[7, 3.6])
    for (row, column), pixel in np.ndenumerate(padded):
        face = "#dbe9f6" if pixel else "white"
        left.add_patch(Rectangle((column, row), 1, 1, facecolor=face, ec=GREY))
        if not pixel:
            left.text(column + 0.5, row + 0.5, "0", ha="center", va="center", color=GREY)
    for place in np.ndindex(seen.shape[:2]):
        rows, columns = np.nonzero(seen[place])
        middle = columns.mean() + 0.3, rows.mean() + 0.3
        left.add_patch(Rectangle(middle, 0.4, 0.4, color=BLUE))
    for place, colour in (((0, 0), ORANGE), ((0, 1), PURPLE)):
        rows, columns = np.nonzero(seen[place])
        frame = {"fill": False, "ec": colour, "lw": 2.5}
        side = np.ptp(rows) + 0.88
        left.add_patch(Rectangle((columns.min() + 0.06, rows.min() + 0.06), side, side, **frame))
        right.add_patch(Rectangle((place[1] + 0.04, place[0] + 0.04), 0.92, 0.92, **frame))
    for (row, column), value in np.ndenumerate(windows(image, 1)):
        right.add_patch(Rectangle((column, row), 1, 1, facecolor="#dbe9f6", ec=GREY, zorder=0))
        right.text(column + 0.5, row + 0.5, f"{value:g}", ha="center", va="center")
    for place, size, title in ((left, 7, "image"), (right, 3, "output")):
        place.set_xlim(-0.1, size + 0.1)
        place.set_ylim(size + 0.1, -0.1)
        place.set_aspect("equal")
        place.axis("off")
        place.set_title(title, fontsize=10)
    return figure


def pooling() -> Any:
    """Returns the figure of a map and its pools."""
    x = jnp.array([[1, 3, 2, 0], [4, 2, 1, 1], [0, 1, 5, 6], [2, 1, 7, 2]], jnp.float32)
    x = x[None, :, :, None]
    panels = {
        "map": x,
        "max, 2 x 2": max_pool(x, window=2, strides=2),
        "average, 2 x 2": average_pool(x, window=2, strides=2),
        "global average": global_average_pool(x)[:, None, None, :],
    }
    figure, axes = plt.subplots(1, 4, figsize=(8, 2.2), width_ratios=[4, 3, 3, 2])
    for place, (name, values) in zip(axes, panels.items(), strict=True):
        place.imshow(values[0, :, :, 0], cmap="Blues", vmin=0, vmax=10)
        for (row, column), value in np.ndenumerate(values[0, :, :, 0]):
            place.text(column, row, f"{value:g}", ha="center", va="center")
        without_ticks(place, name)
    axes[0].axhline(1.5, color=ORANGE)
    axes[0].axvline(1.5, color=ORANGE)
    return figure


class Stack(nn.Module):
    """Convolutions of 3 x 3, one after the other."""

    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.depth):
            x = ConvBlock(8, norm=no_norm)(x, train=False)
        return x


def receptive_field() -> Any:
    """Returns the figure of gradients with respect to the image behind 1, 2 and 4 layers."""
    x = jax.random.normal(jax.random.key(0), (1, 15, 15, 1))
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.6))
    for place, depth in zip(axes, (1, 2, 4), strict=True):
        stack = Stack(depth)

        def seen(key: jax.Array, stack: Stack = stack) -> jax.Array:
            variables = stack.init(key, x)
            gradient = jax.grad(lambda x: stack.apply(variables, x)[0, 7, 7].sum())(x)
            return jnp.abs(gradient[0, :, :, 0])

        keys = jax.random.split(jax.random.key(1), 64)
        mean = np.mean([*map(jax.jit(seen), keys)], axis=0)
        side = 2 * depth + 1
        place.imshow(mean, cmap="Blues")
        place.add_patch(
            Rectangle(
                (7.5 - side / 2 - 0.5, 7.5 - side / 2 - 0.5),
                side,
                side,
                fill=False,
                ec=ORANGE,
                lw=2,
            )
        )
        without_ticks(place, f"{depth} x (3 x 3): {side} pixels")
    return figure


class Plain(nn.Module):
    """The convolutions of a residual block without the addition."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for _ in range(2):
            x = ConvBlock(self.features, norm=no_norm, conv=TORCH.conv)(x, train=train)
        return x


def gradient_norms(block: nn.Module, depths: Sequence[int]) -> list[float]:
    """Returns the norm of the gradient at the input of so many blocks, the median of nine."""
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 8))
    init = jax.jit(lambda key: block.init(key, x, train=False))
    forward = jax.jit(lambda variables, x: block.apply(variables, x, train=False))
    back = jax.jit(lambda variables, x, y: jax.vjp(partial(forward, variables), x)[1](y)[0])

    def norm(key: jax.Array, depth: int) -> float:
        inputs, stack = [x], [init(key) for key in jax.random.split(key, depth)]
        for variables in stack:
            inputs.append(forward(variables, inputs[-1]))
        gradient = jnp.ones_like(x) / x.size
        for variables, seen in zip(reversed(stack), reversed(inputs[:-1]), strict=True):
            gradient = back(variables, seen, gradient)
        return float(jnp.linalg.norm(gradient))

    keys = jax.random.split(jax.random.key(1), 9)
    return [float(np.median([norm(key, depth) for key in keys])) for depth in depths]


def residual() -> Any:
    """Returns the figure of the gradient at the input against the depth."""
    depths = (1, 2, 4, 8, 16)
    figure, axes = plt.subplots(figsize=(5, 3))
    blocks = (
        (ResidualBlock(8, norm=no_norm, conv=TORCH.conv), "Y = ReLU(F(X) + X)", BLUE),
        (Plain(8), "Y = F(X)", ORANGE),
    )
    for block, name, colour in blocks:
        norms = np.array(gradient_norms(block, depths))
        axes.semilogy(depths, norms / norms[0], "o-", label=name, color=colour)
    axes.set_xlabel("blocks")
    axes.set_ylabel("gradient at the input,\nrelative to one block")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def bottleneck() -> Any:
    """Returns the figure of the weights of two blocks between 256 channels."""
    figure, axes = plt.subplots(figsize=(5.5, 3))
    blocks = (
        (ResidualBlock(256, use_bias=False), -0.2, "two of 3 x 3", ORANGE),
        (BottleneckBlock(64), 0.2, "1 x 1, 3 x 3, 1 x 1", BLUE),
    )
    for block, shift, name, colour in blocks:
        rows = [row for row in layers(block, (8, 8, 256)) if row.path.endswith("/conv")]
        weights = [row.parameters / 1000 for row in rows]
        drawn = axes.bar(np.arange(len(rows)) + shift, weights, 0.4, label=name, color=colour)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(3), ["first", "second", "third"])
    axes.set_xlabel("convolution of the block")
    axes.set_ylabel("thousand weights")
    axes.margins(y=0.1)
    axes.legend()
    return figure


def inception() -> Any:
    """Returns the figure of the multiply-adds of an inception block's branches."""

    def millions(module: nn.Module, *names: str) -> float:
        rows = layers(module, (28, 28, 192))
        return sum(row.multiply_adds or 0 for row in rows if row.path in names) / 1e6

    block = InceptionBlock(64, 96, 128, 16, 32, 32)
    branches = (
        ("branch1/conv",),
        ("branch2_reduce/conv", "branch2/conv"),
        ("branch3_reduce/conv", "branch3/conv"),
        ("branch4/conv",),
    )
    with_reduction = [millions(block, *names) for names in branches]
    without = [
        with_reduction[0],
        millions(ConvBlock(128, kernel_size=3, padding=1), "conv"),
        millions(ConvBlock(32, kernel_size=5, padding=2), "conv"),
        with_reduction[3],
    ]
    places = np.arange(4)
    figure, axes = plt.subplots(figsize=(5.5, 3))
    bars = (
        (without, -0.2, "large kernels alone", ORANGE),
        (with_reduction, 0.2, "behind a 1 x 1", BLUE),
    )
    for values, shift, name, colour in bars:
        drawn = axes.bar(places + shift, values, 0.4, label=name, color=colour)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8)
    axes.set_xticks(places, ["1 x 1", "3 x 3", "5 x 5", "pool, 1 x 1"])
    axes.set_ylabel("million multiply-adds")
    axes.margins(y=0.1)
    axes.legend()
    return figure


def learned(
    name: str, module: tuple[str, ...], **arguments: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns images, their labels and what a module makes of them after 150 steps of training."""
    steps, batch_size = 150, 32
    images, labels = photographs(steps * batch_size)
    model = create_model(name, num_classes=10, **arguments)
    tx, key = optax.sgd(0.05, momentum=0.9), jax.random.key(0)
    with warnings.catch_warnings(action="ignore", category=MiscompileWarning):
        state = jax.jit(lambda key: init_state(model, tx, images[:1], key))(key)
    batches = [
        {"image": images[start : start + batch_size], "label": labels[start : start + batch_size]}
        for start in range(0, len(images), batch_size)
    ]
    step = compile_program(jax.jit(make_train_step(model, tx)).lower(state, batches[0], key))
    for batch in batches:
        state, _ = step(state, batch, key)
    images, labels = images[:500], labels[:500]
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    @jax.jit
    def outputs(images: jax.Array) -> Any:
        return model.apply(variables, images, train=False, capture_intermediates=True)[1]

    found = outputs(images)["intermediates"]
    for part in module:
        found = found[part]
    return images, labels, np.asarray(found["__call__"][0])


def squeeze_excite() -> Any:
    """Returns the figure of the channels' gates that a small network has learned, by class."""
    _, labels, logits = learned(
        "seresnet_mini",
        ("stage2_block1", "attention", "expand"),
        stem="medium",
        stage_sizes=(1, 1),
    )
    gates = np.asarray(jax.nn.sigmoid(logits))
    means = np.stack([gates[labels == label].mean(axis=0) for label in range(10)])
    figure, axes = plt.subplots(figsize=(6, 3))
    drawn = axes.imshow(means, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(10), FASHION_MNIST_CLASSES, fontsize=9)
    axes.set_xticks([])
    axes.set_xlabel(f"{means.shape[1]} channels")
    figure.colorbar(drawn, label="gate")
    return figure


def attention() -> Any:
    """Returns the figure of the spatial gates that a small network has learned."""
    images, labels, gates = learned(
        "cbam_resnet_mini",
        ("stage1_block1", "attention", "spatial"),
        width=8,
        stage_sizes=(1,),
    )
    shown = [int(np.argmax(labels == label)) for label in (0, 1, 5, 7, 8, 9)]
    figure, axes = plt.subplots(2, len(shown), figsize=(8, 2.9))
    for column, number in enumerate(shown):
        gate = gates[number, :, :, 0]
        show(axes[0, column], images[number, :, :, 0], "image")
        show(axes[1, column], gate, f"{gate.min():.2f} to {gate.max():.2f}")
    return figure


PICTURES: dict[str, Callable[[], Any]] = {
    "local": local,
    "sharing": sharing,
    "equivariance": equivariance,
    "kernels": kernels,
    "channels": channels,
    "strides": strides,
    "pooling": pooling,
    "receptive_field": receptive_field,
    "residual": residual,
    "bottleneck": bottleneck,
    "inception": inception,
    "squeeze_excite": squeeze_excite,
    "attention": attention,
}


def main(directory: Path) -> None:
    """Writes every picture as PNG, which says what version of matplotlib drew it."""
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(directory / f"{name}.png", dpi=110, bbox_inches="tight")
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("pictures"))
