"""Three ways to improve whole images in a minute and a half, and what networks trained on them from scratch reach."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

import distill_utils as du
from study.experiments.experiment import Experiment, Recipe
from study.experiments.protocols import UNDISTILLED, measure_scratch
from study.methods.matching import feature_distance, gradient_distance, match
from study.methods.truncation import NetworkPool


@dataclass(frozen=True)
class Rival:
    """A hundred whole images that a method improves for LeNet in a minute and a half, from random real ones; or
    undistilled ones."""

    method: str
    iterations: int = 0
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"rival-{self.method}".replace(" ", "-")


GRADIENTS, FEATURES, UNROLLED = "gradient matching", "distribution matching", "unrolled training"
DISTANCES = {GRADIENTS: gradient_distance, FEATURES: feature_distance}
# Unrolled training learns images for training from scratch: an inner loop like it, and the outer loop.
LONG_TRAINING = {"epochs": 300, "momentum": 0.9, "soft_labels": True, "step_size": 0.01}
FOR_SCRATCH = {"batch_size": 512, "learning_rate": 0.05, "step_size_learning_rate": 0}
MATCHED = {"matches": 10, "updates": 5, "batch_size": 32, "learning_rate": 0.1}
RIVALS = (  # learning rates chosen on validation images
    *(Rival(images) for images in UNDISTILLED),
    Rival(GRADIENTS, 70, MATCHED),
    Rival(FEATURES, 2000, {"learning_rate": 1.0}),
    Rival(UNROLLED, 85, {"window": 30}),
)


def rivalry(experiment: Experiment, *, rival: Rival) -> None:
    """Whole images improved by one of three methods in about the same time, or left as they are; two networks are
    trained on them from scratch."""
    mnist, method, begin = experiment.dataset, rival.method, time.process_time()
    kind, unrolled = UNDISTILLED.get(method, "real"), method == UNROLLED
    images = du.initialize(mnist, kind, steps=1, per_class=10)
    distilled = du.DistilledSet(*images, **(LONG_TRAINING if unrolled else {}))
    if unrolled:
        options = {**FOR_SCRATCH, "unroll": NetworkPool(10, **rival.options)}
        experiment.improve(distilled, iterations=rival.iterations, **options)
    elif method in DISTANCES:
        options = {
            "distance": DISTANCES[method],
            "iterations": experiment.reduced(rival.iterations),
        }
        match(distilled, mnist, du.LeNet, **options, **rival.options)
    seconds, content = time.process_time() - begin, (method, "distilled" if unrolled else "true")
    columns = dict(zip(("images", "labels"), content, strict=True))
    columns["set"] = rival.name
    experiment.measure([seconds], metric="seconds", **columns)
    measure_scratch(experiment, distilled, {"LeNet": 3, "ConvNet-3": 2}, **columns)


EXPERIMENTS = {rival.name: Recipe(partial(rivalry, rival=rival)) for rival in RIVALS}
