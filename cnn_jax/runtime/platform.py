"""The process and the machine it runs on: devices, and signals that ask it to stop."""

import contextlib
import importlib.metadata
import os
import platform
import signal
from types import FrameType, TracebackType

import jax

RESTART = 75
"""The exit code of a run that is to be started again: EX_TEMPFAIL of sysexits.h."""


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide a run's numbers."""
    packages = ("cnn_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def describe_devices() -> str:
    """Returns a line such as `8 x NVIDIA H200 (gpu), jax 0.10.2`."""
    kind = jax.devices()[0].device_kind
    return f"{jax.device_count()} x {kind} ({jax.default_backend()}), jax {jax.__version__}"


class Interrupted(BaseException):
    """The run was asked to stop by a signal; no error, so `except Exception` lets it pass."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Turns SIGINT and SIGTERM into a wish to stop, while it is entered.

    Until `defer` is called a signal raises `Interrupted` at once: there is nothing to save yet.
    Afterwards it is kept for `check`, so that a step or a save is never torn. A second
    SIGINT raises KeyboardInterrupt wherever the program is.

    Other code may make another error of an `Interrupted`, as the import of a compiled module does;
    leaving this, it is one again.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]
        if self.received is not None and not self._deferring and isinstance(error, Exception):
            raise Interrupted(self.received) from error

    def defer(self) -> None:
        """From now on, keeps a signal for `check`."""
        self._deferring = True

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    def finish(self) -> None:
        """Says that no `check` follows."""

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first = self.received is None
        self.received = self.received or signum
        if not self._deferring:
            raise Interrupted(signum)
        if first:
            os.write(2, b"\nsaving after this step, then stopping; Ctrl-C again does not save\n")
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
