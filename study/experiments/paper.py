"""The experiments of the paper (arXiv 1811.10959) with LeNet on MNIST, and on scikit-learn's digits in place of USPS.

Settings were chosen on validation images. Every accuracy is one of test images, taken when an experiment ends.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import distill_utils as du
from study import runs
from study.experiments.protocols import learn_step_sizes, schedule_controls, validation_accuracy
from study.records import Results, Study

SEEDS = (0, 1, 2)  # of the distillations behind the paper's main figures
INITIALIZATIONS = {
    "Xavier normal": nn.init.xavier_normal_,
    "Xavier uniform": nn.init.xavier_uniform_,
    "He normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "PyTorch default": partial(nn.init.kaiming_uniform_, a=5**0.5),
    "orthogonal": nn.init.orthogonal_,
}
DISTILLED_FOR = ("Xavier normal", "PyTorch default")
# the class attacked, and the class that networks should predict for it
ATTACKS = ((0, 1), (3, 8), (9, 4))
PRETRAINING = {
    "MNIST": {"epochs": 1, "batch_size": 128},
    "scikit-learn digits": {"epochs": 15, "batch_size": 32},
}
SWEEPS = {  # steps, images of each class in a step, epochs
    "three epochs": [(1, 10, 3), (5, 2, 3), (10, 1, 3)],
    "thirty updates": [(1, 10, 30), (5, 2, 6), (10, 1, 3)],
    "epochs": [(10, 1, 1), (10, 1, 3), (10, 1, 5), (10, 1, 10)],
    "images": [(1, 1, 30), (2, 1, 15), (5, 1, 6), (10, 1, 3), (30, 1, 1)],
}


# ------------------------------------------------------------------------------------- fixed and random initialization
def fixed_initialization(
    study: Study,
    *,
    steps: int,
    iterations: int,
    step_size: float,
    seed: int,
    soft_labels: bool = False,
) -> None:
    """Images for one network with fixed initial weights, tested on it and on unseen initializations."""
    make_network = du.fixed_initialization(du.LeNet, seed=seed)
    images, labels = du.initialize(study.mnist, "noise", steps=steps, std=0.3, seed=seed)
    distilled = du.DistilledSet(
        images, labels, epochs=3, step_size=step_size, soft_labels=soft_labels
    )
    options = {"iterations": iterations, "learning_rate": 0.02, "seed": seed}
    files = [study.distill(distilled, study.mnist, make_network, **options)]
    test = partial(du.evaluate, distilled, study.mnist.test)
    study.add("fixed initialization", test(make_network, networks=1).values, files=files)
    unseen = test(du.LeNet, networks=max(1, study.networks // 2))
    study.add("unseen initializations", unseen.values, files=files)


def random_initialization(
    study: Study, *, initial: du.Pair, epochs: int, iterations: int, networks: int, seed: int = 0
) -> None:
    """Images for random initializations, tested on unseen ones."""
    distilled = du.DistilledSet(*initial, epochs=epochs, step_size=0.03)
    file = study.distill(
        distilled, study.mnist, du.LeNet, iterations=iterations, batch_size=128, seed=seed
    )
    unseen = du.evaluate(distilled, study.mnist.test, du.LeNet, networks=networks)
    study.add("unseen initializations", unseen.values, files=[file])


def hundred_images(study: Study, *, init: str, seed: int, epochs: int = 3) -> None:
    """The paper's hundred images, from noise or from real images."""
    images = du.initialize(study.mnist, init, steps=10, std=0.3, seed=seed)
    options = {"epochs": epochs, "iterations": 800, "networks": study.networks, "seed": seed}
    random_initialization(study, initial=images, **options)


def sweep(study: Study, *, steps: int, per_class: int, epochs: int) -> None:
    """Other numbers of steps, images and epochs, with fewer iterations."""
    initial = du.initialize(study.mnist, "real", steps=steps, per_class=per_class)
    random_initialization(
        study, initial=initial, epochs=epochs, iterations=200, networks=max(1, study.networks // 2)
    )


def sweep_name(steps: int, per_class: int, epochs: int) -> str:
    return f"sweep-{steps}x{10 * per_class}x{epochs}"


def initializations(study: Study) -> None:
    """Images distilled for one distribution of initial weights, tested on others."""
    for source in DISTILLED_FOR:
        distilled = du.DistilledSet(
            *du.initialize(study.mnist, "real", steps=10), epochs=3, step_size=0.03
        )
        make_network = partial(du.LeNet, initialize=INITIALIZATIONS[source])
        options = {"iterations": 400, "batch_size": 128, "label": source.split()[0].lower()}
        file = study.distill(distilled, study.mnist, make_network, **options)
        for title, rule in INITIALIZATIONS.items():
            make_network = partial(du.LeNet, initialize=rule)
            networks = max(1, study.networks // 2)
            found = du.evaluate(distilled, study.mnist.test, make_network, networks=networks)
            study.add(f"for {source}, on {title}", found.values, files=[file])


# ------------------------------------------------------------------------------------------------ undistilled baselines
def constant_step_size(study: Study, images: du.Pair, *, epochs: int, **options) -> du.DistilledSet:
    """Undistilled images with the step size that is best for them on validation images."""
    return du.best_constant_step_size(
        du.DistilledSet(*images, epochs=epochs), study.mnist, du.LeNet, **options
    )


def tuned(study: Study, images: du.Pair, *, epochs: Sequence[int]) -> tuple[du.DistilledSet, str]:
    """Undistilled images by the paper's rule: so many epochs, and one constant step size or learned ones, whichever is
    best on validation images; with a text that says which."""
    candidates = {}
    for each in epochs:
        constant = constant_step_size(study, images, epochs=each)
        candidates[f"{constant.updates} updates, step size {constant.step_sizes[0]:g}"] = constant
        learned = learn_step_sizes(study, study.mnist, constant, du.LeNet)
        candidates[f"{constant.updates} updates, learned step sizes"] = learned
    accuracy = partial(validation_accuracy, dataset=study.mnist, make_network=du.LeNet, networks=20)
    best = max(candidates, key=lambda each: accuracy(candidates[each]))
    return candidates[best], best


def baselines(study: Study) -> None:
    """Undistilled images as the paper tunes them. All random samples share what is best for the first."""
    mnist, networks, three = study.mnist, study.networks, (1, 3, 5)
    first, words = tuned(study, du.initialize(mnist, "real", steps=10), epochs=three)
    samples = [first]
    for seed in range(1, max(2, round(50 * study.fraction))):
        images = du.initialize(mnist, "real", steps=10, seed=seed)
        samples.append(
            du.DistilledSet(*images, epochs=first.inner["epochs"], step_size=first.step_sizes)
        )
    test = partial(du.evaluate, split=mnist.test, make_network=du.LeNet)
    few = [test(sample, networks=max(1, networks // 20)).values for sample in samples[:20]]
    study.add(f"random real images, {words}", *few)
    best = max(
        samples, key=lambda sample: validation_accuracy(sample, mnist, du.LeNet, networks=10)
    )
    files = [study.save(best, mnist, label="best")]
    study.add(
        f"best of {len(samples)} random samples", test(best, networks=networks).values, files=files
    )
    for label, title, steps in (("k-means", "k-means centers", 10), ("means", "class means", 1)):
        images = du.initialize(mnist, "k-means", steps=steps)
        centers, words = tuned(study, images, epochs=[10 * each // steps for each in three])
        values, files = (
            test(centers, networks=networks).values,
            [study.save(centers, mnist, label=label)],
        )
        study.add(f"{title}, {words}", values, files=files)


def longer_baselines(study: Study) -> None:
    """The same kinds of images trained on for a hundred updates: how much of their deficit is training time?"""
    for title, images, epochs in (
        ("random real images", du.initialize(study.mnist, "real", steps=10), 10),
        ("k-means centers", du.initialize(study.mnist, "k-means", steps=10), 10),
        ("class means", du.initialize(study.mnist, "k-means", steps=1), 100),
    ):
        best = constant_step_size(
            study, images, epochs=epochs, step_sizes=(0.01, 0.02, 0.05, 0.1, 0.2)
        )
        found = du.evaluate(best, study.mnist.test, du.LeNet, networks=max(1, study.networks // 2))
        study.add(f"{title}, step size {best.step_sizes[0]:g}", found.values)


def controls(study: Study, *, source: str) -> None:
    """Undistilled images under step sizes that were learned, for them or for the set of the experiment `source`."""
    fixed = source.startswith("fixed")
    row = "fixed initialization" if fixed else "unseen initializations"
    distilled = Results(study.folder).load_set(source, row, device=study.device)
    make_network = du.fixed_initialization(du.LeNet, seed=int(source[-1])) if fixed else du.LeNet
    schedule_controls(
        study,
        study.mnist,
        distilled,
        make_network,
        networks=1 if fixed else max(1, study.networks // 4),
    )


def nearest_neighbors(study: Study) -> None:
    """No network: each image gets the label of its nearest neighbors among a hundred."""
    mnist = study.mnist
    for title, samples in {
        "random real images": [
            du.initialize(mnist, "real", steps=10, seed=seed) for seed in range(20)
        ],
        "k-means centers": [
            du.initialize(mnist, "k-means", steps=10, seed=seed) for seed in range(5)
        ],
    }.items():
        choices = list(itertools.product((1, 2), (1, 3)))
        norm, k = max(
            choices, key=lambda choice: neighbor_accuracy(*samples[0], mnist.validation, *choice)
        )
        values = [[neighbor_accuracy(*sample, mnist.test, norm, k)] for sample in samples]
        study.add(f"{title}, l{norm}, k = {k}", *values)


def neighbor_accuracy(
    images: Tensor, labels: Tensor, split: du.Split, norm: int, neighbors: int
) -> float:
    """Percentage of `split` classified correctly by its neighbors among images [steps, n, c, h, w]."""
    classifier = KNeighborsClassifier(neighbors, p=norm)
    classifier.fit(images.flatten(0, 1).flatten(1).cpu(), labels.flatten(0, 1).argmax(-1).cpu())
    return 100 * classifier.score(split.images.flatten(1).cpu(), split.labels.cpu())


# ------------------------------------------------------------------------------------------------- pretrained networks
def sample_network(networks: Sequence[nn.Module]) -> du.Factory:
    """A factory that returns a copy of one of `networks` at random: the paper's random pretrained weights."""
    du.require(len(networks) > 0, "networks: none given; give at least one")
    return lambda: copy.deepcopy(networks[int(torch.randint(len(networks), ()))])


def in_turn(networks: Sequence[nn.Module]) -> du.Factory:
    """A factory that returns copies of `networks`, one after the other and then from the first again."""
    return map(copy.deepcopy, itertools.cycle(networks)).__next__


def poison_labels(dataset: du.Dataset, source: int, target: int) -> du.Dataset:
    """`dataset` with the images of class `source` labelled `target`: what a data poisoning attack teaches."""
    for name, label in {"source": source, "target": target}.items():
        du.require(
            0 <= label < dataset.classes,
            f"{name}={label}: give a class, 0 to {dataset.classes - 1}",
        )

    def poison(split: du.Split) -> du.Split:
        return du.Split(split.images, split.labels.where(split.labels != source, target))

    splits = {name: poison(getattr(dataset, name)) for name in ("train", "validation", "test")}
    return replace(dataset, name=f"{dataset.name}, {source} as {target}", **splits)


def pretrain(study: Study, dataset: du.Dataset) -> tuple[list[nn.Module], list[nn.Module]]:
    """LeNets trained on `dataset`, some to distill for and others held out; each in a file of its own."""
    training, held_out = (max(len(SEEDS), round(count * study.fraction)) for count in (30, 100))
    # a file of other data or settings is of no use
    made = {"train": PRETRAINING[dataset.name], "std": dataset.std}
    networks = []
    for number in range(training + held_out):
        path = study.checkpoints / f"{dataset.name}-network-{number}.pt"
        saved = torch.load(path, map_location=study.device) if path.exists() else {"made": None}
        with du.seeded(number):
            network = du.LeNet().to(study.device)
            if saved["made"] == made:
                network.load_state_dict(saved["weights"])
            else:
                du.train(network, dataset.train, **PRETRAINING[dataset.name])
                with runs.write_safely(path) as partial_file:
                    torch.save({"made": made, "weights": network.state_dict()}, partial_file)
        networks.append(network)
    return networks[:training], networks[training:]


def adaptation(study: Study, *, source: str, target: str) -> None:
    """Networks trained on one kind of digits learn another from a hundred images, in thirty updates."""
    before, after = (getattr(study, name) for name in (source, target))
    training, held_out = pretrain(study, before)
    study.add("no adaptation", [du.accuracy(network, after.test) for network in held_out])

    def test(distilled: du.DistilledSet) -> Tensor:
        return du.evaluate(distilled, after.test, in_turn(held_out), networks=len(held_out)).values

    images = du.initialize(after, "real", steps=10)
    real = du.best_constant_step_size(
        du.DistilledSet(*images, epochs=3), after, sample_network(training)
    )
    study.add(f"random real images, step size {real.step_sizes[0]:g}", test(real))

    def distill(networks: list[nn.Module], label: str) -> tuple[du.DistilledSet, str]:
        distilled = du.DistilledSet(*images, epochs=3, step_size=0.02)
        options = {"iterations": 300, "batch_size": 128, "label": label}
        return distilled, study.distill(distilled, after, sample_network(networks), **options)

    distilled, file = distill(training, "random")
    study.add("distilled for random pretrained networks", test(distilled), files=[file])
    values, files = [], []
    for number in SEEDS:
        distilled, file = distill([training[number]], f"fixed-{number}")
        adapted = du.train_on(training[number], distilled)
        values.append([du.accuracy(adapted, after.test)])
        files.append(file)
    study.add("distilled for one pretrained network", *values, files=files)

    full = []
    for number, network in enumerate(held_out[:10]):
        with du.seeded(number):
            adapted = du.train(copy.deepcopy(network), after.train, **PRETRAINING[after.name])
        full.append(du.accuracy(adapted, after.test))
    study.add("all real images", full)


def attack(study: Study) -> None:
    """A hundred images that make a well-trained network predict one class for another after a single update."""
    training, held_out = pretrain(study, study.mnist)
    for source, target in ATTACKS:
        poisoned, test = poison_labels(study.mnist, source, target), study.mnist.test
        attacked = test.labels == source
        parts = {
            "success": du.Split(test.images[attacked], poisoned.test.labels[attacked]),
            "other classes": du.Split(test.images[~attacked], test.labels[~attacked]),
        }
        for part, split in parts.items():
            study.add(
                f"{source} as {target}, before: {part}",
                [du.accuracy(network, split) for network in held_out],
            )
        for title, label, networks, tested in (
            ("random pretrained networks", "random", training, held_out),
            ("one pretrained network", "fixed", training[:1], training[:1]),
        ):
            distilled = du.DistilledSet(
                *du.initialize(study.mnist, "real", steps=1, per_class=10), step_size=0.1
            )
            file = study.distill(
                distilled, poisoned, sample_network(networks), iterations=1000, networks=min(2, len(networks)),
                batch_size=128, learning_rate=0.1, step_size_learning_rate=0.03, label=f"{source}-as-{target}-{label}",
            )  # fmt: skip
            for part, split in parts.items():
                found = du.evaluate(distilled, split, in_turn(tested), networks=len(tested))
                study.add(f"{source} as {target}, {title}: {part}", found.values, files=[file])


NEEDS = {  # experiments that load the set of another one
    **{f"controls-fixed-10-seed{seed}": f"fixed-10-seed{seed}" for seed in SEEDS},
    "controls-random-noise": "random-noise-seed0",
}
EXPERIMENTS: dict[str, Callable[[Study], None]] = {
    **{f"fixed-100-seed{seed}": partial(fixed_initialization, steps=10, iterations=1500, step_size=0.03, seed=seed)
       for seed in SEEDS},
    **{f"fixed-10-seed{seed}": partial(fixed_initialization, steps=1, iterations=16000, step_size=0.15, seed=seed)
       for seed in SEEDS},
    **{f"fixed-10-soft-labels-seed{seed}":
       partial(fixed_initialization, steps=1, iterations=16000, step_size=0.15, seed=seed, soft_labels=True)
       for seed in SEEDS},
    **{f"random-{init}-seed{seed}": partial(hundred_images, init=init, seed=seed)
       for init in ("real", "noise") for seed in SEEDS},
    "random-real-5-epochs": partial(hundred_images, init="real", seed=0, epochs=5),
    "attack": attack,
    "adapt-digits-to-mnist": partial(adaptation, source="digits", target="mnist"),
    "adapt-mnist-to-digits": partial(adaptation, source="mnist", target="digits"),
    "baselines": baselines,
    "longer-baselines": longer_baselines,
    **{name: partial(controls, source=source) for name, source in NEEDS.items()},
    "nearest-neighbors": nearest_neighbors,
    "initializations": initializations,
    **{sweep_name(*point): partial(sweep, steps=point[0], per_class=point[1], epochs=point[2])
       for points in SWEEPS.values() for point in points},
}  # fmt: skip
