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
DISTILLED = (
    "distilled",
    "true",
    "distilled",
)  # images, labels and step sizes of a set, in the words of the table
FIXED = "LeNet, fixed initialization"
UNDISTILLED = {"random real": "real", "k-means": "k-means"}  # as `du.initialize` calls them
SCRATCH = "from scratch by Adam"
SEEN = 96_000  # images that a network sees from scratch
SCRATCH_STEP_SIZES = (1e-3, 3e-3)  # candidates
STEP_SIZES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)  # candidates for a constant one


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
class Controls:
    """Undistilled images trained on like a distilled set, with step sizes that are chosen on validation images.

    Args:
        experiment: whose controls they are.
        dataset: what they teach, by default the experiment's.
        make_network: whom they teach.
    """

    def __init__(
        self,
        experiment: Experiment,
        dataset: du.Dataset | None = None,
        make_network: du.Factory = du.LeNet,
    ) -> None:
        self.experiment, self.make_network = experiment, make_network
        self.dataset = dataset or experiment.dataset

    def validate(self, control: du.DistilledSet) -> float:
        """The mean accuracy on validation images."""
        options = {"networks": self.experiment.reduced(10), "seed": du.VALIDATION_SEED}
        return du.evaluate(control, self.dataset.validation, self.make_network, **options).mean

    def with_constant_step_size(self, control: du.DistilledSet) -> du.DistilledSet:
        """A copy of the set with the one of STEP_SIZES that has the best validation accuracy."""
        candidates = self.experiment.some(STEP_SIZES)
        options = {"networks": self.experiment.reduced(5), "step_sizes": candidates}
        return du.best_constant_step_size(control, self.dataset, self.make_network, **options)

    def with_learned_step_sizes(
        self, control: du.DistilledSet, *, iterations: int
    ) -> du.DistilledSet:
        """A copy of the set whose step sizes, one for each update, are learned by Algorithm 1; its images stay."""
        learned = copy.deepcopy(control)
        options = {"dataset": self.dataset, "make_network": self.make_network, "batch_size": 128}
        rates = {"learning_rate": 0, "step_size_learning_rate": 0.03}  # 0 keeps images and labels
        self.experiment.improve(learned, iterations=iterations, **options, **rates)
        return learned

    def choose(
        self, sets: dict[Content, du.DistilledSet], schedule: du.DistilledSet, *, iterations: int
    ) -> dict[tuple[str, str, str], du.DistilledSet]:
        """Undistilled sets with several schedules, by images, labels and step sizes.

        Every set gets its best constant step size. The best of them also borrows the step sizes of the distilled set
        `schedule`, and learns step sizes of its own for so many iterations, from whichever of the two is better.
        """
        constant = {key: self.with_constant_step_size(control) for key, control in sets.items()}
        best = max(constant, key=lambda content: self.validate(constant[content]))
        borrowed = copy.deepcopy(constant[best]).set_step_sizes(schedule.step_sizes)
        start = max(constant[best], borrowed, key=self.validate)
        learned = self.with_learned_step_sizes(start, iterations=iterations)
        chosen = {(*content, "constant"): control for content, control in constant.items()}
        return chosen | {(*best, "distilled"): borrowed, (*best, "learned"): learned}


def undistilled_sets(
    distilled: du.DistilledSet, dataset: du.Dataset
) -> dict[Content, du.DistilledSet]:
    """Undistilled images with true labels, as many as a distilled set has and with its schedule, by what they are."""
    (steps, n, classes), sets = distilled.labels.shape, {}
    options = {"step_size": distilled.step_sizes.detach(), **distilled.inner}
    for title, kind in UNDISTILLED.items():
        pair = du.initialize(dataset, kind, steps=steps, per_class=n // classes)
        sets[title, "true"] = du.DistilledSet(*pair, **options)
    return sets


def hard_labels(labels: Tensor) -> Tensor:
    """Probabilities [..., classes] as one-hot labels of the most probable classes."""
    return F.one_hot(labels.argmax(-1), labels.shape[-1]).to(labels)
