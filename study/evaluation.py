"""Evaluation beyond the learned schedule: training from scratch, label scores, and other architectures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import distill_utils as du


def train_from_scratch(
    distilled: du.DistilledSet, split: du.Split, make_network: du.Factory, *, networks: int = 10, epochs: int = 300,
    batch_size: int = 256, step_size: float = 0.01, seed: int = 10_000, side_by_side: bool = True,
) -> du.Accuracies:  # fmt: skip
    """Accuracies on `split` of fresh networks trained on images and labels alone, without the learned schedule.

    The defaults are the protocol of dataset condensation (Zhao et al. 2021) without its augmentation: shuffled SGD with
    momentum 0.9. Networks may have batch normalization and dropout.

    Args:
        networks: initializations, all drawn from `seed` before any of them is trained.
        epochs: passes over the images.
        batch_size: images in an update.
        step_size: of SGD, the same for all updates.
        side_by_side: train networks in ensembles; off for architectures that `torch.vmap` cannot run.
    """
    du.require_counts(networks=networks, epochs=epochs, batch_size=batch_size)
    du.require(step_size > 0, f"step_size={step_size}: give more than 0")
    du.require(
        callable(make_network) and not isinstance(make_network, nn.Module), "make_network: give a network factory"
    )
    device = split.images.device
    at_once = (8 if device.type == "cpu" else 64) if side_by_side else 1
    values = []
    with du.seeded(seed):
        fresh = [make_network().to(device) for _ in range(networks)]
        shuffles = torch.get_rng_state()
        with torch.no_grad():
            train = du.Split(*(each.flatten(0, 1).to(device) for each in (distilled.decode(), distilled.labels)))
        for first in range(0, networks, at_once):
            torch.set_rng_state(shuffles)  # so that accuracies do not depend on the groups
            network = combine(fresh[first : first + at_once]).train()
            du.train(network, train, epochs=epochs, batch_size=batch_size, step_size=step_size)
            values.append(du.accuracy(network.eval(), split).flatten().cpu())
    return du.Accuracies(torch.cat(values))


def combine(networks: Sequence[nn.Module]) -> nn.Module:
    """The networks as one module; a single one stays as it is."""
    return du.Ensemble(networks) if len(networks) > 1 else networks[0]


def with_schedule_of(schedule: du.DistilledSet, images: Tensor, labels: Tensor) -> du.DistilledSet:
    """Other stored images and labels in the parametrization, and with the schedule, of a distilled set."""
    return type(schedule)(
        images.detach(), labels.detach(), epochs=schedule.epochs, step_size=schedule.step_sizes.detach(),
        optimizer=schedule.optimizer, momentum=schedule.momentum,
        **{name: getattr(schedule, name) for name in schedule.options},
    )  # fmt: skip


def hard_labels(labels: Tensor) -> Tensor:
    """Probabilities [..., classes] as one-hot labels of the most probable classes."""
    return F.one_hot(labels.argmax(-1), labels.shape[-1]).to(labels)


def label_robust_score(
    distilled: float, distilled_hard: float, random: float, real: float
) -> tuple[float, float, float]:
    """DD-Ranking's hard label recovery, improvement over random, and label-robust score (Li et al. 2025).

    The recovery is what is missing, so less is better. DD-Ranking itself puts percentage points into the exponent;
    here they are fractions, so that the score lies in 0..1.

    Args:
        distilled: accuracy, in percent, from scratch on the distilled set.
        distilled_hard: the same with hard labels.
        random: on as many random real images with the same labels and recipe.
        real: on all real images.
    """
    recovery, improvement = real - distilled_hard, distilled - random
    alpha = (improvement - recovery) / 2 / 100
    return recovery, improvement, (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


# ------------------------------------------------------------------------------------------- other architectures
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


ARCHITECTURES: dict[str, du.Factory] = {
    "MLP": MLP,
    "wider LeNet": WideLeNet,
    "ConvNet, 3 blocks": ConvNet,
    "AlexNet-like": AlexNet,
    "VGG-like": VGG,
    "ResNet-18": resnet18,
}
