"""One run of a case in Flax, and the difference from what PyTorch gives; the only such place.

A run is a dict of float64 arrays by what they are:
  eval/logits, eval/stage0, ...    with the drawn running statistics; maps are NCHW
  train/loss, train/logits         with the batch's own
  statistics/NORM/NAME             running statistics after that, in each convention
  gradient/NAME, gradient/images   of the loss
  trained/NAME                     weights and running statistics after five steps of SGD
"""

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from parity_cases import (
    LABEL_SMOOTHING,
    MOMENTUM,
    RATES,
    WEIGHT_DECAY,
    Case,
)

from cnn_jax.training.losses import cross_entropy
from cnn_jax.training.optim import make_optimizer
from cnn_jax.training.state import TrainState
from cnn_jax.training.steps import make_train_step

TOLERANCES = {"float64": 1e-9, "float32": 2e-5}
SAMPLE = 24
"""Values that a golden file keeps of an array with more."""

Run = dict[str, np.ndarray]


@functools.cache
def quick() -> dict[str, Any]:
    """Arguments of `jax.jit` for programs that run once: most of the time goes into compiling them.

    XLA's options come and go, so this jaxlib is asked for each whether it knows it.
    """
    known = {}
    for option, value in (
        ("xla_backend_optimization_level", 0),
        ("xla_llvm_disable_expensive_passes", True),
        ("xla_cpu_use_fusion_emitters", False),
    ):
        try:
            jax.jit(lambda x: x + 1, compiler_options={option: value})(jnp.zeros(()))
        except jax.errors.JaxRuntimeError:
            continue
        known[option] = value
    return {"compiler_options": known}


def run_flax(case: Case, dtype: str) -> Run:
    """What the package computes in this precision."""
    with jax.enable_x64(dtype == "float64"):
        tensors = {name: x.astype(dtype) for name, x in case.draw_tensors().items()}
        variables = case.from_torch(tensors)
        batches = [
            (jnp.asarray(images, dtype), jnp.asarray(labels))
            for images, labels in case.draw_batches()
        ]
        run = _inference(case, variables, batches[0][0])
        if not (case.chaotic and dtype == "float32"):
            run |= _first_batch(case, variables, *batches[0])
        if not case.chaotic:
            run |= _training(case, variables, batches)
    return {name: np.asarray(array, np.float64) for name, array in run.items()}


def comparable(case: Case, dtype: str, run: Run) -> Run:
    """The run without what a chaotic case cannot show in this precision."""
    if not case.chaotic:
        return run
    hidden = ("gradient/", "trained/")
    if dtype == "float32":
        hidden += ("train/", "statistics/")
    return {name: array for name, array in run.items() if not name.startswith(hidden)}


def _inference(case: Case, variables, images) -> Run:
    model = case.flax(case.norm)

    @functools.partial(jax.jit, **quick())
    def infer(variables, images):
        apply = functools.partial(model.apply, variables, images, train=False)
        return apply(), apply(method="stages")

    logits, maps = infer(variables, images)
    named = {f"eval/stage{index}": one.transpose(0, 3, 1, 2) for index, one in enumerate(maps)}
    return {"eval/logits": logits, **named}


def _first_batch(case: Case, variables, images, labels) -> Run:
    """In the last of the conventions; `_training` shows the first."""
    norm = case.conventions[-1]
    model = case.flax(norm)

    def mean_loss(images, variables, labels):
        logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        losses = cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        return jnp.mean(losses), (logits, updated)

    def with_gradient(*arguments):
        outputs, pixels = jax.value_and_grad(mean_loss, has_aux=True)(*arguments)
        return outputs, pixels.transpose(0, 3, 1, 2)

    run = {}
    if case.chaotic:
        outputs = jax.jit(mean_loss, **quick())(images, variables, labels)
    else:
        differentiate = jax.jit(with_gradient, **quick())
        outputs, run["gradient/images"] = differentiate(images, variables, labels)
    loss, (logits, updated) = outputs
    run |= {"train/loss": loss, "train/logits": logits}
    return run | _statistics(case, norm, variables, updated)


def _statistics(case: Case, norm: str, variables, updated) -> Run:
    if not updated.get("batch_stats"):
        return {}
    named = case.to_torch({**variables, **updated}).items()
    return {f"statistics/{norm}/{name}": array for name, array in named if "running" in name}


def recording(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with the gradients that it was given last beside its state."""

    def update(gradients, state, params=None):
        updates, inner = tx.update(gradients, state[1], params)
        return updates, (gradients, inner)

    return optax.GradientTransformation(lambda params: (params, tx.init(params)), update)


def _training(case: Case, variables, batches) -> Run:
    rates = jnp.asarray(RATES, batches[0][0].dtype)
    optimizer = make_optimizer(
        "sgd",
        lambda step: rates[step],
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
    )
    tx = recording(optimizer)
    loss = functools.partial(cross_entropy, label_smoothing=LABEL_SMOOTHING)
    step = jax.jit(make_train_step(case.flax(case.norm), tx, loss=loss), **quick())
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=jax.jit(tx.init, **quick())(variables["params"]),
    )
    run = {}
    for images, labels in batches:
        state, _ = step(state, {"image": images, "label": labels}, jax.random.key(0))
        if not run:
            gradients = case.to_torch({"params": state.opt_state[0]})
            run = {f"gradient/{name}": array for name, array in gradients.items()}
            updated = {"batch_stats": state.batch_stats}
            run |= _statistics(case, case.norm, variables, updated)
    statistics = {"batch_stats": state.batch_stats} if state.batch_stats else {}
    named = case.to_torch({"params": state.params, **statistics})
    return run | {f"trained/{name}": array for name, array in named.items()}


def scales(case: Case, expected: Run) -> dict[str, float]:
    """What the differences of each array are measured against: its largest value.

    The bias of a convolution has no effect before a BatchNorm: its gradient is 0, and rounding is
    all there is to see. It is measured against the gradient of the weights beside it.
    """
    largest = {name: float(np.abs(array).max()) for name, array in expected.items()}
    for name in expected:
        weight = f"{name.removesuffix('bias')}weight"
        idle = case.idle_biases and name.startswith("gradient/") and name.endswith(".bias")
        if idle and weight in expected and expected[weight].ndim == 4:
            largest[name] = largest[weight]
    silent = [name for name, value in largest.items() if value == 0]
    assert not silent, f"all zero, so nothing to compare: {silent}"
    return largest


def sample(name: str, array: np.ndarray) -> np.ndarray:
    """The array, flat; of a large one some of its values and two sums that depend on all of them.

    A sum is over the values times normal random numbers, divided by the root of how many they are,
    so that it differs about as much as a value does.
    """
    values = np.asarray(array, np.float64).reshape(-1)
    if values.size <= SAMPLE + 2:
        return values
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    picked = np.sort(rng.choice(values.size, SAMPLE, replace=False))
    sums = rng.standard_normal((2, values.size)) @ values / np.sqrt(values.size)
    return np.concatenate([values[picked], sums])


def errors(actual: Run, expected: Run, largest: Mapping[str, float]) -> dict[str, float]:
    """The largest difference of each array, relative to `largest`.

    Raises AssertionError where the two runs do not hold the same arrays.
    """
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    found = {}
    for name, right in expected.items():
        assert actual[name].shape == right.shape, (name, actual[name].shape, right.shape)
        found[name] = float(np.abs(actual[name] - right).max() / largest[name])
    return found


def assert_equal(found: Mapping[str, float], tolerance: float) -> None:
    """Raises AssertionError with every array that differs more, the worst first."""
    wrong = {name: error for name, error in found.items() if not error <= tolerance}
    worst = sorted(wrong.items(), key=lambda item: -item[1])
    lines = [f"{name}: {error:.2e}" for name, error in worst]
    assert not wrong, f"{len(wrong)} of {len(found)} arrays differ by more than {tolerance}:\n" + (
        "\n".join(lines[:20])
    )
