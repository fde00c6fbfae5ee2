"""Optimisers and learning-rate schedules: optax, with the conventions of the field."""

from typing import Any

import jax
import optax

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant")


def decay_mask(params: Any) -> Any:
    """Returns True for the arrays that decay, those of two or more axes.

    In a convolutional network these are the kernels, not the biases nor the scales of norms.
    """
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_schedule(
    name: str, *, peak: float, total_steps: int, warmup_steps: int = 0, end_factor: float = 0.0
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    It rises linearly from 0 to `peak` over `warmup_steps`, then stays ("constant") or follows half
    a cosine (Loshchilov and Hutter 2016, arXiv:1608.03983) down to `peak * end_factor` ("cosine").
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule name={name!r}: must be one of {', '.join(SCHEDULES)}")
    decay_steps = max(1, total_steps - warmup_steps)
    schedules = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=end_factor),
        "constant": optax.constant_schedule(peak),
    }
    if not warmup_steps:
        return schedules[name]
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, schedules[name]], [warmup_steps])


def make_optimizer(
    name: str,
    schedule: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Returns "sgd" (torch's: the decay is added to the gradient) or "adamw" (decoupled decay).

    Biases and the parameters of norms do not decay.
    """
    if name == "sgd":
        return optax.chain(
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
        )
    if name == "adamw":
        return optax.adamw(
            schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask
        )
    raise ValueError(f"optimizer name={name!r}: must be one of {', '.join(OPTIMIZERS)}")
