"""HTTP: requests are checked, read within limits, decoded, computed in batches and answered."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hashlib
import importlib.resources
import math
import re
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from aiohttp import hdrs, web
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from cnn_jax.data.image_files import decode_image
from cnn_jax.data.images import ImageError, TooManyPixelsError
from cnn_jax.serving.batching import Batcher, FullError, batch_sizes, padded
from cnn_jax.serving.limits import MEBIBYTE, Limits
from cnn_jax.serving.metrics import ServerMetrics
from cnn_jax.serving.multipart import TooManyFilesError, files_of
from cnn_jax.serving.network import Network
from cnn_jax.serving.overlay import overlay
from cnn_jax.trained import most_probable

CHUNK = 2**16

BODIES = 32
"""Bodies of the largest size that may be held at the same time; smaller ones are more."""

EXPLANATIONS = 16
"""Explanations that may be under way at the same time."""

STUCK = 120.0
"""Seconds of one computation after which the server calls itself unwell."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RefusedError(Exception):
    """Why a request has no other answer: a status, a word for the metrics, and a sentence."""

    def __init__(self, status: int, reason: str, sentence: str, *, retry_after: int = 0) -> None:
        super().__init__(sentence)
        self.status, self.reason, self.retry_after = status, reason, retry_after


class Service:
    """Answers requests with what a network says.

    `warm_up` before `ready` is true; `stop` lets what has been accepted be answered.
    """

    def __init__(self, network: Network, limits: Limits, *, num_threads: int) -> None:
        self.ready = self.stopping = False
        self._network, self._limits = network, limits
        self._sizes = batch_sizes(limits.max_batch)
        self._programs: dict[int, Callable[[np.ndarray], Any]] = {}
        self._evidence: Callable[[np.ndarray, int], np.ndarray] | None = None
        self._compute = ThreadPoolExecutor(1, "compute")
        self._decode = ThreadPoolExecutor(num_threads, "decode")
        self._images = Batcher(
            self._probabilities,
            max_batch=limits.max_batch,
            max_delay=limits.max_delay,
            max_places=limits.max_waiting,
            executor=self._compute,
            observe=self._observe,
        )
        self._explanations = Batcher(
            self._explained,
            max_batch=1,
            max_delay=0,
            max_places=EXPLANATIONS,
            executor=self._compute,
        )
        self._metrics = ServerMetrics(
            self._sizes, waiting=lambda: self._images.waiting, under_way=lambda: self._under_way
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._held = self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def application(self) -> web.Application:
        """Returns the routes; the batches are computed while it runs."""
        app = web.Application(middlewares=[self._answer])
        app.add_routes(
            [
                web.get("/", _page()),
                web.get("/healthz", self._health),
                web.get("/readyz", self._readiness),
                web.get("/metrics", self._show_metrics),
                web.get("/v1/model", self._show_model),
                web.post("/v1/predict", self._predict),
                web.post("/v1/explain", self._explain),
            ]
        )
        app.cleanup_ctx.append(self._batching)
        return app

    async def warm_up(self) -> None:
        """Compiles every program, runs it once and is `ready`; ends early when stopping."""
        loop = asyncio.get_running_loop()
        work: list[Callable[[], object]] = [
            *(functools.partial(self._compile, size) for size in self._sizes),
            self._compile_evidence,
            Image.init,  # the first image should not wait for Pillow's decoders
        ]
        for each in work:
            if self.stopping:
                return
            await loop.run_in_executor(self._compute, each)
        self.ready = True

    def count_refused_connection(self) -> None:
        """Counts a client that was told to come again before it could ask."""
        self._metrics.refused.labels("connections").inc()

    async def stop(self, seconds: float) -> None:
        """Refuses what comes from now on; returns when the rest is answered, or after `seconds`."""
        self.stopping = True
        self._images.hurry()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    async def _batching(self, app: web.Application) -> AsyncIterator[None]:
        for each in (self._images, self._explanations):
            self._tasks.append(asyncio.create_task(each.run()))
        yield
        for task in self._tasks:
            task.cancel()
        for threads in (self._compute, self._decode):
            threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, size: int) -> None:
        program = self._network.compile(size)
        np.asarray(program(np.zeros((size, *self._network.image_shape), np.uint8)))
        self._programs[size] = program

    def _compile_evidence(self) -> None:
        if self._network.compile_evidence is not None:
            evidence = self._network.compile_evidence()
            evidence(np.zeros(self._network.image_shape, np.uint8), 0)
            self._evidence = evidence

    def _probabilities(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return padded(self._programs, images)

    def _explained(self, asked: Sequence[tuple[np.ndarray, int]]) -> list[np.ndarray]:
        if self._evidence is None:
            raise RuntimeError("asked for evidence before it was compiled")
        return [self._evidence(*each) for each in asked]

    def _observe(self, images: int, seconds: float) -> None:
        self._metrics.batch_images.observe(images)
        self._metrics.batch_seconds.observe(seconds)

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = resource.canonical if resource else "other"
        start = time.perf_counter()
        try:
            response = await handler(request)
        except RefusedError as refused:
            self._metrics.refused.labels(refused.reason).inc()
            response = _error(refused.status, str(refused))
            if refused.retry_after:
                response.headers[hdrs.RETRY_AFTER] = str(refused.retry_after)
        except web.HTTPException as error:  # of the router
            response = _error(error.status, f"{request.method} {request.path}: {error.reason}")
            if hdrs.ALLOW in error.headers:
                response.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
        except Exception:
            traceback.print_exc()
            response = _error(500, "the computation has failed; the server's log says why")
        if self.stopping:
            response.force_close()
        self._metrics.requests.labels(route, response.status).inc()
        self._metrics.request_seconds.labels(route).observe(time.perf_counter() - start)
        return response

    async def _health(self, request: web.Request) -> web.Response:
        stuck = any(each.computing_for > STUCK for each in (self._images, self._explanations))
        if stuck or any(each.done() for each in self._tasks):
            return _error(500, "the computation is stuck")
        return web.json_response({"status": "alive"})

    async def _readiness(self, request: web.Request) -> web.Response:
        if self.ready and not self.stopping:
            return web.json_response({"status": "ready"})
        return _error(503, "the server is stopping" if self.stopping else "the server is starting")

    async def _show_metrics(self, request: web.Request) -> web.Response:
        text = generate_latest(self._metrics.registry)
        return web.Response(body=text, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST})

    async def _show_model(self, request: web.Request) -> web.Response:
        limits = dataclasses.asdict(self._limits)
        explains = self._network.compile_evidence is not None
        return web.json_response({**self._network.about, "explains": explains, "limits": limits})

    async def _predict(self, request: web.Request) -> web.Response:
        classes = len(self._network.class_names)
        top = min(_integer(request, "top", 5), classes)
        async with self._accepted(request) as files:
            with self._places(self._images, len(files)):
                images = await self._decoded(files)
                rows = await self._images.submit(images)
        predictions = []
        for (name, _), row in zip(files, rows, strict=True):
            best = most_probable(row, self._network.class_names, top)
            self._metrics.predicted.labels(best[0][0]).inc()
            self._metrics.confidence.observe(best[0][1])
            ranked = [{"class": each, "probability": share} for each, share in best]
            predictions.append({"file": name, "classes": ranked} if name else {"classes": ranked})
        return web.json_response({"predictions": predictions})

    async def _explain(self, request: web.Request) -> web.Response:
        names = self._network.class_names
        if self._network.compile_evidence is None:
            raise RefusedError(
                404,
                "no_evidence",
                "Grad-CAM needs the network of a run (--workdir); an exported file gives "
                "probabilities alone",
            )
        asked = _parameter(request, "class")
        if asked is not None and asked not in names:
            raise RefusedError(
                400, "bad_parameter", f"class={asked[:100]!r}: /v1/model has the names"
            )
        async with self._accepted(request) as files:
            if len(files) != 1:
                raise RefusedError(
                    400, "bad_body", f"{len(files)} images: an explanation is of one"
                )
            with self._places(self._explanations, 1), self._places(self._images, 1):
                ((_, pixels),) = zip(files, await self._decoded(files), strict=True)
                if asked is None:
                    chosen = int(np.argmax((await self._images.submit([pixels]))[0]))
                else:
                    chosen = names.index(asked)
                (evidence,) = await self._explanations.submit([(pixels, chosen)])
                loop = asyncio.get_running_loop()
                png = await loop.run_in_executor(self._decode, overlay, pixels, evidence)
        return web.Response(
            body=png, content_type="image/png", headers={"X-Class-Index": str(chosen)}
        )

    @contextlib.asynccontextmanager
    async def _accepted(self, request: web.Request) -> AsyncIterator[list[tuple[str, bytes]]]:
        """Gives the files of a request, name and content; it is under way while this is entered."""
        if not self.ready or self.stopping:
            state = "stopping" if self.stopping else "starting"
            raise RefusedError(503, state, f"the server is {state}", retry_after=1)
        if self._images.full:
            raise self._busy("queue")
        held = 0

        def hold(chunk: int) -> None:
            nonlocal held
            held += chunk
            self._held += chunk
            if self._held > BODIES * self._limits.max_body:
                raise self._busy("bodies")
            if held > self._limits.max_body:
                raise self._too_large()

        self._under_way += 1
        self._idle.clear()
        try:
            yield await self._received(request, hold)
        finally:
            self._held -= held
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def _received(
        self, request: web.Request, hold: Callable[[int], None]
    ) -> list[tuple[str, bytes]]:
        kind, length = request.content_type, request.content_length
        multipart = kind == "multipart/form-data"
        if length is not None and length > self._limits.max_body:
            raise self._too_large()
        if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
            raise RefusedError(415, "kind", "the body must not be compressed (Content-Encoding)")
        if not multipart and not kind.startswith("image/") and kind != "application/octet-stream":
            raise RefusedError(
                415,
                "kind",
                f"Content-Type {kind[:100]!r}: must be image/..., application/octet-stream or "
                "multipart/form-data",
            )
        chunks = []
        try:
            async with asyncio.timeout(self._limits.timeout):
                async for chunk in request.content.iter_chunked(CHUNK):
                    hold(len(chunk))
                    chunks.append(chunk)
        except TimeoutError as error:
            seconds = f"{self._limits.timeout:g}"
            raise RefusedError(
                408, "slow", f"the body was not there in {seconds} seconds"
            ) from error
        except ConnectionError as error:
            raise RefusedError(400, "gone", "the client has left") from error
        except web.RequestPayloadError as error:
            raise RefusedError(
                400, "bad_body", f"the body cannot be read: {_line(error)}"
            ) from error
        body = b"".join(chunks)
        return (
            await self._files(request.headers[hdrs.CONTENT_TYPE], body)
            if multipart
            else [("", body)]
        )

    async def _files(self, content_type: str, body: bytes) -> list[tuple[str, bytes]]:
        find = functools.partial(files_of, content_type, body, max_files=self._limits.max_waiting)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decode, find)
        except TooManyFilesError as error:
            raise RefusedError(413, "files", str(error)) from error
        except ValueError as error:
            raise RefusedError(400, "bad_body", f"the form cannot be read: {error}") from error

    async def _decoded(self, files: Sequence[tuple[str, bytes]]) -> list[np.ndarray]:
        loop = asyncio.get_running_loop()

        def decode(name: str, content: bytes) -> np.ndarray:
            which = f"{name[:100]}:" if name else "the file"
            try:
                return decode_image(
                    content,
                    self._network.image_shape,
                    fraction=self._network.eval_fraction,
                    max_pixels=self._limits.max_pixels,
                )
            except TooManyPixelsError as error:
                raise RefusedError(422, "pixels", f"{which} is {_line(error)}") from error
            except ImageError as error:
                sentence = f"{which} cannot be read: {_line(error)}"
                raise RefusedError(400, "no_image", sentence) from error

        return await asyncio.gather(
            *(loop.run_in_executor(self._decode, decode, *each) for each in files)
        )

    @contextlib.contextmanager
    def _places(self, batcher: Batcher, count: int) -> Iterator[None]:
        try:
            with batcher.places(count):
                yield
        except FullError:
            raise self._busy("queue") from None

    def _busy(self, what: str) -> RefusedError:
        seconds = max(1, math.ceil(self._images.patience))
        sentence = f"too many requests are under way; try again in {seconds} s"
        return RefusedError(429, f"full_{what}", sentence, retry_after=seconds)

    def _too_large(self) -> RefusedError:
        limit = f"{self._limits.max_body / MEBIBYTE:g} MiB"
        return RefusedError(
            413, "bytes", f"the body is larger than {limit}, the limit of this server"
        )


def _parameter(request: web.Request, name: str) -> str | None:
    """Returns the only parameter that the path takes, if it is given; refuses others."""
    others = [each for each in request.query if each != name]
    if others:
        sentence = f"{others[0][:100]!r}: there is no such parameter; {name} is one"
        raise RefusedError(400, "bad_parameter", sentence)
    given = request.query.getall(name, [])
    if len(given) > 1:
        raise RefusedError(400, "bad_parameter", f"{name}: is there {len(given)} times")
    return given[0] if given else None


def _integer(request: web.Request, name: str, default: int) -> int:
    text = _parameter(request, name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 10 and int(text) > 0):
        raise RefusedError(400, "bad_parameter", f"{name}={text[:100]!r}: must be an integer >= 1")
    return int(text)


def _error(status: int, sentence: str) -> web.Response:
    return web.json_response({"error": sentence}, status=status)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _page() -> Handler:
    """Returns the handler of the page; nothing but what it holds itself may run there."""
    text = importlib.resources.files("cnn_jax.serving").joinpath("page.html").read_text("utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}

    async def page(request: web.Request) -> web.Response:
        return web.Response(text=text, content_type="text/html", headers=headers)

    return page
