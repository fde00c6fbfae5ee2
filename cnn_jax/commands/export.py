"""Exporting: what a run has learned as one file, which this package is not needed to use."""

import importlib.util
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from cnn_jax.errors import UserError
from cnn_jax.exported import DESCRIPTION, PROGRAM
from cnn_jax.models.folding import fold_batch_norms
from cnn_jax.runtime.compiler import WITHOUT_FUSED_REDUCTIONS
from cnn_jax.runtime.files import write_atomically
from cnn_jax.runtime.platform import versions
from cnn_jax.runtime.weight_files import refuse_existing
from cnn_jax.trained import Trained, open_run
from cnn_jax.typing import RawImages

PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    workdir: str | Path,
    to: str | Path,
    *,
    checkpoint: str = "last",
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, Any]:
    """Writes a function of uint8 images [batch, h, w, c] that gives probabilities [batch, k].

    The file is a zip of two parts: `model.stablehlo`, the function with its weights and its
    preprocessing, for any batch size and each of `platforms`, as `jax.export` serialises it; and
    `model.json`, which says what it is. It is there whole or not at all. BatchNorms are folded into
    the convolutions before them; see `cnn_jax.models.folding`.

    Args:
      workdir: directory of the run.
      to: the file; it must not be there yet.
      checkpoint: "last", "best" or a step.
      platforms: of cpu, cuda, rocm and tpu; none of them need be here.

    Returns what is in `model.json`. Raises UserError for a run that cannot be read, or a file that
    cannot be written.
    """
    to = Path(to)
    refuse_existing(to)
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("export: jax.export needs flatbuffers; install it: pip install flatbuffers")
    run = open_run(workdir, checkpoint=checkpoint)
    exported, folded = _exported(run, platforms)
    description = _description(run, platforms) | {"batch_norms_folded": folded}
    contents = io.BytesIO()
    with zipfile.ZipFile(contents, "w") as file:
        file.writestr(DESCRIPTION, json.dumps(description, indent=2) + "\n")
        file.writestr(PROGRAM, bytes(exported.serialize()))
    try:
        write_atomically(to, contents.getvalue())
    except OSError as error:
        raise UserError(f"{to}: cannot be written: {error.strerror or error}") from error
    return description


def _exported(run: Trained, platforms: Sequence[str]) -> tuple[jax.export.Exported, bool]:
    """Returns the function, and whether it has lost its BatchNorms."""
    shape = run.dataset.image_shape
    image = jax.ShapeDtypeStruct((1, *shape), jnp.dtype(run.config.precision))
    model, variables = fold_batch_norms(run.model, run.variables, image)

    def probabilities(images: RawImages) -> jax.Array:
        logits: Any = model.apply(variables, run.normalize(images), train=False)
        return jax.nn.softmax(logits)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.uint8)
    exported = jax.export.export(jax.jit(probabilities), platforms=tuple(platforms))(images)
    return exported, model is not run.model


def _description(run: Trained, platforms: Sequence[str]) -> dict[str, Any]:
    height, width, channels = run.dataset.image_shape
    return {
        "input": {"dtype": "uint8", "shape": ["batch", height, width, channels]},
        "output": {"dtype": "float32", "shape": ["batch", run.dataset.num_classes]},
        "class_names": list(run.class_names),
        "preprocessing": run.preprocessing,
        "platforms": list(platforms),
        "compiler_options": {"cpu": dict(WITHOUT_FUSED_REDUCTIONS)},
        "precision": run.config.precision,
        "model": run.config.model.name,
        "data": run.config.data.name,
        "step": run.step,
        "versions": versions(),
    }
