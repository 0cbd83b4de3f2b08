"""Each experiment of the study: what it distils or trains, and the accuracies it keeps.

Settings were chosen on validation images; every accuracy kept here is of test images, taken when an experiment ends.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import distill_utils as du
from runs import atomic_write, seeded

SEEDS = (0, 1, 2)  # of the distillations behind the paper's main figures
INITIALIZATIONS = {
    "Xavier normal": nn.init.xavier_normal_,
    "Xavier uniform": nn.init.xavier_uniform_,
    "He normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "PyTorch default": partial(nn.init.kaiming_uniform_, a=5**0.5),
    "orthogonal": nn.init.orthogonal_,
}
LEARNED_ON = ("Xavier normal", "PyTorch default")  # initializations that images are distilled for
ATTACKS = ((0, 1), (3, 8), (9, 4))  # which class is to be taken for which


@dataclass
class Study:
    """What an experiment is given, and where it leaves its rows."""

    name: str  # the experiment's
    results: Path
    device: torch.device
    data_root: str
    fraction: float = 1.0  # of the iterations and pretrained networks
    networks: int = 200  # fresh networks behind an accuracy
    rows: dict[str, dict] = field(default_factory=dict)

    @cached_property
    def mnist(self) -> du.Dataset:
        return du.load_mnist(self.data_root, device=self.device)

    @cached_property
    def digits(self) -> du.Dataset:
        return du.load_digits(device=self.device)

    def add(self, row: str, *sets: Tensor | list[float], file: str | None = None) -> None:
        """Keeps a row: the accuracies (percent) of the networks of each set of images, and the one set's file."""
        self.rows[row] = {"values": [[round(float(value), 2) for value in values] for values in sets], "file": file}

    def distil(
        self,
        name: str,
        dataset: du.Dataset,
        make_network: du.NetworkFactory,
        start: tuple[Tensor, Tensor],
        *,
        iterations: int,
        epochs: int = 3,
        step_size: float = 0.03,
        inner: dict | None = None,
        seed: int = 0,
        **options,
    ) -> tuple[du.DistilledSet, str]:
        """Distils from `start`, going on where an interrupted run stopped; writes the set, returns it and its file.

        `inner` holds further options of the distilled set, `options` are those of `distill`.
        """
        iterations = max(1, round(self.fraction * iterations))
        checkpoint = self.results / "checkpoints" / f"{self.name}-{name}.pt"
        distilled = du.DistilledSet(*start, epochs=epochs, step_size=step_size, **(inner or {}))
        history = du.distill(
            distilled, dataset, make_network, iterations=iterations, seed=seed, checkpoint=checkpoint,
            validate_every=max(100, iterations // 4), validation_networks=1, progress=False, **options,
        )  # fmt: skip
        if len(history.loss) < iterations:
            raise KeyboardInterrupt  # which distill kept to itself, to end whole
        return distilled, self.save(name, distilled, dataset, seed)

    def save(self, name: str, distilled: du.DistilledSet, dataset: du.Dataset, seed: int = 0) -> str:
        """Writes a set, and returns its file's name."""
        file = f"{self.name}-{name}.safetensors"
        distilled.save(self.results / file, dataset=dataset, network="LeNet", seed=seed, command="make study")
        return file

    @property
    def clock(self) -> Path:
        """Where the seconds of interrupted runs are kept."""
        return self.results / "checkpoints" / f"{self.name}.seconds"

    def earlier_seconds(self) -> float:
        """How long interrupted runs of this experiment took."""
        return float(self.clock.read_text()) if self.clock.exists() else 0.0

    def keep_time(self, seconds: float) -> None:
        """Adds what an interrupted run took."""
        self.clock.parent.mkdir(parents=True, exist_ok=True)
        self.clock.write_text(str(self.earlier_seconds() + seconds))

    def write(self, seconds: float) -> None:
        """Writes the rows and how they came about."""
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else None
        record = {
            "experiment": self.name,
            "fraction": self.fraction,
            "networks": self.networks,
            "seconds": round(self.earlier_seconds() + seconds),  # but for runs that were killed outright
            "machine": gpu or f"{self.device.type}, {torch.get_num_threads()} of {os.cpu_count()} cores",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
            "rows": self.rows,
        }
        with atomic_write(self.results / f"{self.name}.json") as partial_file:
            partial_file.write_text(json.dumps(record, indent=1))


def known(study: Study, *, steps: int, iterations: int, step_size: float, std: float, seed: int) -> None:
    """Images for one network, whose initial weights are known: the paper's fixed initialization."""
    make_network = du.fixed_initialization(du.LeNet, seed=seed)
    start = du.noise_start(study.mnist, steps=steps, std=std, seed=seed)
    distilled, file = study.distil(
        "images", study.mnist, make_network, start, iterations=iterations, step_size=step_size, learning_rate=0.02,
        seed=seed,
    )  # fmt: skip
    study.add("known", du.evaluate(distilled, study.mnist.test, make_network, networks=1).values, file=file)
    elsewhere = du.evaluate(distilled, study.mnist.test, du.LeNet, networks=max(1, study.networks // 2))
    study.add("on unknown initializations", elsewhere.values, file=file)


def unknown(study: Study, *, start: str, seed: int) -> None:
    """A hundred images for networks never met before."""
    images = {"noise": partial(du.noise_start, std=0.3), "real": du.real_start}[start]
    distilled, file = study.distil(
        "images", study.mnist, du.LeNet, images(study.mnist, steps=10, seed=seed), iterations=800, batch_size=128,
        seed=seed,
    )  # fmt: skip
    study.add("unknown", du.evaluate(distilled, study.mnist.test, du.LeNet, networks=study.networks).values, file=file)


def baselines(study: Study) -> None:
    """Images that nothing was learned for, each kind at the step size that is best for it; thirty updates."""
    mnist, networks = study.mnist, study.networks
    test = partial(du.evaluate, split=mnist.test, make_network=du.LeNet)
    tuned = partial(du.tuned, dataset=mnist, make_network=du.LeNet)
    draws = [tuned(*du.real_start(mnist, steps=10, seed=0), epochs=3)]
    step_size = draws[0].step_sizes[0].item()
    draws += [
        du.DistilledSet(*du.real_start(mnist, steps=10, seed=draw), epochs=3, step_size=step_size)
        for draw in range(1, max(2, round(50 * study.fraction)))
    ]
    best = max(draws, key=lambda draw: du.validated(draw, mnist, du.LeNet, networks=10))
    some = [test(draw, networks=max(1, networks // 20)).values for draw in draws[:20]]
    study.add(f"random real images, step size {step_size:g}", *some)
    study.add(
        f"best of {len(draws)} random draws", test(best, networks=networks).values, file=study.save("best", best, mnist)
    )
    for name, title, steps, epochs in (("k-means", "k-means centers", 10, 3), ("means", "class means", 1, 30)):
        centers = tuned(*du.k_means_start(mnist, steps=steps), epochs=epochs)
        values, file = test(centers, networks=networks).values, study.save(name, centers, mnist)
        study.add(f"{title}, step size {centers.step_sizes[0]:g}", values, file=file)


def longer_baselines(study: Study) -> None:
    """The same kinds of images under a hundred updates: how much of their shortfall is training time?"""
    for title, start, epochs in (
        ("random real images", du.real_start(study.mnist, steps=10), 10),
        ("k-means centers", du.k_means_start(study.mnist, steps=10), 10),
        ("class means", du.k_means_start(study.mnist, steps=1), 100),
    ):
        images = du.tuned(*start, study.mnist, du.LeNet, epochs=epochs, step_sizes=(0.01, 0.02, 0.05, 0.1, 0.2))
        result = du.evaluate(images, study.mnist.test, du.LeNet, networks=max(1, study.networks // 2))
        study.add(f"{title}, step size {images.step_sizes[0]:g}", result.values)


def nearest_neighbours(study: Study) -> None:
    """No network: the label of the nearest among a hundred images, by l1 or l2 and 1 or 3 neighbours."""
    mnist = study.mnist
    for title, starts in {
        "random real images": [du.real_start(mnist, steps=10, seed=draw) for draw in range(20)],
        "k-means centers": [du.k_means_start(mnist, steps=10, seed=draw) for draw in range(5)],
    }.items():
        choices = list(itertools.product((1, 2), (1, 3)))
        best = max(choices, key=lambda choice: neighbour_accuracy(*starts[0], mnist.validation, *choice))
        values = [[neighbour_accuracy(*start, mnist.test, *best)] for start in starts]
        study.add(f"{title}, l{best[0]}, k = {best[1]}", *values)


def neighbour_accuracy(images: Tensor, labels: Tensor, split: du.Split, norm: int, neighbours: int) -> float:
    """Percent of `split` that its nearest neighbours among `images` [steps, n, c, h, w] label rightly."""
    classifier = KNeighborsClassifier(neighbours, p=norm)
    classifier.fit(images.flatten(0, 1).flatten(1).cpu(), labels.flatten(0, 1).argmax(-1).cpu())
    return 100 * classifier.score(split.images.flatten(1).cpu(), split.labels.cpu())


def sweep(study: Study, *, steps: int, per_class: int, epochs: int) -> None:
    """One point of the curves: other numbers of steps, images and epochs; else as `unknown`, with fewer iterations."""
    start = du.real_start(study.mnist, steps=steps, per_class=per_class)
    distilled, file = study.distil(
        "images", study.mnist, du.LeNet, start, iterations=200, batch_size=128, epochs=epochs
    )
    networks = max(1, study.networks // 2)
    study.add("unknown", du.evaluate(distilled, study.mnist.test, du.LeNet, networks=networks).values, file=file)


def initializations(study: Study) -> None:
    """Images distilled for one distribution of initial weights, tested on others."""
    networks = max(1, study.networks // 2)
    for learned_on in LEARNED_ON:
        make_network = partial(du.LeNet, initialize=INITIALIZATIONS[learned_on])
        start = du.real_start(study.mnist, steps=10)
        name = learned_on.split()[0].lower()
        distilled, file = study.distil(name, study.mnist, make_network, start, iterations=400, batch_size=128)
        for title, rule in INITIALIZATIONS.items():
            result = du.evaluate(distilled, study.mnist.test, partial(du.LeNet, initialize=rule), networks=networks)
            study.add(f"for {learned_on}, on {title}", result.values, file=file)


def pretrained(study: Study, dataset: du.Dataset) -> tuple[list[nn.Module], list[nn.Module]]:
    """LeNets trained on `dataset` in the ordinary way: some to distil for, others held out.

    Each is kept in a file of its own.
    """
    training, held_out = (max(len(SEEDS), round(count * study.fraction)) for count in (30, 100))
    made = {"train": PRETRAINING[dataset.name], "std": dataset.std}  # a file of other data or settings is of no use
    networks = []
    for number in range(training + held_out):
        path = study.results / "checkpoints" / f"{dataset.name}-network-{number}.pt"
        saved = torch.load(path, map_location=study.device) if path.exists() else {"made": None}
        with seeded(number):
            network = du.LeNet().to(study.device)
            if saved["made"] == made:
                network.load_state_dict(saved["weights"])
            else:
                du.train(network, dataset.train, **PRETRAINING[dataset.name])
                with atomic_write(path) as partial_file:
                    torch.save({"made": made, "weights": network.state_dict()}, partial_file)
        networks.append(network)
    return networks[:training], networks[training:]


PRETRAINING = {"MNIST": {"epochs": 1, "batch_size": 128}, "scikit-learn digits": {"epochs": 15, "batch_size": 32}}


def in_turn(networks: list[nn.Module]) -> du.NetworkFactory:
    """A factory that returns each of `networks` once, from the first."""
    return iter(networks).__next__


def adaptation(study: Study, *, source: str, target: str) -> None:
    """Networks trained on one kind of digits learn another from a hundred images, in thirty updates."""
    before, after = (getattr(study, name) for name in (source, target))
    training, held_out = pretrained(study, before)
    study.add("no adaptation", [du.accuracy(network, after.test) for network in held_out])

    start = du.real_start(after, steps=10)
    real = du.tuned(*start, after, du.one_of(training), epochs=3)
    tested = du.evaluate(real, after.test, in_turn(held_out), networks=len(held_out))
    study.add(f"random real images, step size {real.step_sizes[0]:g}", tested.values)

    distil = partial(study.distil, dataset=after, start=start, iterations=300, batch_size=128, step_size=0.02)
    distilled, file = distil("unknown", make_network=du.one_of(training))
    tested = du.evaluate(distilled, after.test, in_turn(held_out), networks=len(held_out))
    study.add("distilled, unknown networks", tested.values, file=file)
    values = []
    for number in SEEDS:
        distilled, _ = distil(f"known-{number}", make_network=du.one_of([training[number]]))
        values.append([du.accuracy(du.unroll(training[number], distilled, track_higher_grads=False), after.test)])
    study.add("distilled, known network", *values)

    full = []
    for number, network in enumerate(held_out[:10]):
        with seeded(number):
            tuned = du.train(copy.deepcopy(network), after.train, **PRETRAINING[after.name])
        full.append(du.accuracy(tuned, after.test))
    study.add("all real images", full)


def attack(study: Study) -> None:
    """A hundred images after one step on which a well-trained network takes one class for another."""
    mnist = study.mnist
    training, held_out = pretrained(study, mnist)
    start = du.real_start(mnist, steps=1, per_class=10)
    for source, target in ATTACKS:
        poisoned = du.relabel(mnist, source, target)
        attacked = mnist.test.labels == source
        parts = {
            "taken": du.Split(poisoned.test.images[attacked], poisoned.test.labels[attacked]),
            "others": du.Split(mnist.test.images[~attacked], mnist.test.labels[~attacked]),
        }
        for part, split in parts.items():
            values = [du.accuracy(network, split) for network in held_out]
            study.add(f"{source} as {target}, before, {part}", values)
        for title, networks, tested in (("unknown", training, held_out), ("known", training[:1], training[:1])):
            distilled, file = study.distil(
                f"{source}-as-{target}-{title}", poisoned, du.one_of(networks), start, iterations=1000, epochs=1,
                networks=min(2, len(networks)), batch_size=128, step_size=0.1, learning_rate=0.1,
                step_size_learning_rate=0.03,
            )  # fmt: skip
            for part, split in parts.items():
                result = du.evaluate(distilled, split, in_turn(tested), networks=len(tested))
                study.add(f"{source} as {target}, {title}, {part}", result.values, file=file)


SWEEPS = {  # steps, images of each class in a step, epochs
    "three epochs": [(1, 10, 3), (5, 2, 3), (10, 1, 3)],
    "thirty updates": [(1, 10, 30), (5, 2, 6), (10, 1, 3)],
    "epochs": [(10, 1, 1), (10, 1, 3), (10, 1, 5), (10, 1, 10)],
    "images": [(1, 1, 30), (2, 1, 15), (5, 1, 6), (10, 1, 3), (30, 1, 1)],
}


def sweep_name(steps: int, per_class: int, epochs: int) -> str:
    return f"sweep-{steps}x{10 * per_class}x{epochs}"


EXPERIMENTS: dict[str, Callable[[Study], None]] = {
    **{
        f"known-100-seed{seed}": partial(known, steps=10, iterations=1500, step_size=0.03, std=0.3, seed=seed)
        for seed in SEEDS
    },
    **{
        f"known-10-seed{seed}": partial(known, steps=1, iterations=16000, step_size=0.15, std=0.3, seed=seed)
        for seed in SEEDS
    },
    **{f"unknown-{start}-seed{seed}": partial(unknown, start=start, seed=seed)
       for start in ("real", "noise") for seed in SEEDS},
    "attack": attack,
    "adapt-digits-to-mnist": partial(adaptation, source="digits", target="mnist"),
    "adapt-mnist-to-digits": partial(adaptation, source="mnist", target="digits"),
    "baselines": baselines,
    "longer-baselines": longer_baselines,
    "nearest-neighbours": nearest_neighbours,
    "initializations": initializations,
    **{sweep_name(*point): partial(sweep, steps=point[0], per_class=point[1], epochs=point[2])
       for points in SWEEPS.values() for point in points},
}  # fmt: skip
