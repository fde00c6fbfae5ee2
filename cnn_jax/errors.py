"""The kind of error that a command prints without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the person at the terminal can mend; the message says what, where and how."""


class UsageError(UserError):
    """A mistake in the command itself, whatever the files hold."""


def require_between(least: float, most: float, **values: float) -> None:
    """Raises ValueError unless each value, named by its argument, is from `least` to `most`."""
    for name, value in values.items():
        if not least <= value <= most:
            raise ValueError(f"{name}={value}: must be from {least} to {most}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `" (did you mean 'x'?)"` for the known name that is most like `name`, else `""`."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
