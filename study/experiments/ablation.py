"""What each technique since 2018 adds to the paper's method.

Every experiment distills 100 images for 30 updates (10 steps × 3 epochs) from real ones, unless its technique says
otherwise, from each of three seeds, and is measured on validation images with the same networks. All have the same
number of outer iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

import distill_utils as du
from study.experiments.experiment import Experiment, Recipe
from study.experiments.protocols import training
from study.methods.truncation import NetworkPool, RandomWindow

PAPER = {"init": "real", "step_size": 0.03, "iterations": 150}
LONG = {"epochs": 10}


def low_resolution(images: Tensor, labels: Tensor, **options) -> du.DistilledSet:
    """A set of images [steps, n, c, h, w], stored with half the height and width. As many pixels hold four times as
    many images, as in multi-formation (Kim et al. 2022)."""
    size = [length // 2 for length in images.shape[-2:]]
    small = F.interpolate(images.flatten(0, 1), size, mode="bilinear", antialias=True)
    # Channels count as the depth of a volume, which stays.
    decoder = nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear")
    small = small.unflatten(0, images.shape[:2])
    return du.DistilledSet(small, labels, decoder=decoder, **options)


TECHNIQUES = {  # short name: title, and the settings it changes
    "none": ("none", {}),
    "k-means": ("initialization from k-means centers", {"init": "k-means"}),
    "soft-labels": ("soft labels", {"soft_labels": True}),
    "adam": ("inner Adam", {"optimizer": "Adam", "step_size": 0.003}),
    "multi-formation": (
        "four times as many images, 14 × 14 (multi-formation)",
        {"parametrize": low_resolution, "per_class": 4},
    ),
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
}


def ablation(
    experiment: Experiment,
    *,
    init: str,
    epochs: int = 3,
    per_class: int = 1,
    step_size: float,
    optimizer: str = "SGD",
    soft_labels: bool = False,
    parametrize: Callable = du.DistilledSet,
    make_unroll: Callable = lambda: du.unroll,
    **outer,
) -> None:
    """The accuracy on validation images after a short distillation."""
    mnist, seed = experiment.dataset, experiment.seed
    images = du.initialize(mnist, init, steps=10, per_class=per_class, seed=seed)
    inner = {"optimizer": optimizer, "soft_labels": soft_labels}
    distilled = parametrize(*images, epochs=epochs, step_size=step_size, **inner)
    outer = {"batch_size": 128, "seed": seed, "unroll": make_unroll(), **outer}
    experiment.improve(distilled, **outer)
    options = {"networks": experiment.reduced(25), "seed": du.VALIDATION_SEED}
    accuracies = du.evaluate(distilled, mnist.validation, du.LeNet, **options)
    columns = {"images": "distilled", "training": training(distilled)}
    experiment.measure(accuracies.values, metric="validation accuracy", **columns)


EXPERIMENTS = {
    f"ablation-{name}": Recipe(partial(ablation, **PAPER | change), seeds=(0, 1, 2))
    for name, (_, change) in TECHNIQUES.items()
}
