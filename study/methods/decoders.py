"""Other ways to store images, and DSA-style augmentation: decoders of distilled sets."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distill_utils as du


# ------------------------------------------------------------------------- low resolution, augmentation
class LowResolution(nn.Module):
    """Decodes images that are stored on a coarse grid, by enlarging them."""

    def __init__(self, size: Sequence[int] = (28, 28)) -> None:
        super().__init__()
        self.size = tuple(size)  # height and width as networks see them

    def forward(self, images: Tensor) -> Tensor:
        """Stored images [steps, n, c, h, w] to [steps, n, c, *size]."""
        large = F.interpolate(images.flatten(0, 1), self.size, mode="bilinear")
        return large.unflatten(0, images.shape[:2])


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


# ------------------------------------------------------------------------------ sets with these decoders
def multi_formation(images: Tensor, labels: Tensor, *, factor: int, **options) -> du.DistilledSet:
    """A set of images [steps, n, c, h, w] of full size, packed by `du.MultiFormation`."""
    decoder, n = du.MultiFormation(factor), images.shape[1]
    remedy = f"a step has {n} images; give a multiple of {factor**2}"
    du.require(n % factor**2 == 0, f"factor={factor}: {remedy}")
    return du.DistilledSet(decoder.pack(images), labels, decoder=decoder, **options)


def low_resolution(
    images: Tensor, labels: Tensor, *, stored: int = 14, **options
) -> du.DistilledSet:
    """A set of images [steps, n, c, h, w] of full size, stored as `stored` × `stored` pixels."""
    size, decoder = (stored, stored), LowResolution(images.shape[-2:])
    small = F.interpolate(images.flatten(0, 1), size, mode="bilinear", antialias=True)
    small = small.unflatten(0, images.shape[:2])
    return du.DistilledSet(small, labels, decoder=decoder, **options)


def augmented(images: Tensor, labels: Tensor, **options) -> du.DistilledSet:
    """A set whose images networks see augmented."""
    with du.seeded(0):  # it decodes, which is no reason to move the caller's random state
        return du.DistilledSet(images, labels, decoder=Augment(), **options)


# ------------------------------------------------------------------- codes and a decoder, by an autoencoder
def train_teacher(dataset: du.Dataset, *, networks: int, epochs: int, seed: int = 0) -> du.Ensemble:
    """LeNets trained on all real images, side by side."""
    device = dataset.train.images.device
    make_network = partial(du.LeNet, classes=dataset.classes)
    with du.seeded(seed):
        fresh = du.sample_networks(make_network, networks, device)
        return du.train(du.Ensemble(fresh), dataset.train, epochs=epochs)


@torch.no_grad()
def teach(teacher: nn.Module, images: Tensor) -> Tensor:
    """Soft labels [n, classes] of images [n, c, h, w]: the geometric mean of the teacher's probabilities."""
    scores = [teacher(part).log_softmax(-1).mean(0) for part in images.split(500)]
    return torch.cat(scores).softmax(-1)


def fit_decoder(
    dataset: du.Dataset,
    teacher: nn.Module,
    *,
    floats: int,
    codes: int,
    channels: Sequence[int],
    iterations: int,
    seed: int = 0,
) -> tuple[du.DistilledSet, du.DistilledSet]:
    """An autoencoder's decoder with the codes of random training images, in a set of at most `floats` floats.

    Args:
        teacher: gives the soft labels, an ensemble.
        floats: codes, labels and decoder together.
        codes: floats of an image's code.
        channels: between the decoder's layers, two numbers.
        iterations: minibatch updates of the autoencoder.

    Returns the set with the teacher's labels, and its control with true labels. A true label is a single float, so
    the control holds more images.
    """
    du.require_counts(codes=codes, iterations=iterations)
    images, classes = dataset.train.images, dataset.classes
    with du.seeded(seed):
        decoder = du.CodeDecoder(codes, channels, images.shape[1:]).to(images)
        encoder = make_encoder(images[0].numel(), codes).to(images)
        shared = sum(weight.numel() for weight in decoder.parameters())
        least = shared + classes * (codes + classes)
        du.require(floats >= least, f"{floats=}: give at least {least}, for an image of each class")
        train_autoencoder(encoder, decoder, images, iterations=iterations)
    sets = []
    for soft in (True, False):
        per_class = (floats - shared) // (codes + (classes if soft else 1)) // classes
        options = {"steps": 1, "per_class": per_class, "seed": seed}
        real, labels = du.initialize(dataset, "real", **options)
        with torch.no_grad():
            stored = encoder.eval()(real[0])[None]
            labels = teach(teacher, decoder(stored)[0])[None] if soft else labels
        options = {"decoder": copy.deepcopy(decoder), "step_size": 0.01, "momentum": 0.9}
        sets.append(du.DistilledSet(stored, labels, **options))
    return tuple(sets)


def make_encoder(pixels: int, codes: int) -> nn.Sequential:
    """Images [n, c, h, w] to codes [n, codes, 1, 1] of about unit variance. It is not stored."""
    hidden = nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, codes)
    norm = nn.BatchNorm1d(codes, affine=False)
    return nn.Sequential(nn.Flatten(), *hidden, norm, nn.Unflatten(1, (codes, 1, 1)))


def train_autoencoder(
    encoder: nn.Module, decoder: nn.Module, images: Tensor, *, iterations: int
) -> None:
    """Minimizes the squared error on `images` [n, c, h, w] by Adam, whose step size falls along a half cosine."""
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        batch = images[torch.randint(len(images), (256,)).to(images.device)]
        loss = F.mse_loss(decoder(encoder(batch)[None])[0], batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
