"""Parameter counts against published ones, without making a single parameter."""

import jax
import jax.numpy as jnp
import pytest

from cnn_jax import MODELS, create_model

TORCHVISION = (
    "torchvision 0.28 `*_Weights.meta['num_params']`, also pytorch.org/vision/stable/models.html"
)
TIMM = (
    "timm 1.0.31 `results/results-imagenet.csv`, in millions; exact by counting `create_model(...)`"
)
TIMM_BLOCK_ARGUMENTS = "counted from timm 1.0.31 `resnet50(block_args={'attn_layer': ...})`"
REFERENCE = (
    "resnet50 and a bias for each of its convolutions, 26,560 in all: the reference's most literal "
    "reading that runs"
)

PUBLISHED = {
    "modern_cnn": (25_557_032, TORCHVISION),  # resnet50 under the reference's name
    "modern_cnn_literal": (25_583_592, REFERENCE),
    "resnet18": (11_689_512, TORCHVISION),
    "resnet34": (21_797_672, TORCHVISION),
    "resnet50": (25_557_032, TORCHVISION),
    "resnet101": (44_549_160, TORCHVISION),
    "resnet152": (60_192_808, TORCHVISION),
    "resnext50_32x4d": (25_028_904, TORCHVISION),
    "wide_resnet50_2": (68_883_240, TORCHVISION),
    "resnet50d": (25_576_264, TIMM),
    "seresnet50": (28_088_024, TIMM),
    "ecaresnet50": (25_557_118, TIMM_BLOCK_ARGUMENTS + " 'eca'"),
    "cbam_resnet50": (28_073_576, TIMM_BLOCK_ARGUMENTS + " 'cbam'"),
    "googlenet": (6_624_904, TORCHVISION),  # without its auxiliary heads
    "convnext_tiny": (28_589_128, TORCHVISION),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    model = create_model(name)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    counted = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    published, source = PUBLISHED[name]
    assert counted == published, source


def test_every_model_has_a_published_count_but_the_small_ones():
    assert set(PUBLISHED) == {name for name in MODELS if not name.endswith("_mini")}
