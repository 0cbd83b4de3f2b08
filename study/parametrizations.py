"""Other ways to store images, and DSA-style augmentation: decoders of distilled sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distill_utils as du


class LowResolution(nn.Module):
    """Decodes images that are stored on a coarse grid, by enlarging them."""

    def __init__(self, size: Sequence[int] = (28, 28)) -> None:
        super().__init__()
        self.size = tuple(size)  # height and width as networks see them

    def forward(self, images: Tensor) -> Tensor:
        """Stored images [steps, n, c, h, w] to [steps, n, c, *size]."""
        large = F.interpolate(images.flatten(0, 1), size=self.size, mode="bilinear")
        return large.unflatten(0, images.shape[:2])

    @staticmethod
    def pack(images: Tensor, *, stored: int = 14) -> Tensor:
        """Images [steps, n, c, h, w], shrunk, to [steps, n, c, stored, stored]."""
        du.require_counts(stored=stored)
        small = F.interpolate(
            images.flatten(0, 1), (stored, stored), mode="bilinear", antialias=True
        )
        return small.unflatten(0, images.shape[:2])


class Augment(nn.Module):
    """Transforms every image anew at each call, by transforms drawn from torch's random state."""

    def forward(self, images: Tensor) -> Tensor:
        """[steps, n, c, h, w]; what moves in from outside has the mean value of a step's corners."""
        # black where the images show digits
        corners = images[..., 0, 0].detach().flatten(1).mean(1)
        return torch.stack(
            [augment(step, black=corner) for step, corner in zip(images, corners, strict=True)]
        )


def multi_formation(images: Tensor, labels: Tensor, *, factor: int, **options) -> du.DistilledSet:
    """A set of images [steps, n, c, h, w] of full size, packed by `du.MultiFormation`."""
    decoder, n = du.MultiFormation(factor), images.shape[1]
    remedy = f"a step has {n} images; give a multiple of {factor**2}"
    du.require(n % factor**2 == 0, f"factor={factor}: {remedy}")
    return du.DistilledSet(decoder.pack(images), labels, decoder=decoder, **options)


def low_resolution(images: Tensor, labels: Tensor, **options) -> du.DistilledSet:
    """A set of images [steps, n, c, h, w] of full size, stored by `LowResolution`."""
    decoder = LowResolution(images.shape[-2:])
    return du.DistilledSet(decoder.pack(images), labels, decoder=decoder, **options)


def augmented(images: Tensor, labels: Tensor, **options) -> du.DistilledSet:
    """A set whose images networks see augmented."""
    with du.seeded(0):  # it decodes, which is no reason to move the caller's random state
        return du.DistilledSet(images, labels, decoder=Augment(), **options)


def augment(images: Tensor, *, black: float | Tensor) -> Tensor:
    """Images [n, c, h, w], each turned by up to 10°, shifted by up to 2 of 28 pixels and scaled by up to a tenth, at
    random; differentiable. What moves in from outside is `black`."""
    angle, across, down, scale = (
        2 * torch.rand(4, len(images), device=images.device, dtype=images.dtype) - 1
    ).unbind()
    angle, scale = angle * math.pi / 18, 1 + scale / 10
    rows = [
        scale * angle.cos(),
        -scale * angle.sin(),
        across / 7,
        scale * angle.sin(),
        scale * angle.cos(),
        down / 7,
    ]
    grid = F.affine_grid(
        torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False
    )
    return F.grid_sample(images - black, grid, align_corners=False) + black  # it fills with 0
