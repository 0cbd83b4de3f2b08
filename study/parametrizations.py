"""Other ways to store images, and DSA-style augmentation: distilled sets that override `decode` alone.

Import this module before `DistilledSet.load` reads a file of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

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
    """Images that networks see transformed: each call of `decode` samples one transform for every step.

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
    """Images [n, c, h, w] slightly rotated, shifted and scaled, all in one random way; differentiable."""
    bilinear = v2.InterpolationMode.BILINEAR
    transform = v2.RandomAffine(10, (0.07, 0.07), (0.9, 1.1), interpolation=bilinear, fill=None)
    return transform(images - black) + black  # torchvision fills with 0 here: its own fill value has no gradient


def augmented(images: Tensor, *, black: float, copies: int, seed: int = 0) -> Tensor:
    """`copies` of images [n, c, h, w], each transformed in a way of its own, as [copies × n, c, h, w]."""
    du.require_counts(copies=copies)
    with du.seeded(seed):
        return torch.stack([augment(image, black=black) for _ in range(copies) for image in images])
