"""The weights that a model starts from, out of a file or a directory, each tensor accounted for."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cnn_jax.models.torch_weights import from_torch, from_variables
from cnn_jax.runtime.weight_files import read_directory, read_tensors
from cnn_jax.storage import place


def load_weights(
    path: str | Path, like: Mapping[str, Any], *, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns the variables that lie at `path`, of the structure of `like`, in their own dtypes.

    Args:
      path: a state dict of torchvision or timm (.safetensors, .pth, .pt), or a directory: what
        `convert` has written, a run or one of its checkpoints.
      like: the variables of the model; abstract ones will do.
      ignore: parts that are left as they stand in `like`, such as "head".

    Raises UserError where it cannot be read or does not fit, with everything that does not.
    """
    path = place(path)
    if path.is_dir():
        return from_variables(read_directory(path)[0], like, ignore=ignore)
    return from_torch(read_tensors(path), like, ignore=ignore)
