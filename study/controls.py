"""Controls for learned schedules: undistilled images under as many updates of the same inner optimizer."""

from __future__ import annotations

import copy
from functools import partial

from torch import Tensor

import distill_utils as du
from study.evaluation import validation_accuracy, with_schedule_of
from study.records import Study

UNDISTILLED = {"random real images": "real", "k-means centers": "k-means"}
STEP_SIZES = {  # candidates for a constant one
    "SGD": (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3),
    "Adam": (0.0003, 0.0006, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03),
}
SMOOTHING = (0.1, 0.3)  # candidates where the labels of the distilled set are free, too


def schedule_controls(
    study: Study, dataset: du.Dataset, distilled: du.DistilledSet, make_network: du.Factory = du.LeNet, *,
    networks: int,
) -> None:  # fmt: skip
    """Keeps the accuracies of undistilled images, as many and of the same parametrization."""
    per_class = distilled.labels.shape[1] // dataset.classes
    for title, kind in UNDISTILLED.items():
        images, labels = du.initialize(
            dataset, kind, steps=len(distilled.images), per_class=per_class
        )
        sets = label_kinds(distilled, labels).items()
        sets = {kind: undistilled_set(distilled, images, labels) for kind, labels in sets}
        compare_schedules(
            study, dataset, distilled, sets, make_network, title=title, networks=networks
        )


def compare_schedules(
    study: Study, dataset: du.Dataset, distilled: du.DistilledSet, sets: dict[str, du.DistilledSet],
    make_network: du.Factory, *, title: str, networks: int,
) -> None:  # fmt: skip
    """Keeps the accuracies of a control with each of several kinds of labels, by as many updates as the distilled set.

    Every kind of labels gets its best constant step size. The kind that is best on validation images is then tested
    with step sizes learned for these very images by the same outer loop, and with those of the distilled set.
    """
    constant, step_sizes = {}, STEP_SIZES[distilled.inner["optimizer"]]
    for kind, control in sets.items():
        constant[kind] = du.best_constant_step_size(
            control, dataset, make_network, step_sizes=step_sizes
        )
        found = du.evaluate(constant[kind], dataset.test, make_network, networks=networks)
        study.add(
            f"{title}, {kind}, constant step size {constant[kind].step_sizes[0]:.4g}", found.values
        )
    validate = partial(validation_accuracy, dataset=dataset, make_network=make_network, networks=5)
    kind = max(constant, key=lambda each: validate(constant[each]))
    learned = learn_step_sizes(study, dataset, constant[kind], make_network)
    borrowed = copy.deepcopy(constant[kind]).set_step_sizes(distilled.step_sizes)
    for schedule, control in (("learned for them", learned), ("of the distilled set", borrowed)):
        found = du.evaluate(control, dataset.test, make_network, networks=networks)
        study.add(f"{title}, {kind}, step sizes {schedule}", found.values)


def learn_step_sizes(
    study: Study, dataset: du.Dataset, undistilled: du.DistilledSet, make_network: du.Factory
) -> du.DistilledSet:
    """A copy of the set whose step sizes, one for each update, are learned by Algorithm 1; its images stay."""
    learned = copy.deepcopy(undistilled)
    du.distill(  # a learning rate of 0 keeps images and labels
        learned, dataset, make_network, iterations=max(1, round(200 * study.fraction)), batch_size=128,
        learning_rate=0, step_size_learning_rate=0.03, validation_networks=1, progress=False,
    )  # fmt: skip
    return learned


def label_kinds(distilled: du.DistilledSet, labels: Tensor) -> dict[str, Tensor]:
    """True labels [steps, n, classes]; where the set has learned its own, also smoothed ones and those of the set."""
    kinds = {"true labels": labels}
    if distilled.labels.max(-1).values.min() < 1:
        uniform = 1 / labels.shape[-1]
        kinds |= {
            f"labels smoothed by {share}": (1 - share) * labels + share * uniform
            for share in SMOOTHING
        }
        kinds["labels of the distilled set"] = distilled.labels.detach()
    return kinds


def undistilled_set(distilled: du.DistilledSet, images: Tensor, labels: Tensor) -> du.DistilledSet:
    """Images of full size and their labels, in the parametrization and with the schedule of a distilled set."""
    packs = isinstance(distilled.decoder, du.MultiFormation)
    return with_schedule_of(distilled, distilled.decoder.pack(images) if packs else images, labels)
