"""Normalising by a batch's statistics: values and gradients against float64 NumPy and JAX."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import EPSILON
from formulas import batch_norm as formula

from cnn_jax import create_model
from cnn_jax.models import batch_statistics
from cnn_jax.models.batch_statistics import normalize, relu
from cnn_jax.models.layers import ConvBlock
from cnn_jax.runtime.compiler import compiler_settings


def ours(x, scale, bias, rectify):
    return normalize(x, scale, bias, EPSILON, rectify, x.dtype)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("shape", [(4, 5, 3, 6), (8, 6)])
def test_values_and_gradients_are_those_of_the_formula(shape, rectify):
    """The gradients that come in through mean and variance too."""
    rng = np.random.default_rng(0)
    arguments = [rng.normal(size=size) for size in (shape, shape[-1:], shape[-1:])]
    cotangents = [rng.normal(size=size) for size in (shape, shape[-1:], shape[-1:])]
    with jax.enable_x64(True):
        arguments, cotangents = jax.tree.map(jnp.asarray, (arguments, tuple(cotangents)))
        values, pull_back = jax.vjp(functools.partial(ours, rectify=rectify), *arguments)
        expected, pull_back_formula = jax.vjp(
            functools.partial(formula, rectify=rectify), *arguments
        )
        gradients = pull_back(cotangents), pull_back_formula(cotangents)
    for found, wanted in [*zip(values, expected, strict=True), *zip(*gradients, strict=True)]:
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(4, 5, 3, 6), (8, 6)])
def test_what_a_gpu_adds_up_is_the_same(shape):
    """By what it is given, on a CPU."""
    a, b = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    axes = tuple(range(len(shape) - 1))
    found = batch_statistics._together(jnp.asarray(a), jnp.asarray(b))
    for sums, array in zip(found, (a, b), strict=True):
        np.testing.assert_allclose(sums, array.sum(axes, dtype=np.float64), rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_those_of_the_formula():
    rng = np.random.default_rng(1)
    x, direction = rng.normal(size=(2, 5, 3))
    with jax.enable_x64(True):
        curvatures = [
            jax.jvp(
                jax.grad(lambda x, of=of: jnp.sum(of(x, 1 + x[0], x[1], False)[0] ** 3)),
                (jnp.asarray(x),),
                (jnp.asarray(direction),),
            )[1]
            for of in (ours, formula)
        ]
    np.testing.assert_allclose(*curvatures, rtol=1e-8, atol=1e-9)


def test_relu_and_its_gradient():
    x = jnp.asarray([-2.0, -0.0, 0.0, 3.0])
    y, pull_back = jax.vjp(relu, x)
    assert y.tolist() == [0, 0, 0, 3]
    assert pull_back(jnp.asarray([5.0, 6.0, 7.0, 8.0]))[0].tolist() == [0, 0, 0, 8]
    assert jnp.isnan(relu(jnp.asarray([jnp.nan]))).all()
    of_square = jax.vmap(jax.grad(jax.grad(lambda x: relu(x) ** 2)))
    assert of_square(x).tolist() == [0, 0, 0, 2]


def test_a_cpu_reorders_what_was_normalised_and_does_not_normalise_again():
    """The feature map that the gradient of the second kernel reorders, in the compiled program."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return ConvBlock(12)(ConvBlock(12)(x, train=True), train=True)

    images = jnp.zeros((8, 6, 6, 4))
    variables = Two().init(jax.random.key(0), images)

    def loss(variables):
        return jnp.sum(jnp.sin(Two().apply(variables, images, mutable=True)[0]))

    compiled = (
        jax.jit(jax.grad(loss))
        .lower(variables)
        .compile(compiler_options=dict(compiler_settings("cpu").options))
    )
    computations = re.findall(r"^%fused_.*?^}", compiled.as_text(), re.M | re.S)
    reorders = [text for text in computations if re.search(r"\[12,6,6,8\].* transpose\(", text)]
    assert len(reorders) == 1
    assert not re.search(r" (multiply|subtract|maximum)\(", reorders[0])


@pytest.mark.parametrize(("platform", "barriers"), [("cuda", 1), ("tpu", 0), ("cpu", 0)])
def test_only_a_gpu_is_asked_to_compute_again_what_it_could_keep(platform, barriers):
    def loss(x, scale, bias):
        return jnp.sum(ours(x, scale, bias, True)[0])

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 5, 3, 6), (6,), (6,))]
    traced = jax.jit(jax.grad(loss)).trace(*shapes)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.optimization_barrier") == barriers


@pytest.mark.parametrize(
    ("platform", "barriers"), [("cuda", ["backward"]), ("tpu", ["forward"]), ("cpu", [])]
)
def test_a_tpu_makes_the_output_of_a_relu_once_and_a_gpu_its_gradient(platform, barriers):
    def at(x):
        """The value is that of the forward pass of a gradient."""
        y, pull_back = jax.vjp(relu, x)
        return {"forward": y, "backward": pull_back(x)[0]}

    found = []
    for part in ("forward", "backward"):
        traced = jax.jit(lambda x, part=part: at(x)[part]).trace(jax.ShapeDtypeStruct((9,), "f4"))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        found += [part] * text.count("stablehlo.optimization_barrier")
    assert found[:1] == barriers


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_network_that_evaluates_has_derivatives_of_both_directions(norm):
    """`u . (J v) = v . (J^T u)`."""
    model = create_model("bottleneck_mini", width=16, stage_sizes=(1, 1), norm=norm, num_classes=5)
    rng = np.random.default_rng(0)
    image, v = (jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32) for _ in range(2))
    u = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    variables = jax.jit(lambda: model.init(jax.random.key(0), image, train=False))()

    @jax.jit
    def both(image):
        def logits(image):
            return model.apply(variables, image, train=False)

        forward = jnp.sum(u * jax.jvp(logits, (image,), (v,))[1])
        return forward, jnp.sum(v * jax.vjp(logits, image)[1](u)[0])

    np.testing.assert_allclose(*both(image), rtol=1e-4)


def test_branches_of_equal_shape_are_traced_once(monkeypatch):
    """However many norms a network has: what a platform does is traced in Python."""
    traced = []
    apart = batch_statistics._apart

    def counted(a, b):
        traced.append(a.shape)
        return apart(a, b)

    monkeypatch.setattr(batch_statistics, "_apart", counted)

    def loss(x, scale):
        for _ in range(5):
            x, _, _ = ours(x, scale, scale, True)
        return x.sum()

    jax.eval_shape(jax.grad(loss), jnp.ones((2, 5, 7, 3)), jnp.ones(3))
    assert set(traced) == {(2, 5, 7, 3)}
    assert len(traced) <= 3, "forwards, and the two forms backwards; not for each of five norms"
