"""Python programs in forks of a process that has imported what they import.

Imports are half of a short run's time, and the tests make hundreds of them. A program so started
is a process of its own, with its own environment; but what Python and jax read of that as they are
imported (`READ_BY_IMPORTS`) is what the process forked from was given, and so are hash seeds.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

MODULES = (
    "cnn_jax.__main__",
    "cnn_jax.commands.train",
    "cnn_jax.data.images",
    "grain",
    "matplotlib.figure",
    "tensorflow_datasets",
)
READ_BY_IMPORTS = ("JAX_", "PYTHON")
"""Beginnings of names in the environment."""


class Preloaded:
    """The process that forks; it ends when this is closed, and with the tests."""

    def __init__(self, environment: Mapping[str, str], directory: Path) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, cwd=directory, env=environment, pass_fds=[theirs.fileno()]
            )

    def start(
        self, program: Sequence[str], environment: Mapping[str, str], output: int
    ) -> "Process":
        """Starts a Python file with arguments; the file descriptor gets all that it writes."""
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            request = json.dumps([list(program), dict(environment)]).encode()
            socket.send_fds(self._requests, [request], [output, theirs.fileno()])
        return Process(status)

    def close(self) -> None:
        self._requests.close()
        self._process.wait()


class Process:
    """A fork, with what `subprocess.Popen` has for a process."""

    def __init__(self, status: socket.socket) -> None:
        self._status = status
        self.pid = int(status.recv(64))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code when the process has ended: `-N` where signal N ended it."""
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                self.returncode = int(self._status.recv(64))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from None
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        """Returns the exit code, or None while the process runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


def of_each_request(requests: socket.socket) -> list[str]:
    """Returns only in the fork for a request: the program and its arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the tests; this ends with them
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who report
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not message:
            sys.exit()
        if os.fork() == 0:
            break
        for each in descriptors:
            os.close(each)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    program, environment = json.loads(message)
    output, status = descriptors
    requests.close()
    if (process := os.fork()) != 0:
        os.close(output)
        with socket.socket(fileno=status) as report:
            report.send(b"%d" % process)
            _, ended = os.waitpid(process, 0)
            report.send(b"%d" % os.waitstatus_to_exitcode(ended))
        os._exit(0)
    os.close(status)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    return program


if __name__ == "__main__":
    for module in MODULES:
        importlib.import_module(module)
    sys.argv = of_each_request(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = str(Path(sys.argv[0]).parent)
    sys.modules.pop("__mp_main__")  # what multiprocessing took for the program: this file
    runpy.run_path(sys.argv[0], run_name="__main__")
