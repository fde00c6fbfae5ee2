"""Weights in files: state dicts of PyTorch, and directories with a checkpoint of this package.

A directory of weights is laid out like a checkpoint of a run, with a manifest: `state` holds the
parameters and the running statistics, `record` a JSON that says what they are. So the checkpoints
of runs are read here as well.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from cnn_jax.errors import UserError, nearest
from cnn_jax.runtime.checkpoint import find_damage, quieten_orbax, write_manifest
from cnn_jax.runtime.files import refuse_existing
from cnn_jax.runtime.object_storage import prepare_for
from cnn_jax.runtime.torch_files import read_torch_file
from cnn_jax.storage import absolute, write_atomically
from cnn_jax.training.statistics import pool_statistics

COLLECTIONS = ("params", "batch_stats")

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a PyTorch state dict by name.

    Raises UserError where there is no such file, its name does not end as one, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"no file {str(path)!r}{nearest(str(path), map(str, _siblings(path)))}")
    if path.suffix not in _READERS:
        raise UserError(f"{path}: the name of a file of weights ends in {', '.join(_READERS)}")
    return _READERS[path.suffix](path)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a `.safetensors` file; raises UserError where one is there already."""
    refuse_existing(path)
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    try:
        write_atomically(path, safetensors.numpy.save(arrays, metadata={"format": "pt"}))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read_directory(
    directory: Path, *, averaged: bool = False
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Returns the variables and the record of a directory of weights, or of a run's checkpoint.

    In the directory of a run it is the newest good checkpoint. Running statistics that each device
    had of its own are pooled. With `averaged` the variables are the moving averages of a run.

    Raises UserError where there is none, or it is damaged, or has no averages.
    """
    quieten_orbax()
    prepare_for(directory)
    checkpoint = _find_checkpoint(directory)
    with ocp.PyTreeCheckpointer() as reader:
        metadata = reader.metadata(checkpoint / "state")
        tree = metadata.item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(checkpoint / "state", restore_args=as_numpy)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        record = reader.restore(checkpoint / "record")
    if averaged and "ema" not in state:
        raise UserError(
            f"{checkpoint} has no averaged weights: a run keeps them with ema.decay above 0"
        )
    values = state["ema"] if averaged else state
    variables = {name: values[name] for name in COLLECTIONS if name in values}
    if "batch_stats" in variables:
        variables["batch_stats"] = pool_statistics(variables["batch_stats"])
    return variables, record


def write_directory(
    directory: Path, variables: Mapping[str, Any], *, record: Mapping[str, Any]
) -> None:
    """Writes a directory of weights, whole or not at all; UserError where it is there already."""
    refuse_existing(directory)
    quieten_orbax()
    try:
        directory.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=directory.absolute().parent, prefix=f".{directory.name}."
        ) as folder:
            unfinished = Path(folder) / directory.name
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
                writer.save(
                    unfinished,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(dict(variables)),
                        record=ocp.args.JsonSave(dict(record)),
                    ),
                )
            write_manifest(unfinished)
            unfinished.rename(directory.absolute())
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_checkpoint(directory: Path) -> Path:
    """Returns the directory itself if it is a checkpoint, or else the newest good one in it."""
    directory = absolute(directory)
    if (directory / "state").is_dir():
        damage = find_damage(directory)
        if damage is not None:
            raise UserError(f"{directory} cannot be used: {damage}")
        return directory
    parents = (directory / "checkpoints", directory)
    steps = [path for parent in parents for path in parent.glob("[0-9]*") if path.name.isdigit()]
    for step in sorted(steps, key=lambda path: int(path.name), reverse=True):
        if find_damage(step) is None:
            return step
    raise UserError(
        f"{directory} holds no good checkpoint; it must be what `convert` has written, the "
        "directory of a run or one of its checkpoints"
    )


def _siblings(path: Path) -> list[Path]:
    return [sibling for sibling in path.parent.glob("*") if sibling.suffix in _READERS]


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged, cut short or no safetensors file ({error})") from error
    unknown = {entry["dtype"] for _, entry in entries} - _SAFETENSORS_DTYPES.keys()
    if unknown:
        raise UserError(f"{path} has tensors of {', '.join(sorted(unknown))}, which are not read")
    return {
        name: np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in entries
    }


_READERS: Mapping[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": _read_safetensors,
    ".pth": read_torch_file,
    ".pt": read_torch_file,
    ".tar": read_torch_file,
    ".bin": read_torch_file,
}
