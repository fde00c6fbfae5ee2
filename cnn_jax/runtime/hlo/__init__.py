"""What the text of a compiled step says that it costs.

The text is that of `jax.jit(f).lower(...).compile().as_text()`, of the CPU, GPU or TPU compiler.
Nothing here runs a program or imports JAX.
"""

from cnn_jax.runtime.hlo.costs import (
    Collective,
    Flops,
    Kernel,
    Traffic,
    collectives,
    flops,
    kernels,
    launches,
    traffic,
    unknown_loops,
)
from cnn_jax.runtime.hlo.memory import Buffer, Liveness, Point, large_buffers, liveness
from cnn_jax.runtime.hlo.text import Array, Frame, Program, read

__all__ = [
    "Array",
    "Buffer",
    "Collective",
    "Flops",
    "Frame",
    "Kernel",
    "Liveness",
    "Point",
    "Program",
    "Traffic",
    "collectives",
    "flops",
    "kernels",
    "large_buffers",
    "launches",
    "liveness",
    "read",
    "traffic",
    "unknown_loops",
]
