"""The sides that run on JAX: this package, and the plain linen network beside it."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnn_jax.benchmarking.linen_resnet import plain_network, plain_variables
from cnn_jax.benchmarking.machine import told
from cnn_jax.benchmarking.workload import (
    LEARNING_RATE,
    MEAN,
    MOMENTUM,
    OURS,
    STD,
    WEIGHT_DECAY,
    Workload,
    architecture,
)
from cnn_jax.models.folding import fold_batch_norms
from cnn_jax.models.torch_weights import from_torch, to_torch
from cnn_jax.runtime import hlo
from cnn_jax.runtime.compiler import compile_program, compiler_settings
from cnn_jax.runtime.platform import describe_devices, versions
from cnn_jax.training.augment import normalize
from cnn_jax.training.optim import make_optimizer
from cnn_jax.training.state import TrainState, init_state
from cnn_jax.training.steps import make_train_step
from cnn_jax.typing import Metrics

PRODUCT_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
"""Rows and columns of the matrices whose product is timed."""

COPY_BYTES = {"cpu": 2**28, "gpu": 2**31, "tpu": 2**30}
"""Of the array whose copy is timed: far more than any cache holds."""


class JaxSide:
    """One network as JAX runs it, compiled when it is made.

    Attributes:
      facts: what is known of it before it runs, for JSON.
    """

    def __init__(self, name: str, workload: Workload, folder: Path) -> None:
        """Compiles the network; `folder` has the weights, or gets them if the side is ours."""
        self._workload = workload
        batch = workload.make_batch()
        if not workload.training:
            batch = {"image": batch["image"]}
        self._batch = jax.device_put(batch)
        make = {OURS: _ours, "linen": _linen}[name]
        run, self._state, options = make(workload, folder)
        donated = (0,) if workload.training else ()
        start = time.perf_counter()
        lowered = jax.jit(run, donate_argnums=donated).lower(self._state, self._batch)
        lowering, start = time.perf_counter() - start, time.perf_counter()
        if name == OURS:
            self._program = compile_program(lowered, options)
        else:
            self._program = lowered.compile()
        compiling = time.perf_counter() - start
        self._text = self._program.as_text() or ""
        program = hlo.read(self._text)
        params = self._state.params if workload.training else self._state["params"]
        self.facts = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "device": describe_devices(),
            "platform": jax.default_backend(),
            "device_kind": jax.devices()[0].device_kind,
            "versions": versions(),
            "options": {name: str(value) for name, value in options.items()},
            "flags": told("XLA_FLAGS", "GLIBC_TUNABLES"),
            "compile_seconds": {"lowering": lowering, "compiling": compiling},
            "bytes": hlo.traffic(program).total,
            "launches": hlo.launches(program),
        }

    def results(self, count: int) -> list[Any]:
        """Returns what so many steps give, one after the other: losses, or logits."""
        results = [jax.device_get(self._once()) for _ in range(count)]
        if self._workload.training:
            return [float(sums["loss"] / sums["count"]) for sums in results]
        return [logits.tolist() for logits in results]

    def window(self, count: int) -> float:
        """Returns the seconds that so many steps take, until the last of them is done."""
        start = time.perf_counter()
        for _ in range(count):
            result = self._once()
        jax.block_until_ready((result, self._state))
        return time.perf_counter() - start

    def rates(self) -> dict[str, float]:
        """Returns bytes a second of a copy, and operations a second of a matrix product."""
        platform, dtype = jax.default_backend(), jnp.dtype(self._workload.precision)
        size = PRODUCT_SIZE[platform]
        matrix = jnp.ones((size, size), dtype)
        product = jax.jit(lambda x, y: x @ y, donate_argnums=1)
        count = COPY_BYTES[platform] // 4
        source, target = (jnp.full(count, value, jnp.float32) for value in (0.0, 1.0))
        # Into memory that is there already: fresh pages would cost more than the copy. A sign is
        # changed because XLA would let a plain copy be no work at all.
        copy = jax.jit(lambda source, target: -source, donate_argnums=1, keep_unused=True)
        return {
            "copy": 2 * 4 * count / _best_seconds(functools.partial(copy, source), target),
            "product": 2.0
            * size**3
            / _best_seconds(functools.partial(product, matrix), matrix + 0),
        }

    def bound_seconds(self, rates: dict[str, float]) -> float:
        """Returns what a run of the program takes at least, at these rates.

        Kernels run one after the other, each as long as its operations or its bytes need.
        """
        return sum(
            kernel.times
            * max(kernel.flops.matrix / rates["product"], kernel.traffic.total / rates["copy"])
            for kernel in hlo.kernels(hlo.read(self._text))
        )

    def _once(self) -> Any:
        if not self._workload.training:
            return self._program(self._state, self._batch)
        self._state, sums = self._program(self._state, self._batch)
        return sums


def _best_seconds(run: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int = 8) -> float:
    """Returns the least time of `x = run(x)`, the compile left out."""
    best = float("inf")
    for repeat in range(repeats + 1):
        x.block_until_ready()
        start = time.perf_counter()
        x = run(x)
        x.block_until_ready()
        if repeat:
            best = min(best, time.perf_counter() - start)
    return best


def _ours(workload: Workload, folder: Path) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
    """Returns the step or the prediction of this package, its state and the compiler's options."""
    model, dtype = workload.make_model(), jnp.dtype(workload.precision)
    channels = workload.image_shape[-1]
    prepare = functools.partial(
        normalize, mean=(MEAN,) * channels, std=(STD,) * channels, dtype=dtype
    )
    tx = make_optimizer(
        "sgd", LEARNING_RATE, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    options = dict(compiler_settings().options)

    def init() -> TrainState:
        image = jnp.zeros((1, *workload.image_shape), jnp.float32)
        return init_state(model, tx, image, jax.random.key(0))

    state = compile_program(jax.jit(init).lower(), options)()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    _write_weights(variables, folder)
    if workload.training:
        step = make_train_step(model, tx, normalize=prepare)
        return (lambda state, batch: step(state, batch, jax.random.key(1))), state, options

    image = jax.ShapeDtypeStruct((workload.batch_size, *workload.image_shape), dtype)
    folded, variables = fold_batch_norms(model, jax.device_get(variables), image)

    def predict(variables: Any, batch: Any) -> Any:
        return folded.apply(variables, prepare(batch["image"]), train=False)

    return predict, jax.device_put(variables), options


@flax.struct.dataclass
class PlainState:
    """What the plain step takes and gives back."""

    params: Any
    batch_stats: Any
    opt_state: Any


def _linen(workload: Workload, folder: Path) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
    """Returns the same of the plain network, with XLA's own options."""
    of, dtype = architecture(workload), jnp.dtype(workload.precision)
    model = plain_network(of, dtype)
    variables = jax.device_put(plain_variables(_read_weights(workload, folder), of.stage_sizes))

    def normalized(images: jax.Array) -> jax.Array:
        return ((images.astype(jnp.float32) / 255 - MEAN) / STD).astype(dtype)

    if not workload.training:

        def predict(variables: Any, batch: Any) -> jax.Array:
            logits: Any = model.apply(variables, normalized(batch["image"]), train=False)
            return logits.astype(jnp.float32)

        return predict, variables, {}

    tx = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY, lambda tree: jax.tree.map(_is_kernel, tree)),
        optax.sgd(LEARNING_RATE, momentum=MOMENTUM, nesterov=True),
    )

    def train(state: PlainState, batch: Any) -> tuple[PlainState, Metrics]:
        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            logits, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                normalized(batch["image"]),
                train=True,
                mutable=["batch_stats"],
            )
            one_hot = jax.nn.one_hot(batch["label"], of.num_classes)
            losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), one_hot)
            return jnp.mean(losses), updated["batch_stats"]

        (loss, statistics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return PlainState(params, statistics, opt_state), {"loss": loss, "count": jnp.float32(1)}

    params = variables["params"]
    return train, PlainState(params, variables["batch_stats"], jax.jit(tx.init)(params)), {}


def _is_kernel(leaf: Any) -> bool:
    return leaf.ndim > 1


def _write_weights(variables: Any, folder: Path) -> None:
    """Writes the weights under torch's names, which every side can read."""
    tensors: dict[str, Any] = to_torch(jax.device_get(variables))
    np.savez(folder / "weights.npz", **tensors)


def _read_weights(workload: Workload, folder: Path) -> dict[str, Any]:
    model = workload.make_model()
    image = jax.ShapeDtypeStruct((1, *workload.image_shape), jnp.float32)
    like = jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image)
    with np.load(folder / "weights.npz") as tensors:
        counters = ("num_batches_tracked",)
        return from_torch({k: v for k, v in tensors.items() if not k.endswith(counters)}, like)
