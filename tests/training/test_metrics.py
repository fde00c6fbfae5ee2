"""Sums over the real examples of a batch, and means over all batches."""

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.training.metrics import global_norm, mean, metric_sums


def sums_of(logits, labels, losses, mask):
    return jax.device_get(metric_sums(*map(jnp.asarray, (logits, labels, losses, mask))))


def draw(examples, classes=4):
    rng = np.random.default_rng(examples)
    logits = rng.normal(size=(examples, classes)).astype(np.float32)
    labels = rng.integers(classes, size=examples, dtype=np.int32)
    return logits, labels, rng.exponential(size=examples).astype(np.float32)


def test_sums_are_over_the_examples_of_the_mask():
    logits, labels, losses = draw(50)
    mask = (np.arange(50) % 3 > 0).astype(np.float32)
    sums = sums_of(logits, labels, losses, mask)
    kept = mask == 1
    assert sums.keys() == {"loss", "accuracy", "count"}
    np.testing.assert_allclose(sums["loss"], losses[kept].sum(dtype=np.float64), rtol=1e-6)
    assert sums["accuracy"] == np.count_nonzero(logits.argmax(axis=1)[kept] == labels[kept])
    assert sums["count"] == np.count_nonzero(kept)


def test_padding_counts_for_nothing_even_if_it_is_no_number():
    logits, labels, losses = draw(8)
    mask = np.asarray([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    clean = sums_of(logits, labels, losses, mask)
    for garbage in (np.nan, np.inf, 1e30):
        logits[5:], losses[5:], labels[5:] = garbage, garbage, 0
        assert sums_of(logits, labels, losses, mask) == clean


def test_the_mean_over_uneven_batches_is_the_mean_over_all_examples():
    batches = [draw(examples) for examples in (1, 7, 64, 20)]
    means = mean([sums_of(*batch, np.ones(len(batch[1]), np.float32)) for batch in batches])
    logits, labels, losses = map(np.concatenate, zip(*batches, strict=True))
    assert means.keys() == {"loss", "accuracy"}
    np.testing.assert_allclose(means["loss"], losses.mean(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(means["accuracy"], np.mean(logits.argmax(axis=1) == labels))
    assert abs(means["loss"] - np.mean([batch[2].mean() for batch in batches])) > 1e-3


def test_the_global_norm_is_that_of_all_numbers_in_float32():
    rng = np.random.default_rng(0)
    shapes = [(3, 3, 4, 5), (7, 5), (5,), ()]
    tree = {str(shape): rng.normal(size=shape).astype(np.float32) for shape in shapes}
    flat = np.concatenate([leaf.ravel() for leaf in tree.values()]).astype(np.float64)
    norm = jax.jit(global_norm)(tree)
    np.testing.assert_allclose(norm, np.sqrt(np.sum(flat**2)), rtol=1e-6)
    halves = {"a": jnp.full((4096,), 1.0, jnp.bfloat16)}
    assert global_norm(halves) == 64
