"""How sets are tested: by their learned schedule, from scratch, and beside controls of the schedule."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial

import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional as F

import distill_utils as du
from study.experiments.experiment import Experiment
from study.methods.architectures import NETWORKS

Content = tuple[str, str]  # what a set's images and labels are, in the words of the table
FIXED = "LeNet, fixed initialization"
UNDISTILLED = {"random real": "real", "k-means": "k-means"}  # as `du.initialize` calls them
SCRATCH = "from scratch by Adam"
SEEN = 96_000  # images that a network sees from scratch
SCRATCH_STEP_SIZES = (1e-3, 3e-3)  # candidates
# To distill images for training from scratch: an inner loop like it, and the outer loop.
LONG_TRAINING = {"epochs": 300, "momentum": 0.9, "soft_labels": True, "step_size": 0.01}
FOR_SCRATCH = {"batch_size": 512, "learning_rate": 0.05, "step_size_learning_rate": 0}
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
    make_network: du.Factory = du.LeNet,
    *,
    networks: Iterable[int] = range(1),
    seen: int = SEEN,
    step_size: float = 1e-3,
) -> list[nn.Module]:
    """Fresh networks, trained on images and labels alone, without the learned schedule: by Adam in shuffled minibatches
    of 64.

    Args:
        networks: a number for each; its initialization and minibatches are drawn from it.
        seen: images that a network sees, rounded to whole epochs.
        step_size: the same for all updates.

    Raises ValueError for a count or a step size that is not positive.
    """
    du.require_counts(seen=seen)
    du.require(step_size > 0, f"step_size={step_size}: give more than 0")
    content = distilled.decode(), distilled.labels
    images, labels = (part.detach().flatten(0, 1) for part in content)
    copies = max(1, 64 // len(labels))  # so that few images nearly fill a minibatch, too
    images = du.Split(images.repeat(copies, 1, 1, 1), labels.repeat(copies, 1))
    epochs, trained = scratch_epochs(distilled, seen), []
    for number in networks:
        with du.seeded(10_000, number):
            network = make_network().to(images.images.device)
            adam = torch.optim.Adam(network.parameters(), lr=step_size)
            trained.append(du.train(network, images, epochs=epochs, optimizer=adam).eval())
    return trained


def scratch_epochs(distilled: du.DistilledSet, seen: int = SEEN) -> int:
    """Epochs from scratch, in which networks see about so many images; up to 32 images are repeated in each."""
    images = distilled.labels[..., 0].numel()
    return max(1, round(seen / (images * max(1, 64 // images))))


def measure_scratch(
    experiment: Experiment,
    distilled: du.DistilledSet,
    networks: dict[str, int],
    **columns: str,
) -> None:
    """Measures what so many networks of each kind reach from scratch, by the step size with which the first of them is
    best on validation images."""
    dataset, seen = experiment.dataset, experiment.reduced(SEEN)
    with torch.no_grad():  # once for all networks
        decoded = du.DistilledSet(distilled.decode(), distilled.labels)
    for network, count in experiment.some(networks.items()):
        train = partial(train_from_scratch, decoded, NETWORKS[network], seen=seen)
        firsts = {size: train(step_size=size) for size in SCRATCH_STEP_SIZES}
        best = max(firsts, key=lambda size: du.accuracy(*firsts[size], dataset.validation))
        others = train(step_size=best, networks=range(1, experiment.reduced(count)))
        accuracies = [du.accuracy(trained, dataset.test) for trained in firsts[best] + others]
        usual = {"network": network, "training": SCRATCH, "step_sizes": "constant"}
        experiment.measure(accuracies, **usual | columns)


def neighbor_accuracy(
    images: Tensor, labels: Tensor, split: du.Split, norm: int, neighbors: int
) -> float:
    """Percentage of `split` classified correctly by its neighbors among images [steps, n, c, h, w]."""
    classifier = KNeighborsClassifier(neighbors, p=norm)
    classifier.fit(images.flatten(0, 1).flatten(1).cpu(), labels.flatten(0, 1).argmax(-1).cpu())
    return 100 * classifier.score(split.images.flatten(1).cpu(), split.labels.cpu())


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


def learn_step_sizes(
    experiment: Experiment, control: du.DistilledSet, *, iterations: int = 200
) -> du.DistilledSet:
    """A copy of the set whose step sizes, one for each update, are learned by Algorithm 1; its images stay."""
    learned = copy.deepcopy(control)
    options = {"learning_rate": 0, "step_size_learning_rate": 0.03}  # 0 keeps images and labels
    experiment.improve(learned, iterations=iterations, batch_size=128, **options)
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
