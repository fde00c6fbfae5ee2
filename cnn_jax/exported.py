"""A file that `export` has written, read back."""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from cnn_jax.errors import UserError
from cnn_jax.runtime.programs import kept
from cnn_jax.typing import RawImages

PROGRAM, DESCRIPTION = "model.stablehlo", "model.json"
"""The parts of the file."""


@dataclasses.dataclass(frozen=True)
class ExportedFile:
    """What an exported file holds.

    Attributes:
      path: of the file.
      digest: its SHA-256.
      about: what is in its `model.json`.
      program: the function of uint8 images that gives probabilities.
    """

    path: Path
    digest: str
    about: Mapping[str, Any]
    program: jax.export.Exported

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The height, width and channels of an image."""
        _, height, width, channels = self.about["input"]["shape"]
        return height, width, channels

    def compile_probabilities(self, batch_size: int) -> Callable[[RawImages], jax.Array]:
        """Returns a compiled function of `batch_size` uint8 images: probabilities [b, k].

        Raises UserError where the file is not for the platform that JAX has here.
        """
        images = jax.ShapeDtypeStruct((batch_size, *self.image_shape), jnp.uint8)
        options = self.about["compiler_options"].get(jax.default_backend(), {})

        def make() -> jax.stages.Compiled:
            try:
                lowered = jax.jit(self.program.call).lower(images)
            except ValueError as error:
                raise UserError(f"{self.path}: {error}") from error
            return lowered.compile(compiler_options=options)

        return kept(
            "exported",
            make,
            arguments={"images": images},
            devices=jax.local_devices()[:1],
            options=options,
            decided_by={"file": self.digest},
        )


def open_exported(path: str | Path) -> ExportedFile:
    """Returns what is in the file that `export` has written at `path`.

    Raises UserError where there is none, it is damaged, or this JAX cannot read it.
    """
    path = Path(path)
    try:
        contents = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(contents)) as file:
            about = json.loads(file.read(DESCRIPTION))
            program = bytearray(file.read(PROGRAM))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: is no StableHLO file that export has written ({error}); one of --format onnx "
            "is for onnxruntime"
        ) from error
    try:
        exported = jax.export.deserialize(program)
    except Exception as error:  # flatbuffers and MLIR have no error in common
        raise UserError(f"{path}: jax {jax.__version__} cannot read it: {error}") from error
    return ExportedFile(path, hashlib.sha256(contents).hexdigest(), about, exported)
