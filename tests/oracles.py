"""What the layers and networks compute, in plain NumPy float64, written from the formulas alone.

Nothing here imports JAX or the package under test. Images are NHWC, kernels HWIO. The composed
networks read their parameters by name from a Flax tree and return, beside their output, the
running statistics after the call, in the tree's own layout.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Pair = int | tuple[int, int]
Tree = Mapping[str, "Tree | np.ndarray"]


def pair(size: Pair) -> tuple[int, int]:
    """`size` for height and for width."""
    return (size, size) if isinstance(size, int) else size


def output_size(size: int, kernel_size: int, padding: int, strides: int) -> int:
    """`floor((W - K + 2P) / S) + 1`."""
    return (size - kernel_size + 2 * padding) // strides + 1


def windows(
    images: np.ndarray, kernel_size: Pair, strides: Pair, padding: Pair, fill: float
) -> np.ndarray:
    """What each tap of the kernel sees: (kernel height, kernel width, N, H out, W out, C)."""
    (kernel_height, kernel_width), (down, right) = pair(kernel_size), pair(strides)
    (top, left) = pair(padding)
    height = output_size(images.shape[1], kernel_height, top, down)
    width = output_size(images.shape[2], kernel_width, left, right)
    border = ((0, 0), (top, top), (left, left), (0, 0))
    padded = np.pad(np.asarray(images, np.float64), border, constant_values=fill)
    return np.stack(
        [
            [
                padded[
                    :,
                    i : i + down * (height - 1) + 1 : down,
                    j : j + right * (width - 1) + 1 : right,
                ]
                for j in range(kernel_width)
            ]
            for i in range(kernel_height)
        ]
    )


def conv2d(
    images: np.ndarray,
    kernel: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    strides: Pair = 1,
    padding: Pair = 0,
    groups: int = 1,
) -> np.ndarray:
    """`sum over i, j, c of K * X + b`; with groups, each sees its own share of the channels."""
    taps = windows(images, kernel.shape[:2], strides, padding, fill=0.0)
    output = np.concatenate(
        [
            np.einsum("ijnhwc,ijcf->nhwf", share, filters)
            for share, filters in zip(
                np.split(taps, groups, axis=-1),
                np.split(np.asarray(kernel, np.float64), groups, axis=-1),
                strict=True,
            )
        ],
        axis=-1,
    )
    return output if bias is None else output + np.asarray(bias, np.float64)


def max_pool(
    images: np.ndarray, kernel_size: Pair, *, strides: Pair, padding: Pair = 0
) -> np.ndarray:
    """The largest pixel of each window; the border never wins."""
    return windows(images, kernel_size, strides, padding, fill=-np.inf).max(axis=(0, 1))


def global_average_pool(images: np.ndarray) -> np.ndarray:
    return np.asarray(images, np.float64).mean(axis=(1, 2))


def relu(values: np.ndarray) -> np.ndarray:
    return np.maximum(values, 0.0)


def dense(features: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return features @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)


def batch_norm(
    images: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    *,
    train: bool,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    unbiased: bool = False,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The normalised images, and the running mean and variance after the call.

    `momentum` is the share of the old statistics that stays (Flax 0.9 is PyTorch 0.1). The images
    are always normalised by the biased variance; the running one is biased as in Flax, or
    `unbiased` as in PyTorch.
    """
    images, scale, bias, mean, var = (
        np.asarray(value, np.float64) for value in (images, scale, bias, mean, var)
    )
    if not train:
        return (images - mean) / np.sqrt(var + epsilon) * scale + bias, {"mean": mean, "var": var}
    count = images.size // images.shape[-1]
    batch_mean = images.mean(axis=(0, 1, 2))
    batch_var = np.square(images - batch_mean).mean(axis=(0, 1, 2))
    seen_var = batch_var * count / (count - 1) if unbiased else batch_var
    statistics = {
        "mean": momentum * mean + (1 - momentum) * batch_mean,
        "var": momentum * var + (1 - momentum) * seen_var,
    }
    return (images - batch_mean) / np.sqrt(batch_var + epsilon) * scale + bias, statistics


def group_norm(
    images: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
) -> np.ndarray:
    """Each image normalised over its pixels and each group of neighbouring channels."""
    grouped = np.asarray(images, np.float64).reshape(*images.shape[:3], num_groups, -1)
    mean = grouped.mean(axis=(1, 2, 4), keepdims=True)
    var = np.square(grouped - mean).mean(axis=(1, 2, 4), keepdims=True)
    normalised = ((grouped - mean) / np.sqrt(var + epsilon)).reshape(images.shape)
    return normalised * np.asarray(scale, np.float64) + np.asarray(bias, np.float64)


def cross_entropy(
    logits: np.ndarray, labels: np.ndarray, *, label_smoothing: float = 0.0
) -> np.ndarray:
    """Of each example, against its label with `label_smoothing` spread over all the classes."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    classes = logits.shape[-1]
    targets = (1 - label_smoothing) * np.eye(classes)[labels] + label_smoothing / classes
    return -(targets * log_probabilities).sum(axis=-1)


def conv_block(
    images: np.ndarray,
    params: Tree,
    batch_stats: Tree,
    *,
    train: bool,
    strides: Pair = 1,
    padding: Pair = 1,
    groups: int = 1,
    act=relu,
) -> tuple[np.ndarray, dict]:
    """Convolution, the norm that the trees have parameters for, `act`.

    A norm without statistics is a GroupNorm of 16 channels a group; one without parameters, none.
    """
    features = conv2d(images, **params["conv"], strides=strides, padding=padding, groups=groups)
    if "norm" not in params:
        return act(features), {}
    if "norm" not in batch_stats:
        num_groups = features.shape[-1] // 16
        return act(group_norm(features, **params["norm"], num_groups=num_groups)), {}
    features, norm = batch_norm(features, **params["norm"], **batch_stats["norm"], train=train)
    return act(features), {"norm": norm}


def identity(values: np.ndarray) -> np.ndarray:
    return values


def chain(
    images: np.ndarray,
    params: Tree,
    batch_stats: Tree,
    layers: Mapping[str, Mapping],
    train: bool,
) -> tuple[np.ndarray, dict]:
    """ConvBlocks one after the other: each layer's name, and how its block is called."""
    statistics = {}
    for name, arguments in layers.items():
        images, statistics[name] = conv_block(
            images, params[name], batch_stats.get(name, {}), train=train, **arguments
        )
    return images, statistics


def add_shortcut(
    branch: np.ndarray,
    images: np.ndarray,
    params: Tree,
    batch_stats: Tree,
    *,
    train: bool,
    strides: Pair,
    project: bool,
) -> tuple[np.ndarray, dict]:
    """`relu(F(X) + X)`, where X goes through a 1x1 ConvBlock without ReLU if `project`."""
    layers = {"downsample": {"strides": strides, "padding": 0, "act": identity}}
    shortcut, statistics = chain(images, params, batch_stats, layers if project else {}, train)
    return relu(branch + shortcut), statistics


def residual_block(
    images: np.ndarray,
    params: Tree,
    batch_stats: Tree,
    *,
    train: bool,
    strides: Pair = 1,
    project: bool = False,
    relu_before_add: bool = True,
) -> tuple[np.ndarray, dict]:
    """3x3 with the strides, 3x3, the shortcut."""
    layers = {
        "conv1": {"strides": strides},
        "conv2": {"act": relu if relu_before_add else identity},
    }
    branch, statistics = chain(images, params, batch_stats, layers, train)
    output, downsample = add_shortcut(
        branch, images, params, batch_stats, train=train, strides=strides, project=project
    )
    return output, statistics | downsample


def bottleneck_block(
    images: np.ndarray,
    params: Tree,
    batch_stats: Tree,
    *,
    train: bool,
    strides: Pair = 1,
    project: bool = False,
    relu_before_add: bool = False,
) -> tuple[np.ndarray, dict]:
    """1x1, 3x3 with the strides, 1x1, the shortcut."""
    layers = {
        "conv1": {"padding": 0},
        "conv2": {"strides": strides},
        "conv3": {"padding": 0, "act": relu if relu_before_add else identity},
    }
    branch, statistics = chain(images, params, batch_stats, layers, train)
    output, downsample = add_shortcut(
        branch, images, params, batch_stats, train=train, strides=strides, project=project
    )
    return output, statistics | downsample


BLOCKS = {"residual": (residual_block, 1), "bottleneck": (bottleneck_block, 4)}
STEMS = {
    "large": (7, 2, 3),
    "medium": (3, 2, 1),
    "small": (3, 1, 1),
}  # kernel size, strides, padding


def block_plan(
    stage_sizes: Sequence[int], width: int, block: str
) -> list[tuple[int, str, int, int, int, bool]]:
    """Of each block: stage, name, channels in, width, strides, and whether its shortcut projects.

    A projection stands where the block's output has another shape than its input, only there.
    """
    expansion = BLOCKS[block][1]
    plan, channels = [], width
    for stage, size in enumerate(stage_sizes, start=1):
        stage_width = width * 2 ** (stage - 1)
        for number in range(1, size + 1):
            strides = 2 if stage > 1 and number == 1 else 1
            project = strides != 1 or channels != stage_width * expansion
            name = f"stage{stage}_block{number}"
            plan.append((stage, name, channels, stage_width, strides, project))
            channels = stage_width * expansion
    return plan


def modern_cnn_stages(
    images: np.ndarray,
    params: Tree,
    batch_stats: Tree,
    *,
    train: bool,
    stage_sizes: Sequence[int],
    width: int,
    stem: str,
    block: str,
    variant: str,
) -> tuple[list[np.ndarray], dict]:
    """The stem's output (after the pooling) and each stage's."""
    statistics = {}
    _, strides, padding = STEMS[stem]
    features, statistics["stem"] = conv_block(
        images,
        params["stem"],
        batch_stats.get("stem", {}),
        train=train,
        strides=strides,
        padding=padding,
    )
    if stem == "large":
        features = max_pool(features, 3, strides=2, padding=1)
    maps = [features] * (len(stage_sizes) + 1)
    for stage, name, _, _, strides, project in block_plan(stage_sizes, width, block):
        maps[stage], statistics[name] = BLOCKS[block][0](
            features,
            params[name],
            batch_stats.get(name, {}),
            train=train,
            strides=strides,
            project=project,
            relu_before_add=variant == "literal",
        )
        features = maps[stage]
    return maps, statistics


def modern_cnn(
    images: np.ndarray, params: Tree, batch_stats: Tree, **arguments
) -> tuple[np.ndarray, dict]:
    """The logits; the arguments of `modern_cnn_stages`."""
    maps, statistics = modern_cnn_stages(images, params, batch_stats, **arguments)
    return dense(global_average_pool(maps[-1]), **params["head"]), statistics


def conv_block_parameters(kernel_size: int, inputs: int, features: int, use_bias: bool) -> int:
    """Kernel and bias of the convolution, scale and bias of its BatchNorm."""
    convolution = kernel_size**2 * inputs * features + (features if use_bias else 0)
    return convolution + 2 * features


def modern_cnn_parameters(
    *,
    num_classes: int = 1000,
    channels: int = 3,
    stage_sizes: Sequence[int] = (3, 4, 6, 3),
    width: int = 64,
    stem: str = "large",
    block: str = "bottleneck",
    variant: str = "standard",
) -> int:
    """Trainable parameters, by the closed form of each layer."""
    use_bias = variant == "literal"
    expansion = BLOCKS[block][1]
    total = conv_block_parameters(STEMS[stem][0], channels, width, use_bias)
    for _, _, inputs, features, _, project in block_plan(stage_sizes, width, block):
        outputs = features * expansion
        layers = {
            "residual": [(3, inputs, features), (3, features, features)],
            "bottleneck": [(1, inputs, features), (3, features, features), (1, features, outputs)],
        }[block]
        layers += [(1, inputs, outputs)] * project
        total += sum(conv_block_parameters(*layer, use_bias) for layer in layers)
    head = width * 2 ** (len(stage_sizes) - 1) * expansion
    return total + head * num_classes + num_classes
