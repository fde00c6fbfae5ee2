"""A defect of XLA on the CPU that makes some programs compute wrong numbers, and how to see it.

XLA grows a fusion around a sum or a maximum and hands it to the library YNNPACK. When that fusion
has also taken in a matrix product or a convolution it can be wrong, silently:

- the last rows of a product are those of an earlier block (https://github.com/jax-ml/jax/issues/39103):
  jaxlib 0.10.2, not 0.11.0 and later;
- a product with an array of equal numbers, such as the gradient of a mean, reads memory that
  nothing has written: every jaxlib from 0.10.2 to 0.12.0.1, the newest when this was written.

A fusion of sums and elementwise arithmetic alone has never been seen wrong, and the BatchNorms of
a training step live on it: with every such fusion left out a step of ResNet-50 takes a third
longer. So programs are told apart by what the compiler has made of them. Training steps do not
have the mark; evaluation steps may, whose layers become one fusion from the mean over the image
back through the convolutions.
"""

import os
import re
import warnings

import jax

FLAG = "--xla_cpu_experimental_ynn_fusion_type"

_COMPUTATION = re.compile(r"^%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_LIBRARY_FUSION = re.compile(r'calls=%?([\w.-]+)[^\n]*"__ynn_fusion"')


class MiscompileWarning(RuntimeWarning):
    """Programs of this process may compute wrong numbers."""


def may_be_wrong(hlo: str) -> bool:
    """Returns whether a program, as optimised HLO text, has a fusion of the kind that can be wrong.

    That is one for YNNPACK with a matrix product or a convolution as well as a reduction.
    """
    fused = set(_LIBRARY_FUSION.findall(hlo))
    return bool(fused) and any(
        re.search(r" (dot|convolution)\(", body) and re.search(r" reduce(-window)?\(", body)
        for name, body in _COMPUTATION.findall(hlo)
        if name in fused
    )


def warn_if_exposed() -> None:
    """Warns, once where Python shows a warning once, if programs on this machine may be wrong.

    That is the case on the CPU unless FLAG is set. Makes JAX choose its backend.
    """
    if jax.default_backend() == "cpu" and FLAG not in os.environ.get("XLA_FLAGS", ""):
        warnings.warn(
            "on the CPU, XLA can compute wrong numbers where a matrix product or a convolution is "
            "summed (https://github.com/jax-ml/jax/issues/39103). Compile with "
            "cnn_jax.runtime.compiler.compile_program(jax.jit(step).lower(...)), which sees and "
            f"avoids it, or set XLA_FLAGS={FLAG}=-reduce before Python starts, which makes a step "
            "of ResNet-50 a third slower",
            MiscompileWarning,
            stacklevel=3,
        )
