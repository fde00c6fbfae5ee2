"""Strict settings for every test: 8 virtual devices, checked shapes, no silent broadcasting."""

import gc
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # none: neither read nor write the user's

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

install_import_hook(["cnn_jax.models", "cnn_jax.training"], "type_checks.of_module_level")


def pytest_collection_finish():
    """Lets the collector pass over what was imported: with its defaults it takes 15 % of the time.

    Tracing makes objects by the million, of which few are in cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def untyped():
    """As in use: only tests check annotations as they go."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def compile_quickly():
    """For programs that run once each: most of the time would go into optimising them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
