"""A run that hangs is told from one that is slow, and ended, so that something can start it again.

A device, a collective, a file system or a queue may stop answering with the main thread inside it.
A thread of its own sees that, as those calls let other Python threads run; where one does not, a
timer of faulthandler, which needs no Python, goes off instead.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

from cnn_jax.runtime.platform import RESTART

STANDARD_ERROR = 2


class Watchdog:
    """Ends the process when `beat` is not called for `timeout` seconds in a block of `watching`.

    It prints the stacks of all threads on standard error, and what to do; the exit code is
    `RESTART`, or 1 if the process was too stuck to say so, which is seen outside of `watching` too,
    while the watchdog is entered. With a timeout of 0 it does nothing.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._watching = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            self._arm()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timeout:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Says that the run goes on."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def watching(self, watching: bool = True) -> Iterator[None]:
        """Expects beats within the block; with False it may take any time, as a compiler does."""
        before = self._watching
        self.beat()
        self._watching = watching
        try:
            yield
        finally:
            self.beat()
            self._watching = before

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout / 10)):
            self._arm()
            if self._watching and time.monotonic() - self._last > self._timeout:
                self._end()

    def _arm(self) -> None:
        # Not to sys.stderr, which the data's preparation replaces for a while.
        faulthandler.dump_traceback_later(2 * self._timeout, exit=True, file=STANDARD_ERROR)

    def _end(self) -> None:
        sys.stderr.flush()
        os.write(
            STANDARD_ERROR,
            f"\nno step has ended for {self._timeout:g} s; the threads are at\n".encode(),
        )
        faulthandler.dump_traceback(all_threads=True, file=STANDARD_ERROR)
        os.write(
            STANDARD_ERROR,
            b"the step hangs (--step-timeout): a device, a disk, the network or another process "
            b"does not answer. The same command goes on from the newest checkpoint\n",
        )
        os._exit(RESTART)
