"""The gradient of a 1x1 kernel on the CPU: this package's product against that of JAX's own rule.

    python benchmarks/kernel_gradient.py

Prints the processor milliseconds of each for the shapes of ResNet-50, the least of several in turn:
of a program with the gradient among the work that surrounds it in a step, without that work. The
processor's time, as other work on the machine hardly shows in it.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnn_jax.models.convolution import CHANNELS_LAST, convolve

SHAPES = (
    (56, 64, 256),
    (56, 256, 64),
    (28, 128, 512),
    (28, 512, 128),
    (14, 256, 1024),
    (14, 1024, 256),
    (7, 512, 2048),
    (7, 2048, 512),
)
"""Pixels of a side, and channels before and behind the convolution."""

Gradient = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def ours(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    def convolution(kernel: jax.Array) -> jax.Array:
        sides = [(0, 0), (0, 0)]
        return convolve(x, kernel[None, None], (1, 1), sides, dimension_numbers=CHANNELS_LAST)

    return jax.vjp(convolution, kernel)[1](dy)[0]


def by_rule(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    return jax.vjp(lambda kernel: product(x, kernel), kernel)[1](dy)[0]


def nothing(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    return jnp.zeros_like(kernel)


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


def among_others(gradient: Gradient) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns the gradient with what makes its factors, and what else is made of them."""

    def run(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        x, dy = jnp.maximum(x * 1.5, 0), dy * dy + dy
        return gradient(x, kernel, dy), product(x, kernel), product(dy, kernel.T)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"jax {jax.__version__}; ms by JAX's rule, ours")
    for side, before, behind in SHAPES:
        shapes = [(options.images, side, side, before), (before, behind)]
        shapes.append((options.images, side, side, behind))
        arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
        ways = {each: jax.jit(among_others(each)) for each in (by_rule, ours, nothing)}
        least = dict.fromkeys(ways, float("inf"))
        for way in ways.values():
            jax.block_until_ready(way(*arrays))
        for _ in range(options.repeats):
            for each, way in ways.items():
                start = time.process_time()
                jax.block_until_ready(way(*arrays))
                least[each] = min(least[each], time.process_time() - start)
        shown = [1e3 * (least[each] - least[nothing]) for each in (by_rule, ours)]
        print(f"{side} x {side}, {before} to {behind}: {shown[0]:.1f}, {shown[1]:.1f}", flush=True)


if __name__ == "__main__":
    main()
