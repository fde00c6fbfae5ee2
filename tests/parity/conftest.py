"""Settings of the parity tests."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    """These programs run once each: most of the time would go into optimising them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
