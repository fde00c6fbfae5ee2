"""Formulas as they are written in a book, for JAX to derive."""

import jax.numpy as jnp

EPSILON = 1e-5


def batch_norm(x, scale, bias, rectify=False):
    """Returns x normalised, by channel, and its mean and biased variance."""
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    row = mean.shape
    y = (x - mean) / jnp.sqrt(var + EPSILON) * scale.reshape(row) + bias.reshape(row)
    return jnp.where(y > 0, y, 0) if rectify else y, mean.ravel(), var.ravel()
