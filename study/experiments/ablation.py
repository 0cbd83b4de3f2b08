"""What each technique since 2018 contributes: added to the paper's method, and added to or left out of the best one.

Every experiment distills 100 images for 30 updates (10 steps × 3 epochs) from each of three seeds, and is measured on
validation images with the same networks. Within a method, all have the same number of outer iterations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

import distill_utils as du
from study.methods.decoders import augment, augmented, low_resolution, multi_formation
from study.methods.truncation import NetworkPool, RandomWindow
from study.records import Study

PAPER = {
    "init": "noise",
    "inner": {},
    "epochs": 3,
    "step_size": 0.03,
    "batch_size": 128,
    "iterations": 150,
}
BEST = {
    **PAPER, "init": "k-means", "inner": {"optimizer": "Adam", "soft_labels": True}, "step_size": 0.003,
    "iterations": 100,
}  # fmt: skip
SEEDS = (0, 1, 2)  # of the distillations
TECHNIQUES = {  # short name: title, and the settings it changes
    "none": ("none", {}),
    "init-real": ("initialization from real images", {"init": "real"}),
    "init-kmeans": ("initialization from k-means centers", {"init": "k-means"}),
    "soft-labels": ("soft labels", {"inner": {"soft_labels": True}}),
    "momentum": ("inner momentum, 0.5", {"inner": {"momentum": 0.5}, "step_size": 0.015}),
    "adam": ("inner Adam", {"inner": {"optimizer": "Adam"}, "step_size": 0.003}),
    "longer-unroll": ("longer unroll, 100 updates", {"epochs": 10}),
    "random-window": (
        "random truncation window, 25 of 100 updates", {"epochs": 10, "make_unroll": partial(RandomWindow, 25)},
    ),
    "network-pool": (
        "network pool, windows of 25 of 100 updates", {"epochs": 10, "make_unroll": partial(NetworkPool, 8, window=25)},
    ),
    "four-networks": ("four networks per iteration", {"networks": 4}),
    "batch-512": ("real batches of 512", {"batch_size": 512}),
    "augmented-real": ("augmented real images", {"augment_real": True}),
    "augmented-synthetic": ("augmented synthetic images", {"parametrize": augmented}),
    "low-resolution": ("low-resolution parametrization, 14 × 14", {"parametrize": low_resolution}),
    "multi-formation": (
        "multi-formation, factor 2", {"parametrize": partial(multi_formation, factor=2), "per_class": 4},
    ),
    "no-clipping": ("no clipping of the meta-gradient", {"clip": math.inf}),
}  # fmt: skip
LEFT_OUT = {  # what changes where a technique of the best method is left out
    "init-kmeans": {"init": "noise"},
    "soft-labels": {"inner": {"optimizer": "Adam"}},
    "adam": {"inner": {"soft_labels": True}, "step_size": 0.03},
}


def augment_training(dataset: du.Dataset, *, copies: int = 2, seed: int = 0) -> du.Dataset:
    """`dataset` with augmented copies of its training images in place of them."""
    images, black = dataset.train.images, dataset.train.images.min()
    with du.seeded(seed):
        parts = [augment(part, black=black) for _ in range(copies) for part in images.split(5000)]
    return replace(dataset, train=du.Split(torch.cat(parts), dataset.train.labels.repeat(copies)))


def ablation(
    study: Study, *, init: str, inner: dict, epochs: int, step_size: float, iterations: int, per_class: int = 1,
    augment_real: bool = False, parametrize: Callable = du.DistilledSet, make_unroll: Callable = lambda: du.unroll,
    **options,
) -> None:  # fmt: skip
    """The accuracy on validation images after a short distillation from each seed, and how long one took on average."""
    dataset = augment_training(study.mnist) if augment_real else study.mnist
    options |= {"iterations": max(1, round(study.fraction * iterations))}
    networks, values, seconds = max(1, study.networks // 8), [], 0.0
    for seed in SEEDS:
        images, labels = du.initialize(
            dataset, init, steps=10, per_class=per_class, std=0.3, seed=seed
        )
        distilled = parametrize(images, labels, epochs=epochs, step_size=step_size, **inner)
        run = partial(du.distill, distilled, dataset, du.LeNet, unroll=make_unroll(), seed=seed)
        begin = time.perf_counter()
        with du.seeded(seed):  # augmentation draws from torch's random state
            run(validate_every=10**6, validation_networks=1, progress=False, **options)
        seconds += time.perf_counter() - begin
        values.append(
            du.evaluate(
                distilled, dataset.validation, du.LeNet, networks=networks, seed=du.VALIDATION_SEED
            ).values
        )
    study.distillation_seconds = round(seconds / len(SEEDS), 2)
    study.add("validation", *values)


# To the best method, only what it does not have is added: what it has is left out instead.
ADDED = {
    name: change
    for name, (_, change) in TECHNIQUES.items()
    if not {"init", "inner"} & change.keys()
}
EXPERIMENTS: dict[str, Callable[[Study], None]] = {
    **{
        f"add-one-{name}": partial(ablation, **{**PAPER, **change})
        for name, (_, change) in TECHNIQUES.items()
    },
    **{
        f"add-to-best-{name}": partial(ablation, **{**BEST, **change})
        for name, change in ADDED.items()
    },
    **{
        f"leave-one-out-{name}": partial(ablation, **{**BEST, **change})
        for name, change in LEFT_OUT.items()
    },
}
