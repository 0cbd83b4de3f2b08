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
    "step_size_learning_rate": 0, "pool": 10, "learning_rate": 0.05, "batch_size": 1024,
}  # fmt: skip
CALM = {"learning_rate": 0.02, "batch_size": 512, "few": True}
RECIPES = {
    "best-100-in-30": {"steps": 10, "per_class": 1, "epochs": 3, "iterations": 4000, **ADAM, "inner": SOFT},
    "best-100-in-100": {"steps": 10, "per_class": 1, "epochs": 10, "iterations": 2000, **ADAM},
    "best-10": {"steps": 1, "per_class": 1, "epochs": 50, "iterations": 100, "networks": 8, **ADAM},
    "best-100-free": {"steps": 1, "per_class": 10, "epochs": 300, "window": 60, "iterations": 1400, **FREE},
    "best-500-free": {"steps": 2, "per_class": 25, "epochs": 300, "window": 30, "iterations": 500, **FREE, **CALM},
}  # what a name says: images, and in how many updates or for free retraining
AUGMENTED = ("best-100-free",)  # whose accuracy is compared with figures that were augmented


def best(study: Study, *, steps: int, per_class: int, few: bool = False, **recipe) -> None:
    """The best set of one kind: as distilled, and in free retraining beside its controls.

    `few` tests all but free retraining on four networks alone, where images are many and time is short.
    """
    mnist, networks = study.mnist, max(1, study.networks // 2)
    some = max(1, networks // 25) if few else max(1, networks // 10)
    start = du.k_means_start(mnist, steps=steps, per_class=per_class)
    distilled, file = study.distil("images", mnist, du.LeNet, start, **recipe)
    as_distilled = du.evaluate(distilled, mnist.test, du.LeNet, networks=some if few else networks)
    study.add("as distilled", as_distilled.values, file=file)
    study.add("retrained", du.retrain(distilled, mnist.test, du.LeNet, networks=networks).values, file=file)
    real = du.real_start(mnist, steps=steps, per_class=per_class)
    for title, images in {
        "distilled, hard labels": under(distilled, distilled.images, hard(distilled.labels)),
        "random real images, true labels": under(distilled, *real),
        "random real images, learned labels": under(distilled, real[0], distilled.labels),
        "k-means centers, true labels": under(distilled, *start),
        "k-means centers, learned labels": under(distilled, start[0], distilled.labels),
    }.items():
        study.add(f"control, {title}", du.retrain(images, mnist.test, du.LeNet, networks=some).values)


def architectures(study: Study, *, file: str, per_class: int) -> None:
    """A set distilled for LeNet, and random real images, retrained freely on by networks of other kinds."""
    mnist, networks = study.mnist, max(1, study.networks // 200)
    distilled = du.DistilledSet.load(study.results / file, device=study.device)
    real = under(distilled, *du.real_start(mnist, steps=distilled.steps, per_class=per_class))
    for name, make_network in ARCHITECTURES.items():
        for title, images in (("distilled", distilled), ("random real images", real)):
            result = du.retrain(images, mnist.test, make_network, networks=networks, stack=1)
            study.add(f"{name}, {title}", result.values)


def under(schedule: du.DistilledSet, images: Tensor, labels: Tensor) -> du.DistilledSet:
    """Other images and labels under the schedule of a distilled set."""
    return du.DistilledSet(
        images.detach(), labels.detach(), epochs=schedule.epochs, step_size=schedule.step_sizes.detach(),
        optimizer=schedule.optimizer, momentum=schedule.momentum,
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
    """Free retraining on augmented copies of the sets, which sees as many more images in each of its epochs."""
    black = float(study.mnist.train.images.min())
    for name in AUGMENTED:
        distilled = du.DistilledSet.load(study.results / f"{name}-images.safetensors", device=study.device)
        images, labels = (each.detach().flatten(0, 1) for each in (distilled.images, distilled.labels))
        images = augmented(images, black=black, copies=copies)
        shaken = du.DistilledSet(images[None], labels.repeat(copies, 1)[None])
        study.add(name, du.retrain(shaken, study.mnist.test, du.LeNet, networks=max(1, study.networks // 50)).values)


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
    **{
        f"architectures-{images}": partial(architectures, file=f"{name}-images.safetensors", per_class=per_class)
        for images, name, per_class in ((10, "best-10", 1), (100, "best-100-free", 10))
    },
}
