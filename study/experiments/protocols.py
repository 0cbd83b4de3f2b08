"""Evaluation beyond the learned schedule: training from scratch, and label scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distill_utils as du
from study.methods.decoders import augment
from study.records import Study


def train_from_scratch(
    distilled: du.DistilledSet, split: du.Split, make_network: du.Factory, *, networks: int = 10, epochs: int = 300,
    batch_size: int = 256, step_size: float = 0.01, optimizer: str = "SGD", black: float | None = None,
    statistics: Tensor | None = None, seed: int = 10_000, side_by_side: bool = True,
) -> du.Accuracies:  # fmt: skip
    """Accuracies on `split` of fresh networks trained on images and labels alone, without the learned schedule.

    The defaults are the protocol of dataset condensation (Zhao et al. 2021) without its augmentation, weight decay and
    drop of the step size. Networks may have batch normalization and dropout.

    Args:
        networks: initializations, all drawn from `seed` before any of them is trained.
        epochs: passes over the images.
        batch_size: images in an update.
        step_size: the same for all updates.
        optimizer: "SGD", with momentum 0.9, or "Adam".
        black: turn, shift and scale each image anew in every update; what moves in has this value.
        statistics: images [n, c, h, w] that batch normalization takes its statistics from after training.
        side_by_side: train networks in ensembles; off for architectures that `torch.vmap` cannot run.
    """
    du.require_counts(networks=networks, epochs=epochs, batch_size=batch_size)
    du.require(step_size > 0, f"step_size={step_size}: give more than 0")
    du.require(optimizer in ("SGD", "Adam"), f"optimizer={optimizer!r}: give SGD or Adam")
    du.require(
        callable(make_network) and not isinstance(make_network, nn.Module),
        "make_network: give a network factory",
    )
    device = split.images.device
    at_once = (8 if device.type == "cpu" else 64) if side_by_side else 1
    make_optimizer = (
        partial(torch.optim.SGD, momentum=0.9) if optimizer == "SGD" else torch.optim.Adam
    )
    options = {"epochs": epochs, "batch_size": batch_size}
    if black is not None:
        options["transform"] = partial(augment, black=black)
    values = []
    with du.seeded(seed):
        fresh = [make_network().to(device) for _ in range(networks)]
        shuffles = torch.get_rng_state()
        content = (distilled.decode(), distilled.labels)
        train = du.Split(*(each.detach().flatten(0, 1).to(device) for each in content))
        for first in range(0, networks, at_once):
            torch.set_rng_state(shuffles)  # so that accuracies do not depend on the groups
            network = combine(fresh[first : first + at_once]).train()
            optimizer = make_optimizer(network.parameters(), lr=step_size)
            du.train(network, train, optimizer=optimizer, **options)
            if statistics is not None:
                torch.optim.swa_utils.update_bn(statistics.split(250), network)
            values.append(du.accuracy(network.eval(), split).flatten().cpu())
    return du.Accuracies(torch.cat(values))


def combine(networks: Sequence[nn.Module]) -> nn.Module:
    """The networks as one module; a single one stays as it is."""
    return du.Ensemble(networks) if len(networks) > 1 else networks[0]


def with_schedule_of(schedule: du.DistilledSet, images: Tensor, labels: Tensor) -> du.DistilledSet:
    """Other stored images and labels with the decoder and the schedule of a distilled set."""
    step_size, decoder = schedule.step_sizes.detach(), copy.deepcopy(schedule.decoder)
    return du.DistilledSet(images, labels, decoder=decoder, step_size=step_size, **schedule.inner)


def validation_accuracy(
    distilled: du.DistilledSet, dataset: du.Dataset, make_network: du.Factory, *, networks: int
) -> float:
    """The mean accuracy on validation images, to choose settings by."""
    options = {"networks": networks, "seed": du.VALIDATION_SEED}
    return du.evaluate(distilled, dataset.validation, make_network, **options).mean


def hard_labels(labels: Tensor) -> Tensor:
    """Probabilities [..., classes] as one-hot labels of the most probable classes."""
    return F.one_hot(labels.argmax(-1), labels.shape[-1]).to(labels)


def label_robust_score(
    distilled: float, distilled_hard: float, random: float, real: float
) -> tuple[float, float, float]:
    """DD-Ranking's hard label recovery, improvement over random, and label-robust score (Li et al. 2025).

    The recovery is what is missing, so less is better. DD-Ranking itself puts percentage points into the exponent;
    here they are fractions, so that the score lies in 0..1.

    Args:
        distilled: accuracy, in percent, from scratch on the distilled set.
        distilled_hard: the same with hard labels.
        random: on as many random real images with the same labels and recipe.
        real: on all real images.
    """
    recovery, improvement = real - distilled_hard, distilled - random
    alpha = (improvement - recovery) / 2 / 100
    return recovery, improvement, (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


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
