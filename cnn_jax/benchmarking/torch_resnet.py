"""Residual networks as one writes them in PyTorch, with torchvision's names: a peer.

Only the process of that peer imports this module, and PyTorch with it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnn_jax.benchmarking.workload import Architecture


class Block(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, or two of 3x3, and a shortcut; the stride is on a 3x3."""

    def __init__(self, inputs: int, features: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * features if bottleneck else features
        if bottleneck:
            self.conv1 = nn.Conv2d(inputs, features, 1, bias=False)
            self.conv2 = nn.Conv2d(features, features, 3, stride, 1, bias=False)
            self.conv3 = nn.Conv2d(features, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        else:
            self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(features), nn.BatchNorm2d(features)
        self.bottleneck = bottleneck
        self.downsample = None
        if stride > 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.bottleneck:
            y = self.bn3(self.conv3(functional.relu(y, inplace=True)))
        y += x if self.downsample is None else self.downsample(x)
        return functional.relu(y, inplace=True)


class ResNet(nn.Module):
    """Returns logits of normalised images, NCHW."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        window, stride = {"large": (7, 2), "medium": (3, 2), "small": (3, 1)}[of.stem]
        self.conv1 = nn.Conv2d(of.channels, of.width, window, stride, window // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(of.width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if of.stem == "large" else nn.Identity()
        bottleneck = of.block == "bottleneck"
        inputs, stages = of.width, []
        for stage, count in enumerate(of.stage_sizes):
            features = of.width * 2**stage
            blocks = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Block(inputs, features, stride, bottleneck))
                inputs = 4 * features if bottleneck else features
            stages.append(nn.Sequential(*blocks))
            self.add_module(f"layer{stage + 1}", stages[-1])
        self.stages = tuple(stages)
        self.fc = nn.Linear(inputs, of.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x)), inplace=True))
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean(dim=(2, 3)))


def make_resnet(of: Architecture, tensors: dict[str, Tensor]) -> ResNet:
    """Returns the network with these weights, channels last."""
    network = ResNet(of)
    network.load_state_dict(tensors, strict=True)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
