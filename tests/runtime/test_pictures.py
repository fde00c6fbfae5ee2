import contextlib
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cnn_jax.runtime import pictures
from cnn_jax.runtime.pictures import (
    Field,
    draw_confusion,
    draw_contact_sheet,
    draw_evidence,
    draw_feature_maps,
    draw_filters,
    draw_receptive_fields,
    draw_reliability,
    draw_runs,
    smoothed,
)
from cnn_jax.training.scores import Calibration

NOWHERE = Path("never-written.png")


@pytest.fixture
def axes_of(monkeypatch):
    """Returns a function that draws, and gives the axes in place of a file."""
    figures = []

    @contextlib.contextmanager
    def keep(path, width, height):
        figures.append(Figure(figsize=(width, height)))
        yield figures[-1]

    monkeypatch.setattr(pictures, "picture", keep)

    def draw(function, *arguments, **options):
        function(NOWHERE, *arguments, **options)
        return figures[-1].get_axes()

    return draw


def test_the_smoothed_line_is_a_weighted_mean_of_what_came_before():
    values = np.array([3.0, -1.0, 4.0, 1.0, -5.0])
    for weight in (0.0, 0.6, 0.95):
        expected = [
            np.average(values[: n + 1], weights=weight ** np.arange(n, -1, -1)) for n in range(5)
        ]
        np.testing.assert_allclose(smoothed(values.tolist(), weight), expected, rtol=1e-12)


def test_a_filter_of_zeros_is_grey_beside_others(tmp_path):
    kernel = np.zeros((3, 3, 1, 2))
    kernel[..., 1] = np.linspace(-1, 1, 9).reshape(3, 3)[..., None]
    draw_filters(tmp_path / "f.png", kernel)
    with Image.open(tmp_path / "f.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    middle = pixels.shape[0] // 2
    grey, whole = pixels[middle, pixels.shape[1] // 4], pixels[:, pixels.shape[1] // 2 :]
    assert set(grey) <= {127, 128}
    assert whole.min() == 0


@pytest.mark.parametrize("classes", [3, 100])
def test_a_confusion_of_few_and_of_many_classes_is_drawn(classes, tmp_path):
    path = tmp_path / "c.png"
    draw_confusion(path, np.eye(classes, dtype=int), [f"class {n}" for n in range(classes)])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_confusion_has_a_row_for_each_label(axes_of):
    confusion = np.array([[6, 2, 0], [0, 3, 0], [1, 0, 0]])
    axes, _ = axes_of(draw_confusion, confusion, ["a", "b", "c"])
    shares = [[0.75, 0.25, 0], [0, 1, 0], [1, 0, 0]]
    np.testing.assert_array_equal(axes.images[0].get_array(), shares)
    assert axes.images[0].origin == "upper"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "label")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b", "c"]
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert numbers == {(0, 0): "6", (1, 0): "2", (1, 1): "3", (0, 2): "1"}  # (column, row)


def test_a_reliability_diagram_has_accuracy_above_confidence(axes_of):
    nan = np.nan
    calibration = Calibration(
        error=0.25,
        edges=np.array([0.0, 0.4, 0.6, 1.0]),
        count=np.array([4, 0, 6]),
        accuracy=np.array([0.5, nan, 0.9]),
        confidence=np.array([0.3, nan, 0.7]),
    )
    above, below = axes_of(draw_reliability, calibration)
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in above.patches]
    np.testing.assert_allclose(bars, [(0, 0.4, 0.5), (0.6, 0.4, 0.9)], atol=1e-12)
    points, diagonal = above.lines
    np.testing.assert_array_equal(points.get_xydata(), [[0.3, 0.5], [0.7, 0.9]])
    np.testing.assert_array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])
    assert [bar.get_height() for bar in below.patches] == [4, 0, 6]
    assert above.get_title() == "Reliability: calibration error 0.2500"


def test_each_image_of_a_contact_sheet_is_under_its_caption(axes_of):
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 1), np.uint8)
    cells = axes_of(draw_contact_sheet, images, [f"image {n}" for n in range(10)])
    assert len(cells) == 16  # two rows of eight
    for number, axes in enumerate(cells[:10]):
        assert axes.get_title() == f"image {number}"
        assert set(np.unique(axes.images[0].get_array())) == {number}
    assert not any(axes.images for axes in cells[10:])
    (nothing,) = axes_of(draw_contact_sheet, images[:0], [])
    assert (nothing.get_title(), nothing.images[:]) == ("none", [])


def test_feature_maps_are_the_channels_that_vary_most(axes_of):
    pattern = np.arange(16.0).reshape(4, 4)
    strength = np.array([3, 1, 9, 2, 8, 4, 7, 5, 6, 0])
    axes = axes_of(draw_feature_maps, {"stage 1": pattern[..., None] * strength})
    assert len(axes) == 8
    for place, channel in zip(axes, np.argsort(-strength), strict=False):
        assert place.get_xlabel() == f"channel {channel}"
        np.testing.assert_array_equal(place.images[0].get_array(), pattern * strength[channel])


def test_the_box_of_a_field_is_drawn_about_its_pixels(axes_of):
    image, strength = np.zeros((20, 30, 1), np.uint8), np.zeros((20, 30))
    strength[2:7, 11:18] = 1  # 5 rows from 2 on, 7 columns from 11 on
    fields = [Field("inside", (2, 11, 5, 7), strength), Field("beyond", (-3, 8, 40, 9), strength)]
    fields.append(Field("unknown", None, strength))
    axes = axes_of(draw_receptive_fields, image, fields)
    above, below = axes[:3], axes[3:]
    assert [each.get_title() for each in above] == ["inside", "beyond", "unknown"]
    for upper, lower in zip(above, below, strict=True):
        assert upper.images[0].get_array().shape == image.shape[:2]
        np.testing.assert_array_equal(lower.images[0].get_array(), strength)
    for place in (above[0], below[0]):
        (box,) = place.patches
        (left, top), (right, bottom) = box.get_bbox().get_points()
        assert (left, top, right, bottom) == (10.5, 1.5, 17.5, 6.5)  # pixel n: n - 0.5 to n + 0.5
    for place in (above[1], below[1]):  # all of the box and of the image is in sight, row 0 on top
        left, right = place.get_xlim()
        bottom, top = place.get_ylim()
        assert top <= -3.5
        assert bottom >= 36.5
        assert left <= -0.5
        assert right >= 29.5
    assert not above[2].patches[:]


def test_evidence_lies_over_the_whole_image(axes_of):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    evidence = np.zeros((4, 6))
    evidence[0, 5] = 2  # of the upper right
    left, right, *_ = axes_of(draw_evidence, image, evidence, "Bag", "Grad-CAM")
    np.testing.assert_array_equal(left.images[0].get_array(), image)
    below, over = right.images
    np.testing.assert_array_equal(below.get_array(), image)
    np.testing.assert_array_equal(over.get_array(), evidence)
    assert over.get_extent() == below.get_extent() == [-0.5, 29.5, 19.5, -0.5]
    assert over.origin == "upper"  # with this extent the first row is on top
    assert over.get_clim()[0] == 0
    assert 0 < over.get_alpha() < 1
    assert right.get_xlim() == left.get_xlim()
    assert right.get_ylim() == left.get_ylim()


def rows_of_a_run():
    """As a trainer writes them: ten of training, two of them with a test beside it."""
    rng = np.random.default_rng(0)
    names = ("train/loss", "train/accuracy", "learning_rate", "images_per_second")
    rows = [
        {"epoch": n / 4, **dict(zip(names, rng.random(4).tolist(), strict=True))} for n in range(10)
    ]
    for row in rows[4::5]:
        row |= {"test/loss": rng.random(), "test/accuracy": rng.random()}
    return rows


PANELS = {
    "loss": ("train/loss", "test/loss"),
    "accuracy": ("train/accuracy", "test/accuracy"),
    "learning rate": ("learning_rate",),
    "speed": ("images_per_second",),
}


@pytest.mark.parametrize("smooth", [0.0, 0.6])
def test_a_panel_has_the_values_of_each_run_raw_and_smoothed(smooth, axes_of):
    runs = {"a": rows_of_a_run(), "b": rows_of_a_run()[:7]}
    panels = axes_of(draw_runs, runs, smooth=smooth)
    assert [axes.get_title() for axes in panels] == list(PANELS)
    for axes, names in zip(panels, PANELS.values(), strict=True):
        expected = []
        for rows in runs.values():
            for name in names:
                points = np.array([(row["epoch"], row[name]) for row in rows if name in row])
                expected.append(points)
                if smooth and not name.startswith("test/") and name != "learning_rate":
                    mean = [
                        np.average(points[: n + 1, 1], weights=smooth ** np.arange(n, -1, -1))
                        for n in range(len(points))
                    ]
                    expected.append(np.stack([points[:, 0], mean], axis=1))
        assert len(axes.lines) == len(expected)
        for line, points in zip(axes.lines, expected, strict=True):
            np.testing.assert_allclose(line.get_xydata(), points)
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        kinds = [name.partition("/")[0] for name in names]
        assert labels == [
            run if len(names) == 1 else f"{run}: {kind}" for run in runs for kind in kinds
        ]
        pale = [line.get_alpha() is not None for line in axes.lines]
        assert sum(pale) == (2 if smooth and names[0] != "learning_rate" else 0)
