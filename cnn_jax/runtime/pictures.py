"""What was learned, as pictures: scores, filters, feature maps, evidence, curves of runs."""

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.runtime.report import Row
from cnn_jax.storage import write_atomically
from cnn_jax.training.scores import Calibration

NUMBERED_CLASSES = 30
"""Up to this many classes a confusion matrix has its numbers and all names."""

COLUMNS = 8
"""Of a contact sheet."""


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, *, dpi: int = 120) -> Iterator[Any]:
    """Gives a figure of `width` by `height` inches and writes it as a PNG, whole or not at all."""
    from matplotlib.figure import Figure  # where used: it is slow to import

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    contents = io.BytesIO()
    figure.savefig(contents, format="png", dpi=dpi)
    write_atomically(path, contents.getvalue())


def show(axes: Any, image: np.ndarray, **options: Any) -> None:
    """Draws an image [h, w, 1 or 3] or a map [h, w] without ticks."""
    flat = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    axes.imshow(flat, **({"cmap": "gray"} | options))
    axes.set(xticks=[], yticks=[])


def draw_confusion(path: Path, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """Draws the share of each class (a row) that was taken for each class (a column)."""
    classes = len(class_names)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = min(4.5 + 0.5 * classes, 16)
    with picture(path, side, side - 1) as figure:
        axes = figure.subplots()
        drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(drawn, label="share of the class", shrink=0.8)
        axes.set(xlabel="predicted", ylabel="label", title="Confusion: examples by label")
        every = max(1, math.ceil(classes / NUMBERED_CLASSES))
        shown = range(0, classes, every)
        axes.set_xticks(shown, [class_names[number] for number in shown], rotation=90)
        axes.set_yticks(shown, [class_names[number] for number in shown])
        if every > 1:
            return
        for label, predicted in np.argwhere(confusion):
            axes.text(
                predicted,
                label,
                f"{confusion[label, predicted]:,}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if shares[label, predicted] > 0.5 else "black",
            )


def draw_reliability(path: Path, calibration: Calibration) -> None:
    """Draws accuracy against confidence, and how many examples are that confident."""
    edges, count = calibration.edges, calibration.count
    width, middle = np.diff(edges), (edges[:-1] + edges[1:]) / 2
    filled = count > 0
    with picture(path, 5.5, 6.5) as figure:
        axes, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        axes.bar(
            middle[filled],
            calibration.accuracy[filled],
            width[filled],
            color="#4477aa",
            edgecolor="white",
            label="accuracy",
        )
        points = calibration.confidence[filled], calibration.accuracy[filled]
        axes.plot(*points, "o", color="#cc3311", label="at its mean confidence", markersize=4)
        axes.plot([0, 1], [0, 1], "--", color="grey", label="perfect calibration")
        axes.set(
            ylabel="share that is right",
            ylim=(0, 1),
            xlim=(0, 1),
            title=f"Reliability: calibration error {calibration.error:.4f}",
        )
        axes.legend(loc="upper left")
        below.bar(middle, count, width, color="#bbbbbb", edgecolor="white")
        below.set(xlabel="probability of the predicted class", ylabel="examples")


def draw_contact_sheet(path: Path, images: np.ndarray, captions: Sequence[str]) -> None:
    """Draws images [n, h, w, c] in rows, each under its caption; says so where there is none."""
    columns = max(min(COLUMNS, len(images)), 1)
    rows = max(math.ceil(len(images) / columns), 1)
    with picture(path, 1.7 * columns, 2.15 * rows) as figure:
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in cells:
            axes.axis("off")
        for axes, image, caption in zip(cells, images, captions, strict=False):
            show(axes, image)
            axes.set_title(caption, fontsize=7)
        if not len(images):
            cells[0].set_title("none", fontsize=7)


def draw_filters(path: Path, kernel: np.ndarray) -> None:
    """Draws filters [h, w, c, n] about grey, which is 0; in colour for three channels."""
    filters = np.moveaxis(kernel, -1, 0)
    if filters.shape[-1] != 3:
        filters = np.repeat(filters.mean(axis=-1, keepdims=True), 3, axis=-1)
    scale = 2 * max(float(np.abs(filters).max()), 1e-12)
    draw_contact_sheet(path, 0.5 + filters / scale, [str(n) for n in range(len(filters))])


def draw_feature_maps(path: Path, maps: Mapping[str, np.ndarray]) -> None:
    """Draws, of each feature map [h, w, c] by name, the channels that vary most."""
    with picture(path, 1.4 * COLUMNS, 1.75 * len(maps)) as figure:
        rows = figure.subfigures(len(maps), 1, squeeze=False).ravel()
        for row, (name, channels) in zip(rows, maps.items(), strict=True):
            order = np.argsort(-channels.std(axis=(0, 1)), kind="stable")[:COLUMNS]
            row.suptitle(f"{name}: {' x '.join(map(str, channels.shape))}", fontsize=9)
            for axes, number in zip(row.subplots(1, COLUMNS), order, strict=False):
                show(axes, channels[..., number], cmap="viridis")
                axes.set_xlabel(f"channel {number}", fontsize=7)
            for axes in row.axes[len(order) :]:
                axes.axis("off")


@dataclasses.dataclass(frozen=True)
class Field:
    """What the middle of a feature map sees of an image.

    Attributes:
      title: what to write over it.
      box: top, left, height and width in pixels, perhaps beyond the image; None if not known.
      strength: how much each pixel counts, [h, w].
    """

    title: str
    box: tuple[float, float, float, float] | None
    strength: np.ndarray


def draw_receptive_fields(path: Path, image: np.ndarray, fields: Sequence[Field]) -> None:
    """Draws uint8 pixels with the box of each field, and below how much the pixels in it count."""
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    with picture(path, max(2.3 * len(fields), 5), 5.6) as figure:
        figure.suptitle("What the middle of each feature map sees; below, how it weighs the pixels")
        columns = figure.subplots(2, len(fields), squeeze=False).T
        for (above, below), field in zip(columns, fields, strict=True):
            above.set_title(field.title, fontsize=8)
            show(above, image)
            show(below, field.strength, cmap="inferno", vmin=0)
            if field.box is None:
                continue
            top, left, rows, across = field.box
            for axes in (above, below):
                corner = (left - 0.5, top - 0.5)
                axes.add_patch(Rectangle(corner, across, rows, fill=False, ec="#ee7733", lw=2))
                axes.set_xlim(min(left, 0) - 1, max(left + across, width))
                axes.set_ylim(max(top + rows, height), min(top, 0) - 1)


def draw_evidence(
    path: Path, image: np.ndarray, evidence: np.ndarray, caption: str, method: str
) -> None:
    """Draws uint8 pixels, and over them where a method has the evidence [h, w] for a class."""
    height, width = image.shape[:2]
    with picture(path, 8.5, 4.2) as figure:
        figure.suptitle(caption)
        left, right = figure.subplots(1, 2)
        show(left, image)
        show(right, image)
        whole = (-0.5, width - 0.5, height - 0.5, -0.5)
        smooth = {"interpolation": "bilinear", "extent": whole, "alpha": 0.55}
        drawn = right.imshow(evidence, cmap="inferno", vmin=0, **smooth)
        figure.colorbar(drawn, label=method, shrink=0.8)


def smoothed(values: Sequence[float], weight: float) -> np.ndarray:
    """Returns the exponential moving average, free of the bias towards its start.

    `s_t = weight * s_(t-1) + (1 - weight) * x_t` from 0, divided by `1 - weight**t`, as Adam
    corrects its moments (arXiv:1412.6980); a weight of 0 returns the values.
    """
    means, state = [], 0.0
    for number, value in enumerate(values, start=1):
        state = weight * state + (1 - weight) * value
        means.append(state / (1 - weight**number))
    return np.array(means)


CURVES = {  # by title: unit of the axis, and the names of the rows with their style
    "loss": ("cross-entropy (nats)", {"train/loss": "-", "test/loss": "--"}),
    "accuracy": ("share of images", {"train/accuracy": "-", "test/accuracy": "--"}),
    "learning rate": ("", {"learning_rate": "-"}),
    "speed": ("images/s", {"images_per_second": "-"}),
}
SMOOTHED = {"train/loss", "train/accuracy", "images_per_second"}


def draw_runs(path: Path, runs: Mapping[str, Sequence[Row]], *, smooth: float) -> None:
    """Draws the metrics of several runs over their epochs, raw and smoothed with that weight."""
    with picture(path, 13, 9) as figure:
        colours = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
        for axes, (title, (unit, names)) in zip(
            figure.subplots(2, 2).ravel(), CURVES.items(), strict=True
        ):
            for number, (run, rows) in enumerate(runs.items()):
                colour = colours[number % len(colours)]
                for name, style in names.items():
                    points = [(row["epoch"], row[name]) for row in rows if name in row]
                    if not points:
                        continue
                    epochs, values = zip(*points, strict=True)
                    label = run if len(names) == 1 else f"{run}: {name.partition('/')[0]}"
                    drawn: dict[str, Any] = {"color": colour, "linestyle": style}
                    if name in SMOOTHED and smooth:
                        axes.plot(epochs, values, color=colour, alpha=0.3, linewidth=0.8)
                        values = smoothed(values, smooth)
                    elif name not in SMOOTHED and len(points) < 40:
                        drawn["marker"] = "." if style == "-" else "o"
                        drawn["markersize"] = 4
                    axes.plot(epochs, values, label=label, **drawn)
            axes.set(title=title, xlabel="epoch", ylabel=unit)
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
