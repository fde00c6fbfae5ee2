"""The network that answers: of a run's directory, or of an exported file."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.exported import open_exported
from cnn_jax.models.explaining import class_activation_map
from cnn_jax.runtime.checkpoint import MANIFEST
from cnn_jax.trained import Trained, open_run

Program = Callable[[np.ndarray], Any]
Evidence = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Network:
    """What is served.

    Attributes:
      about: what a client should know of it, as JSON can say it.
      class_names: in the order of the probabilities.
      image_shape: height, width and channels that it takes.
      eval_fraction: of an image, the share that it takes; see `images.crop_center`.
      compile: returns a function of so many uint8 images that gives their probabilities.
      compile_evidence: returns a function of one uint8 image and a class, which gives the evidence
        [h, w] for it by Grad-CAM; None where the network cannot be looked into.
    """

    about: Mapping[str, Any]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    eval_fraction: float
    compile: Callable[[int], Program]
    compile_evidence: Callable[[], Evidence] | None = None


def network_of_run(
    workdir: str | Path,
    *,
    checkpoint: str,
    ema: bool = False,
    log: Callable[[str], None] = print,
) -> Network:
    """Returns the network of a run, with `ema` that of its averaged weights.

    Raises UserError for a run that cannot be read, or has none.
    """
    run = open_run(workdir, checkpoint=checkpoint, ema=ema, log=log)
    manifest = run.directory / "checkpoints" / str(run.step) / MANIFEST

    def compile_probabilities(batch_size: int) -> Program:
        logits = run.compile_logits(batch_size)
        return lambda images: jax.nn.softmax(logits(images))

    about = {
        "model": run.config.model.name,
        "data": run.config.data.name,
        "step": run.step,
        "ema": run.ema,
        "digest": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "preprocessing": run.preprocessing,
    }
    shape = run.dataset.image_shape
    return Network(
        _described(about, run.class_names, shape),
        run.class_names,
        shape,
        run.eval_fraction,
        compile_probabilities,
        lambda: _compile_evidence(run),
    )


def network_of_file(path: str | Path) -> Network:
    """Returns the network of an exported file; UserError for one that cannot be read."""
    exported = open_exported(path)
    names = tuple(exported.about["class_names"])
    # Earlier files do not say all of it.
    told = ("model", "data", "step", "ema", "preprocessing")
    known = {key: exported.about[key] for key in told if key in exported.about}
    about = _described(known | {"digest": exported.digest}, names, exported.image_shape)
    fraction = known.get("preprocessing", {}).get("eval_fraction", 1.0)
    return Network(about, names, exported.image_shape, fraction, exported.compile_probabilities)


def _described(
    about: Mapping[str, Any], class_names: tuple[str, ...], shape: tuple[int, int, int]
) -> dict[str, Any]:
    height, width, channels = shape
    image = {"height": height, "width": width, "channels": channels}
    return {**about, "image": image, "class_names": list(class_names)}


def _compile_evidence(run: Trained) -> Evidence:
    def evidence(variables: Any, images: jax.Array, classes: jax.Array) -> jax.Array:
        return class_activation_map(run.model, variables, images, classes)[0]

    program = run.compile("evidence", evidence, 1, jax.ShapeDtypeStruct((1,), jnp.int32))

    def compute(pixels: np.ndarray, chosen: int) -> np.ndarray:
        return np.asarray(program(pixels[None], np.array([chosen], np.int32)))

    return compute
