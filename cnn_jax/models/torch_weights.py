"""PyTorch's state dicts to variables and back: names and layouts of torchvision and timm.

A table gives the torch name of every module of a family. Kernels are (height, width, in, out) here
and (out, in, height, width) there; a trailing axis of length 1 carries no information, so a linear
layer and a 1x1 convolution read alike.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax.errors import UserError, nearest

Path: TypeAlias = tuple[str, ...]
"""Where a leaf is in the variables: `("params", "stem", "conv", "kernel")`."""


class OneByOne(str):
    """The torch name of what has two more axes there, both of length 1."""


RESNET = {
    "stem/conv": "conv1",
    "stem/norm": "bn1",
    "stem1/conv": "conv1.0",
    "stem1/norm": "conv1.1",
    "stem2/conv": "conv1.3",
    "stem2/norm": "conv1.4",
    "stem3/conv": "conv1.6",
    "stem3/norm": "bn1",
    "block/conv1/conv": "layer{stage}.{block}.conv1",
    "block/conv1/norm": "layer{stage}.{block}.bn1",
    "block/conv2/conv": "layer{stage}.{block}.conv2",
    "block/conv2/norm": "layer{stage}.{block}.bn2",
    "block/conv3/conv": "layer{stage}.{block}.conv3",
    "block/conv3/norm": "layer{stage}.{block}.bn3",
    "block/attention/reduce": OneByOne("layer{stage}.{block}.se.fc1"),
    "block/attention/expand": OneByOne("layer{stage}.{block}.se.fc2"),
    "block/attention/conv": "layer{stage}.{block}.se.conv",
    "block/attention/channel/reduce": OneByOne("layer{stage}.{block}.se.channel.fc1"),
    "block/attention/channel/expand": OneByOne("layer{stage}.{block}.se.channel.fc2"),
    "block/attention/spatial/conv": "layer{stage}.{block}.se.spatial.conv.conv",
    "block/attention/spatial/norm": "layer{stage}.{block}.se.spatial.conv.bn",
    "block/downsample/conv": "layer{stage}.{block}.downsample.0",
    "block/downsample/norm": "layer{stage}.{block}.downsample.1",
    "head": "fc",
    "head/pool/power": "global_pool.p",
}
RESNET_AVERAGE_DOWNSAMPLE = RESNET | {  # an average pool is the first of the three
    "block/downsample/conv": "layer{stage}.{block}.downsample.1",
    "block/downsample/norm": "layer{stage}.{block}.downsample.2",
}
GOOGLENET = {
    "conv1/conv": "conv1.conv",
    "conv1/norm": "conv1.bn",
    "conv2/conv": "conv2.conv",
    "conv2/norm": "conv2.bn",
    "conv3/conv": "conv3.conv",
    "conv3/norm": "conv3.bn",
    "inception/branch1/conv": "inception{name}.branch1.conv",
    "inception/branch1/norm": "inception{name}.branch1.bn",
    "inception/branch2_reduce/conv": "inception{name}.branch2.0.conv",
    "inception/branch2_reduce/norm": "inception{name}.branch2.0.bn",
    "inception/branch2/conv": "inception{name}.branch2.1.conv",
    "inception/branch2/norm": "inception{name}.branch2.1.bn",
    "inception/branch3_reduce/conv": "inception{name}.branch3.0.conv",
    "inception/branch3_reduce/norm": "inception{name}.branch3.0.bn",
    "inception/branch3/conv": "inception{name}.branch3.1.conv",
    "inception/branch3/norm": "inception{name}.branch3.1.bn",
    "inception/branch4/conv": "inception{name}.branch4.1.conv",
    "inception/branch4/norm": "inception{name}.branch4.1.bn",
    "head": "fc",
    "head/pool/power": "global_pool.p",
}
CONVNEXT_TORCHVISION = {
    "stem/conv": "features.0.0",
    "stem/norm": "features.0.1",
    "downsample/norm": "features.{between}.0",
    "downsample/conv": "features.{between}.1",
    "block/depthwise": "features.{within}.{block}.block.0",
    "block/norm": "features.{within}.{block}.block.2",
    "block/expand": "features.{within}.{block}.block.3",
    "block/reduce": "features.{within}.{block}.block.5",
    "block/layer_scale": OneByOne("features.{within}.{block}.layer_scale"),
    "head/norm": "classifier.0",
    "head": "classifier.2",
    "head/pool/power": "avgpool.p",
}
CONVNEXT_TIMM = {
    "stem/conv": "stem.0",
    "stem/norm": "stem.1",
    "downsample/norm": "stages.{index}.downsample.0",
    "downsample/conv": "stages.{index}.downsample.1",
    "block/depthwise": "stages.{index}.blocks.{block}.conv_dw",
    "block/norm": "stages.{index}.blocks.{block}.norm",
    "block/expand": "stages.{index}.blocks.{block}.mlp.fc1",
    "block/reduce": "stages.{index}.blocks.{block}.mlp.fc2",
    "block/layer_scale": "stages.{index}.blocks.{block}.gamma",
    "head/norm": "head.norm",
    "head": "head.fc",
    "head/pool/power": "head.global_pool.p",
}

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_NUMBERED = re.compile(
    r"(?P<block>stage(?P<stage>\d+)_block(?P<index>\d+))"
    r"|(?P<downsample>stage(?P<after>\d+)_downsample)"
    r"|(?P<inception>inception(?P<name>\w+))"
)
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_COUNTER = "num_batches_tracked"  # torch counts batches, for a momentum that no model here has


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one library names the modules of one family, by their names here.

    Attributes:
      name: of the library.
      modules: the table, its numbers left open.
      average_downsample: whether shortcuts begin with an average pool, as ResNet-D's do.
    """

    name: str
    modules: Mapping[str, str]
    average_downsample: bool = False


_LAYOUTS = (
    Layout("torchvision", RESNET),
    Layout("torchvision", RESNET_AVERAGE_DOWNSAMPLE, average_downsample=True),
    Layout("timm", RESNET),
    Layout("timm", RESNET_AVERAGE_DOWNSAMPLE, average_downsample=True),
    Layout("torchvision", GOOGLENET),
    Layout("torchvision", CONVNEXT_TORCHVISION),
    Layout("timm", CONVNEXT_TIMM),
)
LAYOUTS = tuple(dict.fromkeys(layout.name for layout in _LAYOUTS))
"""Whose names `to_torch` can give."""


class WeightsError(UserError):
    """Everything in which weights and model differ, one line each in `problems`."""

    def __init__(self, problems: Sequence[str], hint: str = ""):
        super().__init__("\n  ".join([f"the weights do not fit the model{hint}:", *problems]))
        self.problems = tuple(problems)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A leaf of the variables as torch has it.

    Attributes:
      name: in the state dict.
      axes: of the leaf, in torch's order.
      shape: in the state dict.
    """

    name: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """Returns the leaf that `array` gives, a copy: torch changes its arrays in place."""
        bare = array.reshape(self.shape[: len(self.axes)])
        return np.array(bare.transpose(np.argsort(self.axes)), order="C")

    def to_torch(self, leaf: Any) -> np.ndarray:
        """Returns the tensor that `leaf` gives, a copy likewise."""
        return np.array(np.asarray(leaf).transpose(self.axes), order="C").reshape(self.shape)

    def fits(self, array: np.ndarray) -> bool:
        """Returns whether the array is one of numbers with a fraction, and of this shape."""
        return jnp.issubdtype(array.dtype, jnp.floating) and _bare(array.shape) == _bare(self.shape)


def from_torch(
    tensors: Mapping[str, np.ndarray], like: Mapping[str, Any], *, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns the variables that a state dict holds, in its own dtypes, copied.

    Args:
      tensors: NumPy arrays by torch name, `{name: x.numpy() for name, x in
        model.state_dict().items()}`, with or without the prefixes of wrapped modules. Which library
        they are named after is found out from the names.
      like: all variables of the model, `{"params": ..., "batch_stats": ...}`; abstract ones will
        do.
      ignore: parts that are left as they stand in `like`, and whose tensors may be missing or of
        any shape: paths in `like` ("head", "stage4_block1/conv1") or names in `tensors` ("aux1").

    Raises:
      UserError: the model has no torch names, `tensors` has something else than arrays, or `like`
        is a part of the variables.
      WeightsError: tensors are missing, unexpected, or of another shape or kind, or there is
        nothing of a part to ignore; all are named.
    """
    for name, value in tensors.items():
        if not isinstance(value, np.ndarray | np.generic | jax.Array):
            raise UserError(
                f"{name}: is a {type(value).__name__}, must be a NumPy array; of a torch model: "
                "{name: x.numpy() for name, x in model.state_dict().items()}"
            )
    tensors, leaves = _unwrapped(tensors), _leaves(like)
    known = _tensors(leaves, recognize(tensors, like))
    values = _account(tensors, known, counters=_counters(known), ignore=ignore)
    return {**like, **unflatten_dict({**leaves, **values})}


def from_variables(
    variables: Mapping[str, Any], like: Mapping[str, Any], *, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns variables of the structure of `like`, each leaf accounted for as in `from_torch`."""
    leaves = _leaves(like)
    known = {
        path: Tensor("/".join(path[1:]), tuple(range(leaf.ndim)), leaf.shape)
        for path, leaf in leaves.items()
    }
    tensors = {"/".join(path[1:]): leaf for path, leaf in _leaves(variables).items()}
    values = _account(tensors, known, ignore=ignore)
    return {**like, **unflatten_dict({**leaves, **values})}


def _account(
    tensors: Mapping[str, np.ndarray],
    known: Mapping[Path, Tensor],
    *,
    counters: Iterable[str] = (),
    ignore: Iterable[str],
) -> dict[Path, np.ndarray]:
    """Returns the leaf of every known tensor that is not to be ignored; WeightsError for others."""
    ignored = _Ignored(ignore)
    values: dict[Path, np.ndarray] = {}
    problems: list[str] = []
    for path, tensor in known.items():
        array = tensors.get(tensor.name)
        if ignored.covers("/".join(path[1:]), tensor.name):
            continue
        if array is None:
            problems.append(f"{tensor.name}: missing, must be {tensor.shape}")
        elif not tensor.fits(array):
            found = f"{array.dtype} {array.shape}"
            problems.append(f"{tensor.name}: {found}, must be floating {tensor.shape}")
        else:
            values[path] = tensor.from_torch(array)
    expected = {tensor.name for tensor in known.values()} | set(counters)
    for name, array in tensors.items():
        if name not in expected and not ignored.covers(name):
            problems.append(f"{name}: {array.dtype} {array.shape}, not expected")
    problems.extend(ignored.unused(["/".join(path[1:]) for path in known], tensors))
    if problems:
        raise WeightsError(problems, _hint(tensors, known))
    return values


def to_torch(
    variables: Mapping[str, Any], layout: str = "torchvision", *, average_downsample: bool = False
) -> dict[str, np.ndarray]:
    """Returns the state dict of real variables, in their own dtypes.

    Args:
      variables: of any model in `cnn_jax.models.MODELS`.
      layout: whose names: "torchvision" or "timm".
      average_downsample: whether the model has downsample="average", which the variables do not
        show and torch's names do.

    Raises UserError where the library has no such model.
    """
    leaves = _leaves(variables)
    known = _tensors(leaves, _layout(leaves, layout, average_downsample))
    arrays = {tensor.name: tensor.to_torch(leaves[path]) for path, tensor in known.items()}
    return arrays | {name: np.zeros((), np.int64) for name in _counters(known)}


def torch_names(
    like: Mapping[str, Any], layout: str = "torchvision", *, average_downsample: bool = False
) -> dict[Path, str]:
    """Returns the torch name of every leaf of the variables, abstract ones will do."""
    leaves = _leaves(like)
    known = _tensors(leaves, _layout(leaves, layout, average_downsample))
    return {path: tensor.name for path, tensor in known.items()}


def recognize(tensors: Mapping[str, Any], like: Mapping[str, Any]) -> Layout:
    """Returns the layout that most names of the tensors follow, of those the model can have."""
    leaves, names = _leaves(like), _unwrapped(tensors).keys()

    def common(layout: Layout) -> int:
        return len(names & {tensor.name for tensor in _tensors(leaves, layout).values()})

    return max(_layouts(leaves), key=common)


def head_and_channels(
    tensors: Mapping[str, np.ndarray], like: Mapping[str, Any]
) -> tuple[int | None, int | None]:
    """Returns the classes and the channels of the images that the tensors were made for.

    `like` may have others. None stands for what the tensors do not tell.
    """
    known = _tensors(_leaves(like), recognize(tensors, like))
    tensors = _unwrapped(tensors)

    def size(axis: int, *modules: tuple[str, ...]) -> int | None:
        names = [known[path].name for path in modules if path in known]
        shapes = [tensors[name].shape for name in names if name in tensors]
        return shapes[0][axis] if shapes and len(shapes[0]) > axis else None

    stems = [("params", part, "conv", "kernel") for part in ("stem", "stem1", "conv1")]
    return size(0, ("params", "head", "kernel")), size(1, *stems)


def fold_conv_biases(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables without the biases of convolutions in front of a BatchNorm.

    The running mean takes them up, `mean' = mean - bias`, so that in evaluation the same numbers
    come out; in training BatchNorm takes them away by itself. Biases only: a model of
    variant="literal" has a ReLU before each addition as well, and stays another function.
    """
    leaves = _leaves(variables)
    for convolution, mean in _normalized_convolutions(leaves):
        if (bias := leaves.pop((*convolution, "bias"), None)) is not None:
            leaves[mean] = leaves[mean] - bias
    return {**variables, **unflatten_dict(leaves)}


def unfold_conv_biases(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables with a bias, zero, for each convolution in front of a BatchNorm.

    A bias that is there already stays as it is.
    """
    leaves = _leaves(variables)
    for convolution, mean in _normalized_convolutions(leaves):
        zeros = np.zeros(leaves[mean].shape, leaves[mean].dtype)
        leaves.setdefault((*convolution, "bias"), zeros)
    return {**variables, **unflatten_dict(leaves)}


def _leaves(variables: Mapping[str, Any]) -> dict[Path, Any]:
    if "params" not in variables:
        raise UserError(
            f"variables of {', '.join(variables) or 'nothing'}: must be all of the model's, "
            '{"params": ..., "batch_stats": ...}'
        )
    flat: Any = flatten_dict(variables)
    return flat


def _normalized_convolutions(leaves: Mapping[Path, Any]) -> list[tuple[Path, Path]]:
    """Returns the path of each convolution before a BatchNorm, and of the BatchNorm's mean."""
    return [
        (("params", *path[1:-2], "conv"), path)
        for path in leaves
        if path[-2:] == ("norm", "mean") and not re.fullmatch(r"stage\d+_downsample", path[1])
    ]


class _Ignored:
    """The parts to ignore, and which of them have been met."""

    def __init__(self, parts: Iterable[str]):
        self._met = dict.fromkeys([parts] if isinstance(parts, str) else parts, False)

    def covers(self, *names: str) -> bool:
        """Returns whether one of the names is that of a part, or of something in it."""
        parts = [
            part
            for part in self._met
            if any(name == part or name.startswith((f"{part}/", f"{part}.")) for name in names)
        ]
        self._met.update(dict.fromkeys(parts, True))
        return bool(parts)

    def unused(self, paths: Iterable[str], names: Iterable[str]) -> Iterator[str]:
        known = sorted({*_prefixes(paths, "/"), *_prefixes(names, ".")})
        for part, met in self._met.items():
            if not met:
                hint = nearest(part, known)
                yield f"{part}: to be ignored, but there is no such part or tensor{hint}"


def _prefixes(names: Iterable[str], separator: str) -> Iterator[str]:
    for name in names:
        parts = name.split(separator)
        yield from (separator.join(parts[: end + 1]) for end in range(len(parts)))


def _layouts(leaves: Mapping[Path, Any]) -> list[Layout]:
    """Returns the layouts that have a name for every leaf; UserError where there is none."""
    nameless = [leaves.keys() - _tensors(leaves, layout).keys() for layout in _LAYOUTS]
    found = [layout for layout, paths in zip(_LAYOUTS, nameless, strict=True) if not paths]
    if not found:
        fewest = sorted("/".join(path) for path in min(nameless, key=len))
        raise UserError(
            f"this model has no counterpart in torchvision or timm, where nothing is like "
            f"{', '.join(fewest)}"
        )
    return found


def _layout(leaves: Mapping[Path, Any], name: str, average_downsample: bool) -> Layout:
    found = [each for each in _layouts(leaves) if each.average_downsample == average_downsample]
    for layout in found:
        if layout.name == name:
            return layout
    known = [layout.name for layout in found]
    raise UserError(
        f"layout={name!r}, average_downsample={average_downsample}: not one of this model"
        f"{nearest(name, known)}; layouts of it: {', '.join(known) or 'none'}"
    )


def _tensors(leaves: Mapping[Path, Any], layout: Layout) -> dict[Path, Tensor]:
    """Returns the tensor of every leaf for which the layout has a name."""
    found = {path: _tensor(path, leaf.shape, layout.modules) for path, leaf in leaves.items()}
    return {path: tensor for path, tensor in found.items() if tensor is not None}


def _tensor(path: Path, shape: tuple[int, ...], modules: Mapping[str, str]) -> Tensor | None:
    if len(path) < 3:
        return None
    _, part, *inner, leaf = path
    key, numbers = _numbered(part)
    module = "/".join([key, *inner])
    if f"{module}/{leaf}" in modules:  # a parameter of the block itself
        name, suffix = modules[f"{module}/{leaf}"], ""
    elif module in modules and leaf in _LEAVES:
        name, suffix = modules[module], f".{_LEAVES[leaf]}"
    else:
        return None
    axes = tuple(range(len(shape)))
    if leaf == "kernel":
        axes = (*axes[:-3:-1], *axes[:-2])
    more = (1, 1) if isinstance(name, OneByOne) and leaf != "bias" else ()
    return Tensor(name.format(**numbers) + suffix, axes, (*(shape[axis] for axis in axes), *more))


def _numbered(part: str) -> tuple[str, dict[str, Any]]:
    """Returns the key of a top-level module in the tables, and the numbers of its torch name."""
    match = _NUMBERED.fullmatch(part)
    if match is None:
        return part, {}
    (key,) = (key for key in ("block", "downsample", "inception") if match[key])
    stage = int(match["stage"] or match["after"] or 0)
    return key, {
        "stage": stage,
        "index": stage - 1,
        "within": 2 * stage - 1,
        "between": 2 * stage - 2,
        "block": int(match["index"] or 0) - 1,
        "name": match["name"],
    }


def _counters(known: Mapping[Path, Tensor]) -> list[str]:
    means = [tensor.name for path, tensor in known.items() if path[-1] == "mean"]
    return [name.removesuffix("running_mean") + _COUNTER for name in means]


def _unwrapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors without a prefix that a wrapper has given to all names."""
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): x for name, x in tensors.items()})
    return dict(tensors)


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape without its trailing axes of length 1."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


def _hint(tensors: Mapping[str, np.ndarray], known: Mapping[Path, Tensor]) -> str:
    """Returns what is probably the matter."""
    names = {tensor.name: path for path, tensor in known.items()}
    if len(names.keys() & tensors.keys()) < len(names) / 2:
        return ", most of whose tensors have other names; is it another model?"
    biases = [name for name in names.keys() ^ tensors.keys() if name.endswith(".bias")]
    modules = {names[w][1:-1] for b in biases if (w := f"{b[:-4]}weight") in names}
    if any(module[-1] == "conv" for module in modules):
        return " (biases in front of BatchNorm can be folded or added; see `convert --help`)"
    return ""
