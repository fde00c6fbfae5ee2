"""A server in a process of its own, asked over real sockets."""

import contextlib
import http.client
import json
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driver import HANG, Child
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """`python -m cnn_jax serve` with these flags at a free port; made, it has said `until`."""

    def __init__(self, environment: Mapping[str, str], *flags: str, until: str = "ready: ") -> None:
        command = [sys.executable, "-m", "cnn_jax", "serve", "--port=0", *flags]
        self.process = Child(command, environment)
        self.process.wait_for(until)
        address = self.process.lines[0].removeprefix("listening at ")
        self.address = address
        self.port = int(address.rpartition(":")[2])

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Returns the answer to one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def predict(self, image: bytes | Path, query: str = "") -> Answer:
        body = image if isinstance(image, bytes) else image.read_bytes()
        return self.ask("POST", f"/v1/predict{query}", body, {"Content-Type": "image/png"})

    def send(self, *parts: bytes) -> bytes:
        """Returns all that comes back for raw bytes, until the server closes the connection."""
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError):
                for part in parts:
                    connection.sendall(part)
            return read_all(connection)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANG)

    def metrics(self) -> dict[str, float]:
        """Returns the samples by name and labels, as Prometheus' own parser reads them."""
        return dict(samples(self.ask("GET", "/metrics").body.decode()))

    def rises(self, before: Mapping[str, float]) -> dict[str, float]:
        """Returns by how much counters have risen since."""
        now = self.metrics()
        risen = {name: value - before.get(name, 0.0) for name, value in now.items()}
        return {name: value for name, value in risen.items() if value}


def samples(text: str) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(sorted(sample.labels.values()))
            yield f"{sample.name}{{{labels}}}" if labels else sample.name, sample.value


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def multipart(files: Mapping[str, bytes], boundary: str = "b0undary") -> tuple[bytes, str]:
    """Returns a body of `files` by name, and its Content-Type."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        f"Content-Type: image/png\r\n\r\n".encode()
        + content
        + b"\r\n"
        for name, content in files.items()
    ]
    ending = f"--{boundary}--\r\n".encode()
    return b"".join([*parts, ending]), f"multipart/form-data; boundary={boundary}"
