"""The networks in plain PyTorch, written from the papers and the names in published state dicts.

Nothing here imports the package under test, torchvision or timm. Parameters have torchvision's
names, and timm's where only timm has the network (deep stem, average-pooled shortcut, attention).
`docs/parity.md` says how these networks were checked against the originals.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Norm = Callable[[int], nn.Module]


class BiasedBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose running variance is the biased one, as Flax keeps it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
            return functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return super().forward(x)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of an NCHW array."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm_layer(name: str, channels: int, epsilon: float = 1e-5) -> nn.Module:
    """The normalisation that the package calls `name`."""
    if name == "group":
        return nn.GroupNorm(channels // math.gcd(16, channels), channels, eps=1e-5)
    if name == "layer":
        return ChannelLayerNorm(channels, eps=1e-6)
    if name == "none":
        return nn.Identity()
    make = {"batch": BiasedBatchNorm, "batch_unbiased": nn.BatchNorm2d}[name]
    return make(channels, eps=epsilon, momentum=0.1)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, max(1, channels // reduction), 1)
        self.fc2 = nn.Conv2d(max(1, channels // reduction), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(pooled))))


class EfficientChannel(nn.Module):
    def __init__(self, channels: int, kernel_size: int | None = None):
        super().__init__()
        if kernel_size is None:
            kernel_size = int(abs(math.log2(channels) + 1) / 2)
            kernel_size = max(3, kernel_size + 1 - kernel_size % 2)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.conv(x.mean(dim=(2, 3))[:, None])[:, 0])
        return x * gate[:, :, None, None]


class ChannelGate(nn.Module):
    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, max(1, channels // reduction), 1, bias=False)
        self.fc2 = nn.Conv2d(max(1, channels // reduction), channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        average, largest = x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        score = sum(self.fc2(torch.relu(self.fc1(pooled))) for pooled in (average, largest))
        return x * torch.sigmoid(score)


class ConvNorm(nn.Module):
    """A convolution without bias and its norm, named `conv` and `bn`; a ReLU if asked for."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        *,
        norm: Norm,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = False,
        relu: bool = True,
    ):
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=bias)
        self.bn = norm(outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return torch.relu(x) if self.relu else x


class SpatialGate(nn.Module):
    def __init__(self, kernel_size: int, norm: Norm):
        super().__init__()
        self.conv = ConvNorm(2, 1, kernel_size, norm=norm, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        summary = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.conv(summary))


class CBAM(nn.Module):
    def __init__(self, channels: int, norm: Norm, reduction: int = 16, kernel_size: int = 7):
        super().__init__()
        self.channel = ChannelGate(channels, reduction)
        self.spatial = SpatialGate(kernel_size, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial(self.channel(x))


def attention_layer(name: str, channels: int, norm: Norm) -> nn.Module:
    if name == "none":
        return nn.Identity()
    if name == "squeeze_excite":
        return SqueezeExcite(channels)
    if name == "efficient_channel":
        return EfficientChannel(channels)
    return {"cbam": CBAM}[name](channels, norm)


class BlurPool(nn.Module):
    """A binomial filter on reflected edges, then every `stride`-th pixel."""

    def __init__(self, stride: int = 2, kernel_size: int = 3):
        super().__init__()
        self.stride = stride
        self.edge = (stride - 1 + kernel_size - 1) // 2
        self.taps = [math.comb(kernel_size - 1, k) for k in range(kernel_size)]

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        taps = torch.tensor(self.taps, dtype=x.dtype) / sum(self.taps)
        kernel = torch.outer(taps, taps).expand(channels, 1, -1, -1)
        x = functional.pad(x, [self.edge] * 4, mode="reflect")
        return functional.conv2d(x, kernel, stride=self.stride, groups=channels)


class GeneralizedMean(nn.Module):
    def __init__(self, power: float = 3.0, epsilon: float = 1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), power))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=self.epsilon).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)


class GlobalAverage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class GlobalMax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=(2, 3))


MaxPool, AveragePool = nn.MaxPool2d, nn.AvgPool2d
POOLS = {"average": GlobalAverage, "max": GlobalMax, "generalized_mean": GeneralizedMean}


class Shortcut(nn.Sequential):
    """[average pool,] 1x1 convolution, norm; with `average` their names are `.1` and `.2`."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, average: bool, bias: bool, norm: Norm
    ):
        pool = []
        if average:
            one = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            pool = [one if stride > 1 else nn.Identity()]
        conv = nn.Conv2d(inputs, outputs, 1, stride=1 if average else stride, bias=bias)
        super().__init__(*pool, conv, norm(outputs))


class ResidualBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions (`residual`) or of 1x1, 3x3, 1x1 (`bottleneck`)."""

    def __init__(
        self,
        inputs: int,
        features: int,
        *,
        stride: int = 1,
        block: str = "bottleneck",
        groups: int = 1,
        width_per_group: int = 64,
        use_bias: bool = False,
        relu_before_add: bool = False,
        attention: str = "none",
        average_downsample: bool = False,
        anti_alias: bool = False,
        norm: str = "batch",
    ):
        super().__init__()

        def make_norm(channels: int) -> nn.Module:
            return norm_layer(norm, channels)

        if block == "residual":
            outputs = features
            plan = [(inputs, features, 3), (features, features, 3)]
            strided = 1
        else:
            outputs = 4 * features
            width = int(features * (width_per_group / 64.0)) * groups
            plan = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
            strided = 2
        self.depth = len(plan)
        self.relu_before_add = relu_before_add
        self.blur_behind = strided if anti_alias and stride > 1 else 0
        for number, (before, after, kernel_size) in enumerate(plan, start=1):
            step = stride if number == strided and not self.blur_behind else 1
            shares = groups if block == "bottleneck" and kernel_size == 3 else 1
            conv = nn.Conv2d(
                before, after, kernel_size, step, kernel_size // 2, groups=shares, bias=use_bias
            )
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", make_norm(after))
        self.se = attention_layer(attention, outputs, make_norm)
        self.blur = BlurPool(stride)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = Shortcut(
                inputs, outputs, stride, average=average_downsample, bias=use_bias, norm=make_norm
            )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            if number < self.depth or self.relu_before_add:
                y = torch.relu(y)
            if number == self.blur_behind:
                y = self.blur(y)
        y = self.se(y)
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet, ResNeXt, Wide ResNet, ResNet-D and their attentive forms; the reference's network."""

    def __init__(
        self,
        *,
        channels: int = 3,
        num_classes: int = 1000,
        stage_sizes: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        stem: str = "large",
        block: str = "bottleneck",
        variant: str = "standard",
        norm: str = "batch",
        groups: int = 1,
        width_per_group: int = 64,
        attention: str = "none",
        downsample: str = "projection",
        anti_alias: bool = False,
        pool: str = "average",
    ):
        super().__init__()
        literal = variant == "literal"
        bias = literal or norm == "none"

        def conv3(before: int, after: int, stride: int) -> nn.Conv2d:
            return nn.Conv2d(before, after, 3, stride, 1, bias=bias)

        if stem == "large":
            self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=bias)
        elif stem == "deep":
            half = width // 2
            self.conv1 = nn.Sequential(
                conv3(channels, half, 2),
                norm_layer(norm, half),
                nn.ReLU(),
                conv3(half, half, 1),
                norm_layer(norm, half),
                nn.ReLU(),
                conv3(half, width, 1),
            )
        else:
            self.conv1 = conv3(channels, width, {"medium": 2, "small": 1}[stem])
        self.bn1 = norm_layer(norm, width)
        self.maxpool = nn.Identity()
        if stem in ("large", "deep"):
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
            if anti_alias:
                self.maxpool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), BlurPool(2))

        inputs = width
        self.num_stages = len(stage_sizes)
        for stage, num_blocks in enumerate(stage_sizes):
            blocks = []
            for index in range(num_blocks):
                features = width * 2**stage
                blocks.append(
                    ResidualBlock(
                        inputs,
                        features,
                        stride=2 if stage > 0 and index == 0 else 1,
                        block=block,
                        groups=groups,
                        width_per_group=width_per_group,
                        use_bias=bias,
                        relu_before_add=literal,
                        attention=attention,
                        average_downsample=downsample == "average",
                        anti_alias=anti_alias,
                        norm=norm,
                    )
                )
                inputs = features * (4 if block == "bottleneck" else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.global_pool = POOLS[pool]()
        self.fc = nn.Linear(inputs, num_classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        maps = [self.maxpool(torch.relu(self.bn1(self.conv1(x))))]
        for stage in range(self.num_stages):
            maps.append(self.get_submodule(f"layer{stage + 1}")(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.global_pool(self.stages(x)[-1]))


class Inception(nn.Module):
    """1x1; 1x1 then 3x3; 1x1 then `large_kernel_size`; 3x3 max pool then 1x1: side by side."""

    def __init__(
        self,
        inputs: int,
        branch1: int,
        branch2_reduce: int,
        branch2: int,
        branch3_reduce: int,
        branch3: int,
        branch4: int,
        *,
        large_kernel_size: int = 3,
        norm: Norm,
        bias: bool = False,
    ):
        super().__init__()
        parts = {"norm": norm, "bias": bias}
        self.branch1 = ConvNorm(inputs, branch1, 1, **parts)
        self.branch2 = nn.Sequential(
            ConvNorm(inputs, branch2_reduce, 1, **parts),
            ConvNorm(branch2_reduce, branch2, 3, **parts),
        )
        self.branch3 = nn.Sequential(
            ConvNorm(inputs, branch3_reduce, 1, **parts),
            ConvNorm(branch3_reduce, branch3, large_kernel_size, **parts),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), ConvNorm(inputs, branch4, 1, **parts)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.children()], dim=1)


# The widths of each block in the order of `Inception`'s arguments: table 1 of the paper.
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class GoogLeNet(nn.Module):
    """GoogLeNet with BatchNorm and without auxiliary heads; every width times `width / 64`."""

    def __init__(
        self,
        *,
        channels: int = 3,
        num_classes: int = 1000,
        width: int = 64,
        stem: str = "large",
        blocks: Sequence[str] = tuple(INCEPTIONS),
        norm: str = "batch",
        pool: str = "average",
    ):
        super().__init__()

        def scaled(number: int) -> int:
            return number * width // 64

        parts = {
            "norm": lambda outputs: norm_layer(norm, outputs, epsilon=1e-3),
            "bias": norm == "none",
        }
        self.large = stem == "large"
        if self.large:
            self.conv1 = ConvNorm(channels, width, 7, stride=2, **parts)
            self.conv2 = ConvNorm(width, width, 1, **parts)
            self.conv3 = ConvNorm(width, scaled(192), 3, **parts)
            inputs = scaled(192)
        else:
            self.conv1 = ConvNorm(channels, width, 3, **parts)
            inputs = width
        self.blocks = blocks
        for name in blocks:
            outputs = [scaled(number) for number in INCEPTIONS[name]]
            self.add_module(f"inception{name}", Inception(inputs, *outputs, **parts))
            inputs = outputs[0] + outputs[2] + outputs[4] + outputs[5]
        self.global_pool = POOLS[pool]()
        self.fc = nn.Linear(inputs, num_classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        def halve(x: Tensor, window: int = 3) -> Tensor:
            return functional.max_pool2d(x, window, stride=2, ceil_mode=True)

        x = self.conv1(x)
        if self.large:
            x = halve(self.conv3(self.conv2(halve(x))))
        maps = [x]
        for name, before in zip(self.blocks, (None, *self.blocks), strict=False):
            if before is not None and before[0] != name[0]:
                maps.append(x)
                x = halve(x, 2 if name[0] == "5" else 3)
            x = self.get_submodule(f"inception{name}")(x)
        return [*maps, x]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.global_pool(self.stages(x)[-1]))


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise, LayerNorm, 1x1 to four times the width, GELU, 1x1 back, scaled, added."""

    def __init__(self, features: int, layer_scale: float = 1e-6, norm: str = "layer"):
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((features, 1, 1), layer_scale))
        depthwise = nn.Conv2d(features, features, 7, padding=3, groups=features)
        expand, reduce = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)
        norm = norm_layer(norm, features)
        # The published names count the transpositions: 0 depthwise, 2 norm, 3 and 5 linear.
        self.block = nn.ModuleDict({"0": depthwise, "2": norm, "3": expand, "5": reduce})

    def forward(self, x: Tensor) -> Tensor:
        depthwise, norm, expand, reduce = self.block.values()
        y = norm(depthwise(x)).movedim(1, -1)
        y = reduce(functional.gelu(expand(y))).movedim(-1, 1)
        return x + self.layer_scale * y


class ConvNeXt(nn.Module):
    def __init__(
        self,
        *,
        channels: int = 3,
        num_classes: int = 1000,
        stage_sizes: Sequence[int] = (3, 3, 9, 3),
        width: int = 96,
        stem: str = "patch",
        layer_scale: float = 1e-6,
        norm: str = "layer",
        pool: str = "average",
    ):
        super().__init__()
        patch = (4, 4, 0) if stem == "patch" else (3, 1, 1)
        layers = [nn.Sequential(nn.Conv2d(channels, width, *patch), norm_layer(norm, width))]
        for stage, num_blocks in enumerate(stage_sizes):
            if stage > 0:
                halve = nn.Conv2d(width, 2 * width, 2, 2)
                layers.append(nn.Sequential(norm_layer(norm, width), halve))
                width *= 2
            blocks = [ConvNeXtBlock(width, layer_scale, norm) for _ in range(num_blocks)]
            layers.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*layers)
        self.avgpool = POOLS[pool]()
        norm = nn.LayerNorm(width, eps=1e-6)
        self.classifier = nn.ModuleDict({"0": norm, "2": nn.Linear(width, num_classes)})

    def stages(self, x: Tensor) -> list[Tensor]:
        maps = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number == 0 or number % 2 == 1:
                maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        norm, linear = self.classifier.values()
        return linear(norm(self.avgpool(self.stages(x)[-1])))


class OneBlock(nn.Module):
    """A block alone, under the name that it has inside a network, and a head.

    Attributes:
      path, head: where the block and the linear layer are; their tensors are named after it.
      block: of channels to `channels`, or None for a function without parameters.
    """

    def __init__(
        self,
        path: str,
        block: nn.Module,
        *,
        channels: int,
        num_classes: int,
        head: str = "fc",
        pool: str = "average",
    ):
        super().__init__()
        self.paths = (path, head)
        self.global_pool = POOLS[pool]()
        for where, module in ((path, block), (head, nn.Linear(channels, num_classes))):
            *parents, name = where.split(".")
            holder = self
            for parent in parents:
                holder.add_module(parent, nn.Module())
                holder = holder.get_submodule(parent)
            holder.add_module(name, module)

    def stages(self, x: Tensor) -> list[Tensor]:
        return [self.get_submodule(self.paths[0])(x)]

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.paths[1])(self.global_pool(self.stages(x)[-1]))
