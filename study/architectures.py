"""Other networks for 28×28 images, which no set here was distilled for: do its images teach them too?"""

from collections.abc import Callable

import torchvision
from torch import nn


class MLP(nn.Sequential):
    """Two hidden layers of 128."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(784, 128), nn.ReLU(),
            nn.Linear(128, 128), nn.ReLU(),
            nn.Linear(128, 10),
        )  # fmt: skip


class WideLeNet(nn.Sequential):
    """LeNet with twice as many channels and units, and PyTorch's own initial weights."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),  # [n, 12, 14, 14]
            nn.Conv2d(12, 32, 5), nn.ReLU(), nn.MaxPool2d(2),  # [n, 32, 5, 5]
            nn.Flatten(),
            nn.Linear(800, 240), nn.ReLU(),
            nn.Linear(240, 168), nn.ReLU(),
            nn.Linear(168, 10),
        )  # fmt: skip


class ConvNet(nn.Sequential):
    """The field's usual three blocks of convolution, instance normalization, ReLU and average pooling, half as wide."""

    def __init__(self, width: int = 64) -> None:
        blocks = []
        for channels in (1, width, width):
            blocks += [
                nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2),
            ]  # fmt: skip
        super().__init__(*blocks, nn.Flatten(), nn.Linear(9 * width, 10))


class AlexNet(nn.Sequential):
    """Five convolutions as AlexNet has them, large kernels first, at a quarter of its width."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 5, padding=4), nn.ReLU(), nn.MaxPool2d(2),  # [n, 32, 16, 16]
            nn.Conv2d(32, 48, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),  # [n, 48, 8, 8]
            nn.Conv2d(48, 96, 3, padding=1), nn.ReLU(),
            nn.Conv2d(96, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # [n, 64, 4, 4]
            nn.Flatten(), nn.Linear(1024, 10),
        )  # fmt: skip


class VGG(nn.Sequential):
    """Pairs of 3×3 convolutions with batch normalization, as VGG has them, at a quarter of its width."""

    def __init__(self) -> None:
        layers, channels = [], 1
        for width in (32, 64, 128):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(9 * channels, 10))


def resnet18() -> nn.Module:
    """torchvision's ResNet-18, for one channel and ten classes."""
    network = torchvision.models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return network


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "MLP": MLP,
    "wider LeNet": WideLeNet,
    "ConvNet, 3 blocks": ConvNet,
    "AlexNet-like": AlexNet,
    "VGG-like": VGG,
    "ResNet-18": resnet18,
}
