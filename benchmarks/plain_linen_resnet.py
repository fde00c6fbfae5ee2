"""ResNet-50 and its training step as one writes them in flax.linen without this package.

The yardstick of `benchmarks/static_table.py`, in the manner of Flax's own ImageNet example
(https://github.com/google/flax/tree/main/examples/imagenet): layers of `flax.linen` with "SAME"
padding, bfloat16 computation of float32 parameters, cross entropy with one-hot labels, weight decay
of the kernels, Nesterov momentum, a warm-up and a cosine, the metrics loss and accuracy.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax.benchmarking.linen_resnet import PlainResNet

IMAGE_SHAPE = (224, 224, 3)
NUM_CLASSES = 1000
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
WEIGHT_DECAY = 5e-4
WARMUP_STEPS, TOTAL_STEPS = 250, 5004


@flax.struct.dataclass
class State:
    """What the step takes and gives back."""

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any


def optimizer() -> optax.GradientTransformation:
    """Returns decay of the kernels, then Nesterov momentum at the scheduled rate."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, WARMUP_STEPS, TOTAL_STEPS)
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY, lambda tree: jax.tree.map(_is_kernel, tree)),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )


def _is_kernel(leaf: Any) -> bool:
    return leaf.ndim > 1


def train_step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
    """Returns the state after a step, and its metrics."""
    mean, std = (255 * jnp.asarray(each, jnp.float32).reshape(1, 1, 1, 3) for each in (MEAN, STD))
    images = ((batch["image"].astype(jnp.float32) - mean) / std).astype(jnp.bfloat16)
    labels = batch["label"]

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = PlainResNet().apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, NUM_CLASSES))
        return jnp.mean(losses), (logits, updated["batch_stats"])

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optimizer().update(grads, state.opt_state, state.params)
    metrics = {"loss": loss, "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels)}
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, batch_stats, opt_state), metrics


def abstract_state() -> State:
    """Returns shapes and dtypes of the state, which the step starts from."""

    def make() -> State:
        images = jnp.zeros((1, *IMAGE_SHAPE), jnp.bfloat16)
        variables = PlainResNet().init(jax.random.key(0), images, train=False)
        params = variables["params"]
        opt_state = optimizer().init(params)
        return State(jnp.zeros((), jnp.int32), params, variables["batch_stats"], opt_state)

    return jax.eval_shape(make)


def lower_train_step(devices: Sequence[Any], batch_size: int) -> jax.stages.Lowered:
    """Returns the step, ready to compile, its batch divided among `devices`."""
    mesh = Mesh(np.asarray(devices), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    divided = NamedSharding(mesh, PartitionSpec("data"))

    def of(sharding: NamedSharding) -> Any:
        return lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *IMAGE_SHAPE), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    step = jax.jit(train_step, donate_argnums=0, out_shardings=(everywhere, everywhere))
    return step.lower(
        jax.tree.map(of(everywhere), abstract_state()), jax.tree.map(of(divided), batch)
    )
