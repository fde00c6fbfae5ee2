"""Object stores on this machine: moto for S3, gcp-storage-emulator for Google Cloud Storage."""

import contextlib
import functools
import os
import socket
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

BUCKET = "bucket"

Environment = dict[str, str]


@functools.cache
def _s3_address() -> str:
    """Starts the process's server: clients are kept with its address, so there is but one."""
    with warnings.catch_warnings(action="ignore"):
        from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
    return address


@contextlib.contextmanager
def s3() -> Iterator[tuple[str, Environment]]:
    """Gives the URL of a bucket, and the environment in which it is found, this process's too."""
    environment = {
        "AWS_ENDPOINT_URL": _s3_address(),
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with _set(environment):
        yield f"s3://{BUCKET}", environment


@contextlib.contextmanager
def gs() -> Iterator[tuple[str, Environment]]:
    """Gives the URL of a bucket, and the environment in which it is found, this process's too."""
    with warnings.catch_warnings(action="ignore"):
        from gcp_storage_emulator.handlers import objects
        from gcp_storage_emulator.server import create_server
    objects.download = _with_generation(objects.download)
    objects._media_upload = _if_generation_matches(objects._media_upload)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    address = f"http://127.0.0.1:{port}"
    environment = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anything",
        "GOOGLE_CLOUD_PROJECT": "project",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask Google for the bucket's kind
    }
    try:
        with _set(environment):
            yield f"gs://{BUCKET}", environment
    finally:
        server.stop()


STORES = {"s3": s3, "gs": gs}


def _with_generation(download: Callable[..., None]) -> Callable[..., None]:
    """What the emulator lacks and tensorstore needs: reads tell the generation of an object."""

    def downloaded(request: Any, response: Any, storage: Any, *others: Any, **options: Any) -> None:
        found = _find(request, storage, request.params["object_id"])
        if found:
            response["x-goog-generation"] = found["generation"]
        download(request, response, storage, *others, **options)

    return downloaded


def _if_generation_matches(upload: Callable[..., None]) -> Callable[..., None]:
    """What it lacks too: a write may depend on the generation that is there, 0 for none."""
    turn = threading.Lock()

    def uploaded(request: Any, response: Any, storage: Any) -> None:
        with turn:
            (wanted,) = request.query.get("ifGenerationMatch", [None])
            found = _find(request, storage, request.query["name"][0])
            if wanted is None or wanted == (found["generation"] if found else "0"):
                upload(request, response, storage)
            else:
                response.status = HTTPStatus.PRECONDITION_FAILED

    return uploaded


def _find(request: Any, storage: Any, name: str) -> Any:
    from gcp_storage_emulator.exceptions import NotFound

    with contextlib.suppress(NotFound):
        return storage.get_file_obj(request.params["bucket_name"], name)
    return None


@contextlib.contextmanager
def _set(environment: Environment) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def download(url: str, to: Path) -> Path:
    """Returns a directory with the objects below the URL, without the code under test."""
    import fsspec

    files, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    for name in files.find(root):
        path = to / os.path.relpath(name, root)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files.cat_file(name))
    return to
