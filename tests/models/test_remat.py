"""What is computed again in the backward pass: the same numbers, less kept for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import create_model
from cnn_jax.training.freezing import frozen_statistics, train_only

pytestmark = pytest.mark.usefixtures("compile_quickly")

MODELS = {
    "resnet_mini": {"stage_sizes": (2,), "stochastic_depth_rate": 0.3},
    "googlenet_mini": {"blocks": ("3a", "3b")},
    "convnext_mini": {"stage_sizes": (2,), "stochastic_depth_rate": 0.3},
}
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
KEY = jax.random.key(3)


def made(name, remat, **arguments):
    return create_model(name, num_classes=5, remat=remat, **MODELS[name] | arguments)


def variables_of(model):
    return jax.jit(lambda: model.init(jax.random.key(0), IMAGES, train=False))()


def loss_of(model, variables, frozen):
    """A loss of the parameters, with the running statistics after it."""

    def loss(params):
        with frozen_statistics(frozen):
            output, updated = model.apply(
                {**variables, "params": params},
                IMAGES,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": KEY},
            )
        return sum(jnp.mean(jnp.square(leaf)) for leaf in jax.tree.leaves(output)), updated

    return loss


def kept_bytes(loss, params):
    """What the forward pass leaves for the backward pass."""
    backward = jax.eval_shape(lambda params: jax.vjp(loss, params, has_aux=True)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


@pytest.mark.parametrize(
    ("name", "features_only"),
    [
        ("resnet_mini", False),
        pytest.param("resnet_mini", True, marks=pytest.mark.slow),
        pytest.param("googlenet_mini", False, marks=pytest.mark.slow),
        pytest.param("convnext_mini", False, marks=pytest.mark.slow),
    ],
)
def test_the_numbers_are_the_same_and_less_is_kept(name, features_only):
    """With stochastic depth or dropout, and a frozen stem if the model has one."""
    results, kept = {}, {}
    variables = variables_of(made(name, "none", features_only=features_only))
    patterns = ["stage.*"] if "stem" in variables["params"] else []
    frozen = train_only(patterns, variables["params"])
    for remat in ("none", "block", "stage"):
        model = made(name, remat, features_only=features_only)
        again = jax.eval_shape(lambda model=model: model.init(KEY, IMAGES, train=False))
        assert jax.tree.structure(again) == jax.tree.structure(variables)
        loss = loss_of(model, variables, frozen)
        kept[remat] = kept_bytes(loss, variables["params"])
        results[remat] = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    for remat in ("block", "stage"):
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(
                ours, theirs, rtol=0, atol=1e-4 * max(1e-3, np.abs(theirs).max())
            ),
            results[remat],
            results["none"],
        )
    assert kept["stage"] < kept["block"] < 0.6 * kept["none"]


def test_frozen_statistics_stay_inside_what_is_computed_again():
    model = made("resnet_mini", "block")
    variables = variables_of(model)
    frozen = train_only(["head"], variables["params"])
    _, updated = jax.jit(loss_of(model, variables, frozen))(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])


def test_evaluation_is_the_same_program():
    """There is no backward pass to save memory for."""
    programs = [
        str(
            jax.make_jaxpr(lambda images, model=model: model.init(KEY, images, train=False))(IMAGES)
        )
        for model in (made("resnet_mini", "none"), made("resnet_mini", "stage"))
    ]
    assert programs[0] == programs[1]


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="remat='stages': must be one of 'none', 'block', 'stage'"):
        made("resnet_mini", "stages").init(KEY, IMAGES, train=False)
