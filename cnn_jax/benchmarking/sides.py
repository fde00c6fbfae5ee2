"""One process for each side: it compiles, and then runs when it is told to.

XLA and PyTorch each keep a pool of as many threads as there are cores, and a pool spins a while
when its work is done. In one process the two would also share the allocator, and whoever was
loaded first would decide which OpenMP there is. So each side has a process of its own, as in real
use, and they take turns: the others sleep in a read from a pipe, and each window begins with a step
that is not timed, by which time the last pool has gone to sleep.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cnn_jax.benchmarking.workload import OURS, Workload
from cnn_jax.errors import UserError


class Side:
    """One side, running in a process of its own.

    Attributes:
      facts: what it has said of itself, for JSON.
    """

    def __init__(self, name: str, workload: Workload, folder: Path, memory_share: float) -> None:
        """Starts the process, and returns when it has compiled.

        Raises UserError where it cannot, with what it said.
        """
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, name, workload, folder)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with _environment({"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{memory_share:.2f}"}):
            self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._receive()

    @property
    def process(self) -> int:
        """Returns the number of its process."""
        return self._process.pid or 0

    def results(self, count: int) -> list[Any]:
        """Returns what so many steps give, one after the other: losses, or logits."""
        return self._ask("results", count)

    def window(self, count: int) -> float:
        """Returns the seconds of a step, the mean of so many."""
        return self._ask("window", count) / count

    def rates(self) -> dict[str, float]:
        """Returns bytes a second of a copy and operations a second of a matrix product; of JAX."""
        return self._ask("rates")

    def bound_seconds(self, rates: Mapping[str, float]) -> float:
        """Returns what a step takes at least at these rates; of JAX."""
        return self._ask("bound", dict(rates))

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, what: str, *arguments: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # what has died is found by its answer
            self._pipe.send((what, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            error, answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            raise UserError(f"{self.name}: its process died with code {code}") from None
        if error:
            raise UserError(f"{self.name}: {error}")
        return answer


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets the variables that are not set, for a process that is started meanwhile."""
    ours = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


@contextlib.contextmanager
def open_sides(peers: Sequence[str], workload: Workload, folder: Path) -> Iterator[list[Side]]:
    """Gives this package's side, whose weights the others take, and then those of the peers."""
    with contextlib.ExitStack() as stack:
        sides = []
        for name in (OURS, *peers):
            share = 0.9 / (1 + len(peers))  # of a card's memory, which JAX would take most of
            sides.append(
                stack.enter_context(contextlib.closing(Side(name, workload, folder, share)))
            )
        yield sides


def _serve(pipe: Connection, name: str, workload: Workload, folder: Path) -> None:
    """Answers until nobody asks any more; an error is an answer too."""
    try:
        side: Any = _make_side(name, workload, folder)
        pipe.send(("", side.facts))
        while True:
            what, arguments = pipe.recv()
            if what == "results":
                answer = side.results(*arguments)
            elif what == "window":
                side.window(1)
                answer = side.window(*arguments)
            elif what == "rates":
                answer = side.rates()
            else:
                answer = side.bound_seconds(*arguments)
            pipe.send(("", answer))
    except EOFError:
        return
    except ModuleNotFoundError as error:
        pipe.send((f'needs {error.name}: pip install "cnn_jax[parity]"', None))
    except UserError as error:
        pipe.send((str(error), None))
    except Exception as error:  # a compiler's own, or memory that is too small
        pipe.send((f"{type(error).__name__}: {str(error).strip()[:600]}", None))


def _make_side(name: str, workload: Workload, folder: Path) -> Any:
    if name.startswith("torch"):
        from cnn_jax.benchmarking.torch_side import TorchSide  # here alone: it loads PyTorch

        return TorchSide(name, workload, folder)
    import jax

    from cnn_jax.benchmarking.jax_side import JaxSide

    jax.config.update("jax_enable_compilation_cache", False)  # the time of a compile is a result
    return JaxSide(name, workload, folder)
