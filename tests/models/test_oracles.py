"""The oracles themselves, where the answer is known without computing it."""

import numpy as np
import oracles
import pytest

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 5, 6, 3))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolution_with_the_identity_kernel_copies_the_image(size):
    kernel = np.zeros((size, size, 3, 3))
    kernel[size // 2, size // 2] = np.eye(3)
    np.testing.assert_array_equal(oracles.conv2d(IMAGES, kernel, padding=size // 2), IMAGES)
    strided = oracles.conv2d(IMAGES, kernel, strides=(2, 3), padding=size // 2)
    np.testing.assert_array_equal(strided, IMAGES[:, ::2, ::3])


def test_convolution_is_not_flipped():
    kernel = np.zeros((1, 3, 3, 3))
    kernel[0, 2] = np.eye(3)
    moved = oracles.conv2d(IMAGES, kernel, padding=(0, 1))
    np.testing.assert_array_equal(moved[:, :, :-1], IMAGES[:, :, 1:])
    np.testing.assert_array_equal(moved[:, :, -1], 0)


def test_convolution_with_a_kernel_of_ones_counts_the_pixels_it_sees():
    counts = oracles.conv2d(
        np.ones((1, 3, 4, 2)), np.ones((3, 3, 2, 1)), np.array([0.5]), padding=1
    )
    seen = [[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]
    np.testing.assert_array_equal(counts[0, :, :, 0], 2 * np.array(seen) + 0.5)


def test_grouped_convolution_is_one_convolution_for_each_group():
    kernel = RNG.normal(size=(3, 3, 1, 6))
    grouped = oracles.conv2d(IMAGES, kernel, padding=1, groups=3)
    for group in range(3):
        alone = oracles.conv2d(
            IMAGES[..., group : group + 1], kernel[..., 2 * group : 2 * group + 2], padding=1
        )
        np.testing.assert_array_equal(grouped[..., 2 * group : 2 * group + 2], alone)


def test_max_pool_ignores_its_border():
    ramp = -1.0 - np.arange(12.0).reshape(1, 3, 4, 1)
    pooled = oracles.max_pool(ramp, 3, strides=2, padding=1)
    np.testing.assert_array_equal(pooled[0, :, :, 0], [[-1, -2], [-5, -6]])


@pytest.mark.parametrize(("unbiased", "var"), [(False, 4.0), (True, 4.0 * 8 / 7)])
def test_batch_norm_in_train_mode_keeps_what_it_saw(unbiased, var):
    images = np.full((2, 2, 2, 1), 3.0)
    images[0] = 7.0
    output, statistics = oracles.batch_norm(
        images, [2.0], [1.0], [0.0], [0.0], train=True, epsilon=0.0, unbiased=unbiased
    )
    np.testing.assert_allclose(output, np.where(images == 7.0, 3.0, -1.0))
    np.testing.assert_allclose(statistics["mean"], [0.1 * 5.0])
    np.testing.assert_allclose(statistics["var"], [0.1 * var])


def test_batch_norm_in_eval_mode_uses_and_keeps_the_running_statistics():
    output, statistics = oracles.batch_norm(
        np.full((1, 2, 2, 1), 8.0), [3.0], [1.0], [2.0], [4.0], train=False, epsilon=0.0
    )
    np.testing.assert_allclose(output, 3 * (8 - 2) / 2 + 1)
    assert (statistics["mean"], statistics["var"]) == ([2.0], [4.0])


def test_group_norm_of_one_channel_a_group_is_batch_norm_of_one_image():
    scale, bias = RNG.normal(size=(2, 3))
    image = IMAGES[:1]
    alone, _ = oracles.batch_norm(image, scale, bias, bias, scale, train=True)
    np.testing.assert_allclose(oracles.group_norm(image, scale, bias, num_groups=3), alone)


def test_cross_entropy_of_equal_logits_is_the_logarithm_of_the_classes():
    for smoothing in (0.0, 0.1):
        loss = oracles.cross_entropy(
            np.full((2, 10), 1e4), np.array([0, 9]), label_smoothing=smoothing
        )
        np.testing.assert_allclose(loss, np.log(10))


def test_cross_entropy_of_a_certain_answer():
    logits = np.array([[50.0, 0.0], [0.0, 50.0]])
    np.testing.assert_allclose(oracles.cross_entropy(logits, np.array([0, 0])), [0, 50], atol=1e-9)
    smoothed = oracles.cross_entropy(logits, np.array([0, 0]), label_smoothing=0.2)
    np.testing.assert_allclose(smoothed, [0.1 * 50, 0.9 * 50])


def test_dense_and_global_average_pool():
    np.testing.assert_allclose(oracles.global_average_pool(np.full((1, 3, 5, 2), 4.0)), [[4, 4]])
    np.testing.assert_allclose(
        oracles.dense(np.ones((1, 2)), [[1, 2], [3, 4]], [10, 20]), [[14, 26]]
    )
