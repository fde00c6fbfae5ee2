"""Compiled programs in files: saved where they were compiled, used by a run that fits them.

A program is two files of a directory: `NAME.executable`, which only this user may read, and
`NAME.json`, which says what it is good for. Loading one runs its machine code and unpickles its
description, so files that another user wrote, or could have, are never opened.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh, NamedSharding

from cnn_jax.errors import UserError
from cnn_jax.runtime.compiler import FLAGS, Options, processor, was_read_from_cache
from cnn_jax.runtime.sharding import describe_mesh

PACKAGES = ("cnn_jax", "jax", "jaxlib", "flax", "optax")
COMPILERS: Mapping[str, Sequence[str]] = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda12-pjrt", "jax-cuda12-plugin", "jax-cuda13-pjrt", "jax-cuda13-plugin"),
    "cpu": (),
}
"""Packages in which a platform's compiler comes, beside jaxlib."""

STEP = "the step (its StableHLO)"
ARGUMENT = "argument "
CONFIG = "config."
MOST_ARGUMENTS = 10

CANNOT_BE_SAVED = (
    ValueError,
    NotImplementedError,
    jax.errors.JaxRuntimeError,
    *(pickle.PicklingError, TypeError, AttributeError),  # of its trees
)


class UnusableError(UserError):
    """A saved program is not for this run, or not to be trusted; the lines say why."""


def conditions(
    lowered: jax.stages.Lowered,
    arguments: Mapping[str, Any],
    *,
    mesh: Mesh,
    options: Options,
    config: Mapping[str, Any],
) -> dict[str, str]:
    """Returns what a program holds for: two that agree in every entry are interchangeable.

    The values of `config`, by key, do not count: they explain why the step is another.
    """
    return {
        **circumstances(arguments, devices=list(mesh.devices.flat), options=options),
        "mesh": describe_mesh(mesh),
        STEP: hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        **{f"{CONFIG}{key}": str(value) for key, value in config.items()},
    }


def circumstances(
    arguments: Mapping[str, Any], *, devices: Sequence[Any], options: Options
) -> dict[str, str]:
    """Returns what a program holds for, beside the step that it was compiled from."""
    platform = devices[0].platform
    found = {
        "platform": platform,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "ids of the devices": ", ".join(str(device.id) for device in devices),
    }
    if platform == "cpu":
        found["processor"] = processor()
    for package in (*PACKAGES, *COMPILERS[platform]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    for variable in filter(None, ("XLA_FLAGS", FLAGS.get(platform))):
        found[variable] = os.environ.get(variable, "")
    found["compiler options"] = ", ".join(f"{name}={options[name]}" for name in sorted(options))
    for name, tree in arguments.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            found[f"{ARGUMENT}{name}{jax.tree_util.keystr(path)}"] = _array(leaf)
    return found


def _array(leaf: jax.ShapeDtypeStruct) -> str:
    """Returns such as `uint8[64/data,28,28,1]`: 64 images divided over the axis `data`."""
    sharding = leaf.sharding
    divided = dict(enumerate(sharding.spec)) if isinstance(sharding, NamedSharding) else {}
    sizes = [f"{size}{_over(divided.get(i))}" for i, size in enumerate(leaf.shape)]
    return f"{leaf.dtype}[{','.join(sizes)}]"


def _over(axes: str | Sequence[str] | None) -> str:
    names = [axes] if isinstance(axes, str) else axes or []
    return "".join(f"/{name}" for name in names)


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Returns a line for each entry in which two programs differ; none if they are one."""
    another_step = there.get(STEP) != here.get(STEP)
    lines = [
        f"{name}: {_shown(there, name)} there, {_shown(here, name)} here"
        for name in {**here, **there}
        if there.get(name) != here.get(name) and (another_step or not name.startswith(CONFIG))
    ]
    arguments = [line for line in lines if line.startswith(ARGUMENT)]
    surplus = arguments[MOST_ARGUMENTS:]
    lines = [line for line in lines if line not in surplus]
    return [*lines, f"and {len(surplus)} more arguments"] if surplus else lines


def _shown(entries: Mapping[str, str], name: str) -> str:
    value = entries.get(name, "absent")
    return value[:12] if name == STEP else value or "none"


def saved_files(directory: Path, name: str) -> tuple[Path, Path]:
    """Returns the paths of a program and of what is known about it."""
    return directory / f"{name}.executable", directory / f"{name}.json"


def save(
    directory: Path, name: str, compiled: jax.stages.Compiled, entries: Mapping[str, str]
) -> Path:
    """Writes a program that `compile_program` has returned; returns its path.

    `entries` are its `conditions`. Raises UserError where one is already there, where
    the directory could not be trusted later, or where this compiler's programs cannot be saved:
    on the CPU, one that came from JAX's compilation cache would be saved without its functions.
    """
    if was_read_from_cache(compiled):
        raise UserError("it came from JAX's compilation cache, and such a program loses parts")
    try:
        contents = pickle.dumps(serialize(compiled))
    except CANNOT_BE_SAVED as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"programs of this compiler cannot be saved: {reason}") from error
    executable, description = saved_files(directory, name)
    entries = {"executable": _digest(contents), **entries}
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(directory, directory.stat())
        _write_new(executable, contents)
        _write_new(description, (json.dumps(entries, indent=2) + "\n").encode())
    except FileExistsError as error:
        raise UserError(f"{error.filename} is already there; save to another directory") from error
    except OSError as error:
        raise UserError(f"cannot save to {directory}: {error.strerror}") from error
    return executable


def load(
    directory: Path, name: str, here: Mapping[str, str], devices: Sequence[Any]
) -> jax.stages.Compiled:
    """Returns the saved program of the step that `here` describes, as `conditions` do.

    Raises UnusableError, with a reason a line, where it is not that of this step on these devices,
    is damaged, or is not surely this user's own.
    """
    executable, description = saved_files(directory, name)
    try:
        _check(directory, directory.stat())
        with _damage(description):
            entries = {k: str(v) for k, v in json.loads(_read_own(description)).items()}
            digest = entries.pop("executable")
        lines = differences(entries, here)
        if lines:
            raise UnusableError("\n".join(lines))
        contents = _read_own(executable)
    except OSError as error:
        raise UnusableError(f"{error.filename}: {error.strerror}") from error
    if _digest(contents) != digest:
        raise UnusableError(f"{executable} is damaged: its SHA-256 is not that of {description}")
    with _damage(executable):
        program, arguments, outputs = pickle.loads(contents)
        return deserialize_and_load(
            program,
            arguments,
            outputs,
            backend=devices[0].client,
            execution_devices=devices,
        )


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns whatever a file's contents make Python or XLA raise into UnusableError."""
    try:
        yield
    except (UnusableError, OSError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UnusableError(f"{path} cannot be read: {type(error).__name__}: {reason}") from error


def _read_own(path: Path) -> bytes:
    """Returns the contents of a file that this user alone can have written."""
    with path.open("rb") as file:
        _check(path, os.fstat(file.fileno()))
        return file.read()


def _check(path: Path, status: os.stat_result) -> None:
    """Raises UnusableError for a file or directory that another user can have written."""
    if not hasattr(os, "getuid"):
        return
    if status.st_uid != os.getuid():
        raise UnusableError(f"{path} belongs to another user")
    if status.st_mode & 0o022:
        raise UnusableError(f"{path} can be written to by others; chmod go-w {path} if it is yours")


def _write_new(path: Path, contents: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()
