"""Other architectures for 28×28 images and ten classes, to test distilled sets on.

All are small, so that a CPU trains many of them. `norm` is "instance" or "batch".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distill_utils as du


def make_norm(norm: str, channels: int) -> nn.Module:
    """A normalization layer for images [n, channels, h, w]."""
    return nn.GroupNorm(channels, channels) if norm == "instance" else nn.BatchNorm2d(channels)


class MLP(nn.Sequential):
    """Two hidden layers of 128."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(784, 128), nn.ReLU(),
            nn.Linear(128, 128), nn.ReLU(),
            nn.Linear(128, 10),
        )  # fmt: skip


class TanhLeNet(nn.Sequential):
    """LeNet with tanh and average pooling, as LeCun et al. (1998) have them, and PyTorch's own initial weights."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),  # [n, 6, 14, 14]
            nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),  # [n, 16, 5, 5]
            nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
        )  # fmt: skip


class WideLeNet(nn.Sequential):
    """LeNet with twice as many channels and units, and PyTorch's own initial weights."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),  # [n, 12, 14, 14]
            nn.Conv2d(12, 32, 5), nn.ReLU(), nn.MaxPool2d(2),  # [n, 32, 5, 5]
            nn.Flatten(), nn.Linear(800, 240), nn.ReLU(), nn.Linear(240, 168), nn.ReLU(), nn.Linear(168, 10),
        )  # fmt: skip


class ConvNet(nn.Sequential):
    """ConvNet-3, by default at a quarter of its width of 128: three blocks of convolution, normalization, ReLU and
    average pooling, for images [n, channels, size, size]."""

    def __init__(
        self, *, width: int = 32, norm: str = "instance", channels: int = 1, size: int = 28
    ) -> None:
        blocks = []
        for inputs in (channels, width, width):
            blocks += [
                nn.Conv2d(inputs, width, 3, padding=1),
                make_norm(norm, width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        super().__init__(*blocks, nn.Flatten(), nn.Linear((size // 8) ** 2 * width, 10))


class AlexNet(nn.Sequential):
    """Five convolutions as AlexNet has them, large kernels first, at an eighth of its width."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 5, padding=4), nn.ReLU(), nn.MaxPool2d(2),  # [n, 16, 16, 16]
            nn.Conv2d(16, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),  # [n, 24, 8, 8]
            nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(),
            nn.Conv2d(48, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # [n, 32, 4, 4]
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip


class VGG(nn.Sequential):
    """Eight 3×3 convolutions as VGG-11 has them, at a quarter of its width and for smaller images."""

    def __init__(self, *, norm: str) -> None:
        layers, channels = [], 1
        for width in (16, "pool", 32, "pool", 64, 64, "pool", 128, 128, 128, 128):
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), make_norm(norm, width), nn.ReLU()]
            channels = width
        super().__init__(*layers, nn.Flatten(), nn.Linear(9 * channels, 10))


class Residual(nn.Module):
    """Two 3×3 convolutions around which the images are added, as in ResNet-18."""

    def __init__(self, channels: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), make_norm(norm, width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), make_norm(norm, width),
        )  # fmt: skip
        same = channels == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.body(images) + self.shortcut(images))


class ResNet(nn.Sequential):
    """ResNet-18 at a quarter of its width, without the pooling at its start."""

    def __init__(self, *, norm: str) -> None:
        layers = [
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
            make_norm(norm, 16),
            nn.ReLU(),
        ]
        channels = 16
        for width in (16, 32, 64, 128):
            layers += [
                Residual(channels, width, 1 if width == 16 else 2, norm),
                Residual(width, width, 1, norm),
            ]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Patches(nn.Module):
    """Embeds patches of 7×7, mixes them by `blocks`, and classifies their mean: the frame of ViT and MLP-Mixer."""

    def __init__(self, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 7, stride=7)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks, self.norm, self.head = (
            nn.Sequential(*blocks),
            nn.LayerNorm(width),
            nn.Linear(width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position  # [n, 16, width]
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class PreNorm(nn.Module):
    """Adds a layer's result on normalized tokens [n, 16, width] to the tokens."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), layer

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.layer(self.norm(tokens))


class AcrossTokens(nn.Sequential):
    """Layers that see each feature of all tokens, where others see all features of each token."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.transpose(1, 2)).transpose(1, 2)


def feed_forward(width: int, kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    return kind(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class ViT(Patches):
    """Two blocks of a vision transformer, 48 wide (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 48) -> None:
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        super().__init__(
            [nn.TransformerEncoderLayer(width, 4, 2 * width, **options) for _ in range(2)], width
        )


class Mixer(Patches):
    """Two blocks of MLP-Mixer, 64 wide (Tolstikhin et al. 2021)."""

    def __init__(self, width: int = 64) -> None:
        layers = (
            layer
            for _ in range(2)
            for layer in (feed_forward(16, AcrossTokens), feed_forward(width))
        )
        super().__init__([PreNorm(layer, width) for layer in layers], width)


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
        self.spatial = nn.ModuleList(
            nn.Conv2d(width, width, 7, padding=3, groups=width) for _ in range(2)
        )
        self.channels = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        images = self.stem(images)
        for spatial, channels in zip(self.spatial, self.channels, strict=True):
            images = images + channels(spatial(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.norm(images.mean((2, 3))))


TESTED_ON: dict[str, du.Factory] = {
    "LeNet": du.LeNet,
    "MLP": MLP,
    "tanh LeNet": TanhLeNet,
    "wide LeNet": WideLeNet,
    "ConvNet-3, instance norm": ConvNet,
    "ConvNet-3, batch norm": partial(ConvNet, norm="batch"),
    "AlexNet-like": AlexNet,
    "VGG11-like, instance norm": partial(VGG, norm="instance"),
    "VGG11-like, batch norm": partial(VGG, norm="batch"),
    "ResNet-18, instance norm": partial(ResNet, norm="instance"),
    "ResNet-18, batch norm": partial(ResNet, norm="batch"),
    "MLP-Mixer": Mixer,
    "ViT": ViT,
    "GRU over rows": GRU,
    "ConvNeXt-like": ConvNeXt,
}
