"""Other architectures for 28×28 images and ten classes, to test training sets on. All are small, so that a CPU trains
many of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import distill_utils as du


def make_convnet() -> nn.Sequential:
    """ConvNet-3 at a quarter of its width of 128: three blocks of convolution, instance normalization, ReLU and average
    pooling."""
    width, blocks = 32, []
    for channels in (1, width, width):
        convolution = nn.Conv2d(channels, width, 3, padding=1)
        blocks += [convolution, nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(9 * width, 10))


def make_narrow_lenet(divisor: int) -> nn.Sequential:
    """A LeNet with so many times fewer channels and units."""
    c1, c2, h1, h2 = (width // divisor for width in (6, 16, 120, 84))
    convolutions = nn.Conv2d(1, c1, 5, padding=2), nn.Conv2d(c1, c2, 5)
    blocks = [layer for conv in convolutions for layer in (conv, nn.MaxPool2d(2), nn.ReLU())]
    hidden = nn.Linear(25 * c2, h1), nn.ReLU(), nn.Linear(h1, h2), nn.ReLU()
    return nn.Sequential(*blocks, nn.Flatten(), *hidden, nn.Linear(h2, 10))


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


NETWORKS: dict[str, du.Factory] = {
    "LeNet": du.LeNet,
    "ConvNet-3": make_convnet,
    "MLP-Mixer": partial(Patches, MixerBlock, 64),
    "ViT": partial(Patches, make_transformer_block, 48),
    "GRU over rows": GRU,
    "ConvNeXt-like": ConvNeXt,
}
