"""What pictures of a compiled step call its parts."""

import pytest

from cnn_jax.runtime.compile_plot import layer


@pytest.mark.parametrize(
    ("op_name", "name"),
    [
        (
            "jit(step)/transpose(jvp(ModernCNN))/ModernCNN.stages/stage1_block3/conv3/norm/cond/"
            "branch_0_fun/cond/branch_0_fun/reduce",
            "stage1_block3/conv3/norm/reduce, gradient",
        ),
        (
            "jit(step)/jvp(ModernCNN)/ModernCNN.stages/stem/conv/conv_general_dilated",
            "stem/conv/conv_general_dilated",
        ),
        (
            "jit(step)/while/body/closed_call/transpose(jvp(ModernCNN))/checkpoint/"
            "rematted_computation/stage2_block1/conv1/norm/mul",
            "stage2_block1/conv1/norm/mul, gradient",
        ),
        ("jit(step)/add", "add"),
        ("batch['image']", "batch['image']"),
        ("", ""),
    ],
)
def test_an_operation_is_named_by_its_layer(op_name, name):
    assert layer(op_name) == name
