"""Draws the pictures of the concept pages: `python docs/make_pictures.py [DIRECTORY]`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from cnn_jax import ConvBlock, InceptionBlock, ResidualBlock, create_model, make_train_step
from cnn_jax.data.builders.fashion_mnist import read_idx, read_subset
from cnn_jax.models.geometry import layers
from cnn_jax.models.initialization import TORCH
from cnn_jax.models.normalization import no_norm
from cnn_jax.training.state import init_state

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

BLUE, ORANGE, GREY = "#1f77b4", "#d95f02", "#888888"
SOBEL = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4


def photographs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images of Fashion-MNIST in [0, 1], [n, 28, 28, 1], and their labels."""
    files = read_subset()
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
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


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


def strides() -> Any:
    """Returns the figure of windows over a padded image."""
    figure, axes = plt.subplots(figsize=(3.4, 3.4))
    for row in range(7):
        for column in range(7):
            inside = 0 < row < 6 and 0 < column < 6
            axes.add_patch(
                Rectangle((column, row), 1, 1, facecolor="#dbe9f6" if inside else "white", ec=GREY)
            )
            if not inside:
                axes.text(column + 0.5, row + 0.5, "0", ha="center", va="center", color=GREY)
    for row in (0, 2, 4):
        for column in (0, 2, 4):
            axes.add_patch(Rectangle((column + 1.3, row + 1.3), 0.4, 0.4, color=BLUE))
    for column, colour in ((0, ORANGE), (2, "#7570b3")):
        axes.add_patch(Rectangle((column + 0.06, 0.06), 2.88, 2.88, fill=False, ec=colour, lw=2.5))
    axes.set_xlim(-0.1, 7.1)
    axes.set_ylim(7.1, -0.1)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure


def pooling() -> Any:
    """Returns the figure of a map and its pools."""
    x = np.array([[1, 3, 2, 0], [4, 2, 1, 1], [0, 1, 5, 6], [2, 1, 7, 2]])
    windows = x.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(2, 2, 4)
    panels = {
        "map": x,
        "max, 2 x 2": windows.max(axis=-1),
        "average, 2 x 2": windows.mean(axis=-1),
        "global average": x.mean(keepdims=True),
    }
    figure, axes = plt.subplots(1, 4, figsize=(8, 2.2), width_ratios=[4, 3, 3, 2])
    for place, (name, values) in zip(axes, panels.items(), strict=True):
        place.imshow(values, cmap="Blues", vmin=0, vmax=10)
        for (row, column), value in np.ndenumerate(values):
            place.text(column, row, f"{value:g}", ha="center", va="center")
        place.set_title(name, fontsize=10)
        place.set_xticks([])
        place.set_yticks([])
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

        mean = jax.jit(jax.vmap(seen))(jax.random.split(jax.random.key(1), 64)).mean(axis=0)
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
        place.set_title(f"{depth} x (3 x 3): {side} pixels", fontsize=10)
        place.set_xticks([])
        place.set_yticks([])
    return figure


class Blocks(nn.Module):
    """Residual blocks, or the same convolutions without the addition."""

    depth: int
    residual: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.depth):
            if self.residual:
                x = ResidualBlock(8, norm=no_norm, conv=TORCH.conv)(x, train=False)
            else:
                for _ in range(2):
                    x = ConvBlock(8, norm=no_norm, conv=TORCH.conv)(x, train=False)
        return x


def residual() -> Any:
    """Returns the figure of the gradient at the input against the depth."""
    depths = (1, 2, 4, 8, 16)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 8))
    figure, axes = plt.subplots(figsize=(5, 3))
    for adds, name, colour in ((True, "Y = F(X) + X", BLUE), (False, "Y = F(X)", ORANGE)):
        norms = []
        for depth in depths:
            model = Blocks(depth, adds)

            def norm(key: jax.Array, model: Blocks = model) -> jax.Array:
                variables = model.init(key, x)
                y, pull = jax.vjp(lambda x: model.apply(variables, x), x)
                return jnp.linalg.norm(pull(jnp.ones_like(y) / y.size)[0])

            norms.append(
                jnp.median(jax.jit(jax.vmap(norm))(jax.random.split(jax.random.key(1), 9)))
            )
        axes.semilogy(depths, np.asarray(norms) / norms[0], "o-", label=name, color=colour)
    axes.set_xlabel("blocks")
    axes.set_ylabel("gradient at the input,\nrelative to one block")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def inception() -> Any:
    """Returns the figure of the multiply-adds of an inception block's branches."""
    rows = {row.path: row for row in layers(InceptionBlock(64, 96, 128, 16, 32, 32), (28, 28, 192))}
    million = 1e6
    with_reduction = [
        sum(rows[f"{name}/conv"].multiply_adds or 0 for name in names) / million
        for names in (
            ("branch1",),
            ("branch2_reduce", "branch2"),
            ("branch3_reduce", "branch3"),
            ("branch4",),
        )
    ]
    pixels = 28 * 28
    without = [
        with_reduction[0],
        pixels * 9 * 192 * 128 / million,
        pixels * 25 * 192 * 32 / million,
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


def attention() -> Any:
    """Returns the figure of the spatial gates that a small network has learned."""
    images, labels = photographs(64 * 150)
    model = create_model("cbam_resnet_mini", num_classes=10)
    tx = optax.sgd(0.05, momentum=0.9)
    state = jax.jit(lambda key: init_state(model, tx, jnp.zeros((64, 28, 28, 1)), key))(
        jax.random.key(0)
    )
    step = jax.jit(make_train_step(model, tx))
    for batch in zip(images.reshape(150, 64, 28, 28, 1), labels.reshape(150, 64), strict=True):
        state, _ = step(state, dict(zip(("image", "label"), batch, strict=True)), jax.random.key(1))
    shown = np.stack([images[np.argmax(labels == label)] for label in (0, 1, 5, 7, 8, 9)])
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    _, kept = model.apply(variables, shown, train=False, capture_intermediates=True)
    gates = kept["intermediates"]["stage1_block1"]["attention"]["spatial"]["__call__"][0]
    figure, axes = plt.subplots(2, len(shown), figsize=(8, 2.9))
    for column, (image, gate) in enumerate(zip(shown, np.asarray(gates), strict=True)):
        show(axes[0, column], image[:, :, 0], "image")
        show(axes[1, column], gate[:, :, 0], f"{gate.min():.2f} to {gate.max():.2f}")
    return figure


PICTURES: dict[str, Callable[[], Any]] = {
    "equivariance": equivariance,
    "kernels": kernels,
    "strides": strides,
    "pooling": pooling,
    "receptive_field": receptive_field,
    "residual": residual,
    "inception": inception,
    "attention": attention,
}


def main(directory: Path) -> None:
    """Writes every picture as PNG."""
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(
            directory / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None}
        )
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("pictures"))
