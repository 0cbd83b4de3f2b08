"""The experiments of the paper (arXiv 1811.10959) with LeNet on MNIST, and on scikit-learn's digits in place of USPS.

Settings were chosen on validation images. Every accuracy is one of test images, taken when an experiment ends.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import distill_utils as du
from study.experiments.experiment import Experiment, Recipe
from study.experiments.protocols import (
    DISTILLED,
    FIXED,
    Content,
    Controls,
    measure_schedule,
    neighbor_accuracy,
    undistilled_sets,
)

SEEDS = (0, 1, 2)  # of the distillations behind the paper's main figures
ATTACKS = ((0, 1), (9, 4))  # the class attacked, and the one that networks should predict
PRETRAINING = {"MNIST": (1, 128), "scikit-learn digits": (15, 32)}  # epochs, batch size
ITERATIONS = 800  # of distillation for random initializations, and of learning step sizes
UPDATES = (10, 30, 50)  # that baselines choose from


# ------------------------------------------------------------------ fixed and random initialization
def distill_images(
    experiment: Experiment,
    *,
    iterations: int,
    fixed: bool = False,
    controls: bool = False,
    init: str = "real",
    steps: int = 10,
    step_size: float = 0.03,
    **options,
) -> None:
    """Images distilled by the paper's method, one of each class in a step, for three epochs; tested on unseen random
    initializations.

    Args:
        iterations: of distillation, and of learning step sizes for the controls.
        fixed: distills for one network with fixed initial weights, and tests on it, too.
        controls: tests undistilled images beside them, on the networks that they are made for.
        options: of `du.Distillation`.
    """
    content = {"steps": steps, "std": 0.3, "seed": experiment.seed}
    images = du.initialize(experiment.dataset, init, **content)
    distilled = du.DistilledSet(*images, epochs=3, step_size=step_size)
    network = {"make_network": du.LeNet}
    if fixed:
        network = {"make_network": du.fixed_initialization(du.LeNet, seed=experiment.seed)}
    name = experiment.distill(distilled, iterations=iterations, **network, **options)
    measure_schedule(experiment, distilled, set=name)
    if fixed:
        network |= {"network": FIXED, "networks": 1}
        measure_schedule(experiment, distilled, set=name, **network)
    if controls:
        chosen = Controls(experiment, make_network=network["make_network"]).choose(
            undistilled_sets(distilled, experiment.dataset), distilled, iterations=iterations
        )
        measure_all(experiment, chosen, set=name, **network)


def measure_all(
    experiment: Experiment, sets: dict[tuple[str, str, str], du.DistilledSet], **columns
) -> None:
    """Measures sets by images, labels and step sizes."""
    for content, distilled in sets.items():
        what = dict(zip(("images", "labels", "step_sizes"), content, strict=True))
        measure_schedule(experiment, distilled, **what, **columns)


# ---------------------------------------------------------------------------- undistilled baselines
def tune(experiment: Experiment, images: du.Pair) -> tuple[du.DistilledSet, str]:
    """Undistilled images by the paper's rule: as many updates and the constant step size that are best on validation
    images, or step sizes that are learned from there, if they are better; with how the table calls the step sizes."""
    controls, steps = Controls(experiment), len(images[0])
    sets = (du.DistilledSet(*images, epochs=count // steps) for count in UPDATES)
    constant = max(map(controls.with_constant_step_size, sets), key=controls.validate)
    learned = controls.with_learned_step_sizes(constant, iterations=ITERATIONS)
    candidates = (constant, "constant"), (learned, "learned")
    return max(candidates, key=lambda candidate: controls.validate(candidate[0]))


def baselines(experiment: Experiment) -> None:
    """Centers of the real images as the paper tunes them."""
    for images, steps in {"k-means": 10, "class means": 1}.items():
        pair = du.initialize(experiment.dataset, "k-means", steps=steps)
        control, step_sizes = tune(experiment, pair)
        name = experiment.save(control, label=images.replace(" ", "-"))
        columns = {"set": name, "images": images, "step_sizes": step_sizes}
        measure_schedule(experiment, control, **columns)


def random_samples(experiment: Experiment) -> None:
    """Random samples of real images, which share the tuning of the first; and the best of them on validation images."""
    sample = partial(du.initialize, experiment.dataset, "real", steps=10)
    pairs = [sample(seed=seed) for seed in experiment.some(range(50))]
    first, step_sizes = tune(experiment, pairs[0])
    options = {"epochs": first.inner["epochs"], "step_size": first.step_sizes.detach()}
    samples = [du.DistilledSet(*pair, **options) for pair in pairs]
    columns = {"images": "random real", "step_sizes": step_sizes}
    for number, sample in enumerate(samples[:20]):
        measure_schedule(experiment, sample, set=f"sample {number}", networks=10, **columns)
    best = max(samples, key=Controls(experiment).validate)
    columns |= {"images": "best random real", "set": experiment.save(best, label="best")}
    measure_schedule(experiment, best, **columns)


def nearest_neighbors(experiment: Experiment) -> None:
    """No network: each image gets the label of its nearest neighbors among a hundred."""
    mnist, columns = experiment.dataset, {"labels": "true", "network": "nearest neighbors"}
    for title, kind, count in (("random real", "real", 20), ("k-means", "k-means", 5)):
        seeds = experiment.some(range(count))
        samples = [du.initialize(mnist, kind, steps=10, seed=seed) for seed in seeds]
        validate = partial(neighbor_accuracy, *samples[0], mnist.validation)
        choice = max(itertools.product((1, 2), (1, 3)), key=lambda choice: validate(*choice))
        values = [neighbor_accuracy(*sample, mnist.test, *choice) for sample in samples]
        experiment.measure(values, images=title, **columns)


# ------------------------------------------------------------------------------ pretrained networks
def sample_network(networks: Sequence[nn.Module]) -> du.Factory:
    """A factory that returns a copy of one of `networks` at random: the paper's random pretrained weights."""
    du.require(len(networks) > 0, "networks: none given; give at least one")
    return lambda: copy.deepcopy(networks[int(torch.randint(len(networks), ()))])


def in_turn(networks: Sequence[nn.Module]) -> du.Factory:
    """A factory that returns copies of `networks`, one after the other and then from the first again."""
    return map(copy.deepcopy, itertools.cycle(networks)).__next__


def train_fully(experiment: Experiment, network: nn.Module, dataset: du.Dataset) -> nn.Module:
    """The network, trained in place on all real images."""
    epochs, batch_size = PRETRAINING[dataset.name]
    epochs = experiment.reduced(epochs)
    return du.train(network, dataset.train, epochs=epochs, batch_size=batch_size)


def pretrain(
    experiment: Experiment, dataset: du.Dataset
) -> tuple[list[nn.Module], list[nn.Module]]:
    """LeNets trained on `dataset`, some to distill for and others held out."""
    pretrained, held_out = (3, 3) if experiment.quick else (20, 30)
    device, networks = experiment.device, []
    for number in range(pretrained + held_out):
        path = experiment.checkpoints / f"network-{number}.pt"  # kept one by one
        if not path.exists():
            with du.seeded(number):
                network = train_fully(experiment, du.LeNet().to(device), dataset)
            with du.replacing(path) as unfinished:
                torch.save(network, unfinished)
        networks.append(torch.load(path, map_location=device, weights_only=False))
    return networks[:pretrained], networks[pretrained:]


def distill_pretrained(
    experiment: Experiment,
    distilled: du.DistilledSet,
    dataset: du.Dataset,
    parts: dict[str, du.Split],
    pretrained: Sequence[nn.Module],
    held_out: Sequence[nn.Module],
    controls: dict[Content, du.DistilledSet],
    *,
    network: str,
    iterations: int,
    **options,
) -> None:
    """Distills for pretrained networks and measures what others then reach on `parts` of the test images, by metric;
    beside them, controls that teach the same."""
    task = {"dataset": dataset, "make_network": sample_network(pretrained)}
    name = experiment.distill(distilled, iterations=iterations, batch_size=128, **task, **options)
    sets = Controls(experiment, **task).choose(controls, distilled, iterations=iterations)
    sets[DISTILLED] = distilled
    columns = {"set": name, "network": network, "networks": len(held_out)}
    for metric, split in parts.items():
        options = {"make_network": in_turn(held_out), "split": split, "metric": metric}
        measure_all(experiment, sets, **options, **columns)


def adaptation(experiment: Experiment) -> None:
    """Networks trained on scikit-learn's digits learn MNIST from a hundred images, in thirty updates."""
    before, after = du.load_digits(device=experiment.device), experiment.dataset
    pretrained, held_out = pretrain(experiment, before)
    columns = {"network": f"LeNet pretrained on {before.name}"}
    values = [du.accuracy(network, after.test) for network in held_out]
    experiment.measure(values, images="none", **columns)

    images = du.initialize(after, "real", steps=10)
    distilled = du.DistilledSet(*images, epochs=3, step_size=0.02)
    parts, controls = {"accuracy": after.test}, undistilled_sets(distilled, after)
    task = experiment, distilled, after, parts, pretrained, held_out, controls
    distill_pretrained(*task, iterations=300, **columns)

    values = []
    for number, trained in enumerate(experiment.some(held_out[:10])):
        with du.seeded(number):
            adapted = train_fully(experiment, copy.deepcopy(trained), after)
        values.append(du.accuracy(adapted, after.test))
    experiment.measure(values, images="all real", labels="true", **columns)


def poison_labels(dataset: du.Dataset, source: int, target: int) -> du.Dataset:
    """`dataset` with the images of class `source` labelled `target`: what a data poisoning attack teaches."""
    for name, label in {"source": source, "target": target}.items():
        remedy = f"give a class, 0 to {dataset.classes - 1}"
        du.require(0 <= label < dataset.classes, f"{name}={label}: {remedy}")

    def poison(split: du.Split) -> du.Split:
        return du.Split(split.images, split.labels.where(split.labels != source, target))

    splits = {name: poison(getattr(dataset, name)) for name in ("train", "validation", "test")}
    return replace(dataset, name=f"{dataset.name}, {source} as {target}", **splits)


def poison_set(control: du.DistilledSet, source: int, target: int) -> du.DistilledSet:
    """A set with true labels whose images of class `source` are labelled `target`."""
    labels = control.labels.detach().clone()
    labels[..., target] += labels[..., source]
    labels[..., source] = 0
    return du.DistilledSet(control.images.detach(), labels, **control.inner)


def attack(experiment: Experiment) -> None:
    """A hundred images that make a well-trained network predict one class for another after a single update."""
    mnist, columns = experiment.dataset, {"network": "LeNet pretrained on MNIST"}
    pretrained, held_out = pretrain(experiment, mnist)
    images = du.initialize(mnist, "real", steps=1, per_class=10)
    for source, target in ATTACKS:
        name, poisoned = f"{source}-as-{target}", poison_labels(mnist, source, target)
        attacked = mnist.test.labels == source
        parts = {
            "success": du.Split(*(part[attacked] for part in poisoned.test)),
            "accuracy on other classes": du.Split(*(part[~attacked] for part in poisoned.test)),
        }
        for metric, split in parts.items():
            values = [du.accuracy(network, split) for network in held_out]
            experiment.measure(
                values, images="none", metric=metric, set=f"attack-{name}", **columns
            )
        distilled = du.DistilledSet(*images, step_size=0.1)
        controls = {
            (content[0], "poisoned"): poison_set(control, source, target)
            for content, control in undistilled_sets(distilled, mnist).items()
        }
        options = {"learning_rate": 0.1, "step_size_learning_rate": 0.03, "networks": 2}
        options |= {"iterations": 1000, "label": name, **columns}
        task = experiment, distilled, poisoned, parts, pretrained, held_out, controls
        distill_pretrained(*task, **options)


# --------------------------------------------------------------------------------------- experiments
FIXED_NOISE = partial(distill_images, fixed=True, init="noise", learning_rate=0.02)
HUNDRED = partial(distill_images, iterations=ITERATIONS, batch_size=128)
TEN = partial(FIXED_NOISE, steps=1, iterations=16_000, step_size=0.15, controls=True)
EXPERIMENTS = {
    "fixed-10": Recipe(TEN, SEEDS),
    "fixed-100": Recipe(partial(FIXED_NOISE, iterations=1500), SEEDS),
    "random-noise": Recipe(partial(HUNDRED, init="noise", controls=True), SEEDS),
    "random-real": Recipe(HUNDRED, SEEDS),
    "attack": Recipe(attack),
    "adapt-digits-to-mnist": Recipe(adaptation),
    "baselines": Recipe(baselines),
    "random-samples": Recipe(random_samples),
    "nearest-neighbors": Recipe(nearest_neighbors),
}
