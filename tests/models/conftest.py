"""One comparison for every module: Flax against an oracle, in both modes and both precisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(compile_quickly):
    """As elsewhere, in every test here."""


def draw(shapes, rng):
    """Random float64 variables of those shapes: none is zero, one or symmetric by accident."""

    def leaf(path, shape):
        match path[-1].key:
            case "kernel":
                return rng.normal(size=shape.shape) / np.sqrt(np.prod(shape.shape[:-1]))
            case "scale" | "var":
                return rng.uniform(0.5, 1.5, size=shape.shape)
            case _:
                return rng.normal(size=shape.shape) / 2

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def assert_trees_close(actual, expected, tolerance):
    """Leaf by leaf, `tolerance` relative to the leaf's largest value or to 1."""
    actual, expected = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (actual, expected)
    )
    assert actual.keys() == expected.keys()
    for path, right in expected.items():
        np.testing.assert_allclose(
            np.asarray(actual[path], np.float64),
            right,
            rtol=0,
            atol=tolerance * max(1.0, np.abs(right).max()),
            err_msg=path,
        )


@pytest.fixture
def assert_matches():
    """Returns `check(module, oracle, shape, **arguments)`.

    `oracle(images, params, batch_stats, train=..., **arguments)` gives the output and the running
    statistics after the call. Float64 shows that the two are one formula, float32 that rounding
    stays small. `method` names what to call on the module.
    """

    def check(module, oracle, shape, *, method=None, float64=1e-9, float32=2e-5, **arguments):
        rng = np.random.default_rng(0)
        images = rng.normal(size=shape) + 0.3
        variables = draw(
            jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), train=False)),
            rng,
        )
        for train in (False, True):

            @jax.jit
            def call(variables, images, train=train):
                return module.apply(
                    variables, images, train=train, mutable=["batch_stats"], method=method
                )

            expected = oracle(
                images,
                variables["params"],
                variables.get("batch_stats", {}),
                train=train,
                **arguments,
            )
            for dtype, tolerance in ((np.float64, float64), (np.float32, float32)):
                with jax.enable_x64(dtype == np.float64):
                    output, updated = call(*jax.tree.map(dtype, (variables, images)))
                assert_trees_close((output, updated.get("batch_stats", {})), expected, tolerance)

    return check
