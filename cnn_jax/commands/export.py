"""Exporting: what a run has learned as one file, which this package is not needed to use."""

import dataclasses
import functools
import importlib.util
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cnn_jax.errors import UserError
from cnn_jax.exported import DESCRIPTION, PROGRAM
from cnn_jax.plan import as_evaluated
from cnn_jax.runtime.compiler import compile_program, unseen_options
from cnn_jax.runtime.files import refuse_existing
from cnn_jax.runtime.platform import versions
from cnn_jax.storage import write_atomically
from cnn_jax.trained import Trained, open_run
from cnn_jax.typing import RawImages

PLATFORMS = ("cpu", "cuda", "tpu")

FORMATS = ("stablehlo", "onnx")

TOLERANCE = 1e-5
"""The largest difference of a probability that what is written may have."""

CHECKED_BATCH = 3
"""Random images on which it is compared."""

NEEDED = {
    "stablehlo": (("flatbuffers",), "pip install flatbuffers"),
    "onnx": (
        ("jax2onnx", "onnx", "onnxruntime"),
        # Named, or pip takes a version of jax2onnx that replaces it by an older one.
        'pip install jax2onnx onnxruntime "orbax-checkpoint>=0.12.8"',
    ),
}
"""What a format needs, and how it is had."""


def export(
    workdir: str | Path,
    to: str | Path,
    *,
    checkpoint: str = "last",
    ema: bool = False,
    form: str = "stablehlo",
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, Any]:
    """Writes a function of uint8 images [batch, h, w, c] that gives probabilities [batch, k].

    It computes in float32, whatever the run did, and is written only after what it gives on the CPU
    has been compared with the run's weights in float32. As "stablehlo" the file is a zip of two
    parts: `model.stablehlo`, the function with its weights and its preprocessing, for any batch
    size and each of `platforms`, as `jax.export` serialises it; and `model.json`, which says what
    it is. As "onnx" it is an ONNX model with the same as metadata. It is there whole or not at all.
    BatchNorms are folded into the convolutions before them; see `cnn_jax.models.folding`.

    Args:
      workdir: directory of the run.
      to: the file; it must not be there yet.
      checkpoint: "last", "best" or a step.
      ema: take the moving averages of the weights.
      form: one of `FORMATS`.
      platforms: of StableHLO: of cpu, cuda, rocm and tpu; none of them need be here.

    Returns the description in the file and, as `largest_difference`, those of a probability on
    random images from the run's network: in "float32", and in the run's precision where that is
    another. Raises UserError for a run that cannot be read, a missing package, a network that is
    not converted right, or a file that cannot be written.
    """
    to = Path(to)
    refuse_existing(to)
    packages, how = NEEDED[form]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"export: {form} needs {', '.join(missing)}; install it: {how}")
    run = open_run(workdir, checkpoint=checkpoint, ema=ema)
    config = dataclasses.replace(run.config, precision="float32")
    exact = dataclasses.replace(run, config=config, model=run.model.clone(dtype=jnp.float32))
    shape = (CHECKED_BATCH, *run.dataset.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    write = {"stablehlo": functools.partial(_stablehlo, platforms=platforms), "onnx": _onnx}[form]
    with jax.default_device(_cpu()):  # others multiply float32 in fewer bits, unless told
        description, contents, found = write(exact, images)
        differences = {
            each.config.precision: float(np.abs(found - _probabilities_of(each, images)).max())
            for each in (exact, run)
        }
    if not differences["float32"] <= TOLERANCE:
        raise UserError(
            f"export: as {form} it computes other probabilities than the run's weights in float32, "
            f"by {differences['float32']:.2g}; nothing is written"
        )
    try:
        write_atomically(to, contents)
    except OSError as error:
        raise UserError(f"{to}: cannot be written: {error.strerror or error}") from error
    return {**description, "largest_difference": differences}


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(
            f"export: what is written is compared on the CPU, which JAX_PLATFORMS leaves out; add "
            f"it, as in JAX_PLATFORMS=cuda,cpu ({error})"
        ) from error


def _stablehlo(
    run: Trained, checked: np.ndarray, platforms: Sequence[str]
) -> tuple[dict[str, Any], bytes, np.ndarray]:
    """Returns the description, the contents of the file and what it makes of `checked` images."""
    function, folded = _probabilities(run)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *run.dataset.image_shape), jnp.uint8)
    exported = jax.export.export(jax.jit(function), platforms=tuple(platforms))(images)
    program = bytes(exported.serialize())
    here = jax.export.deserialize(bytearray(program)).call if "cpu" in platforms else function
    lowered = jax.jit(here).lower(checked)
    options = dict(unseen_options(lowered))
    description = {
        **_description(run, folded),
        "platforms": list(platforms),
        "compiler_options": {"cpu": options},
    }
    contents = io.BytesIO()
    with zipfile.ZipFile(contents, "w") as file:
        file.writestr(DESCRIPTION, json.dumps(description, indent=2) + "\n")
        file.writestr(PROGRAM, program)
    found = lowered.compile(compiler_options=options)(checked)
    return description, contents.getvalue(), np.asarray(found)


def _onnx(run: Trained, checked: np.ndarray) -> tuple[dict[str, Any], bytes, np.ndarray]:
    """Returns the description, the contents of the file and what it makes of `checked` images."""
    from cnn_jax.runtime.onnx_program import convert_to_onnx, run_onnx

    function, folded = _probabilities(run)
    description = _description(run, folded)
    try:
        contents = convert_to_onnx(function, run.dataset.image_shape, description)
    except (NotImplementedError, TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"export: jax2onnx does not convert {run.config.model.name}: "
            f"{' '.join(str(error).split())}; --format stablehlo takes every network"
        ) from error
    return description, contents, run_onnx(contents, checked)


def _probabilities_of(run: Trained, images: RawImages) -> np.ndarray:
    """Returns what a run says of images, BatchNorms and all, in its precision."""
    model = as_evaluated(run.model, run.config)

    def probabilities(variables: Any, images: RawImages) -> jax.Array:
        return jax.nn.softmax(model.apply(variables, run.normalize(images), train=False))

    arguments = dict(run.variables), images
    return np.asarray(compile_program(jax.jit(probabilities).lower(*arguments))(*arguments))


def _probabilities(run: Trained) -> tuple[Callable[[RawImages], jax.Array], bool]:
    """Returns the function, and whether it has lost its BatchNorms."""
    folded = run.without_batch_norms
    model = as_evaluated(folded.model, folded.config)

    def probabilities(images: RawImages) -> jax.Array:
        logits: Any = model.apply(folded.variables, folded.normalize(images), train=False)
        return jax.nn.softmax(logits)

    return probabilities, folded.model is not run.model


def _description(run: Trained, folded: bool) -> dict[str, Any]:
    height, width, channels = run.dataset.image_shape
    return {
        "input": {"dtype": "uint8", "shape": ["batch", height, width, channels]},
        "output": {"dtype": "float32", "shape": ["batch", run.dataset.num_classes]},
        "class_names": list(run.class_names),
        "preprocessing": run.preprocessing,
        "batch_norms_folded": folded,
        "precision": run.config.precision,
        "model": run.config.model.name,
        "data": run.config.data.name,
        "step": run.step,
        "ema": run.ema,
        "versions": versions(),
    }
