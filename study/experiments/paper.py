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
    FIXED,
    best_constant_step_size,
    learn_step_sizes,
    measure_schedule,
    neighbor_accuracy,
    schedule_controls,
    validation_accuracy,
)

SEEDS = (0, 1, 2)  # of the distillations behind the paper's main figures
ATTACKS = ((0, 1), (3, 8), (9, 4))  # the class attacked, and the one that networks should predict
PRETRAINING = {"MNIST": (1, 128), "scikit-learn digits": (15, 32)}  # epochs, batch size
SWEEPS = {  # steps, images of each class in a step, epochs
    "three epochs": [(1, 10, 3), (5, 2, 3), (10, 1, 3)],
    "thirty updates": [(1, 10, 30), (5, 2, 6), (10, 1, 3)],
    "epochs": [(10, 1, 1), (10, 1, 3), (10, 1, 5), (10, 1, 10)],
    "images": [(1, 1, 30), (2, 1, 15), (5, 1, 6), (10, 1, 3), (30, 1, 1)],
}
UPDATES = (10, 30, 50)  # that baselines choose from
BASELINES = {  # how `du.initialize` calls the images, steps
    "random real": ("real", 10),
    "k-means": ("k-means", 10),
    "class means": ("k-means", 1),
}


# ------------------------------------------------------------------ fixed and random initialization
def distill_images(
    experiment: Experiment,
    *,
    init: str = "real",
    steps: int = 10,
    per_class: int = 1,
    epochs: int = 3,
    step_size: float = 0.03,
    soft_labels: bool = False,
    optimizer: str = "SGD",
    **options,
) -> tuple[du.DistilledSet, str]:
    """Images distilled by the paper's method; returns them with their name."""
    content = {"steps": steps, "per_class": per_class, "std": 0.3, "seed": experiment.seed}
    images = du.initialize(experiment.dataset, init, **content)
    inner = {"epochs": epochs, "step_size": step_size, "optimizer": optimizer}
    distilled = du.DistilledSet(*images, soft_labels=soft_labels, **inner)
    return distilled, experiment.distill(distilled, **options)


def fixed_initialization(experiment: Experiment, **options) -> None:
    """Images for one network with fixed initial weights, tested on it and on unseen initializations."""
    distilled, name = distill_images(experiment, init="noise", learning_rate=0.02, **options)
    columns = {"network": FIXED, "networks": 1, "set": name}
    measure_schedule(experiment, distilled, experiment.make_network, **columns)
    measure_schedule(experiment, distilled, set=name)


def random_initialization(experiment: Experiment, *, networks: int, **options) -> None:
    """Images for random initializations, tested on unseen ones."""
    distilled, name = distill_images(experiment, batch_size=128, **options)
    measure_schedule(experiment, distilled, networks=networks, set=name)


# ---------------------------------------------------------------------------- undistilled baselines
def tune(
    experiment: Experiment, images: du.Pair, updates: Sequence[int]
) -> tuple[du.DistilledSet, str]:
    """Undistilled images by the paper's rule: so many updates, and one constant step size or learned ones, whichever is
    best on validation images; with how the table calls the step sizes."""
    candidates = {}
    for count in updates:
        control = du.DistilledSet(*images, epochs=count // len(images[0]))
        constant = best_constant_step_size(experiment, control)
        candidates[count, "constant"] = constant
        candidates[count, "learned"] = learn_step_sizes(experiment, constant)
    validate = partial(validation_accuracy, experiment, networks=20)
    best = max(candidates, key=lambda key: validate(candidates[key]))
    return candidates[best], best[1]


def baselines(
    experiment: Experiment, *, kinds: Sequence[str], updates: Sequence[int], networks: int
) -> None:
    """Undistilled images as the paper tunes them."""
    for images in kinds:
        kind, steps = BASELINES[images]
        pair = du.initialize(experiment.dataset, kind, steps=steps)
        control, step_sizes = tune(experiment, pair, updates)
        name = experiment.save(control, label=images.replace(" ", "-"))
        columns = {"set": name, "images": images, "step_sizes": step_sizes, "networks": networks}
        measure_schedule(experiment, control, **columns)


def random_samples(experiment: Experiment) -> None:
    """Random samples of real images, which share the tuning of the first; and the best of them on validation images."""
    seeds = experiment.some(range(50))
    sample = partial(du.initialize, experiment.dataset, "real", steps=10)
    pairs = [sample(seed=seed) for seed in seeds]
    first, step_sizes = tune(experiment, pairs[0], UPDATES)
    options = {"epochs": first.inner["epochs"], "step_size": first.step_sizes.detach()}
    samples = [du.DistilledSet(*pair, **options) for pair in pairs]
    columns = {"images": "random real", "step_sizes": step_sizes, "networks": 10}
    for number, sample in enumerate(samples[:20]):
        measure_schedule(experiment, sample, set=f"sample {number}", **columns)
    best = max(samples, key=partial(validation_accuracy, experiment, networks=10))
    columns |= {"images": "best random real", "networks": 200}
    name = experiment.save(best, label="best")
    measure_schedule(experiment, best, set=name, **columns)


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
    pretrained, held_out = (3, 3) if experiment.quick else (30, 100)
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
    *,
    network: str,
    **options,
) -> None:
    """Distills for pretrained networks and measures what others then reach on `parts` of the test images, by metric;
    images for a single network are tested on itself."""
    options |= {"dataset": dataset, "make_network": sample_network(pretrained)}
    name = experiment.distill(distilled, **options)
    if len(pretrained) == 1:
        held_out, network = pretrained, f"one {network}"
    for metric, split in parts.items():
        columns = {"set": name, "network": network, "metric": metric, "networks": len(held_out)}
        measure_schedule(experiment, distilled, in_turn(held_out), split=split, **columns)


def adaptation(experiment: Experiment, *, source: str) -> None:
    """Networks trained on one kind of digits learn another from a hundred images, in thirty updates."""
    before, after = experiment.load_dataset(source), experiment.dataset
    pretrained, held_out = pretrain(experiment, before)
    network = f"LeNet pretrained on {before.name}"
    values = [du.accuracy(each, after.test) for each in held_out]
    experiment.measure(values, images="none", network=network)

    images = du.initialize(after, "real", steps=10)
    control = du.DistilledSet(*images, epochs=3)
    real = best_constant_step_size(experiment, control, sample_network(pretrained))
    columns = {"images": "random real", "step_sizes": "constant", "network": network}
    measure_schedule(experiment, real, in_turn(held_out), networks=len(held_out), **columns)

    chosen = {"random": pretrained, **{f"fixed-{i}": pretrained[i : i + 1] for i in SEEDS}}
    for label, networks in chosen.items():
        distilled = du.DistilledSet(*images, epochs=3, step_size=0.02)
        options = {"iterations": 300, "batch_size": 128, "label": label, "network": network}
        parts = {"accuracy": after.test}
        distill_pretrained(experiment, distilled, after, parts, networks, held_out, **options)

    values = []
    for number, trained in enumerate(experiment.some(held_out[:10])):
        with du.seeded(number):
            adapted = train_fully(experiment, copy.deepcopy(trained), after)
        values.append(du.accuracy(adapted, after.test))
    experiment.measure(values, images="all real", labels="true", network=network)


def poison_labels(dataset: du.Dataset, source: int, target: int) -> du.Dataset:
    """`dataset` with the images of class `source` labelled `target`: what a data poisoning attack teaches."""
    for name, label in {"source": source, "target": target}.items():
        remedy = f"give a class, 0 to {dataset.classes - 1}"
        du.require(0 <= label < dataset.classes, f"{name}={label}: {remedy}")

    def poison(split: du.Split) -> du.Split:
        return du.Split(split.images, split.labels.where(split.labels != source, target))

    splits = {name: poison(getattr(dataset, name)) for name in ("train", "validation", "test")}
    return replace(dataset, name=f"{dataset.name}, {source} as {target}", **splits)


def attack(experiment: Experiment) -> None:
    """A hundred images that make a well-trained network predict one class for another after a single update."""
    mnist, network = experiment.dataset, "LeNet pretrained on MNIST"
    pretrained, held_out = pretrain(experiment, mnist)
    for source, target in ATTACKS:
        name, poisoned = f"{source}-as-{target}", poison_labels(mnist, source, target)
        attacked = mnist.test.labels == source
        parts = {
            "success": du.Split(*(part[attacked] for part in poisoned.test)),
            "accuracy on other classes": du.Split(*(part[~attacked] for part in poisoned.test)),
        }
        for metric, split in parts.items():
            values = [du.accuracy(each, split) for each in held_out]
            columns = {"set": f"attack-{name}", "images": "none", "metric": metric}
            experiment.measure(values, network=network, **columns)
        images = du.initialize(mnist, "real", steps=1, per_class=10)
        options = {"learning_rate": 0.1, "step_size_learning_rate": 0.03, "network": network}
        options |= {"iterations": 1000, "batch_size": 128}
        for label, networks in {"random": pretrained, "fixed": pretrained[:1]}.items():
            distilled = du.DistilledSet(*images, step_size=0.1)
            options |= {"label": f"{name}-{label}", "networks": min(2, len(networks))}
            distill_pretrained(
                experiment, distilled, poisoned, parts, networks, held_out, **options
            )


# --------------------------------------------------------------------------------------- experiments
def sweep_name(steps: int, per_class: int, epochs: int) -> str:
    return f"sweep-{steps}x{10 * per_class}x{epochs}"


def sweep(steps: int, per_class: int, epochs: int) -> Recipe:
    """Another number of steps, images or epochs, with fewer iterations."""
    options = {"steps": steps, "per_class": per_class, "epochs": epochs}
    return Recipe(partial(random_initialization, iterations=200, networks=100, **options))


TEN = partial(fixed_initialization, steps=1, iterations=16_000, step_size=0.15)
HUNDRED = partial(random_initialization, iterations=800, networks=200)
SOFT = dict(init="k-means", soft_labels=True, optimizer="Adam", step_size=0.003, iterations=4000)
CENTERS = ("k-means", "class means")
EXPERIMENTS = {
    "fixed-10": Recipe(TEN, SEEDS),
    "fixed-10-soft-labels": Recipe(partial(TEN, soft_labels=True), SEEDS),
    "fixed-100": Recipe(partial(fixed_initialization, iterations=1500), SEEDS),
    "random-noise": Recipe(partial(HUNDRED, init="noise"), SEEDS),
    "random-real": Recipe(HUNDRED, SEEDS),
    "mnist-ipc10-30updates": Recipe(partial(HUNDRED, **SOFT), SEEDS),
    "random-real-5-epochs": Recipe(partial(HUNDRED, epochs=5)),
    "attack": Recipe(attack),
    "adapt-digits-to-mnist": Recipe(partial(adaptation, source="digits")),
    "adapt-mnist-to-digits": Recipe(partial(adaptation, source="MNIST")),
    "baselines": Recipe(partial(baselines, kinds=CENTERS, updates=UPDATES, networks=200)),
    "longer-baselines": Recipe(partial(baselines, kinds=BASELINES, updates=(100,), networks=100)),
    "random-samples": Recipe(random_samples),
    "controls-fixed-10": Recipe(schedule_controls, SEEDS, needs="fixed-10"),
    "controls-random-noise": Recipe(schedule_controls, needs="random-noise"),
    "controls-mnist-ipc10-30updates": Recipe(schedule_controls, needs="mnist-ipc10-30updates"),
    "nearest-neighbors": Recipe(nearest_neighbors),
    **{sweep_name(*point): sweep(*point) for points in SWEEPS.values() for point in points},
}
