"""Settings of the parity tests."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(compile_quickly):
    """As elsewhere, in every test here."""
