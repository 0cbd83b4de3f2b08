"""Controls for learned schedules: undistilled images under as many updates of the same inner optimizer."""

from __future__ import annotations

import copy

from torch import Tensor

import distill_utils as du
from study.evaluation import with_schedule_of
from study.records import Study

UNDISTILLED = {"random real images": du.init_from_real, "k-means centers": du.init_from_kmeans}
STEP_SIZES = {  # candidates for a constant one
    "SGD": (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3),
    "Adam": (0.0003, 0.0006, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03),
}


def schedule_controls(
    study: Study, distilled: du.DistilledSet, make_network: du.Factory = du.LeNet, *, networks: int
) -> None:
    """Keeps the accuracies of undistilled images with true labels, as many and of the same parametrization.

    Their step sizes are the best constant one on validation images, those learned for these very images by the same
    outer loop, and those learned for the distilled set.
    """
    mnist = study.mnist
    per_class = distilled.labels.shape[1] // mnist.classes
    for title, initialize in UNDISTILLED.items():
        borrowed = undistilled_set(distilled, *initialize(mnist, steps=distilled.steps, per_class=per_class))
        step_sizes = STEP_SIZES[distilled.optimizer]
        constant = du.best_constant_step_size(borrowed, mnist, make_network, step_sizes=step_sizes)
        learned = copy.deepcopy(constant)
        du.distill(  # a learning rate of 0 keeps the images
            learned, mnist, make_network, iterations=max(1, round(200 * study.fraction)), batch_size=128,
            learning_rate=0, step_size_learning_rate=0.03, validation_networks=1, progress=False,
        )  # fmt: skip
        for schedule, control in (
            (f"constant step size {constant.step_sizes[0].item():.4g}", constant),
            ("step sizes learned for them", learned),
            ("step sizes of the distilled set", borrowed),
        ):
            found = du.evaluate(control, mnist.test, make_network, networks=networks)
            study.add(f"{title}, {schedule}", found.values)


def undistilled_set(distilled: du.DistilledSet, images: Tensor, labels: Tensor) -> du.DistilledSet:
    """Images of full size and their labels, in the parametrization and with the schedule of a distilled set."""
    options = {name: getattr(distilled, name) for name in distilled.options}
    undistilled = type(distilled).from_images(images, labels, **options) if options else type(distilled)(images, labels)
    return with_schedule_of(distilled, undistilled.images, labels)
