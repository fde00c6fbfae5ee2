"""Serving: what is on images, told over HTTP, until the process is asked to stop."""

import asyncio
import signal
from pathlib import Path

from cnn_jax.errors import UserError
from cnn_jax.serving.limits import Limits
from cnn_jax.serving.network import network_of_file, network_of_run

DEFAULTS = Limits()


def serve(
    *,
    workdir: str | Path | None = None,
    model: str | Path | None = None,
    checkpoint: str = "last",
    ema: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits = DEFAULTS,
    num_threads: int = 2,
    stop_timeout: float = 30.0,
) -> int:
    """Answers HTTP requests until SIGTERM or SIGINT; returns the exit code.

    That is 0, once all that was accepted is answered, or 143 where it was stopped before it was
    ready. Call it in the main thread. It listens at once, and is ready when its programs are
    compiled.

    Args:
      workdir: directory of a run; or else
      model: a file that `export` has written, for which there is no Grad-CAM.
      checkpoint: of the run: "last", "best" or a step.
      ema: take the moving averages of the run's weights.
      host: the address to listen at; by default only this machine can reach it.
      port: 0 is any that is free; the address is printed.
      limits: what it takes on; see `Limits`.
      num_threads: that decode images.
      stop_timeout: seconds after which a stop waits no longer.

    Raises UserError for a network that cannot be read, an address that cannot be used and a package
    that is not installed, and ValueError unless one of `workdir` and `model` is given.
    """
    if (workdir is None) == (model is None):
        raise ValueError(f"workdir={workdir!r}, model={model!r}: give one of them")
    try:
        from cnn_jax.serving.server import run
    except ModuleNotFoundError as error:
        raise UserError(
            f'serve needs {error.name}, which is not installed: pip install "cnn_jax[serve]"'
        ) from error
    network = (
        network_of_run(str(workdir), checkpoint=checkpoint, ema=ema)
        if model is None
        else network_of_file(model)
    )
    server = run(
        network, limits, host=host, port=port, num_threads=num_threads, stop_timeout=stop_timeout
    )
    return 0 if asyncio.run(server) else 128 + signal.SIGTERM
