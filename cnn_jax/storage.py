"""Places: directories of this machine, and URLs of object storage, `gs://` and `s3://`.

A place on object storage is an `epath.Path`, which has the methods of a `Path` that are used here
and goes to orbax as it is. Object storage knows whole objects only: none grows, none is renamed,
and a directory is there as long as something is in it.
"""

import contextlib
import hashlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from cnn_jax.errors import UserError

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
"""What speaks to the storage that a URL begins with, and is installed as an extra of that name."""

CONNECTIONS = 16
"""Objects that are read or copied at once."""


def place(name: str | os.PathLike[str]) -> Path:
    """Returns the place of that name; `file://` is a directory of this machine.

    Raises UserError for a URL of another kind, or where a package is missing.
    """
    if not isinstance(name, str):
        return cast(Path, name)
    scheme, mark, rest = name.partition("://")
    if not mark:
        return Path(name).expanduser()
    if scheme == "file":
        return Path(rest)
    if scheme not in PACKAGES:
        known = ", ".join(f"{each}://" for each in ("file", *PACKAGES))
        raise UserError(f"{name}: must be a directory or one of {known}")
    if not rest.strip("/"):
        raise UserError(f"{name}: names no bucket")
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise UserError(f"{name}: needs {PACKAGES[scheme]}: pip install 'cnn_jax[{scheme}]'")
    import fsspec.config
    from etils import epath

    # Others write there too, so what was listed before is no longer true. etils says gcs for gs.
    for protocol in (*PACKAGES, "gcs"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    return cast(Path, epath.Path(name.rstrip("/")))


def is_remote(path: Path) -> bool:
    """Returns whether a place is on object storage."""
    return not isinstance(path, Path)


def absolute(path: Path) -> Path:
    """Returns the place whatever the current directory will be."""
    return path if is_remote(path) else path.absolute()


def files_below(directory: Path) -> list[str]:
    """Returns every file below a place by its path from there, sorted."""
    if is_remote(directory):
        return sorted(_objects_below(directory))
    files = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path.relative_to(directory).as_posix() for path in files)


def read_bytes(name: str) -> bytes:
    """Returns what is in the file or object of that name.

    Raises OSError, and RuntimeError where the storage does not answer: no damage of that object.
    """
    if "://" not in name:
        with open(name, "rb", buffering=0) as file:  # whole: a buffer would cost, and help nothing
            return file.read()
    files, path = _file_system(name)
    try:
        return files.cat_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # whichever way a client fails
        raise RuntimeError(f"{name} cannot be read: {reason(error)}") from error


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Writes a file that exists whole or not at all, also after a power cut; raises OSError."""
    data = contents.encode() if isinstance(contents, str) else contents
    if is_remote(path):
        try:
            path.write_bytes(data)
        except Exception as error:  # whichever way a client fails
            raise OSError(f"{path} cannot be written: {reason(error)}") from error
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a full disk should not be left fuller
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def digests(directory: Path, names: list[str]) -> dict[str, str]:
    """Returns the SHA-256 of the files of these names below a place."""

    def digest(name: str) -> str:
        with (directory / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(CONNECTIONS) as threads:
        return dict(zip(names, threads.map(digest, names), strict=True))


def move(directory: Path, to: Path) -> None:
    """Gives a directory another place; on object storage the old one goes last."""
    if not is_remote(directory):
        to.parent.mkdir(parents=True, exist_ok=True)
        directory.rename(to)
        return
    files, path = _file_system(str(directory))
    for name in _objects_below(directory):
        files.cp_file(f"{path}/{name}", f"{_file_system(str(to))[1]}/{name}")
    files.rm(path, recursive=True)


def local_copy(directory: Path) -> Path:
    """Returns a directory of this machine with the files of `directory`, itself if it is one.

    The objects of a URL are copied once, and again when one of them has changed, into `cache()`.
    Several processes may ask at once, and be killed.

    Raises UserError where they cannot be had.
    """
    if not is_remote(directory):
        return directory
    try:
        objects = _objects_below(directory)
        told = repr((str(directory), sorted((n, _version(about)) for n, about in objects.items())))
        copy = cache() / hashlib.sha256(told.encode()).hexdigest()[:32]
        _fetch(directory, copy, {name: about["size"] for name, about in objects.items()})
    except UserError:
        raise
    except Exception as error:  # whichever way a client fails
        raise UserError(f"{directory} cannot be read: {reason(error)}") from error
    return copy


def cache() -> Path:
    """Returns where copies of objects are kept on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "cnn_jax"


def reason(error: BaseException) -> str:
    """Returns what a client of object storage says, in a line."""
    return (str(error) or type(error).__name__).partition("\n")[0][:400]


def _fetch(directory: Path, copy: Path, sizes: Mapping[str, int]) -> None:
    if not sizes:
        raise UserError(f"{directory}: there is nothing")
    missing = [name for name in sizes if not (copy / name).exists()]
    if not missing:
        return
    size = sum(sizes[name] for name in missing)
    print(
        f"copying {len(missing):,} files, {size / 1e6:,.1f} MB, of {directory} to {copy}",
        file=sys.stderr,
        flush=True,
    )
    files, path = _file_system(str(directory))

    def fetch(name: str) -> None:
        whole = copy / name
        whole.parent.mkdir(parents=True, exist_ok=True)
        unfinished = whole.with_name(f".{whole.name}.{os.getpid()}")
        files.get_file(f"{path}/{name}", str(unfinished))
        unfinished.replace(whole)

    with ThreadPoolExecutor(CONNECTIONS) as threads:
        for _ in threads.map(fetch, missing):
            pass


def _objects_below(directory: Path) -> dict[str, dict[str, Any]]:
    files, path = _file_system(str(directory))
    found = files.find(path, detail=True).items()
    return {name[len(path) + 1 :]: about for name, about in found if name.startswith(f"{path}/")}


def _version(about: Mapping[str, Any]) -> list[str]:
    names = ("size", "ETag", "etag", "generation")  # of S3, of GCS
    return [str(about[name]) for name in names if name in about]


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(url)
