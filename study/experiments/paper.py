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
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import distill_utils as du
from study.experiments.experiment import Experiment, Recipe
from study.experiments.protocols import (
    STEP_SIZES,
    learn_step_sizes,
    schedule_controls,
    training,
    validation_accuracy,
)

SEEDS = (0, 1, 2)  # of the distillations behind the paper's main figures
FIXED = "LeNet, fixed initialization"
INITIALIZATIONS = {
    "Xavier normal": nn.init.xavier_normal_,
    "Xavier uniform": nn.init.xavier_uniform_,
    "He normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "PyTorch default": partial(nn.init.kaiming_uniform_, a=5**0.5),
    "orthogonal": nn.init.orthogonal_,
}
DISTILLED_FOR = ("Xavier normal", "PyTorch default")
ATTACKS = ((0, 1), (3, 8), (9, 4))  # the class attacked, and the one that networks should predict
PRETRAINING = {"MNIST": (1, 128), "scikit-learn digits": (15, 32)}  # epochs, batch size
SWEEPS = {  # steps, images of each class in a step, epochs
    "three epochs": [(1, 10, 3), (5, 2, 3), (10, 1, 3)],
    "thirty updates": [(1, 10, 30), (5, 2, 6), (10, 1, 3)],
    "epochs": [(10, 1, 1), (10, 1, 3), (10, 1, 5), (10, 1, 10)],
    "images": [(1, 1, 30), (2, 1, 15), (5, 1, 6), (10, 1, 3), (30, 1, 1)],
}
UPDATES = (10, 30, 50)  # that baselines choose from
REAL = ("random real", "real", 10)  # images, how `du.initialize` calls them, steps
CENTERS = (("k-means", "k-means", 10), ("class means", "k-means", 1))
DISTILLED = {"images": "distilled", "labels": "true", "step_sizes": "distilled"}


# ------------------------------------------------------------------ fixed and random initialization
def distill_images(
    experiment: Experiment,
    *,
    make_network: du.Factory = du.LeNet,
    init: str = "real",
    steps: int = 10,
    per_class: int = 1,
    epochs: int = 3,
    step_size: float = 0.03,
    soft_labels: bool = False,
    **options,
) -> tuple[du.DistilledSet, dict[str, str]]:
    """Images distilled from noise or real ones by the paper's method; returns them with their columns of the table."""
    content = {"steps": steps, "per_class": per_class, "std": 0.3, "seed": experiment.seed}
    images = du.initialize(experiment.mnist, init, **content)
    inner = {"epochs": epochs, "step_size": step_size, "soft_labels": soft_labels}
    distilled = du.DistilledSet(*images, **inner)
    name = experiment.distill(distilled, experiment.mnist, make_network, **options)
    columns = DISTILLED | {"set": name, "training": training(distilled)}
    return distilled, columns | {"labels": "distilled" if soft_labels else "true"}


def fixed_initialization(experiment: Experiment, **options) -> None:
    """Images for one network with fixed initial weights, tested on it and on unseen initializations."""
    make_network = du.fixed_initialization(du.LeNet, seed=experiment.seed)
    options |= {"init": "noise", "learning_rate": 0.02, "make_network": make_network}
    distilled, columns = distill_images(experiment, **options)
    test = partial(du.evaluate, distilled, experiment.mnist.test)
    experiment.measure(test(make_network, networks=1).values, network=FIXED, **columns)
    experiment.measure(test(du.LeNet, networks=experiment.reduced(100)).values, **columns)


def random_initialization(experiment: Experiment, *, networks: int, **options) -> None:
    """Images for random initializations, tested on unseen ones."""
    distilled, columns = distill_images(experiment, batch_size=128, **options)
    networks = experiment.reduced(networks)
    accuracies = du.evaluate(distilled, experiment.mnist.test, du.LeNet, networks=networks)
    experiment.measure(accuracies.values, **columns)


def initializations(experiment: Experiment) -> None:
    """Images distilled for one distribution of initial weights, tested on others."""
    networks = experiment.reduced(100)
    factories = {name: partial(du.LeNet, initialize=rule) for name, rule in INITIALIZATIONS.items()}
    for source in DISTILLED_FOR:
        options = {"iterations": 400, "batch_size": 128, "label": source.split()[0].lower()}
        options["make_network"] = factories[source]
        distilled, columns = distill_images(experiment, **options)
        for title, make_network in factories.items():
            test = experiment.mnist.test
            accuracies = du.evaluate(distilled, test, make_network, networks=networks)
            experiment.measure(accuracies.values, **columns, network=f"LeNet, {title}")


# ---------------------------------------------------------------------------- undistilled baselines
def tune(
    experiment: Experiment, images: du.Pair, updates: Sequence[int]
) -> tuple[du.DistilledSet, dict[str, str]]:
    """Undistilled images by the paper's rule: so many updates, and one constant step size or learned ones, whichever is
    best on validation images; with their columns of the table."""
    mnist, candidates, steps = experiment.mnist, {}, len(images[0])
    options = {"networks": experiment.reduced(5), "step_sizes": experiment.some(STEP_SIZES["SGD"])}
    choose = partial(du.best_constant_step_size, **options)
    for count in updates:
        control = du.DistilledSet(*images, epochs=count // steps)
        constant = choose(control, mnist, du.LeNet)
        candidates[count, "constant"] = constant
        learned = learn_step_sizes(experiment, mnist, constant, du.LeNet)
        candidates[count, "learned"] = learned
    networks = experiment.reduced(20)
    validate = partial(validation_accuracy, dataset=mnist, make_network=du.LeNet, networks=networks)
    best = max(candidates, key=lambda key: validate(candidates[key]))
    columns = {"labels": "true", "step_sizes": best[1], "training": training(candidates[best])}
    return candidates[best], columns


def baselines(
    experiment: Experiment, *, kinds: Sequence[tuple], updates: Sequence[int], networks: int
) -> None:
    """Undistilled images as the paper tunes them."""
    test = partial(du.evaluate, split=experiment.mnist.test, make_network=du.LeNet)
    for images, kind, steps in kinds:
        pair = du.initialize(experiment.mnist, kind, steps=steps)
        control, columns = tune(experiment, pair, updates)
        label = images.replace(" ", "-")
        columns["set"] = experiment.save(control, experiment.mnist, label=label)
        values = test(control, networks=experiment.reduced(networks)).values
        experiment.measure(values, images=images, **columns)


def random_samples(experiment: Experiment) -> None:
    """Random samples of real images, which share the tuning of the first; and the best of them on validation images."""
    mnist, seeds = experiment.mnist, experiment.some(range(50))
    pairs = [du.initialize(mnist, "real", steps=10, seed=seed) for seed in seeds]
    first, columns = tune(experiment, pairs[0], UPDATES)
    options = {"epochs": first.inner["epochs"], "step_size": first.step_sizes.detach()}
    samples = [du.DistilledSet(*pair, **options) for pair in pairs]
    test = partial(du.evaluate, split=mnist.test, make_network=du.LeNet)
    networks = experiment.reduced(10)
    for number, sample in enumerate(samples[:20]):
        values = test(sample, networks=networks).values
        experiment.measure(values, images="random real", set=f"sample {number}", **columns)
    validate = partial(validation_accuracy, dataset=mnist, make_network=du.LeNet, networks=networks)
    best = max(samples, key=validate)
    columns["set"] = experiment.save(best, mnist, label="best")
    values = test(best, networks=experiment.reduced(200)).values
    experiment.measure(values, images="best random real", **columns)


def controls(experiment: Experiment, *, name: str, fixed: bool = False) -> None:
    """Undistilled images under step sizes that were learned, for them or for the set of that name."""
    if fixed:
        make_network = du.fixed_initialization(du.LeNet, seed=experiment.seed)
        name += f"-seed{experiment.seed}" * (experiment.seed > 0)
        options = {"network": FIXED, "networks": 1}
        schedule_controls(experiment, name, experiment.mnist, make_network, **options)
    else:
        schedule_controls(experiment, name, experiment.mnist)


def nearest_neighbors(experiment: Experiment) -> None:
    """No network: each image gets the label of its nearest neighbors among a hundred."""
    mnist = experiment.mnist
    for title, kind, count in (("random real", "real", 20), ("k-means", "k-means", 5)):
        seeds = experiment.some(range(count))
        samples = [du.initialize(mnist, kind, steps=10, seed=seed) for seed in seeds]
        validate = partial(neighbor_accuracy, *samples[0], mnist.validation)
        choice = max(itertools.product((1, 2), (1, 3)), key=lambda choice: validate(*choice))
        values = [neighbor_accuracy(*sample, mnist.test, *choice) for sample in samples]
        experiment.measure(values, images=title, labels="true", network="nearest neighbors")


def neighbor_accuracy(
    images: Tensor, labels: Tensor, split: du.Split, norm: int, neighbors: int
) -> float:
    """Percentage of `split` classified correctly by its neighbors among images [steps, n, c, h, w]."""
    classifier = KNeighborsClassifier(neighbors, p=norm)
    classifier.fit(images.flatten(0, 1).flatten(1).cpu(), labels.flatten(0, 1).argmax(-1).cpu())
    return 100 * classifier.score(split.images.flatten(1).cpu(), split.labels.cpu())


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
    training, held_out = (3, 3) if experiment.quick else (30, 100)
    path, networks = experiment.checkpoints / "networks.pt", []
    stored = torch.load(path, map_location=experiment.device) if path.exists() else []
    for number in range(training + held_out):
        with du.seeded(number):
            network = du.LeNet().to(experiment.device)
            if stored:
                network.load_state_dict(stored[number])
            else:
                train_fully(experiment, network, dataset)
        networks.append(network)
    path.parent.mkdir(parents=True, exist_ok=True)
    with du.replacing(path) as partial_file:
        torch.save([network.state_dict() for network in networks], partial_file)
    return networks[:training], networks[training:]


def adaptation(experiment: Experiment, *, source: str, target: str) -> None:
    """Networks trained on one kind of digits learn another from a hundred images, in thirty updates."""
    before, after = getattr(experiment, source), getattr(experiment, target)
    training_networks, held_out = pretrain(experiment, before)
    pretrained = {"network": f"LeNet pretrained on {before.name}"}
    values = [du.accuracy(network, after.test) for network in held_out]
    experiment.measure(values, images="none", **pretrained)

    images = du.initialize(after, "real", steps=10)
    control = du.DistilledSet(*images, epochs=3)
    options = {"networks": experiment.reduced(5), "step_sizes": experiment.some(STEP_SIZES["SGD"])}
    factory = sample_network(training_networks)
    real = du.best_constant_step_size(control, after, factory, **options)
    columns = {"labels": "true", "training": training(real), **pretrained}
    test = partial(du.evaluate, split=after.test, networks=len(held_out))
    values = test(real, make_network=in_turn(held_out)).values
    experiment.measure(values, images="random real", step_sizes="constant", **columns)

    columns |= DISTILLED
    chosen = {"random": training_networks, **{f"fixed-{i}": [training_networks[i]] for i in SEEDS}}
    for label, networks in chosen.items():
        distilled = du.DistilledSet(*images, epochs=3, step_size=0.02)
        options = {"iterations": 300, "batch_size": 128, "label": label}
        columns["set"] = experiment.distill(distilled, after, sample_network(networks), **options)
        if label == "random":
            values = test(distilled, make_network=in_turn(held_out)).values
        else:
            columns["network"] = f"one LeNet pretrained on {before.name}"
            values = [du.accuracy(du.train_on(networks[0], distilled), after.test)]
        experiment.measure(values, **columns)

    values = []
    for number, network in enumerate(experiment.some(held_out[:10])):
        with du.seeded(number):
            adapted = train_fully(experiment, copy.deepcopy(network), after)
        values.append(du.accuracy(adapted, after.test))
    experiment.measure(values, images="all real", labels="true", **pretrained)


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
    mnist = experiment.mnist
    training_networks, held_out = pretrain(experiment, mnist)
    for source, target in ATTACKS:
        poisoned, test = poison_labels(mnist, source, target), mnist.test
        attacked = test.labels == source
        parts = {
            "success": du.Split(test.images[attacked], poisoned.test.labels[attacked]),
            "accuracy on other classes": du.Split(test.images[~attacked], test.labels[~attacked]),
        }
        pretrained = {"network": "LeNet pretrained on MNIST"}
        for metric, split in parts.items():
            values = [du.accuracy(network, split) for network in held_out]
            columns = {"set": f"attack-{source}-as-{target}", "metric": metric, **pretrained}
            experiment.measure(values, images="none", **columns)
        one = training_networks[:1]
        for label, networks, tested in (
            ("random", training_networks, held_out),
            ("fixed", one, one),
        ):
            images = du.initialize(mnist, "real", steps=1, per_class=10)
            distilled = du.DistilledSet(*images, step_size=0.1)
            options = {"iterations": 1000, "networks": min(2, len(networks)), "batch_size": 128}
            options |= {"learning_rate": 0.1, "step_size_learning_rate": 0.03}
            options["label"] = f"{source}-as-{target}-{label}"
            name = experiment.distill(distilled, poisoned, sample_network(networks), **options)
            columns = DISTILLED | {"set": name, "training": training(distilled)} | pretrained
            if label == "fixed":
                columns["network"] = "one LeNet pretrained on MNIST"
            for metric, split in parts.items():
                networks = len(tested)
                accuracies = du.evaluate(distilled, split, in_turn(tested), networks=networks)
                experiment.measure(accuracies.values, metric=metric, **columns)


# --------------------------------------------------------------------------------------- experiments
def sweep_name(steps: int, per_class: int, epochs: int) -> str:
    return f"sweep-{steps}x{10 * per_class}x{epochs}"


def sweep(steps: int, per_class: int, epochs: int) -> Recipe:
    """Another number of steps, images or epochs, with fewer iterations."""
    options = {"steps": steps, "per_class": per_class, "epochs": epochs}
    return Recipe(partial(random_initialization, iterations=200, networks=100, **options))


TEN = partial(fixed_initialization, steps=1, iterations=16_000, step_size=0.15)
HUNDRED = partial(random_initialization, iterations=800, networks=200)
EXPERIMENTS = {
    "fixed-10": Recipe(TEN, SEEDS),
    "fixed-10-soft-labels": Recipe(partial(TEN, soft_labels=True), SEEDS),
    "fixed-100": Recipe(partial(fixed_initialization, iterations=1500), SEEDS),
    "random-noise": Recipe(partial(HUNDRED, init="noise"), SEEDS),
    "random-real": Recipe(HUNDRED, SEEDS),
    "random-real-5-epochs": Recipe(partial(HUNDRED, epochs=5)),
    "attack": Recipe(attack),
    "adapt-digits-to-mnist": Recipe(partial(adaptation, source="digits", target="mnist")),
    "adapt-mnist-to-digits": Recipe(partial(adaptation, source="mnist", target="digits")),
    "baselines": Recipe(partial(baselines, kinds=CENTERS, updates=UPDATES, networks=200)),
    "longer-baselines": Recipe(
        partial(baselines, kinds=(REAL, *CENTERS), updates=(100,), networks=100)
    ),
    "random-samples": Recipe(random_samples),
    "controls-fixed-10": Recipe(partial(controls, name="fixed-10", fixed=True), SEEDS, "fixed-10"),
    "controls-random-noise": Recipe(partial(controls, name="random-noise"), needs="random-noise"),
    "nearest-neighbors": Recipe(nearest_neighbors),
    "initializations": Recipe(initializations),
    **{sweep_name(*point): sweep(*point) for points in SWEEPS.values() for point in points},
}
