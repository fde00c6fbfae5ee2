"""How the tests check the types and shapes that the package's functions are annotated with."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def of_module_level(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with its annotations checked, unless it is defined within another.

    Those would be given new checks whenever the other is called, a fifth of the tests' time.
    """
    return function if "<locals>" in function.__qualname__ else beartype(function)
