"""Weights from PyTorch's files to directories of this package, and back."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax.errors import UsageError, UserError
from cnn_jax.models import create_model
from cnn_jax.models.torch_weights import (
    fold_conv_biases,
    from_torch,
    head_and_channels,
    recognize,
    to_torch,
    unfold_conv_biases,
)
from cnn_jax.runtime.files import refuse_existing
from cnn_jax.runtime.platform import versions
from cnn_jax.runtime.weight_files import (
    COLLECTIONS,
    read_directory,
    read_tensors,
    sha256,
    write_directory,
    write_tensors,
)

CONV_BIASES = {
    "fold": (unfold_conv_biases, fold_conv_biases),
    "zero": (fold_conv_biases, unfold_conv_biases),
}
"""What makes the model's variables those that the file has, and what takes them back."""


def convert(
    source: Path,
    target: Path,
    *,
    model: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    conv_biases: str | None = None,
    layout: str | None = None,
) -> int:
    """Converts the weights in `source`, a file or a directory, to `target`, the same.

    Args:
      source: a PyTorch state dict, or a directory of weights, a run or one of its checkpoints.
      target: a `.safetensors` file, or a directory. It must not be there yet.
      model: a name in MODELS, for a file; a directory says itself what it holds.
      arguments: of the model. The classes and channels are the file's where they are not given.
      ignore: parts left at random, as a model starts; see `from_torch`.
      conv_biases: "fold" or "zero" for a file and a model of which only the first, or only the
        second, has biases in front of BatchNorm.
      layout: whose names the file gets; by default those of the file that the weights came from.

    Returns 0. Raises UserError where anything is missing or does not fit (UsageError where the
    arguments do not go together); nothing is written then.
    """
    refuse_existing(target)
    if target.suffix in (".pth", ".pt", ".bin", ".tar"):
        raise UsageError(
            f"{target}: files are written as .safetensors; in PyTorch, safetensors.torch.load_file "
            "reads them"
        )
    variables, record = _read(source, model, dict(arguments or {}), ignore, conv_biases)
    name, given = record["model"]["name"], record["model"]["arguments"]
    _say(f"{source}: {name}({_listed(given)}), {_described(variables)}")
    if conv_biases:
        _say(
            "the biases in front of BatchNorm are in the running means, with the same numbers in "
            "evaluation; the ReLU that variant='literal' has before each addition is another matter"
            if conv_biases == "fold"
            else "each convolution in front of BatchNorm has a bias, which is zero"
        )
    if target.suffix == ".safetensors":
        layout = layout or str(record["source"].get("layout", "torchvision"))
        average = getattr(create_model(name, **given), "downsample", None) == "average"
        write_tensors(target, to_torch(variables, layout, average_downsample=average))
        _say(f"written to {target}, with the names of {layout}")
    else:
        write_directory(target, variables, record=record)
        _say(f"written to {target}; a run starts from it with --config.init_from={target}")
    return 0


def _read(
    source: Path,
    model: str | None,
    arguments: dict[str, Any],
    ignore: Sequence[str],
    conv_biases: str | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the variables and a record of the model and the source."""
    if source.is_dir():
        if model or arguments or ignore or conv_biases:
            raise UsageError(
                f"{source} is a directory, which says itself what model it holds: --model and what "
                "goes with it are for a file"
            )
        variables, found = read_directory(source)
        return variables, _record_of(found, variables)
    tensors = read_tensors(source)
    if model is None:
        raise UsageError(f"{source} does not say what model it is for: --model NAME")
    variables, arguments, layout = _fit(tensors, model, arguments, ignore, conv_biases)
    return variables, {
        "model": {"name": model, "arguments": arguments},
        "source": {
            "file": source.name,
            "sha256": sha256(source),
            "layout": layout,
            "ignored": list(ignore),
            "conv_biases": conv_biases,
        },
        "versions": versions(),
    }


def _fit(
    tensors: Mapping[str, np.ndarray],
    name: str,
    arguments: Mapping[str, Any],
    ignore: Sequence[str],
    conv_biases: str | None,
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Returns the model's variables with the tensors in, its arguments, and the tensors' layout."""
    classes, channels = head_and_channels(tensors, jax.eval_shape(_init(name, arguments, 3)))
    if classes and not {"head", "fc"} & set(ignore):
        arguments = {"num_classes": classes, **arguments}
    init = _init(name, arguments, channels or 3)
    as_file, as_model = CONV_BIASES[conv_biases] if conv_biases else (dict, dict)
    like = jax.eval_shape(lambda: as_file(init()))
    if conv_biases and jax.tree.structure(like) == jax.tree.structure(jax.eval_shape(init)):
        raise UserError(
            f"--conv-biases={conv_biases}: {name} has "
            f"{'no convolution without' if conv_biases == 'fold' else 'no'} bias before a BatchNorm"
        )
    found = flatten_dict(from_torch(tensors, like, ignore=ignore))
    left = [path for path, leaf in found.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
    random = jax.jit(lambda: {path: flatten_dict(as_file(init()))[path] for path in left})
    variables = unflatten_dict({**found, **jax.device_get(random() if left else {})})
    return as_model({**like, **variables}), dict(arguments), recognize(tensors, like).name


def _init(name: str, arguments: Mapping[str, Any], channels: int) -> Callable[[], dict[str, Any]]:
    """Returns what makes the variables that the model starts with; UserError if it cannot be."""
    model = create_model(name, **arguments)

    def init() -> dict[str, Any]:
        side = 2 * max(model.feature_strides)
        image = jnp.zeros((1, side, side, channels))
        variables = model.init(jax.random.key(0), image, train=False)
        return {name: variables[name] for name in COLLECTIONS if name in variables}

    try:
        jax.eval_shape(init)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{name}({_listed(arguments)}): {' '.join(str(error).split())}") from error
    return init


def _record_of(found: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a directory of weights, or one like it of a checkpoint of a run."""
    if "source" in found:
        return dict(found)
    arguments = dict(found["config"]["model"])
    return {
        "model": {
            "name": arguments.pop("name"),
            "arguments": {**arguments, "num_classes": variables["params"]["head"]["bias"].size},
        },
        "source": {"config": found["config"]},
        "versions": versions(),
    }


def _listed(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items())


def _described(variables: Mapping[str, Any]) -> str:
    leaves = jax.tree.leaves(variables["params"])
    dtypes = sorted({leaf.dtype.name for leaf in leaves})
    return f"{sum(leaf.size for leaf in leaves):,} parameters of {' and '.join(dtypes)}"


def _say(text: str) -> None:
    print(text, flush=True)
