"""The process that listens: from its address to its end."""

import asyncio
import logging
import signal
import warnings
from collections.abc import Callable

from aiohttp import http_exceptions, web

from cnn_jax.errors import UserError
from cnn_jax.runtime.platform import describe_devices
from cnn_jax.serving.application import Service
from cnn_jax.serving.limits import Limits
from cnn_jax.serving.network import Network

LINGER = 1.0
"""Seconds for which the rest of a refused body is read, so that the client sees the answer."""

REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\n"
    b"Retry-After: 1\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
)
TOO_MANY = b'{"error": "too many connections are open"}'


async def run(
    network: Network,
    limits: Limits,
    *,
    host: str,
    port: int,
    num_threads: int,
    stop_timeout: float,
) -> bool:
    """Serves until SIGTERM or SIGINT; returns when what was accepted is answered.

    It returns whether it has been ready; else a program may still be compiled in a thread.

    Raises UserError for an address that cannot be used.
    """
    logging.getLogger("aiohttp.server").addFilter(_is_worth_a_line)
    warnings.simplefilter("ignore")  # of images and forms that clients send, each worded anew
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, asked.set)
    service = Service(network, limits, num_threads=num_threads)
    runner = web.AppRunner(
        service.application(),
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=limits.timeout,
        lingering_time=LINGER,
        shutdown_timeout=LINGER,
    )
    await runner.setup()
    try:
        listener = await _listen(
            runner, host, port, limits.max_connections, service.count_refused_connection
        )
        for socket in listener.sockets:
            name, number = socket.getsockname()[:2]
            _say(f"listening at http://{f'[{name}]' if ':' in name else name}:{number}")
        warming = asyncio.create_task(service.warm_up())
        stopping = asyncio.create_task(asked.wait())
        await asyncio.wait({warming, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if service.ready:
            _say(f"ready: {network.about['model']} on {describe_devices()}")
        elif warming.done():
            warming.result()
        await stopping
        _say("stopping")
        await asyncio.sleep(0)  # what the system has accepted already becomes a connection
        listener.close()
        await service.stop(stop_timeout)
    finally:
        await runner.cleanup()
    _say("stopped")
    return service.ready


async def _listen(
    runner: web.AppRunner,
    host: str,
    port: int,
    max_connections: int,
    count_refused: Callable[[], None],
) -> asyncio.Server:
    server = runner.server
    if server is None:
        raise RuntimeError("the runner has not been set up")

    def connection() -> asyncio.Protocol:
        if len(server.connections) < max_connections:
            return server()
        count_refused()
        return _Refusal()

    try:
        return await asyncio.get_running_loop().create_server(connection, host, port)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot listen at --host {host} --port {port}: {reason}") from error


class _Refusal(asyncio.Protocol):
    """Tells one more client than there may be so, and hangs up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.WriteTransport):
            transport.write(REFUSAL % (len(TOO_MANY), TOO_MANY))
        transport.close()


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Whether it is more than a client that does not speak HTTP."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, http_exceptions.HttpProcessingError)


def _say(text: str) -> None:
    print(text, flush=True)
