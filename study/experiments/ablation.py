"""What each technique since 2018 contributes: added to the paper's method, and added to or left out of the best one.

Every experiment distills 100 images for 30 updates (10 steps × 3 epochs), unless its technique says otherwise, from
each of three seeds, and is measured on validation images with the same networks. Within a method, all have the same
number of outer iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

import distill_utils as du
from study.experiments.experiment import Experiment, Recipe
from study.experiments.protocols import training
from study.methods.decoders import augment, augmented, low_resolution
from study.methods.truncation import NetworkPool, RandomWindow

ADAM = {"optimizer": "Adam", "step_size": 0.003}
SOFT = {"soft_labels": True}
PAPER = {"init": "noise", "step_size": 0.03, "iterations": 150}
BEST = {**ADAM, **SOFT, "init": "k-means", "iterations": 100}
LONG = {"epochs": 10}
TECHNIQUES = {  # short name: title, and the settings it changes
    "none": ("none", {}),
    "init-real": ("initialization from real images", {"init": "real"}),
    "init-kmeans": ("initialization from k-means centers", {"init": "k-means"}),
    "soft-labels": ("soft labels", SOFT),
    "momentum": ("inner momentum, 0.5", {"momentum": 0.5, "step_size": 0.015}),
    "adam": ("inner Adam", ADAM),
    "longer-unroll": ("longer unroll, 100 updates", LONG),
    "random-window": (
        "random truncation window, 25 of 100 updates",
        {**LONG, "make_unroll": partial(RandomWindow, 25)},
    ),
    "network-pool": (
        "network pool, windows of 25 of 100 updates",
        {**LONG, "make_unroll": partial(NetworkPool, 8, window=25)},
    ),
    "four-networks": ("four networks per iteration", {"networks": 4}),
    "batch-512": ("real batches of 512", {"batch_size": 512}),
    "augmented-real": ("augmented real images", {"augment_real": True}),
    "augmented-synthetic": ("augmented synthetic images", {"parametrize": augmented}),
    "low-resolution": ("low-resolution images, 14 × 14", {"parametrize": low_resolution}),
    "multi-formation": (
        "four times as many images, 14 × 14 (multi-formation)",
        {"parametrize": low_resolution, "per_class": 4},
    ),
    "no-clipping": ("no clipping of the meta-gradient", {"clip": math.inf}),
}
LEFT_OUT = {  # what changes where a technique of the best method is left out
    "init-kmeans": {"init": "noise"},
    "soft-labels": {"soft_labels": False},
    "adam": {"optimizer": "SGD", "step_size": 0.03},
}


def augment_training(dataset: du.Dataset) -> du.Dataset:
    """`dataset` with two augmented copies of each training image in place of it."""
    images, black = dataset.train.images, float(dataset.train.images.min())
    with du.seeded(0):
        parts = [augment(part, black=black) for _ in range(2) for part in images.split(5000)]
    return replace(dataset, train=du.Split(torch.cat(parts), dataset.train.labels.repeat(2)))


def ablation(
    experiment: Experiment,
    *,
    init: str,
    epochs: int = 3,
    per_class: int = 1,
    step_size: float,
    optimizer: str = "SGD",
    momentum: float = 0.0,
    soft_labels: bool = False,
    augment_real: bool = False,
    parametrize: Callable = du.DistilledSet,
    make_unroll: Callable = lambda: du.unroll,
    **outer,
) -> None:
    """The accuracy on validation images after a short distillation, and how long that took."""
    mnist, seed = experiment.dataset, experiment.seed
    dataset = augment_training(mnist) if augment_real else mnist
    images = du.initialize(dataset, init, steps=10, per_class=per_class, std=0.3, seed=seed)
    inner = {"optimizer": optimizer, "momentum": momentum, "soft_labels": soft_labels}
    distilled = parametrize(*images, epochs=epochs, step_size=step_size, **inner)
    outer = {"batch_size": 128, "seed": seed, "unroll": make_unroll(), **outer}
    outer["dataset"] = dataset
    with du.seeded(seed):  # augmentation draws from torch's random state
        seconds = experiment.improve(distilled, **outer)
    options = {"networks": experiment.reduced(25), "seed": du.VALIDATION_SEED}
    accuracies = du.evaluate(distilled, mnist.validation, du.LeNet, **options)
    columns = {"images": "distilled", "training": training(distilled)}
    experiment.measure(accuracies.values, metric="validation accuracy", **columns)
    experiment.measure([seconds], metric="seconds", **columns)


def recipe(settings: dict) -> Recipe:
    return Recipe(partial(ablation, **settings), seeds=(0, 1, 2))


EXPERIMENTS = {
    f"add-one-{name}": recipe(PAPER | change) for name, (_, change) in TECHNIQUES.items()
}
for name, (_, change) in TECHNIQUES.items():
    if name in LEFT_OUT:  # what the best method has is left out instead
        EXPERIMENTS[f"leave-one-out-{name}"] = recipe(BEST | LEFT_OUT[name])
    elif name not in ("init-real", "momentum"):
        EXPERIMENTS[f"add-to-best-{name}"] = recipe(BEST | change)
