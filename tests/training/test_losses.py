"""Cross-entropy against float64 NumPy and closed forms."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from cnn_jax.training.losses import binary_cross_entropy, cross_entropy

pytestmark = pytest.mark.usefixtures("compile_quickly")


def draw(scale=1.0, examples=64, classes=7):
    rng = np.random.default_rng(0)
    logits = scale * rng.normal(size=(examples, classes))
    return logits.astype(np.float32), rng.integers(classes, size=examples, dtype=np.int32)


def losses_of(logits, labels, **arguments):
    return cross_entropy(jnp.asarray(logits), jnp.asarray(labels), **arguments)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e4])
def test_equals_the_oracle_at_any_size_of_logits(scale, label_smoothing):
    logits, labels = draw(scale)
    losses = losses_of(logits, labels, label_smoothing=label_smoothing)
    expected = oracles.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    assert losses.shape == (64,)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.25])
def test_smoothing_is_torch_s_formula(label_smoothing):
    """`(1 - e) nll + e mean_k(-log p_k)`, of probabilities that are written out."""
    logits, labels = draw()
    exponentials = np.exp(logits.astype(np.float64))
    surprise = -np.log(exponentials / exponentials.sum(axis=1, keepdims=True))
    negative_log_likelihood = surprise[np.arange(len(labels)), labels]
    expected = (1 - label_smoothing) * negative_log_likelihood
    expected += label_smoothing * surprise.mean(axis=1)
    losses = losses_of(logits, labels, label_smoothing=label_smoothing)
    np.testing.assert_allclose(losses, expected, rtol=2e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_knowing_nothing_costs_log_k(classes, label_smoothing):
    logits, labels = np.full((3, classes), 5.0, np.float32), np.asarray([0, 1, classes - 1])
    losses = losses_of(logits, labels, label_smoothing=label_smoothing)
    np.testing.assert_allclose(losses, np.log(classes), rtol=1e-6)


def test_certainty_costs_nothing_when_right_and_the_gap_when_wrong():
    logits = np.asarray([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]], np.float32)
    np.testing.assert_array_equal(losses_of(logits, np.asarray([0, 1])), [0.0, 2e4])


def test_bfloat16_logits_are_summed_in_float32():
    logits, labels = draw(classes=1000)
    logits = jnp.asarray(logits, jnp.bfloat16)
    losses = losses_of(logits, labels)
    assert losses.dtype == jnp.float32
    expected = oracles.cross_entropy(np.asarray(logits, np.float64), labels)
    np.testing.assert_allclose(losses, expected, rtol=2e-6)


def draw_shares(examples=64, classes=7):
    shares = np.random.default_rng(2).dirichlet([0.3] * classes, size=examples)
    return shares.astype(np.float32)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_of_shares_it_is_the_mean_over_the_classes(label_smoothing):
    logits, _ = draw()
    shares = draw_shares()
    by_class = [
        oracles.cross_entropy(logits, np.full(64, k), label_smoothing=label_smoothing)
        for k in range(7)
    ]
    expected = np.sum(shares.T * by_class, axis=0)
    losses = losses_of(logits, shares, label_smoothing=label_smoothing)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def binary(logits, targets):
    """Of each example, the mean over the classes, written out in float64."""
    probabilities = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    return -np.mean(
        targets * np.log(probabilities) + (1 - targets) * np.log1p(-probabilities), axis=-1
    )


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_binary_cross_entropy_equals_the_oracle(label_smoothing, threshold):
    logits, labels = draw(3.0)
    for given, shares in ((labels, np.eye(7)[labels]), (draw_shares(), draw_shares())):
        targets = (1 - label_smoothing) * shares + label_smoothing / 7
        if threshold is not None:
            targets = (targets > threshold) * 1.0
        losses = binary_cross_entropy(
            jnp.asarray(logits),
            jnp.asarray(given),
            label_smoothing=label_smoothing,
            threshold=threshold,
        )
        np.testing.assert_allclose(losses, binary(logits, targets), rtol=1e-5)


def test_binary_cross_entropy_of_large_and_of_bfloat16_logits():
    logits = np.asarray([[1e4, -1e4], [1e4, -1e4]], np.float32)
    losses = binary_cross_entropy(jnp.asarray(logits), jnp.asarray([0, 1]))
    np.testing.assert_array_equal(losses, [0.0, 1e4])
    narrow = jnp.asarray([[1.0, -2.0]], jnp.bfloat16)
    assert binary_cross_entropy(narrow, jnp.asarray([0])).dtype == jnp.float32


def test_losses_of_mixed_images_are_torch_s():
    torch = pytest.importorskip("torch")
    logits, shares = draw(3.0)[0], draw_shares()
    theirs, wanted = torch.from_numpy(logits), torch.from_numpy(shares)
    cross = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)(theirs, wanted)
    np.testing.assert_allclose(losses_of(logits, shares, label_smoothing=0.1), cross, rtol=1e-5)
    both = torch.nn.BCEWithLogitsLoss(reduction="none")(theirs, wanted).mean(dim=1)
    ours = binary_cross_entropy(jnp.asarray(logits), jnp.asarray(shares))
    np.testing.assert_allclose(ours, both, rtol=1e-5)
