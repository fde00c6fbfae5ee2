"""XLA's defect on the CPU: seen in a program, avoided when compiling, and still there."""

import os
import platform

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax import create_model, init_state, make_eval_step, make_train_step
from cnn_jax.runtime.compiler import (
    WITHOUT_FUSED_REDUCTIONS,
    YNN_FUSIONS,
    _without_fused_reductions,
    compile_program,
    compiler_settings,
)
from cnn_jax.training.miscompile import FLAG, MiscompileWarning, may_be_wrong, warn_if_exposed


def rows():
    """The program of https://github.com/jax-ml/jax/issues/39103; its last number is n squared."""

    def squares(points):
        return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(points)

    points = np.zeros((32769, 3), np.float32)
    points[:, 0] = np.arange(32769)
    return squares, (points,), points[:, 0].astype(np.float64) ** 2


def equal_numbers():
    def sums(matrices):
        return jnp.sum(matrices @ jnp.full_like(matrices, 3.0), axis=-1)

    matrices = np.random.default_rng(0).integers(-9, 10, (5, 60, 60)).astype(np.float32)
    return sums, (matrices,), 3 * 60 * matrices.astype(np.float64).sum(-1)


def equal_kernels():
    def sums(images):
        kernel = jnp.full((1, 1, 32, 16), 2.0)
        convolved = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return convolved.sum((1, 2))

    images = np.random.default_rng(0).integers(-4, 5, (16, 28, 28, 32)).astype(np.float32)
    expected = 2 * images.astype(np.float64).sum((1, 2, 3))
    return sums, (images,), np.repeat(expected[:, None], 16, axis=1)


CASES = {  # the program, and the versions of jaxlib that are known to compile it well
    "rows": (rows, {"0.11.0", "0.11.1", "0.11.2", "0.12.0", "0.12.0.1"}),
    "equal numbers": (equal_numbers, set()),
    "equal kernels": (equal_kernels, set()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_guard_gives_the_right_numbers(case):
    function, arguments, expected = CASES[case][0]()
    compiled = compile_program(jax.jit(function).lower(*arguments))
    np.testing.assert_allclose(compiled(*arguments), expected, rtol=1e-6)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a defect on x86 only")
@pytest.mark.skipif(FLAG in os.environ.get("XLA_FLAGS", ""), reason="XLA_FLAGS cures it")
@pytest.mark.parametrize("case", CASES)
def test_without_the_guard_numbers_are_wrong(case):
    """When this fails on a new jaxlib for all cases, the guard has had its day."""
    program, good = CASES[case]
    function, arguments, expected = program()
    compiled = jax.jit(function).lower(*arguments).compile()
    assert may_be_wrong(compiled.as_text())
    right = np.allclose(compiled(*arguments), expected, rtol=1e-6)
    assert right == (jax.lib.__version__ in good)


def hlo(*fused: str, kind: str = "__ynn_fusion") -> str:
    """Returns a program of one fusion for each text of operations."""
    bodies = "".join(
        f"%fused_computation.{i} (p: f32[8,8]) -> f32[8] {{\n{operations}\n}}\n\n"
        for i, operations in enumerate(fused)
    )
    calls = "".join(
        f"  %f.{i} = f32[8]{{0}} fusion(%x), kind=kCustom, calls=%fused_computation.{i}, "
        f'backend_config={{"fusion_config":{{"kind":"{kind}"}}}}\n'
        for i in range(len(fused))
    )
    return f"HloModule m\n\n{bodies}ENTRY %main (x: f32[8,8]) -> f32[8] {{\n{calls}}}\n"


PRODUCT = "  %d = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}"
CONVOLUTION = "  %c = f32[8,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf"
SUM = "  ROOT %r = f32[8]{0} reduce(%d, %z), dimensions={0}, to_apply=%add"
POOL = "  ROOT %r = f32[8]{0} reduce-window(%d, %z), window={size=2}, to_apply=%max"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (hlo(f"{PRODUCT}\n{SUM}"), True),
        (hlo(f"{CONVOLUTION}\n{SUM}"), True),
        (hlo(f"{PRODUCT}\n{POOL}"), True),
        (hlo(SUM, f"{CONVOLUTION}\n{SUM}"), True),
        (hlo(PRODUCT, SUM), False),
        (hlo(CONVOLUTION), False),
        (hlo(f"{PRODUCT}\n{SUM}", kind="__other"), False),
        (hlo(), False),
    ],
)
def test_the_mark_is_a_product_and_a_reduction_in_one_fusion(text, expected):
    assert may_be_wrong(text) == expected


@pytest.fixture(scope="module")
def network():
    """A model, its optimiser, and the abstract state and batch of its steps."""
    model = create_model("resnet_mini", num_classes=4, stage_sizes=(1, 1), width=8)
    tx = optax.sgd(0.1, momentum=0.9)
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((8,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda images, key: init_state(model, tx, images, key), images, key)
    return model, tx, state, {"image": images, "label": labels}, key


def test_a_training_step_does_not_have_the_mark(network):
    """So the guard costs it nothing: neither a second compilation nor speed."""
    model, tx, state, batch, key = network
    step = jax.jit(make_train_step(model, tx)).lower(state, batch, key)
    for options in ({}, compiler_settings("cpu").options):
        assert not may_be_wrong(step.compile(compiler_options=dict(options)).as_text())


def test_an_evaluation_step_is_cured_of_it(network):
    model, _, state, batch, _ = network
    batch = batch | {"mask": jax.ShapeDtypeStruct((8,), jnp.float32)}
    step = jax.jit(make_eval_step(model)).lower(state, batch)
    for options in ({}, compiler_settings("cpu").options):
        assert not may_be_wrong(compile_program(step, options).as_text())


def test_the_cure_leaves_convolutions_to_every_core():
    """Of evaluation too: YNNPACK has one core make 64 channels or fewer."""

    def mean(x, kernel):
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.maximum(y, 0), axis=(1, 2))

    lowered = jax.jit(mean).lower(jnp.ones((16, 14, 14, 32)), jnp.ones((3, 3, 32, 32)))
    for options, by_library in (({}, True), (compiler_settings("cpu").options, False)):
        cure = _without_fused_reductions(options)
        text = lowered.compile(compiler_options=dict(cure)).as_text()
        assert ("__ynn_fusion" in text) == by_library
    assert cure == {YNN_FUSIONS: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    assert _without_fused_reductions({}) == WITHOUT_FUSED_REDUCTIONS


@pytest.mark.parametrize(
    ("platform", "flags", "warns"),
    [
        ("cpu", "", True),
        ("cpu", "--xla_force_host_platform_device_count=2", True),
        ("cpu", f"{FLAG}=-reduce", False),
        ("gpu", "", False),
        ("tpu", "", False),
    ],
)
def test_who_is_exposed_is_warned(platform, flags, warns, monkeypatch, recwarn):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setenv("XLA_FLAGS", flags)
    if warns:
        with pytest.warns(MiscompileWarning, match=r"compile_program.* or set XLA_.*=-reduce"):
            warn_if_exposed()
    else:
        warn_if_exposed()
    assert not recwarn.list
