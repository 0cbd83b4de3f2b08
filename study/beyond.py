"""Beyond the paper: the best images for LeNets never met before, and the controls that tell what they are worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

import distill_utils as du
from runs import seeded
from study.architectures import ARCHITECTURES
from study.experiments import Study
from study.ingredients import EXPERIMENTS as INGREDIENTS
from study.ingredients import augmented

SOFT = {"optimizer": "Adam", "learn_labels": True}
ADAM = {"inner": {**SOFT, "label_smoothing": 0.1}, "step_size": 0.003, "batch_size": 128}
FREE = {
    "inner": {"momentum": 0.9, "learn_labels": True, "share_step_sizes": True}, "step_size": 0.01,
    "step_size_learning_rate": 0, "pool": 10, "epochs": 300, "learning_rate": 0.05, "batch_size": 1024,
}  # fmt: skip
MANY = {**FREE, "steps": 2, "window": 30, "batch_size": 512, "chiefly": "retrained"}
TILED = {"tiles": 2, "steps": 10, "per_class": 4, "chiefly": "as distilled"}
# What a name says: images, and in how many updates or for free retraining.
RECIPES = {
    "best-100-in-30": {"steps": 10, "per_class": 1, "epochs": 3, "iterations": 4000, **ADAM, "inner": SOFT},
    "best-100-in-100": {"steps": 10, "per_class": 1, "epochs": 10, "iterations": 2000, **ADAM},
    "best-10": {"steps": 1, "per_class": 1, "epochs": 50, "iterations": 100, "networks": 8, **ADAM},
    "best-100-free": {**FREE, "steps": 1, "per_class": 10, "window": 60, "iterations": 1400},
    "best-500-free": {**MANY, "per_class": 25, "iterations": 1000, "learning_rate": 0.02},
    "tiled-100-in-30": {**TILED, "epochs": 3, "iterations": 600, **ADAM, "inner": SOFT},
    "tiled-100-in-100": {**TILED, "epochs": 10, "iterations": 300, **ADAM},
    "tiled-10": {"tiles": 2, "steps": 2, "per_class": 2, "epochs": 25, "iterations": 600, "networks": 2, **ADAM},
    "tiled-100-free": {**MANY, "tiles": 2, "per_class": 20, "iterations": 700, "learning_rate": 0.03},
    "tiled-500-free": {
        **MANY, "tiles": 2, "steps": 10, "per_class": 20, "epochs": 60, "iterations": 400, "learning_rate": 0.02,
    },
}  # fmt: skip
AUGMENTED = ("best-100-free",)  # whose accuracy is compared with figures that were augmented
TRANSFERRED = {  # what other networks are given
    "architectures-10": "best-10",
    "architectures-100": "best-100-free",
    "architectures-100-tiled": "tiled-100-free",
}


def best(
    study: Study,
    *,
    steps: int,
    per_class: int,
    tiles: int = 1,
    inner: dict,
    chiefly: str | None = None,
    **recipe,
) -> None:
    """The best set of one kind: as distilled, and in free retraining beside its controls.

    With `tiles`, a start of so many images per class is made smaller, tiles × tiles of them to an image. `chiefly`
    names the use that it is made for, where images are many: all else is then tested on four networks alone.
    """
    mnist, networks = study.mnist, max(1, study.networks // 2)
    some = max(1, networks // (25 if chiefly else 10))
    tested = {use: networks if chiefly in (None, use) else some for use in ("as distilled", "retrained")}
    start, real = (
        du.tiled(*draw(mnist, steps=steps, per_class=per_class), tiles=tiles)
        for draw in (du.k_means_start, du.real_start)
    )
    distilled, file = study.distil("images", mnist, du.LeNet, start, inner={**inner, "tiles": tiles}, **recipe)
    as_distilled = du.evaluate(distilled, mnist.test, du.LeNet, networks=tested["as distilled"])
    retrained = du.retrain(distilled, mnist.test, du.LeNet, networks=tested["retrained"])
    study.add("as distilled", as_distilled.values, file=file)
    study.add("retrained", retrained.values, file=file)
    for title, images in {
        "distilled, hard labels": under(distilled, distilled.images, hard(distilled.labels)),
        "random real images, true labels": under(distilled, *real),
        "random real images, learned labels": under(distilled, real[0], distilled.labels),
        "k-means centers, true labels": under(distilled, *start),
        "k-means centers, learned labels": under(distilled, start[0], distilled.labels),
    }.items():
        study.add(f"control, {title}", du.retrain(images, mnist.test, du.LeNet, networks=some).values)


def architectures(study: Study, *, name: str) -> None:
    """A set distilled for LeNet, and random real images, retrained freely on by networks of other kinds."""
    mnist, networks = study.mnist, max(1, study.networks // 100)
    distilled = du.DistilledSet.load(study.results / f"{name}-images.safetensors", device=study.device)
    start = du.real_start(mnist, steps=distilled.steps, per_class=RECIPES[name]["per_class"])
    real = under(distilled, *du.tiled(*start, tiles=distilled.tiles))
    for architecture, make_network in ARCHITECTURES.items():
        for title, images in (("distilled", distilled), ("random real images", real)):
            result = du.retrain(images, mnist.test, make_network, networks=networks, stack=1)
            study.add(f"{architecture}, {title}", result.values)


def under(schedule: du.DistilledSet, images: Tensor, labels: Tensor) -> du.DistilledSet:
    """Other images and labels under the schedule of a distilled set."""
    return du.DistilledSet(
        images.detach(), labels.detach(), epochs=schedule.epochs, step_size=schedule.step_sizes.detach(),
        optimizer=schedule.optimizer, momentum=schedule.momentum, tiles=schedule.tiles,
    )  # fmt: skip


def hard(labels: Tensor) -> Tensor:
    """Probabilities [..., classes] as one-hot labels of the most probable classes."""
    return F.one_hot(labels.argmax(-1), labels.shape[-1]).to(labels)


def label_robust_score(
    distilled: float, distilled_hard: float, random: float, real: float
) -> tuple[float, float, float]:
    """DD-Ranking's hard label recovery, improvement over random, and the score of both (Li et al. 2025).

    Takes accuracies in percent: on the distilled set, on it with hard labels, on as many random real images with the
    same labels and recipe, and on all real images. The recovery is what is missing, so that less is better.
    """
    recovery, improvement = real - distilled_hard, distilled - random
    alpha = (improvement - recovery) / 2 / 100
    return recovery, improvement, (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def augmented_retraining(study: Study, *, copies: int = 10) -> None:
    """Free retraining on augmented copies of sets, and of what they are held against: more images in each epoch."""
    mnist, networks = study.mnist, max(1, study.networks // 50)
    for name in AUGMENTED:
        recipe = RECIPES[name]
        distilled = du.DistilledSet.load(study.results / f"{name}-images.safetensors", device=study.device)
        starts = {
            "distilled": (distilled.images.detach(), distilled.labels.detach()),
            "random real images": du.real_start(mnist, steps=recipe["steps"], per_class=recipe["per_class"]),
            "k-means centers": du.k_means_start(mnist, steps=recipe["steps"], per_class=recipe["per_class"]),
        }
        for title, (images, labels) in starts.items():
            images = augmented(images.flatten(0, 1), black=float(mnist.train.images.min()), copies=copies)
            shaken = du.DistilledSet(images[None], labels.flatten(0, 1).repeat(copies, 1)[None])
            study.add(f"{name}, {title}", du.retrain(shaken, mnist.test, du.LeNet, networks=networks).values)


def whole_set(study: Study) -> None:
    """What all real images teach: the upper bound of every set."""
    values = []
    epochs = max(1, round(5 * study.fraction))
    for seed in range(max(1, study.networks // 100)):
        with seeded(seed):
            network = du.train(du.LeNet().to(study.device), study.mnist.train, epochs=epochs)
        values.append(du.accuracy(network, study.mnist.test))
    study.add("ordinary training", values)


BEYOND: dict[str, Callable[[Study], None]] = {
    **INGREDIENTS,
    **{name: partial(best, **recipe) for name, recipe in RECIPES.items()},
    "whole-set": whole_set,
    "augmented": augmented_retraining,
    **{experiment: partial(architectures, name=name) for experiment, name in TRANSFERRED.items()},
}
