"""Other ways to store images, and DSA-style augmentation: decoders of distilled sets."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distill_utils as du


def low_resolution(
    images: Tensor, labels: Tensor, *, factor: int = 2, **options
) -> du.DistilledSet:
    """A set of images [steps, n, c, h, w], stored `factor` times smaller in height and width. As
    many pixels hold factor² times as many images, as in multi-formation (Kim et al. 2022)."""
    size = [length // factor for length in images.shape[-2:]]
    small = F.interpolate(images.flatten(0, 1), size, mode="bilinear", antialias=True)
    # Channels count as the depth of a volume, which stays.
    decoder = nn.Upsample(scale_factor=(1, factor, factor), mode="trilinear")
    small = small.unflatten(0, images.shape[:2])
    return du.DistilledSet(small, labels, decoder=decoder, **options)


class Augment(nn.Module):
    """Transforms every image anew at each call, by transforms drawn from torch's random state."""

    def forward(self, images: Tensor) -> Tensor:
        """[steps, n, c, h, w]; what moves in from outside has the mean value of a step's corners, which are black
        where images show digits."""
        corners = images[..., 0, 0].detach().flatten(1).mean(1)
        pairs = zip(images, corners, strict=True)
        return torch.stack([augment(step, black=corner) for step, corner in pairs])


def augment(images: Tensor, *, black: float | Tensor) -> Tensor:
    """Images [n, c, h, w], each turned by up to 10°, shifted by up to 2 of 28 pixels and scaled by up to a tenth, at
    random; differentiable. What moves in from outside is `black`.

    Torchvision's `RandomAffine` draws one transform for all images; one call for each takes ten times as long."""
    options = {"device": images.device, "dtype": images.dtype}
    angle, across, down, scale = 2 * torch.rand(4, len(images), **options) - 1
    angle, scale = math.radians(10) * angle, 1 + scale / 10
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrices = torch.stack([cos, -sin, across / 7, sin, cos, down / 7], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, [*images.shape], align_corners=False)
    return F.grid_sample(images - black, grid, align_corners=False) + black  # it fills with 0


def augmented(images: Tensor, labels: Tensor, **options) -> du.DistilledSet:
    """A set whose images networks see augmented."""
    with du.seeded(0):  # it decodes, which is no reason to move the caller's random state
        return du.DistilledSet(images, labels, decoder=Augment(), **options)
