"""Optimisers against PyTorch's update rules in float64 NumPy, schedules against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax import ModernCNN
from cnn_jax.training.optim import decay_mask, make_optimizer, make_schedule

STEPS = 10
SHAPES = {
    "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "norm": {"scale": (4,), "bias": (4,)},
    "head": {"kernel": (4, 5), "bias": (5,)},
}
RATES = 0.3 * np.concatenate([np.arange(3) / 3, (1 + np.cos(np.pi * np.arange(8) / 7)) / 2])


def draw(rng):
    return jax.tree.map(
        lambda shape: rng.normal(size=shape), SHAPES, is_leaf=lambda x: type(x) is tuple
    )


def torch_sgd(param, gradients, *, weight_decay, momentum, nesterov):
    """torch.optim.SGD, algorithm as in its documentation; dampening 0."""
    buffer = 0.0
    for rate, gradient in zip(RATES, gradients, strict=False):
        gradient = gradient + weight_decay * param
        buffer = momentum * buffer + gradient
        param = param - rate * (gradient + momentum * buffer if nesterov else buffer)
    return param


def torch_adamw(param, gradients, *, weight_decay, b1, b2, eps):
    """torch.optim.AdamW, algorithm as in its documentation."""
    first = second = 0.0
    for step, (rate, gradient) in enumerate(zip(RATES, gradients, strict=False), start=1):
        param = param - rate * weight_decay * param
        first = b1 * first + (1 - b1) * gradient
        second = b2 * second + (1 - b2) * gradient**2
        scale = np.sqrt(second / (1 - b2**step)) + eps
        param = param - rate * first / (1 - b1**step) / scale
    return param


@pytest.mark.parametrize(
    ("name", "rule", "arguments"),
    [
        ("sgd", torch_sgd, {"momentum": 0.0, "nesterov": False}),
        ("sgd", torch_sgd, {"momentum": 0.9, "nesterov": False}),
        ("sgd", torch_sgd, {"momentum": 0.8, "nesterov": True}),
        ("adamw", torch_adamw, {"b1": 0.9, "b2": 0.999, "eps": 1e-8}),
        ("adamw", torch_adamw, {"b1": 0.7, "b2": 0.95, "eps": 1e-2}),
    ],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_ten_steps_equal_torch_s_under_a_varying_rate(name, rule, arguments, weight_decay):
    rng = np.random.default_rng(0)
    params, gradients = draw(rng), [draw(rng) for _ in range(STEPS)]

    def expected(path, param, *history):
        decay = weight_decay if path[-1].key == "kernel" else 0.0
        return rule(param, history, weight_decay=decay, **arguments)

    expected = jax.tree_util.tree_map_with_path(expected, params, *gradients)
    schedule = make_schedule("cosine", peak=0.3, total_steps=STEPS, warmup_steps=3)
    tx = make_optimizer(name, schedule, weight_decay=weight_decay, **arguments)

    @jax.jit
    def update(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        state = tx.init(params)
        for gradient in gradients:
            params, state = update(params, state, gradient)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), params, expected)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_kernels_decay_but_neither_biases_nor_the_scales_of_norms(norm):
    model = ModernCNN(num_classes=3, stage_sizes=(1, 1), width=16, stem="small", norm=norm)
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    init = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(init["params"]))
    assert {path[-1].key for path, _ in mask} >= {"kernel", "bias"}
    for path, decays in mask:
        assert decays == (path[-1].key == "kernel"), jax.tree_util.keystr(path)


def test_an_unknown_optimizer_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match="optimizer name='sdg': must be one of sgd, adamw"):
        make_optimizer("sdg", 0.1)


PEAK = 0.4


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (
            {"name": "cosine", "total_steps": 100, "warmup_steps": 20},
            {
                0: 0,
                1: PEAK / 20,
                10: PEAK / 2,
                20: PEAK,
                40: PEAK * (1 + 0.5**0.5) / 2,
                60: PEAK / 2,
                100: 0,
            },
        ),
        (
            {"name": "cosine", "total_steps": 100, "warmup_steps": 20, "end_factor": 0.1},
            {0: 0, 10: PEAK / 2, 20: PEAK, 60: PEAK * 1.1 / 2, 100: PEAK / 10, 1000: PEAK / 10},
        ),
        (
            {"name": "cosine", "total_steps": 90},
            {0: PEAK, 30: PEAK * 3 / 4, 45: PEAK / 2, 60: PEAK / 4, 90: 0, 91: 0},
        ),
        (
            {"name": "constant", "total_steps": 100, "warmup_steps": 4},
            {0: 0, 1: PEAK / 4, 3: PEAK * 3 / 4, 4: PEAK, 5: PEAK, 100: PEAK},
        ),
        ({"name": "constant", "total_steps": 100}, {0: PEAK, 1: PEAK, 99: PEAK}),
        ({"name": "cosine", "total_steps": 5, "warmup_steps": 5}, {0: 0, 4: PEAK * 4 / 5, 5: PEAK}),
    ],
)
def test_schedules_pass_through_closed_forms(arguments, values):
    schedule = make_schedule(peak=PEAK, **arguments)
    rates = [float(schedule(jnp.asarray(step, jnp.int32))) for step in values]
    np.testing.assert_allclose(rates, list(values.values()), rtol=1e-6, atol=1e-7)
