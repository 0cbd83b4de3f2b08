"""Other architectures for 28×28 images and ten classes, to test distilled sets on.

All are small, so that a CPU trains many of them. `norm` is "instance" or "batch".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import distill_utils as du


def make_norm(norm: str, channels: int) -> nn.Module:
    """A normalization layer for images [n, channels, h, w]."""
    return nn.GroupNorm(channels, channels) if norm == "instance" else nn.BatchNorm2d(channels)


class Stack(nn.Sequential):
    """Convolutions and then linear layers, in one sequence, for images [n, channels, h, w].

    Args:
        convolutions: each as (width, kernel, padding), or as its width where it is 3×3; "pool" halves the images.
        units: inputs of the linear layers, the first of which is flattened images.
        norm: after every convolution; by default none.
    """

    def __init__(
        self,
        convolutions: Sequence[tuple[int, int, int] | int | str],
        units: Sequence[int],
        *,
        channels: int = 1,
        norm: str | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        pool: Callable[[int], nn.Module] = nn.MaxPool2d,
    ) -> None:
        modules = []
        for layer in convolutions:
            if layer == "pool":
                modules.append(pool(2))
                continue
            width, kernel, padding = layer if isinstance(layer, tuple) else (layer, 3, 1)
            modules.append(nn.Conv2d(channels, width, kernel, padding=padding))
            modules += [make_norm(norm, width), activation()] if norm else [activation()]
            channels = width
        modules.append(nn.Flatten())
        for inputs, outputs in pairwise(units):
            modules += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*modules, nn.Linear(units[-1], 10))


class ConvNet(Stack):
    """ConvNet-3, by default at a quarter of its width of 128: three blocks of convolution, normalization, ReLU and
    average pooling, for images [n, channels, size, size]."""

    def __init__(
        self, *, width: int = 32, norm: str = "instance", channels: int = 1, size: int = 28
    ) -> None:
        options = {"channels": channels, "norm": norm, "pool": nn.AvgPool2d}
        super().__init__([width, "pool"] * 3, [(size // 8) ** 2 * width], **options)


MLP = partial(Stack, (), (784, 128, 128))  # two hidden layers of 128
# VGG-11's eight 3×3 convolutions, at a quarter of its width and for smaller images.
VGG = partial(Stack, (16, "pool", 32, "pool", 64, 64, "pool", 128, 128, 128, 128), (9 * 128,))


class ResNet(nn.Sequential):
    """ResNet-18 at a quarter of its width, without the pooling at its start."""

    def __init__(self, *, norm: str) -> None:
        make = partial(make_norm, norm)
        layers = [nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), make(16), nn.ReLU()]
        for inputs, width in pairwise((16, 16, 32, 64, 128)):
            stride = width // inputs
            first = BasicBlock(inputs, width, stride, norm_layer=make)
            if stride > 1:
                first.downsample = nn.Conv2d(inputs, width, 1, stride, bias=False)
            layers += [first, BasicBlock(width, width, norm_layer=make)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Patches(nn.Module):
    """Embeds patches of 7×7, mixes them by two blocks, and classifies their mean."""

    def __init__(self, make_block: Callable[[int], nn.Module], width: int) -> None:
        super().__init__()
        blocks = make_block(width), make_block(width)
        self.embed = nn.Conv2d(1, width, 7, stride=7)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position  # [n, 16, width]
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def make_transformer_block(width: int) -> nn.Module:
    """As in ViT (Dosovitskiy et al. 2021)."""
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    return nn.TransformerEncoderLayer(width, 4, 2 * width, **options)


def feed_forward(width: int, factor: int = 2) -> nn.Sequential:
    """Two linear layers [..., width], with `factor` times as many units between them."""
    hidden = factor * width
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class MixerBlock(nn.Module):
    """As in MLP-Mixer (Tolstikhin et al. 2021): mixes tokens [n, 16, width], first the values of each feature, then
    those of each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.across_tokens = nn.LayerNorm(width), feed_forward(16)
        self.norm_2, self.across_features = nn.LayerNorm(width), feed_forward(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.across_tokens(self.norm_1(tokens).transpose(1, 2)).transpose(1, 2)
        return tokens + self.across_features(self.norm_2(tokens))


class GRU(nn.Module):
    """PyTorch's GRU over the 28 rows of an image; 64 wide."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.rows, self.head = nn.GRU(28, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.rows(images[:, 0])[0][:, -1])


class ConvNeXt(nn.Module):
    """Patches of 4×4 and two ConvNeXt blocks, 32 wide (Liu et al. 2022)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 4, stride=4)  # [n, width, 7, 7]
        spatial = [nn.Conv2d(width, width, 7, padding=3, groups=width) for _ in range(2)]
        mixing = [nn.Sequential(nn.LayerNorm(width), feed_forward(width, 4)) for _ in range(2)]
        self.spatial, self.channels = nn.ModuleList(spatial), nn.ModuleList(mixing)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        images = self.stem(images)
        for spatial, channels in zip(self.spatial, self.channels, strict=True):
            images = images + channels(spatial(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.norm(images.mean((2, 3))))


TESTED_ON: dict[str, du.Factory] = {
    "LeNet": du.LeNet,
    "MLP": MLP,
    # As LeCun et al. (1998) have it, but with PyTorch's own initial weights, as all that follow.
    "tanh LeNet": partial(
        Stack,
        ((6, 5, 2), "pool", (16, 5, 0), "pool"),
        (400, 120, 84),
        activation=nn.Tanh,
        pool=nn.AvgPool2d,
    ),
    "wide LeNet": partial(Stack, ((12, 5, 2), "pool", (32, 5, 0), "pool"), (800, 240, 168)),
    "ConvNet-3, instance norm": ConvNet,
    "ConvNet-3, batch norm": partial(ConvNet, norm="batch"),
    # Five convolutions, large kernels first, at an eighth of AlexNet's width.
    "AlexNet-like": partial(
        Stack, ((16, 5, 4), "pool", (24, 5, 2), "pool", 48, 32, 32, "pool"), (512,)
    ),
    "VGG11-like, instance norm": partial(VGG, norm="instance"),
    "VGG11-like, batch norm": partial(VGG, norm="batch"),
    "ResNet-18, instance norm": partial(ResNet, norm="instance"),
    "ResNet-18, batch norm": partial(ResNet, norm="batch"),
    "MLP-Mixer": partial(Patches, MixerBlock, 64),
    "ViT": partial(Patches, make_transformer_block, 48),
    "GRU over rows": GRU,
    "ConvNeXt-like": ConvNeXt,
}
