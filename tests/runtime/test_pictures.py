import numpy as np
import pytest
from PIL import Image

from cnn_jax.runtime.pictures import draw_confusion, draw_filters, smoothed


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
