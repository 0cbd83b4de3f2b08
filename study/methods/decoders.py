"""Other ways to store images, and DSA-style augmentation: decoders of distilled sets."""

from __future__ import annotations

import copy
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


def train_teacher(dataset: du.Dataset, *, networks: int, epochs: int, seed: int = 0) -> du.Ensemble:
    """LeNets trained on all real images, side by side."""
    with du.seeded(seed):
        fresh = [
            du.LeNet(classes=dataset.classes).to(dataset.train.images.device)
            for _ in range(networks)
        ]
        return du.train(du.Ensemble(fresh), dataset.train, epochs=epochs)


@torch.no_grad()
def teach(teacher: nn.Module, images: Tensor) -> Tensor:
    """Soft labels [n, classes] of images [n, c, h, w]: the geometric mean of the teacher's probabilities."""
    scores = [teacher(part).log_softmax(-1).mean(0) for part in images.split(500)]
    return torch.cat(scores).softmax(-1)


def stored_floats(distilled: du.DistilledSet) -> int:
    """Images, labels and shared tensors, as stored, together."""
    return sum(
        tensor.numel()
        for tensor in (distilled.images, distilled.labels, *distilled.decoder.parameters())
    )


def count_codes(floats: int, shared: int, codes: int, labels: int) -> int:
    """How many images `floats` pay for, after the decoder's `shared` ones: each has `codes` and `labels` floats."""
    du.require(
        floats >= shared + codes + labels,
        f"floats={floats}: the decoder alone has {shared}; give more",
    )
    return (floats - shared) // (codes + labels)


def fit_decoder(
    dataset: du.Dataset, teacher: nn.Module, *, floats: int, codes: int, channels: Sequence[int], iterations: int,
    batch_size: int = 256, step_size: float = 3e-3, seed: int = 0,
) -> tuple[du.DistilledSet, du.DistilledSet]:  # fmt: skip
    """An autoencoder's decoder with the codes of random training images, in a set of at most `floats` floats.

    Args:
        teacher: gives the soft labels, an ensemble.
        floats: codes, labels and decoder together.
        codes: floats of an image's code.
        channels: between the decoder's layers, two numbers.
        iterations: minibatch updates of the autoencoder by Adam, whose step size falls along a half cosine.
        step_size: the first one.

    Returns the set with the teacher's labels, and its control with true labels. A true label is a single float, so
    the control holds more images.
    """
    images = dataset.train.images
    du.require_counts(floats=floats, codes=codes, iterations=iterations, batch_size=batch_size)
    with du.seeded(seed):
        decoder = du.CodeDecoder(codes, channels, images.shape[1:]).to(images)
        encoder = make_encoder(images[0].numel(), codes).to(images)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=step_size)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        for _ in range(iterations):
            batch = images[torch.randint(len(images), (batch_size,)).to(images.device)]
            loss = F.mse_loss(decoder(encoder(batch)[None])[0], batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
    shared = sum(weight.numel() for weight in decoder.parameters())
    sets = []
    for soft in (True, False):
        count = count_codes(floats, shared, codes, dataset.classes if soft else 1)
        chosen, labels = du.initialize(
            dataset, "real", steps=1, per_class=count // dataset.classes, seed=seed
        )
        with torch.no_grad():
            code = encoder.eval()(chosen[0])
            labels = teach(teacher, decoder(code[None])[0])[None] if soft else labels
        sets.append(
            du.DistilledSet(
                code[None], labels, decoder=copy.deepcopy(decoder), step_size=0.01, momentum=0.9
            )
        )
    return tuple(sets)


def make_encoder(pixels: int, codes: int) -> nn.Sequential:
    """Images [n, c, h, w] to codes [n, codes, 1, 1] of about unit variance. It is not stored."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, codes),
        nn.BatchNorm1d(codes, affine=False), nn.Unflatten(1, (codes, 1, 1)),
    )  # fmt: skip
