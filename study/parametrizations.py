"""Other ways to store images, and DSA-style augmentation: distilled sets that override `decode` alone.

Import this module before `DistilledSet.load` reads a file of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import distill_utils as du


class LowResolution(du.DistilledSet):
    """Images that are stored on a coarse grid, and that networks see enlarged.

    Args:
        images: [steps, n, c, h, w], as stored; `from_images` starts from images of full size.
        size: height and width as networks see them.
    """

    options = ("size",)

    def __init__(self, images: Tensor, labels: Tensor, *, size: Sequence[int], **options) -> None:
        du.require(len(size) == 2, f"size={size!r}: give a height and a width, as [28, 28]")
        du.require_counts(height=size[0], width=size[1])
        self.size = list(size)  # before the rest, which decodes
        super().__init__(images, labels, **options)

    @classmethod
    def from_images(cls, images: Tensor, labels: Tensor, *, stored: int = 14, **options) -> LowResolution:
        """Shrinks images [steps, n, c, h, w] to [steps, n, c, stored, stored]; networks see them at h × w."""
        du.require_counts(stored=stored)
        small = F.interpolate(images.flatten(0, 1), size=(stored, stored), mode="bilinear", antialias=True)
        return cls(small.unflatten(0, images.shape[:2]), labels, size=images.shape[-2:], **options)

    def decode(self) -> Tensor:
        """[steps, n, c, *size]"""
        large = F.interpolate(self.images.flatten(0, 1), size=self.size, mode="bilinear")
        return large.unflatten(0, self.images.shape[:2])


class Augmented(du.DistilledSet):
    """Images that networks see transformed: each call of `decode` samples a transform for every image.

    It takes them from torch's random state; `du.seeded` repeats them.
    """

    def __init__(self, images: Tensor, labels: Tensor, **options) -> None:
        with du.seeded(0):  # it decodes, which is no reason to move the caller's random state
            super().__init__(images, labels, **options)

    def decode(self) -> Tensor:
        """[steps, n, c, h, w]; what moves in from outside has the mean value of a step's upper left corners."""
        corners = self.images[..., 0, 0].detach().flatten(1).mean(1)  # black where the images show digits
        return torch.stack([augment(step, black=corner) for step, corner in zip(self.images, corners, strict=True)])


def augment(images: Tensor, *, black: float | Tensor) -> Tensor:
    """Images [n, c, h, w], each turned by up to 10°, shifted by up to 2 of 28 pixels and scaled by up to a tenth, at
    random; differentiable. What moves in from outside is `black`."""
    angle, across, down, scale = (2 * torch.rand(4, len(images), device=images.device, dtype=images.dtype) - 1).unbind()
    angle, scale = angle * math.pi / 18, 1 + scale / 10
    rows = [scale * angle.cos(), -scale * angle.sin(), across / 7, scale * angle.sin(), scale * angle.cos(), down / 7]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images - black, grid, align_corners=False) + black  # it fills with 0
