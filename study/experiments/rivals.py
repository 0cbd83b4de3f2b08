"""Three ways to improve whole images in two minutes, and what networks trained on them from scratch reach."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

import distill_utils as du
from study.experiments.experiment import Experiment, Recipe
from study.experiments.protocols import NETWORKS, UNDISTILLED, measure_scratch
from study.methods.matching import feature_distance, gradient_distance, match
from study.methods.truncation import NetworkPool

CONSTANT = {"momentum": 0.9, "soft_labels": True, "step_size": 0.01}  # training from scratch itself
KEPT = {"batch_size": 512, "step_size_learning_rate": 0}  # keeps the step sizes


@dataclass(frozen=True)
class Rival:
    """Whole images that a method improves for a network in two minutes, from random real ones; or undistilled ones."""

    per_class: int
    method: str
    network: str = ""
    iterations: int = 0
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = ["rival", self.method, f"ipc{self.per_class}", self.network]
        return "-".join(filter(None, words)).replace(" ", "-").lower()


GRADIENTS, FEATURES, UNROLLED = "gradient matching", "distribution matching", "unrolled training"
DISTANCES = {GRADIENTS: gradient_distance, FEATURES: feature_distance}
MATCHED = {"matches": 10, "updates": 5, "batch_size": 32, "learning_rate": 0.1}
RIVALS = (  # learning rates chosen on validation images
    *(Rival(per_class, images) for per_class in (1, 10) for images in UNDISTILLED),
    Rival(1, GRADIENTS, "LeNet", 1000, {"learning_rate": 1.0}),
    Rival(1, FEATURES, "LeNet", 2200, {"learning_rate": 1.0}),
    Rival(1, UNROLLED, "LeNet", 200, {"window": 60}),
    Rival(1, GRADIENTS, "ConvNet-3", 280, {"learning_rate": 1.0}),
    Rival(1, FEATURES, "ConvNet-3", 700, {"learning_rate": 0.3}),
    Rival(1, UNROLLED, "ConvNet-3", 100, {"window": 20}),
    Rival(10, GRADIENTS, "LeNet", 70, MATCHED),
    Rival(10, FEATURES, "LeNet", 2000, {"learning_rate": 1.0}),
    Rival(10, UNROLLED, "LeNet", 85, {"window": 30}),
)


def rivalry(experiment: Experiment, *, rival: Rival) -> None:
    """Whole images improved by one of three methods in about the same time, or left as they are; two networks are
    trained on them from scratch."""
    mnist, method, begin = experiment.dataset, rival.method, time.process_time()
    kind, unrolled = UNDISTILLED.get(method, "real"), method == UNROLLED
    images = du.initialize(mnist, kind, steps=1, per_class=rival.per_class)
    distilled = du.DistilledSet(*images, **({"epochs": 300, **CONSTANT} if unrolled else {}))
    if unrolled:
        options = {**KEPT, "learning_rate": 0.05, "unroll": NetworkPool(10, **rival.options)}
        options |= {"iterations": rival.iterations, "make_network": NETWORKS[rival.network]}
        experiment.improve(distilled, **options)
    elif method in DISTANCES:
        options = {
            "distance": DISTANCES[method],
            "iterations": experiment.reduced(rival.iterations),
        }
        match(distilled, mnist, NETWORKS[rival.network], **options, **rival.options)
    seconds, content = time.process_time() - begin, (method, "distilled" if unrolled else "true")
    columns = dict(zip(("images", "labels"), content, strict=True))
    columns |= {"set": rival.name, "network": rival.network}
    experiment.measure([seconds], metric="seconds", **columns)
    del columns["network"]
    measure_scratch(experiment, distilled, {"LeNet": 10, "ConvNet-3": 3}, **columns)


EXPERIMENTS = {rival.name: Recipe(partial(rivalry, rival=rival)) for rival in RIVALS}
