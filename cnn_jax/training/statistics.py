"""Running statistics with a row for each device, for BatchNorm without communication.

A device that normalises by its own share of the batch has running statistics of its own. They are
an array `[rows, channels]` in place of `[channels]`, divided among the devices like the batch, so
that moving them takes no collective, and so that a run that is killed goes on with the same bits.
Evaluation, exported weights and another number of devices take all rows as one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax.training.freezing import Frozen


def spread_statistics(
    batch_stats: Any, rows: int, *, frozen: Frozen | None = None
) -> dict[str, Any]:
    """Returns running statistics with `rows` equal rows, but for those of frozen BatchNorms.

    These stay as they are: a step only reads them, and would have to gather them.
    """

    def spread(path: tuple[str, ...], leaf: Any) -> Any:
        if frozen and frozen("/".join([*path[:-1], "scale"])):
            return leaf
        return jnp.broadcast_to(leaf[None], (rows, *leaf.shape))

    return unflatten_dict(
        {path: spread(path, leaf) for path, leaf in flatten_dict(batch_stats).items()}
    )


def pool_statistics(batch_stats: Mapping[str, Any]) -> dict[str, Any]:
    """Returns running statistics without rows: means and second moments are averaged.

    So the variance is the mean of the rows' and the variance of their means. Without rows they
    are returned as they are; they may be NumPy's.
    """
    leaves: Any = flatten_dict(dict(batch_stats))

    def pool(path: tuple[str, ...], leaf: Any) -> Any:
        if leaf.ndim != 2:
            return leaf
        means = leaves[(*path[:-1], "mean")]
        return leaf.mean(0) + (means.var(0) if path[-1] == "var" else 0)

    return unflatten_dict({path: pool(path, leaf) for path, leaf in leaves.items()})


def fit_statistics(batch_stats: Any, like: Any) -> Any:
    """Returns running statistics with the rows and the shardings of the abstract ones in `like`.

    Those that have such rows already stay, to the bit; others are pooled and spread again.
    """

    def fit(batch_stats: Any) -> Any:
        def one(leaf: Any, whole: Any, asked: Any) -> Any:
            return leaf if leaf.shape == asked.shape else jnp.broadcast_to(whole, asked.shape)

        return jax.tree.map(one, batch_stats, pool_statistics(batch_stats), like)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(fit, out_shardings=shardings)(batch_stats)
