"""Preparing TFDS data sets: under a lock, whole or not at all, and without TFDS's chatter."""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from filelock import FileLock
from tensorflow_datasets.core import constants

from cnn_jax.errors import UserError
from cnn_jax.storage import cache, is_remote, place


def prepared_builder(
    builder_class: type[tfds.core.DatasetBuilder],
    *,
    data_dir: str,
    log: Callable[[str], None],
    **arguments: Any,
) -> tfds.core.DatasetBuilder:
    """Returns a builder, made with `arguments`, whose data set is prepared in `data_dir`.

    Any number of processes may ask at once: one prepares, the others wait for it. A process that
    is killed while it prepares leaves nothing that is taken for a data set.

    Raises:
      UserError: the data set cannot be written, or what is there is damaged.
    """
    root = place(data_dir or str(constants.DATA_DIR))
    if is_remote(root):  # it is made here, and array_record reads files alone
        root = cache() / "sets"
    directory = root / builder_class.name / str(builder_class.VERSION)
    if not directory.exists():
        log(f"preparing {builder_class.name} in {directory}")
        _prepare(lambda: builder_class(data_dir=root, **arguments), directory)
    try:
        builder = builder_class(data_dir=root, **arguments)
    except Exception as error:  # JSON, protobuf and others: TFDS reads its metadata
        raise _damaged(directory, str(error)) from error
    if not builder.is_prepared():
        raise _damaged(directory, "its metadata is missing")
    return builder


def _prepare(make_builder: Callable[[], tfds.core.DatasetBuilder], directory: Path) -> None:
    unread = io.StringIO()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_name(f".{directory.name}.lock")):
            # What TFDS writes into before it renames; under the lock, left by a killed process.
            for leftover in directory.parent.glob(f"incomplete.*_{directory.name}"):
                shutil.rmtree(leftover)
            # If another process has prepared the data set meanwhile, TFDS leaves it as it is.
            with contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
                make_builder().download_and_prepare()
    except (OSError, RuntimeError) as error:  # RuntimeError: a failed write in array_record
        raise UserError(
            f"cannot write the data set to {directory} ({error}): free some space or name another "
            "directory with --config.data.data_dir=DIR"
        ) from error


def _damaged(directory: Path, reason: str) -> UserError:
    return UserError(
        f"the data set in {directory} is damaged ({reason}): delete that directory, and the data "
        "set is prepared again"
    )
