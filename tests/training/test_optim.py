"""Optimisers against PyTorch's update rules in float64 NumPy, schedules against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax import ModernCNN
from cnn_jax.training.freezing import freeze_updates, train_only
from cnn_jax.training.optim import OPTIMIZERS, decay_mask, make_optimizer, make_schedule

pytestmark = pytest.mark.usefixtures("compile_quickly")

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


def torch_adamw(param, gradients, *, weight_decay, b1, b2, eps, nesterov=False):
    """torch.optim.AdamW, algorithm as in its documentation; or Dozat's 2016 form of its mean."""
    first = second = 0.0
    for step, (rate, gradient) in enumerate(zip(RATES, gradients, strict=False), start=1):
        param = param - rate * weight_decay * param
        first = b1 * first + (1 - b1) * gradient
        second = b2 * second + (1 - b2) * gradient**2
        scale = np.sqrt(second / (1 - b2**step)) + eps
        mean = first / (1 - b1**step)
        if nesterov:
            mean = b1 * first / (1 - b1 ** (step + 1)) + (1 - b1) * gradient / (1 - b1**step)
        param = param - rate * mean / scale
    return param


def lars(param, gradients, *, weight_decay, momentum, nesterov):
    """You et al. 2017, algorithm 1: the local rate times the global one goes into the momentum."""
    buffer = 0.0
    for rate, gradient in zip(RATES, gradients, strict=False):
        if param.ndim > 1:
            gradient = gradient + weight_decay * param
            gradient = 0.001 * np.linalg.norm(param) / np.linalg.norm(gradient) * gradient
        buffer = momentum * buffer + rate * gradient
        param = param - (rate * gradient + momentum * buffer if nesterov else buffer)
    return param


def lamb(param, gradients, *, weight_decay, b1, b2, eps):
    """You et al. 2020, algorithm 2, with phi(z) = z."""
    first = second = 0.0
    for step, (rate, gradient) in enumerate(zip(RATES, gradients, strict=False), start=1):
        first = b1 * first + (1 - b1) * gradient
        second = b2 * second + (1 - b2) * gradient**2
        ratio = first / (1 - b1**step) / (np.sqrt(second / (1 - b2**step)) + eps)
        ratio = ratio + weight_decay * param
        param = param - rate * np.linalg.norm(param) / np.linalg.norm(ratio) * ratio
    return param


def muon(param, gradients, *, weight_decay, momentum, nesterov, b1, b2):
    """Jordan 2024, of a kernel as inputs by outputs, with the scale of Liu et al. 2025, eq. 4."""
    if param.ndim == 1:
        look_ahead = {"weight_decay": 0, "eps": 1e-8, "nesterov": nesterov}
        return torch_adamw(param, gradients, b1=b1, b2=b2, **look_ahead)
    shape, mean = param.shape, 0.0
    for step, (rate, gradient) in enumerate(zip(RATES, gradients, strict=False), start=1):
        mean = momentum * mean + (1 - momentum) * gradient
        direction = mean / (1 - momentum**step)
        if nesterov:
            direction = momentum * mean / (1 - momentum ** (step + 1))
            direction = direction + (1 - momentum) * gradient / (1 - momentum**step)
        matrix = direction.reshape(-1, shape[-1])
        matrix = matrix / (np.linalg.norm(matrix) + 1e-8)
        for _ in range(5):
            square = matrix @ matrix.T
            product = (-4.7750 * square + 2.0315 * square @ square) @ matrix
            matrix = 3.4445 * matrix + product
        update = 0.2 * np.sqrt(max(matrix.shape)) * matrix.reshape(shape)
        param = param - rate * (update + weight_decay * param)
    return param


@pytest.mark.parametrize(
    ("name", "rule", "arguments"),
    [
        ("sgd", torch_sgd, {"momentum": 0.0, "nesterov": False}),
        ("sgd", torch_sgd, {"momentum": 0.9, "nesterov": False}),
        ("sgd", torch_sgd, {"momentum": 0.8, "nesterov": True}),
        ("adamw", torch_adamw, {"b1": 0.9, "b2": 0.999, "eps": 1e-8}),
        ("adamw", torch_adamw, {"b1": 0.7, "b2": 0.95, "eps": 1e-2}),
        ("lars", lars, {"momentum": 0.9, "nesterov": False}),
        ("lars", lars, {"momentum": 0.8, "nesterov": True}),
        ("lamb", lamb, {"b1": 0.9, "b2": 0.999, "eps": 1e-6}),
        ("muon", muon, {"momentum": 0.95, "nesterov": True, "b1": 0.9, "b2": 0.99}),
        ("muon", muon, {"momentum": 0.8, "nesterov": False, "b1": 0.9, "b2": 0.99}),
    ],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_ten_steps_equal_the_rule_under_a_varying_rate(name, rule, arguments, weight_decay):
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
    with pytest.raises(
        ValueError, match="optimizer name='sdg': must be one of sgd, adamw, lars, lamb, muon"
    ):
        make_optimizer("sdg", 0.1)


def test_a_larger_gradient_is_scaled_down_to_the_norm_before_it_decays():
    rng = np.random.default_rng(0)
    params, gradients = draw(rng), draw(rng)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradients)))
    for limit, scale in ((2.0, 2.0 / norm), (2 * norm, 1.0)):
        tx = make_optimizer("sgd", 1.0, momentum=0.0, weight_decay=0.5, clip_norm=limit)
        with jax.enable_x64(True):
            updates, _ = tx.update(gradients, tx.init(params), params)
        expected = -scale * gradients["head"]["kernel"] - 0.5 * params["head"]["kernel"]
        np.testing.assert_allclose(updates["head"]["kernel"], expected, rtol=1e-5)
        np.testing.assert_allclose(
            updates["norm"]["bias"], -scale * gradients["norm"]["bias"], rtol=1e-5
        )


def test_a_unit_s_gradient_is_scaled_down_to_a_share_of_its_weights():
    """Brock et al. 2021, equation 3, of every output of a kernel and of every vector."""
    rng = np.random.default_rng(0)
    params, gradients = draw(rng), draw(rng)
    params["norm"]["bias"] = 0.0 * params["norm"]["bias"]
    tx = make_optimizer("sgd", 1.0, momentum=0.0, clip_ratio=0.8)
    updates, _ = tx.update(gradients, tx.init(params), params)

    def clip(param, gradient, update):
        axes = tuple(range(param.ndim - 1)) or (0,)

        def norm(array):
            return np.sqrt(np.sum(array**2, axis=axes, keepdims=True))

        limit = 0.8 * np.maximum(norm(param), 1e-3)
        scale = np.minimum(1.0, limit / norm(gradient))
        np.testing.assert_allclose(-update, scale * gradient, rtol=1e-4)
        return np.mean(scale < 1)

    clipped = jax.tree.leaves(jax.tree.map(clip, params, gradients, updates))
    assert 0 < np.mean(clipped) < 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parts_are_left_alone_by_every_optimizer(name):
    params = jax.tree.map(jnp.asarray, draw(np.random.default_rng(0)))
    tx = freeze_updates(make_optimizer(name, 0.1, clip_ratio=0.1), train_only(("head",), params))
    updates, _ = tx.update(params, tx.init(params), params)
    moved = jax.tree.map(lambda update: bool(jnp.any(update != 0)), updates)
    assert all(jax.tree.leaves(moved["head"]))
    assert not any(jax.tree.leaves([moved["conv"], moved["norm"]]))


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
        (
            {"name": "linear", "total_steps": 100, "warmup_steps": 20, "end_factor": 0.5},
            {0: 0, 10: PEAK / 2, 20: PEAK, 60: PEAK * 3 / 4, 100: PEAK / 2, 101: PEAK / 2},
        ),
        (
            {"name": "step", "total_steps": 90, "warmup_steps": 5, "milestones": (30, 60)},
            {0: 0, 5: PEAK, 29: PEAK, 30: PEAK / 10, 59: PEAK / 10, 60: PEAK / 100, 89: PEAK / 100},
        ),
        (
            {"name": "step", "total_steps": 9, "milestones": (3, 4), "step_factor": 0.5},
            {0: PEAK, 2: PEAK, 3: PEAK / 2, 4: PEAK / 4},
        ),
        (
            {"name": "one_cycle", "total_steps": 101, "warmup_steps": 21, "end_factor": 0.1},
            {0: PEAK / 25, 10: PEAK * 26 / 50, 20: PEAK, 60: PEAK * 1.1 / 2, 100: PEAK / 10},
        ),
        ({"name": "one_cycle", "total_steps": 11}, {0: PEAK, 5: PEAK / 2, 10: 0}),
        ({"name": "cosine", "total_steps": 5, "warmup_steps": 5}, {0: 0, 4: PEAK * 4 / 5, 5: PEAK}),
    ],
)
def test_schedules_pass_through_closed_forms(arguments, values):
    schedule = make_schedule(peak=PEAK, **arguments)
    rates = [float(schedule(jnp.asarray(step, jnp.int32))) for step in values]
    np.testing.assert_allclose(rates, list(values.values()), rtol=1e-6, atol=1e-7)


def test_schedules_are_torch_s():
    torch = pytest.importorskip("torch")
    schedulers = torch.optim.lr_scheduler
    cases = [
        (
            {"name": "one_cycle", "total_steps": 50, "warmup_steps": 15, "end_factor": 0.02},
            lambda optimizer: schedulers.OneCycleLR(
                optimizer, PEAK, total_steps=50, pct_start=0.3, final_div_factor=2.0
            ),
        ),
        (
            {"name": "step", "total_steps": 50, "milestones": (10, 30), "step_factor": 0.2},
            lambda optimizer: schedulers.MultiStepLR(optimizer, [10, 30], gamma=0.2),
        ),
        (
            {"name": "cosine", "total_steps": 50, "end_factor": 0.1},
            lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 50, eta_min=PEAK / 10),
        ),
    ]
    for arguments, make in cases:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
        scheduler, rates = make(optimizer), []
        for _ in range(50):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step() if len(rates) < 50 else None
        schedule = make_schedule(peak=PEAK, **arguments)
        ours = [float(schedule(step)) for step in range(50)]
        np.testing.assert_allclose(ours, rates, rtol=1e-5, atol=1e-7, err_msg=arguments["name"])
