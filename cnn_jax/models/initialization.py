"""What a layer's weights are before training, by the conventions of torch and torchvision."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax.models.convolution import convolve
from cnn_jax.typing import Array

Initializer: TypeAlias = Callable[..., Any]
"""Makes an array: `initializer(key, shape, dtype)`."""

kaiming_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He et al. 2015 (arXiv:1502.01852) with fan-out, as torchvision initialises its ResNets."""

torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of torch's `Conv2d` and `Linear` weights."""


def torch_bias(fan_in: int) -> Initializer:
    """Returns U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of torch's biases."""
    bound = 1 / math.sqrt(fan_in)

    def initialize(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialize


def zero_bias(fan_in: int) -> Initializer:
    """Returns the initialiser of zeros."""
    return nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class Convolution:
    """An `nn.Conv`, made inside a compact method when it is called, or its kernel alone."""

    features: int
    kernel_size: Sequence[int]
    feature_group_count: int
    initialization: "Initialization"
    arguments: Mapping[str, Any]

    def __call__(self, x: Array) -> jax.Array:
        """Returns what `nn.Conv` does."""
        start = self.initialization
        return nn.Conv(
            self.features,
            self.kernel_size,
            feature_group_count=self.feature_group_count,
            kernel_init=start.kernel,
            bias_init=start.bias(max(1, math.prod(self._shape(x)[:-1]))),
            conv_general_dilated=convolve,
            **self.arguments,
        )(x)

    @property
    def is_pointwise(self) -> bool:
        """Whether it multiplies the channels of a pixel by its kernel, and nothing else."""
        asked = {"strides", "padding", "use_bias", "dtype", "name"}
        return (
            tuple(self.kernel_size) == (1, 1)
            and self.feature_group_count == 1
            and self.arguments.keys() == asked
            and self.arguments["padding"] == [(0, 0), (0, 0)]
            and not self.arguments["use_bias"]
        )

    def make_kernel(self, x: Array) -> jax.Array:
        """Returns the kernel, [h, w, c, features] and float32, for what convolves x by itself."""
        shape = self._shape(x)
        return ConvolutionKernel(self.initialization.kernel, shape, name=self.arguments["name"])()

    def _shape(self, x: Array) -> tuple[int, ...]:
        return (*self.kernel_size, x.shape[-1] // self.feature_group_count, self.features)


class ConvolutionKernel(nn.Module):
    """The parameter of an `nn.Conv` without bias.

    Attributes:
      initializer: of the kernel.
      shape: [h, w, c, features].
    """

    initializer: Initializer
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Any:
        """Returns the parameter."""
        return self.param("kernel", self.initializer, self.shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Initialization:
    """Makes convolutions and dense layers whose weights start in one way.

    Attributes:
      kernel: initialiser of kernels.
      bias: makes the initialiser of a bias from the number of inputs of an output, the fan-in.
    """

    kernel: Initializer
    bias: Callable[[int], Initializer]

    def conv(
        self,
        features: int,
        *,
        kernel_size: Sequence[int],
        feature_group_count: int = 1,
        **arguments: Any,
    ) -> Convolution:
        """Returns an `nn.Conv`, to be called inside a compact method."""
        return Convolution(features, kernel_size, feature_group_count, self, arguments)

    def dense(self, features: int, **arguments: Any) -> Callable[[Array], jax.Array]:
        """Returns an `nn.Dense`, to be called inside a compact method; each call makes one."""

        def multiply(x: Array) -> jax.Array:
            return nn.Dense(
                features,
                kernel_init=self.kernel,
                bias_init=self.bias(max(1, x.shape[-1])),
                **arguments,
            )(x)

        return multiply


KAIMING = Initialization(kaiming_normal_fan_out, zero_bias)
TORCH = Initialization(torch_uniform, torch_bias)


def normal(stddev: float, bias: Callable[[int], Initializer]) -> Initialization:
    """Returns N(0, stddev**2) kernels.

    torchvision cuts them at -2 and 2, a hundred deviations away: never.
    """
    return Initialization(nn.initializers.normal(stddev), bias)
