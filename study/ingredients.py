"""What each ingredient of the last years is worth: alone, added to the paper's method, and in company of the best.

Every row is one distillation of 100 images for 30 updates (10 steps × 3 epochs) over the same number of outer
iterations, measured on validation images with the same networks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

import distill_utils as du
from runs import seeded
from study.experiments import Study

STARTS = {"noise": partial(du.noise_start, std=0.3), "real": du.real_start, "k-means": du.k_means_start}
PAPER = {"start": "noise", "epochs": 3, "step_size": 0.03, "batch_size": 128, "iterations": 100}
COMPANY = {"start": "k-means", "inner": {"optimizer": "Adam", "learn_labels": True}, "step_size": 0.003}
INGREDIENTS = {
    "nothing": ("nothing added", {}),
    "real": ("real images as the start", {"start": "real"}),
    "k-means": ("k-means centers as the start", {"start": "k-means"}),
    "labels": ("learned labels", {"inner": {"learn_labels": True}}),
    "momentum": ("inner momentum, 0.5", {"inner": {"momentum": 0.5}, "step_size": 0.015}),
    "adam": ("inner Adam", {"inner": {"optimizer": "Adam"}, "step_size": 0.003}),
    "longer": ("longer unroll, 100 updates", {"epochs": 10}),
    "window": ("random window, 25 of 100 updates", {"epochs": 10, "window": 25}),
    "pool": ("pool of networks, windows of 25 of 100 updates", {"epochs": 10, "window": 25, "pool": 8}),
    "networks": ("four networks per iteration", {"networks": 4}),
    "batch": ("real batches of 512", {"batch_size": 512}),
    "augmentation": ("augmented real images", {"augmented_images": True}),
    "shaken": ("augmented distilled images", {"kind": "shaken"}),
    "resolution": ("low-resolution parametrization, 14 × 14", {"kind": "coarse"}),
    "tiles": ("multi-formation, 2 × 2 tiles in each image", {"tiles": 2}),
    "unclipped": ("no clipping of the outer gradient", {"clipped": False}),
}  # short name: title, and what it changes
WITHOUT = {
    "k-means": {"start": "noise"},
    "labels": {"inner": {"optimizer": "Adam"}},
    "adam": {"inner": {"learn_labels": True}, "step_size": 0.03},
}  # what the company is without those that belong to it


def shake(images: Tensor, *, black: float) -> Tensor:
    """Images [n, c, h, w] slightly turned, moved and scaled, all in one random way; differentiable."""
    bilinear = v2.InterpolationMode.BILINEAR
    transform = v2.RandomAffine(10, (0.07, 0.07), (0.9, 1.1), interpolation=bilinear, fill=None)
    return transform(images - black) + black  # what is moved in is 0: a fill of torchvision's own has no gradient


def augmented(images: Tensor, *, black: float, copies: int) -> Tensor:
    """So many copies of images [n, c, h, w], each shaken in a way of its own, as [copies × n, c, h, w]."""
    with seeded(0):
        return torch.stack([shake(image, black=black) for _ in range(copies) for image in images])


class LowResolution(du.DistilledSet):
    """Images learned on a coarser grid than networks see them on."""

    def __init__(self, images: Tensor, labels: Tensor, **options) -> None:
        coarse = F.interpolate(images.flatten(0, 1), size=(14, 14), mode="bilinear", antialias=True)
        super().__init__(coarse.unflatten(0, images.shape[:2]), labels, **options)

    def schedule(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images, labels, step_size in super().schedule():
            yield F.interpolate(images, size=(28, 28), mode="bilinear"), labels, step_size


class Shaken(du.DistilledSet):
    """Images that networks see moved about, in another way at each update."""

    def schedule(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images, labels, step_size in super().schedule():
            corner = float(images[..., 0, 0].detach().mean())  # which is black where the images show digits
            yield shake(images, black=corner), labels, step_size


KINDS = {"plain": du.DistilledSet, "coarse": LowResolution, "shaken": Shaken}


def augmented_training(dataset: du.Dataset, *, copies: int = 2) -> du.Dataset:
    """`dataset` with augmented copies of its training images in place of them."""
    images = augmented(dataset.train.images, black=float(dataset.train.images.min()), copies=copies)
    return replace(dataset, train=du.Split(images, dataset.train.labels.repeat(copies)))


def ingredient(
    study: Study,
    *,
    start: str,
    epochs: int,
    step_size: float,
    iterations: int,
    inner: dict | None = None,
    augmented_images: bool = False,
    kind: str = "plain",
    tiles: int = 1,
    clipped: bool = True,
    **options,
) -> None:
    """One row: the accuracy on validation images after a short distillation, and how long it took."""
    dataset = augmented_training(study.mnist) if augmented_images else study.mnist
    images, labels = du.tiled(*STARTS[start](dataset, steps=10, per_class=tiles**2), tiles=tiles)
    distilled = KINDS[kind](images, labels, epochs=epochs, step_size=step_size, tiles=tiles, **(inner or {}))
    iterations = max(1, round(study.fraction * iterations))
    begin = time.perf_counter()
    unclipped = mock.patch.object(du.History, "clip_gradient")
    with seeded(0), contextlib.nullcontext() if clipped else unclipped:
        du.distill(
            distilled, dataset, du.LeNet, iterations=iterations, validate_every=iterations, validation_networks=1,
            progress=False, **options,
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    networks = max(1, study.networks // 4)
    result = du.evaluate(distilled, dataset.validation, du.LeNet, networks=networks, seed=20_000)
    study.add("validation", result.values)
    study.add("seconds", [seconds])


# In company, momentum is Adam's own affair, and what belongs to the company is measured by leaving it out.
APART = {name: change for name, (_, change) in INGREDIENTS.items() if not {"start", "inner"} & change.keys()}
EXPERIMENTS: dict[str, Callable[[Study], None]] = {
    **{f"alone-{name}": partial(ingredient, **{**PAPER, **change}) for name, (_, change) in INGREDIENTS.items()},
    **{f"together-{name}": partial(ingredient, **{**PAPER, **COMPANY, **change}) for name, change in APART.items()},
    **{f"without-{name}": partial(ingredient, **{**PAPER, **COMPANY, **change}) for name, change in WITHOUT.items()},
}
