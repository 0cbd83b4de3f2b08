"""How sets are tested: from scratch, by Adam with its best step size, and beside controls of a learned schedule."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import distill_utils as du
from study.experiments.experiment import Experiment
from study.methods.decoders import augment

UNDISTILLED = {
    "random real": "real",
    "k-means": "k-means",
}  # images, and how `du.initialize` calls them
SCRATCH, ADAM, AUGMENTED = (
    "from scratch",
    "from scratch by Adam",
    ", augmented",
)  # kinds of training
STEP_SIZES = {  # candidates for a constant one
    "SGD": (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3),
    "Adam": (0.0003, 0.0006, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03),
}
SMOOTHING = (0.1, 0.3)  # candidates where the labels of the distilled set are free, too
Content = tuple[str, str]  # what a set's images and labels are, in the words of the table
Sets = Mapping[Content, du.DistilledSet]


# ------------------------------------------------------------------------------------------ from scratch
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
        epochs: passes over the images.
        batch_size: images in an update.
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
class Adam:
    """Training from scratch by Adam: step sizes to choose from, networks tested, images that each sees in training."""

    step_sizes: tuple[float, ...] = (1e-3, 3e-3)
    networks: int = 3
    seen: int = 64_000


def train_by_adam(
    experiment: Experiment,
    dataset: du.Dataset,
    distilled: du.DistilledSet,
    make_network: du.Factory,
    adam: Adam,
    **options,
) -> du.Accuracies:
    """Test accuracies of networks trained on a set with the step size that is best on validation images."""
    epochs = round(experiment.reduced(adam.seen) / distilled.labels[..., 0].numel())
    options |= {"optimizer": "Adam", "batch_size": 64, "epochs": max(1, epochs)}
    train = partial(train_from_scratch, distilled, make_network=make_network, **options)
    choose = partial(train, dataset.validation, networks=1, seed=du.VALIDATION_SEED)
    best = max(adam.step_sizes, key=lambda step_size: choose(step_size=step_size).mean)
    return train(dataset.test, networks=experiment.reduced(adam.networks), step_size=best)


# --------------------------------------------------------------------------------- controls of a schedule
def validation_accuracy(
    distilled: du.DistilledSet, dataset: du.Dataset, make_network: du.Factory, *, networks: int
) -> float:
    """The mean accuracy on validation images, to choose settings by."""
    options = {"networks": networks, "seed": du.VALIDATION_SEED}
    return du.evaluate(distilled, dataset.validation, make_network, **options).mean


def with_schedule_of(schedule: du.DistilledSet, images: Tensor, labels: Tensor) -> du.DistilledSet:
    """Other stored images and labels with the decoder and the schedule of a distilled set."""
    step_size, decoder = schedule.step_sizes.detach(), copy.deepcopy(schedule.decoder)
    return du.DistilledSet(images, labels, decoder=decoder, step_size=step_size, **schedule.inner)


def undistilled_set(distilled: du.DistilledSet, images: Tensor, labels: Tensor) -> du.DistilledSet:
    """Images of full size and their labels, in the parametrization and with the schedule of a distilled set."""
    packs = isinstance(distilled.decoder, du.MultiFormation)
    return with_schedule_of(distilled, distilled.decoder.pack(images) if packs else images, labels)


def undistilled_sets(distilled: du.DistilledSet, dataset: du.Dataset) -> dict[str, du.DistilledSet]:
    """Undistilled images with true labels, as many as a set has and in its parametrization, by what they are."""
    steps, n, classes = distilled.labels.shape
    options = {"steps": steps, "per_class": n // classes}
    return {
        images: undistilled_set(distilled, *du.initialize(dataset, kind, **options))
        for images, kind in UNDISTILLED.items()
    }


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


def schedule_controls(
    experiment: Experiment,
    name: str,
    dataset: du.Dataset,
    make_network: du.Factory = du.LeNet,
    *,
    networks: int = 50,
    **columns: str,
) -> None:
    """Measures undistilled images in place of those of the set of that name, by as many updates."""
    distilled = experiment.load(name)
    for images, control in undistilled_sets(distilled, dataset).items():
        kinds = label_kinds(distilled, control.labels).items()
        sets = {
            label: with_schedule_of(distilled, control.images, values) for label, values in kinds
        }
        options = {"networks": networks, "images": images, "set": name, **columns}
        compare_schedules(experiment, dataset, distilled, sets, make_network, **options)


def compare_schedules(
    experiment: Experiment,
    dataset: du.Dataset,
    distilled: du.DistilledSet,
    sets: dict[str, du.DistilledSet],
    make_network: du.Factory,
    *,
    networks: int,
    **columns: str,
) -> None:
    """Measures control images with each of several kinds of labels, by as many updates as the distilled set.

    Every kind of labels gets its best constant step size. The kind that is best on validation images is then tested
    with step sizes learned for these very images by the same outer loop, and with those of the distilled set.
    """
    candidates = experiment.some(STEP_SIZES[distilled.inner["optimizer"]])
    networks = experiment.reduced(networks)
    columns["training"] = training(distilled)
    options = {"make_network": make_network, "networks": experiment.reduced(5), "dataset": dataset}
    choose = partial(du.best_constant_step_size, step_sizes=candidates, **options)
    constant = {label: choose(control) for label, control in sets.items()}
    validate = partial(validation_accuracy, **options)
    best = max(constant, key=lambda label: validate(constant[label]))
    controls = [("constant", label, control) for label, control in constant.items()]
    controls.append(
        ("learned", best, learn_step_sizes(experiment, dataset, constant[best], make_network))
    )
    borrowed = copy.deepcopy(constant[best]).set_step_sizes(distilled.step_sizes)
    controls.append(("distilled", best, borrowed))
    for step_sizes, label, control in controls:
        accuracies = du.evaluate(control, dataset.test, make_network, networks=networks)
        experiment.measure(accuracies.values, labels=label, step_sizes=step_sizes, **columns)


def learn_step_sizes(
    experiment: Experiment,
    dataset: du.Dataset,
    undistilled: du.DistilledSet,
    make_network: du.Factory,
) -> du.DistilledSet:
    """A copy of the set whose step sizes, one for each update, are learned by Algorithm 1; its images stay."""
    learned = copy.deepcopy(undistilled)
    options = {"learning_rate": 0, "step_size_learning_rate": 0.03}  # 0 keeps images and labels
    options |= {"batch_size": 128, "validation_networks": 1, "progress": False}
    iterations = experiment.reduced(200)
    du.distill(learned, dataset, make_network, iterations=iterations, **options)
    return learned


def training(distilled: du.DistilledSet) -> str:
    """The learned schedule of a set in the words of the table."""
    return f"{distilled.updates} updates of {distilled.inner['optimizer']}"
