"""Optimisers and learning-rate schedules: optax, with the conventions of the field."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from optax.contrib import MuonDimensionNumbers, muon

OPTIMIZERS = ("sgd", "adamw", "lars", "lamb", "muon")
SCHEDULES = ("cosine", "linear", "step", "one_cycle", "constant")

ONE_CYCLE_START = 1 / 25
"""Where "one_cycle" begins, as a share of its peak: torch's `div_factor`."""


def decay_mask(params: Any) -> Any:
    """Returns True for the arrays that decay, those of two or more axes.

    In a convolutional network these are the kernels, not the biases nor the scales of norms.
    """
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_schedule(
    name: str,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    end_factor: float = 0.0,
    milestones: Sequence[int] = (),
    step_factor: float = 0.1,
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    It rises linearly from 0 to `peak` over `warmup_steps`, then

    - "constant" stays;
    - "cosine" follows half a cosine (Loshchilov and Hutter 2016, arXiv:1608.03983) and "linear" a
      line, down to `peak * end_factor` after `total_steps`;
    - "step" is multiplied by `step_factor` at each of the `milestones`, steps from the first on, as
      by torch's `MultiStepLR`.

    "one_cycle" rises along half a cosine from `peak / 25` over `warmup_steps` and falls along
    another to `peak * end_factor`: torch's `OneCycleLR`, which is at both a step early.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule name={name!r}: must be one of {', '.join(SCHEDULES)}")
    if name == "one_cycle":
        return _one_cycle(peak, total_steps, warmup_steps, end_factor)
    decay_steps = max(1, total_steps - warmup_steps)
    schedules = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=end_factor),
        "linear": optax.linear_schedule(peak, peak * end_factor, decay_steps),
        "step": optax.piecewise_constant_schedule(
            peak, {milestone - warmup_steps: step_factor for milestone in milestones}
        ),
        "constant": optax.constant_schedule(peak),
    }
    if not warmup_steps:
        return schedules[name]
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, schedules[name]], [warmup_steps])


def _one_cycle(
    peak: float, total_steps: int, warmup_steps: int, end_factor: float
) -> optax.Schedule:
    top = max(0, warmup_steps - 1)
    fall = optax.cosine_decay_schedule(peak, max(1, total_steps - 1 - top), alpha=end_factor)
    if not top:
        return fall

    def rise(count: ArrayLike) -> jax.Array:
        left = (1 + jnp.cos(jnp.pi / top * jnp.asarray(count))) / 2
        return peak - peak * (1 - ONE_CYCLE_START) * left

    return optax.join_schedules([rise, fall], [top])


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
    clip_norm: float = 0.0,
    clip_ratio: float = 0.0,
) -> optax.GradientTransformation:
    """Returns one of `OPTIMIZERS`; biases and the parameters of norms do not decay.

    - "sgd": torch's, the decay is added to the gradient.
    - "adamw": torch's, the decay is decoupled.
    - "lars" (You et al. 2017, arXiv:1708.03888): SGD whose step is 0.001 of a kernel's norm times
      the rate; biases and norms take plain steps.
    - "lamb" (You et al. 2020, arXiv:1904.00962): AdamW whose step is the parameter's norm times
      the rate.
    - "muon" (Jordan 2024): the mean gradient of a kernel, as a matrix of inputs by outputs, with
      all its singular values near 1; scaled so that rate and decay are those of AdamW (Liu et al.
      2025, arXiv:2502.16982), which takes biases and norms, with `nesterov` too.

    Before anything else, a gradient whose norm over all parameters is larger is scaled down to
    `clip_norm` (torch's `clip_grad_norm_`), or that of each unit to `clip_ratio` times the norm
    of its weights (AGC, Brock et al. 2021, arXiv:2102.06171, which spares the last layer; here
    all are clipped); 0 is never.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer name={name!r}: must be one of {', '.join(OPTIMIZERS)}")

    def sgd() -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
        )

    def adamw() -> optax.GradientTransformation:
        return optax.adamw(
            schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask
        )

    def lars() -> optax.GradientTransformation:
        return optax.lars(
            schedule,
            weight_decay=weight_decay,
            weight_decay_mask=decay_mask,
            trust_ratio_mask=decay_mask,
            momentum=momentum,
            nesterov=nesterov,
        )

    def lamb() -> optax.GradientTransformation:
        return optax.lamb(
            schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask
        )

    def muon_or_adamw() -> optax.GradientTransformation:
        return muon(
            schedule,
            beta=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            eps=eps,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrices,
        )

    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "sgd": sgd,
        "adamw": adamw,
        "lars": lars,
        "lamb": lamb,
        "muon": muon_or_adamw,
    }
    clips = []
    if clip_norm:
        clips.append(optax.clip_by_global_norm(clip_norm))
    if clip_ratio:
        clips.append(optax.adaptive_grad_clip(clip_ratio))
    tx = makers[name]()
    return optax.chain(*clips, tx) if clips else tx


def _matrices(params: Any) -> Any:
    """Returns, for every kernel, that its last axis are the outputs; None for other arrays."""

    def matrix(leaf: jax.Array) -> MuonDimensionNumbers | None:
        last = leaf.ndim - 1
        return MuonDimensionNumbers(tuple(range(last)), (last,)) if last > 0 else None

    return jax.tree.map(matrix, params)
