"""One step, as pure functions to hand to `jax.jit` with any sharding."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from cnn_jax.training.accumulation import accumulate
from cnn_jax.training.augment import Augment
from cnn_jax.training.averaging import Average
from cnn_jax.training.freezing import Frozen, frozen_statistics, stop_gradients
from cnn_jax.training.losses import Loss, cross_entropy
from cnn_jax.training.metrics import global_norm, metric_sums
from cnn_jax.training.mixing import Mix
from cnn_jax.training.state import TrainState
from cnn_jax.typing import Batch, FeatureMap, Images, Metrics, PerClass

TrainStep: TypeAlias = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]
EvalStep: TypeAlias = Callable[[TrainState, Batch], Metrics]
PredictStep: TypeAlias = Callable[[TrainState, Batch], PerClass]
Normalize: TypeAlias = Callable[[Images], FeatureMap]


def _without_average(state: TrainState) -> TrainState:
    if state.ema:
        raise ValueError(
            "the state has moving averages (init_state(ema=True)), which no step would move: give "
            "make_train_step(average=moving_average(...)) as well"
        )
    return state


def make_train_step(
    model: Any,
    tx: optax.GradientTransformation,
    *,
    loss: Loss = cross_entropy,
    normalize: Normalize = lambda images: images,
    augment: Augment | None = None,
    mix: Mix | None = None,
    average: Average = _without_average,
    frozen: Frozen | None = None,
    accumulate_steps: int = 1,
) -> TrainStep:
    """Returns `step(state, batch, key) -> (state, metric sums)`.

    `model` is any linen module called as `model(images, train=True)`. The loss is averaged over the
    global batch. The metrics are the sums of `loss` and `accuracy` over `count` examples, the norm
    of the gradient as `grad_norm`, and `finite`: 1 where loss and gradient are finite numbers.
    With `augment`, examples are changed by keys of (key, epoch, index), which the batch names, and
    with `mix` images and labels after the normalisation; accuracy is then that of the class with
    the largest share. `average` brings `ema` of the new state up to date.
    Parameters that are `frozen` have no gradient and their BatchNorms keep their statistics; give
    `freeze_updates(tx, frozen)` as the optimiser, since momentum and weight decay move them too.
    With `accumulate_steps` the gradient is that of so many micro-batches in turn, see `accumulate`.

    The step raises ValueError for a batch without what it needs, and for a state and an `average`
    of which one has moving averages and the other has not.
    """
    frozen = frozen or (lambda path: False)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        def gradients(
            params: Any, batch_stats: Any, batch: Batch, dropout_key: jax.Array
        ) -> tuple[Any, Any, Metrics]:
            images, targets = batch["image"], batch["label"]
            if augment is not None or mix is not None:
                _refuse_nameless(batch)
            if augment is not None:
                images = augment(images, key, batch["epoch"], batch["index"])
            images = normalize(images)
            if mix is not None:
                images, targets = mix(images, targets, key, batch["epoch"], batch["index"])

            def mean_loss(params: Any) -> tuple[jax.Array, Any]:
                variables = {
                    "params": stop_gradients(params, frozen),
                    "batch_stats": batch_stats,
                }
                with frozen_statistics(frozen):
                    logits, updated = model.apply(
                        variables,
                        images,
                        train=True,
                        mutable=["batch_stats"],
                        rngs={"dropout": dropout_key},
                    )
                losses = loss(logits, targets)
                return jnp.mean(losses), (logits, losses, updated.get("batch_stats", {}))

            grads, (logits, losses, batch_stats) = jax.grad(mean_loss, has_aux=True)(params)
            return grads, batch_stats, metric_sums(logits, targets, losses, _all_of(images))

        grads, batch_stats, sums = accumulate(gradients, accumulate_steps)(
            state.params, state.batch_stats, batch, jax.random.fold_in(key, state.step)
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=state.ema,
        )
        grad_norm = global_norm(grads)
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
        return average(new_state), {**sums, "grad_norm": grad_norm, "finite": finite}

    return step


def _refuse_nameless(batch: Batch) -> None:
    missing = [repr(name) for name in ("epoch", "index") if name not in batch]
    if missing:
        raise ValueError(
            f"the batch has no {' and no '.join(missing)}: augment and mix take a key for each "
            "example from its epoch and its number, int32 [b]"
        )


def _all_of(images: Images) -> jax.Array:
    """Returns the mask that keeps every example."""
    return jnp.ones(len(images), jnp.float32)


def make_eval_step(
    model: Any, *, loss: Loss = cross_entropy, normalize: Normalize = lambda images: images
) -> EvalStep:
    """Returns `step(state, batch) -> metric sums` over the examples that `batch["mask"]` keeps.

    Without a mask all of them are kept.
    """

    def step(state: TrainState, batch: Batch) -> Metrics:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = model.apply(variables, normalize(batch["image"]), train=False)
        losses = loss(logits, batch["label"])
        mask = batch["mask"] if "mask" in batch else _all_of(batch["image"])
        return metric_sums(logits, batch["label"], losses, mask)

    return step


def make_predict_step(model: Any, *, normalize: Normalize = lambda images: images) -> PredictStep:
    """Returns `step(state, batch) -> probabilities [b, k]` of the images in `batch["image"]`."""

    def step(state: TrainState, batch: Batch) -> PerClass:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return jax.nn.softmax(model.apply(variables, normalize(batch["image"]), train=False))

    return step
