"""The process and the machine it runs on: devices, and signals that ask it to stop."""

import contextlib
import importlib.metadata
import os
import platform
import re
import signal
from pathlib import Path
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


HUGE_PAGES = "glibc.malloc.hugetlb"
"""A tunable of glibc from 2.35 on; with 1, what malloc maps is of huge pages."""

MAPPED_ANEW = 32 * 2**20
"""Bytes of a block from which on glibc always gives it back when it is freed."""

OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def advice_on_pages(temporaries: int) -> str:
    """Returns what to set before a program for the CPU runs, or an empty string.

    It has so many bytes of temporary arrays. glibc maps them for each call, and the kernel fills
    them page by page, which takes a fifth of a ResNet-50 step (docs/performance.md) and with huge
    pages next to nothing. A process is told of them when it starts, and not later.
    """
    told = os.environ.get("GLIBC_TUNABLES", "")
    library, version = platform.libc_ver()
    knows = library == "glibc" and [int(part) for part in re.findall(r"\d+", version)] >= [2, 35]
    if temporaries < MAPPED_ANEW or HUGE_PAGES in told or not knows:
        return ""
    try:
        on_request = "[madvise]" in OFFERED.read_text()
    except OSError:
        on_request = False
    if not on_request:
        return ""
    setting = ":".join(filter(None, [told, f"{HUGE_PAGES}=1"]))
    return (
        f"GLIBC_TUNABLES={setting} before the command would make steps quicker, which take "
        f"{temporaries / 2**20:,.0f} MiB of temporary memory, in huge pages then"
    )


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
