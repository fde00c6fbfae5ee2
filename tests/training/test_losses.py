"""Cross-entropy against float64 NumPy and closed forms."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from cnn_jax.training.losses import cross_entropy


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
