"""How sets are tested: by their learned schedule, from scratch, and beside controls of the schedule."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import distill_utils as du
from study.experiments.experiment import Experiment
from study.methods.architectures import TESTED_ON, ConvNet
from study.methods.decoders import augment

Content = tuple[str, str]  # what a set's images and labels are, in the words of the table
NETWORKS = {**TESTED_ON, "ConvNet-3": ConvNet}
FIXED = "LeNet, fixed initialization"
UNDISTILLED = {"random real": "real", "k-means": "k-means"}  # as `du.initialize` calls them
SCRATCH, ADAM = "from scratch", "from scratch by Adam"  # training, and how it varies
AUGMENTED, REAL_STATISTICS = ", augmented", ", real statistics"
STEP_SIZES = {  # candidates for a constant one
    "SGD": (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3),
    "Adam": (0.0003, 0.0006, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03),
}
SMOOTHING = (0.1, 0.3)  # candidates where the labels of the distilled set are free, too


# ---------------------------------------------------------------------------------- learned schedules
def training(distilled: du.DistilledSet) -> str:
    """The learned schedule of a set in the words of the table."""
    return f"{distilled.updates} updates of {distilled.inner['optimizer']}"


def measure_schedule(
    experiment: Experiment,
    distilled: du.DistilledSet,
    make_network: du.Factory = du.LeNet,
    *,
    split: du.Split | None = None,
    networks: int = 100,
    **columns: str,
) -> None:
    """Measures what networks reach by the schedule of a set, by default on all test images; `columns` tell how it
    differs from a set whose images and step sizes are distilled."""
    usual = {"images": "distilled", "labels": "true", "step_sizes": "distilled"}
    if hasattr(distilled, "label_scores"):
        usual["labels"] = "distilled"
    split, networks = split or experiment.dataset.test, experiment.reduced(networks)
    accuracies = du.evaluate(distilled, split, make_network, networks=networks)
    usual["training"] = training(distilled)
    experiment.measure(accuracies.values, **usual | columns)


# ---------------------------------------------------------------------------------------- from scratch
def train_from_scratch(
    distilled: du.DistilledSet,
    split: du.Split,
    make_network: du.Factory = du.LeNet,
    *,
    networks: int = 10,
    epochs: int = 300,
    batch_size: int = 256,
    step_size: float = 0.01,
    optimizer: str = "SGD",
    black: float | None = None,
    statistics: Tensor | None = None,
    seed: int = 10_000,
) -> du.Accuracies:
    """Accuracies on `split` of fresh networks trained on images and labels alone, without the learned schedule.

    The defaults are the protocol of dataset condensation (Zhao et al. 2021) without its augmentation, weight decay and
    drop of the step size. Networks may have batch normalization and dropout.

    Args:
        networks: initializations, all drawn from `seed` before any of them is trained.
        step_size: the same for all updates.
        optimizer: "SGD", with momentum 0.9, or "Adam".
        black: turn, shift and scale each image anew in every update; what moves in has this value.
        statistics: images [n, c, h, w] that batch normalization takes its statistics from after training.

    Raises ValueError for a count or a step size that is not positive, and for another optimizer.
    """
    du.require_counts(networks=networks, epochs=epochs, batch_size=batch_size)
    du.require(step_size > 0, f"step_size={step_size}: give more than 0")
    kinds = {"SGD": partial(torch.optim.SGD, momentum=0.9), "Adam": torch.optim.Adam}
    du.require(optimizer in kinds, f"optimizer={optimizer!r}: give SGD or Adam")
    options = {"epochs": epochs, "batch_size": batch_size}
    if black is not None:
        options["transform"] = partial(augment, black=black)
    device, values = split.images.device, []
    content = (distilled.decode(), distilled.labels)
    images = du.Split(*(part.detach().flatten(0, 1).to(device) for part in content))
    with du.seeded(seed):
        fresh = [make_network().to(device) for _ in range(networks)]
        shuffles = torch.get_rng_state()
        for network in fresh:
            torch.set_rng_state(shuffles)  # all networks see the images in the same order
            steps = kinds[optimizer](network.parameters(), lr=step_size)
            du.train(network.train(), images, optimizer=steps, **options)
            if statistics is not None:
                torch.optim.swa_utils.update_bn(statistics.split(250), network)
            values.append(du.accuracy(network.eval(), split).cpu())
    return du.Accuracies(torch.stack(values))


@dataclass(frozen=True)
class Scratch:
    """Training from scratch: networks tested, step sizes to choose from on validation images, and the images that each
    network sees by Adam; without their number, it is SGD for 300 epochs."""

    networks: int
    step_sizes: tuple[float, ...] = (0.01,)
    seen: int | None = None


def measure_scratch(
    experiment: Experiment,
    sets: dict[Content, du.DistilledSet],
    networks: dict[str, Scratch],
    variant: str = "",
    **columns: str,
) -> None:
    """Measures what networks reach from scratch on each of several sets, plain, augmented or with real statistics."""
    dataset, variants = experiment.dataset, {}
    if variant == AUGMENTED:
        variants = {"black": float(dataset.train.images.min())}
    elif variant == REAL_STATISTICS:
        variants = {"statistics": dataset.train.images[:2500]}
    pairs = itertools.product(experiment.some(networks.items()), sets.items())
    for (network, scratch), ((images, labels), distilled) in pairs:
        options = {"epochs": experiment.reduced(300), "make_network": NETWORKS[network], **variants}
        if scratch.seen:
            epochs = round(experiment.reduced(scratch.seen) / distilled.labels[..., 0].numel())
            options |= {"optimizer": "Adam", "batch_size": 64, "epochs": max(1, epochs)}
        train = partial(train_from_scratch, distilled, **options)
        choose = partial(train, dataset.validation, networks=1, seed=du.VALIDATION_SEED)
        (best, *others) = scratch.step_sizes
        if others:
            best = max(scratch.step_sizes, key=lambda size: choose(step_size=size).mean)
        options = {"networks": experiment.reduced(scratch.networks), "step_size": best}
        columns |= {"network": network, "training": (ADAM if scratch.seen else SCRATCH) + variant}
        columns |= {"images": images, "labels": labels, "step_sizes": "constant"}
        experiment.measure(train(dataset.test, **options).values, **columns)


# --------------------------------------------------------------------------------- controls of a schedule
def validation_accuracy(
    experiment: Experiment, distilled: du.DistilledSet, *, networks: int = 5
) -> float:
    """The mean accuracy on validation images, to choose settings by."""
    options = {"networks": experiment.reduced(networks), "seed": du.VALIDATION_SEED}
    validation, make_network = experiment.dataset.validation, experiment.make_network
    return du.evaluate(distilled, validation, make_network, **options).mean


def best_constant_step_size(
    experiment: Experiment, control: du.DistilledSet, make_network: du.Factory | None = None
) -> du.DistilledSet:
    """A copy of the set with the one of STEP_SIZES that has the best validation accuracy."""
    candidates = experiment.some(STEP_SIZES[control.inner["optimizer"]])
    options = {"networks": experiment.reduced(5), "step_sizes": candidates}
    options["make_network"] = make_network or experiment.make_network
    return du.best_constant_step_size(control, experiment.dataset, **options)


def learn_step_sizes(experiment: Experiment, control: du.DistilledSet) -> du.DistilledSet:
    """A copy of the set whose step sizes, one for each update, are learned by Algorithm 1; its images stay."""
    learned = copy.deepcopy(control)
    options = {"learning_rate": 0, "step_size_learning_rate": 0.03}  # 0 keeps images and labels
    experiment.improve(learned, iterations=200, batch_size=128, **options)
    return learned


def with_schedule_of(schedule: du.DistilledSet, images: Tensor, labels: Tensor) -> du.DistilledSet:
    """Other stored images and labels with the decoder and the schedule of a distilled set."""
    options = {"step_size": schedule.step_sizes.detach(), "bits": schedule.bits}
    decoder = copy.deepcopy(schedule.decoder)
    return du.DistilledSet(images, labels, decoder=decoder, **options, **schedule.inner)


def undistilled_sets(distilled: du.DistilledSet, dataset: du.Dataset) -> dict[str, du.DistilledSet]:
    """Undistilled images with true labels, as many as a set has, in its parametrization and with its schedule, by what
    they are."""
    (steps, n, classes), sets = distilled.labels.shape, {}
    for title, kind in UNDISTILLED.items():
        images, labels = du.initialize(dataset, kind, steps=steps, per_class=n // classes)
        if isinstance(distilled.decoder, du.MultiFormation):
            images = distilled.decoder.pack(images)
        sets[title] = with_schedule_of(distilled, images, labels)
    return sets


def label_kinds(distilled: du.DistilledSet, labels: Tensor) -> dict[str, Tensor]:
    """True labels [steps, n, classes]; where the set has learned its own, also smoothed ones and those of the set."""
    kinds = {"true": labels}
    if distilled.labels.max(-1).values.min() < 1:
        uniform = 1 / labels.shape[-1]
        for share in SMOOTHING:
            kinds[f"smoothed by {share}"] = (1 - share) * labels + share * uniform
        kinds["distilled"] = distilled.labels.detach()
    return kinds


def hard_labels(labels: Tensor) -> Tensor:
    """Probabilities [..., classes] as one-hot labels of the most probable classes."""
    return F.one_hot(labels.argmax(-1), labels.shape[-1]).to(labels)


def schedule_controls(experiment: Experiment) -> None:
    """Undistilled images in place of those of the set whose controls they are, by as many updates."""
    name = experiment.name.removeprefix("controls-")
    name += f"-seed{experiment.seed}" * (experiment.seed > 0)
    distilled = experiment.load(name)
    for images, control in undistilled_sets(distilled, experiment.dataset).items():
        kinds = label_kinds(distilled, control.labels)
        compare_schedules(experiment, distilled, control, kinds, images=images, set=name)


def compare_schedules(
    experiment: Experiment,
    distilled: du.DistilledSet,
    control: du.DistilledSet,
    kinds: dict[str, Tensor],
    **columns: str,
) -> None:
    """Measures control images with several `kinds` of labels, by as many updates as the distilled set.

    Every kind of labels gets its best constant step size. The kind that is best on validation images is then tested
    with step sizes learned for these very images by the same outer loop, and with those of the distilled set.
    """
    sets = {}
    for kind, labels in kinds.items():
        undistilled = with_schedule_of(control, control.images, labels)
        sets["constant", kind] = best_constant_step_size(experiment, undistilled)
    constant, best = max(sets, key=lambda key: validation_accuracy(experiment, sets[key]))
    images = sets[constant, best]
    sets["learned", best] = learn_step_sizes(experiment, images)
    sets["distilled", best] = copy.deepcopy(images).set_step_sizes(distilled.step_sizes)
    network = {"network": FIXED, "networks": 1} if experiment.fixed else {"networks": 50}
    for (step_sizes, labels), images in sets.items():
        columns |= {"labels": labels, "step_sizes": step_sizes, **network}
        measure_schedule(experiment, images, experiment.make_network, **columns)
