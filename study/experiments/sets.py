"""The best sets for unseen initializations, and the controls and rivals that tell what they are worth."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

import distill_utils as du
from study.experiments.experiment import Experiment, Recipe
from study.experiments.protocols import (
    ADAM,
    AUGMENTED,
    SCRATCH,
    UNDISTILLED,
    Adam,
    compare_schedules,
    hard_labels,
    label_kinds,
    schedule_controls,
    train_by_adam,
    train_from_scratch,
    training,
    undistilled_sets,
    with_schedule_of,
)
from study.methods.architectures import TESTED_ON, ConvNet
from study.methods.decoders import fit_decoder, multi_formation, teach, train_teacher
from study.methods.matching import feature_distance, gradient_distance, match
from study.methods.truncation import NetworkPool

SOFT = {"optimizer": "Adam", "soft_labels": True, "step_size": 0.003}
SMOOTHED = {**SOFT, "label_smoothing": 0.1}
CONSTANT = {"momentum": 0.9, "soft_labels": True, "step_size": 0.01}  # training from scratch itself
DISTILLED = {"images": "distilled", "labels": "distilled"}


@dataclass(frozen=True)
class Distilled:
    """How a set of images is distilled.

    Args:
        steps, per_class: images of each class that networks see in each of so many steps.
        epochs: over the steps, in an update for each.
        inner: options of `du.DistilledSet`.
        outer: options of `du.Distillation`.
        factor: of multi-formation.
        pool: networks in the pool of a set made for training from scratch, without a learned schedule.
        window: updates that the pool's networks are trained on for in an iteration.
        few: networks behind the accuracies of what the set is not made for, and of controls.
    """

    steps: int
    per_class: int
    epochs: int
    inner: dict
    outer: dict
    factor: int = 1
    pool: int | None = None
    window: int | None = None
    few: int = 4


@dataclass(frozen=True)
class Compressed:
    """How a set of codes with a decoder is fitted, and distilled further where it has a schedule.

    Args:
        floats: of codes, labels and decoder together.
        per_class: stored images, in floats, that random real images get in multi-formation beside it.
        codes, channels, iterations: options of `fit_decoder`.
        steps, epochs: of the schedule, each step with `n` images of each class.
        outer: options of `du.Distillation`.
    """

    floats: int
    per_class: int
    codes: int
    channels: tuple[int, int]
    iterations: int
    networks: tuple[str, ...] = ("LeNet",)
    ways: tuple[str, ...] = ("",)
    schedule: dict = field(default_factory=dict)
    outer: dict = field(default_factory=dict)


STEPS = {"steps": 10, "per_class": 1}
MF2 = {"factor": 2, "steps": 10, "per_class": 4}
LARGE = {"factor": 2, "inner": CONSTANT, "pool": 10, "window": 30}
SLOWLY = {"batch_size": 512, "step_size_learning_rate": 0}
TEN_STORED = Distilled(
    **{"factor": 2, "steps": 2, "per_class": 2, "epochs": 25, "inner": SMOOTHED, "few": 10},
    outer={"iterations": 600, "networks": 2, "batch_size": 128},
)
# A name says: the dataset; images stored per class; multi-formation by its factor; the updates of the learned schedule,
# or training from scratch, whichever the set is made for.
RECIPES = {
    "mnist-ipc1-mf2-50updates": TEN_STORED,
    "mnist-ipc10-30updates": Distilled(
        **STEPS, epochs=3, inner=SOFT, few=10, outer={"iterations": 4000, "batch_size": 128}
    ),
    "mnist-ipc10-mf2-30updates": Distilled(
        **MF2, epochs=3, inner=SOFT, outer={"iterations": 600, "batch_size": 128}
    ),
    "mnist-ipc10-mf2-100updates": Distilled(
        **MF2, epochs=10, inner=SMOOTHED, outer={"iterations": 300, "batch_size": 128}
    ),
    "mnist-ipc10-scratch": Distilled(
        **{"steps": 1, "per_class": 10, "epochs": 300, "inner": CONSTANT, "few": 10},
        **{"pool": 10, "window": 60},
        outer={**SLOWLY, "iterations": 1400, "batch_size": 1024, "learning_rate": 0.05},
    ),
    "mnist-ipc10-mf2-scratch": Distilled(
        **{**LARGE, "steps": 2, "per_class": 20, "epochs": 300},
        outer={**SLOWLY, "iterations": 700, "learning_rate": 0.03},
    ),
    "mnist-ipc50-mf2-scratch": Distilled(
        **{**LARGE, "steps": 10, "per_class": 20, "epochs": 60},
        outer={**SLOWLY, "iterations": 400, "learning_rate": 0.02},
    ),
    "fashion-ipc1-mf2-50updates": TEN_STORED,
}
EVERY = {  # networks that the compressed sets are tested on
    "LeNet": Adam(networks=5, seen=192_000),
    "MLP": Adam(networks=5, seen=192_000),
    "MLP-Mixer": Adam(),
    "ViT": Adam(),
    "GRU over rows": Adam(),
    "ConvNeXt-like": Adam(networks=2),
    "ConvNet-3, instance norm": Adam(step_sizes=(1e-3,), networks=2, seen=32_000),
}
HUNDRED_FLOATS = Compressed(
    **{"floats": 78_400, "per_class": 10, "codes": 16, "channels": (16, 12)},
    **{"iterations": 15_000, "networks": tuple(EVERY), "ways": ("", AUGMENTED)},
)
COMPRESSED = {  # floats of 10, 100 and 500 images, all codes, labels and the decoder counted
    "mnist-ipc1-decoded-50updates": Compressed(
        **{"floats": 7_840, "per_class": 1, "codes": 12, "channels": (6, 4), "iterations": 6_000},
        schedule={"steps": 5, "per_class": 3, "epochs": 10, **SMOOTHED},
        outer={"iterations": 600, "batch_size": 256, "learning_rate": 0.01},
    ),
    "mnist-ipc10-compressed": HUNDRED_FLOATS,
    "fashion-ipc10-compressed": HUNDRED_FLOATS,
    "mnist-ipc50-compressed": Compressed(
        **{
            "floats": 392_000,
            "per_class": 50,
            "codes": 24,
            "channels": (32, 16),
            "iterations": 6_000,
        }
    ),
}
TEACHERS = 4  # LeNets
TRANSFERRED = "mnist-ipc10-mf2-scratch"  # to other architectures
AUGMENTED_SET = "mnist-ipc10-scratch"  # which others report with augmentation


def dataset_of(experiment: Experiment, name: str) -> du.Dataset:
    """The dataset that a set's name begins with."""
    return getattr(experiment, name.partition("-")[0])


def is_scheduled(name: str) -> bool:
    """Whether a set is made for its learned schedule, and not for training from scratch."""
    return name.endswith("updates")


# ------------------------------------------------------------------------------------ distilled sets
def distill_set(experiment: Experiment, recipe: Distilled) -> tuple[du.DistilledSet, str]:
    """Distills a set by a recipe; returns it with its name."""
    dataset, seed = dataset_of(experiment, experiment.name), experiment.seed
    options = {"steps": recipe.steps, "per_class": recipe.per_class, "seed": seed}
    centers = du.initialize(dataset, "k-means", **options)
    options = {"epochs": recipe.epochs, **recipe.inner}
    if recipe.factor > 1:
        distilled = multi_formation(*centers, factor=recipe.factor, **options)
    else:
        distilled = du.DistilledSet(*centers, **options)
    unroll = NetworkPool(recipe.pool, window=recipe.window) if recipe.pool else du.unroll
    return distilled, experiment.distill(distilled, dataset, unroll=unroll, **recipe.outer)


def measure_schedule(
    experiment: Experiment, distilled: du.DistilledSet, name: str, *, networks: int
) -> None:
    """Keeps what LeNets reach by a set's learned schedule."""
    test, networks = dataset_of(experiment, name).test, experiment.reduced(networks)
    accuracies = du.evaluate(distilled, test, du.LeNet, networks=networks)
    columns = {"set": name, "step_sizes": "distilled", "training": training(distilled)}
    experiment.measure(accuracies.values, **DISTILLED, **columns)


def measure_scratch(
    experiment: Experiment,
    distilled: du.DistilledSet,
    name: str,
    *,
    networks: int,
    augmented: bool = False,
    **columns: str,
) -> None:
    """Keeps what LeNets reach from scratch."""
    dataset, networks = dataset_of(experiment, name), experiment.reduced(networks)
    options = {"networks": networks, "epochs": experiment.reduced(300)}
    if augmented:
        options["black"] = float(dataset.train.images.min())
    accuracies = train_from_scratch(distilled, dataset.test, **options)
    columns |= {"step_sizes": "constant", "training": SCRATCH + AUGMENTED * augmented}
    experiment.measure(accuracies.values, set=name, **columns)


def distilled_set(experiment: Experiment, *, recipe: Distilled) -> None:
    """Distills a set and measures it with its learned schedule and from scratch, beside its controls. Sets of other
    seeds than 0 are measured by the protocol that they are made for."""
    distilled, name = distill_set(experiment, recipe)
    scheduled, first = is_scheduled(experiment.name), experiment.seed == 0
    if scheduled or first:
        networks = 100 if scheduled else recipe.few
        measure_schedule(experiment, distilled, name, networks=networks)
    if first or not scheduled:
        networks = recipe.few if scheduled else 100
        measure_scratch(experiment, distilled, name, networks=networks, **DISTILLED)
    if first:
        scratch_controls(experiment, distilled, name, networks=recipe.few)


def scratch_controls(
    experiment: Experiment, distilled: du.DistilledSet, name: str, *, networks: int
) -> None:
    """The set with hard labels, and undistilled images with true labels and with those of the set."""
    hard = hard_labels(distilled.labels)
    sets = {("distilled", "hard"): with_schedule_of(distilled, distilled.images, hard)}
    for images, control in undistilled_sets(distilled, dataset_of(experiment, name)).items():
        sets[images, "true"] = control
        labels = distilled.labels
        sets[images, "distilled"] = with_schedule_of(distilled, control.images, labels)
    for (images, labels), control in sets.items():
        columns = {"images": images, "labels": labels}
        measure_scratch(experiment, control, name, networks=networks, **columns)


def controls(experiment: Experiment, *, name: str) -> None:
    """Undistilled images under as many updates as the learned schedule of a set."""
    schedule_controls(experiment, name, dataset_of(experiment, name))


def augmented_training(experiment: Experiment, *, name: str) -> None:
    """Training from scratch on augmented images of a set and of its controls, as long as without."""
    for (images, labels), sets in set_and_controls(experiment, name).items():
        columns = {"images": images, "labels": labels, "augmented": True}
        measure_scratch(experiment, sets, name, networks=10, **columns)


def set_and_controls(experiment: Experiment, name: str) -> dict[tuple[str, str], du.DistilledSet]:
    """A set beside undistilled ones, by what their images and labels are."""
    distilled = experiment.load(name)
    undistilled = undistilled_sets(distilled, dataset_of(experiment, name)).items()
    sets = {(images, "true"): control for images, control in undistilled}
    return {("distilled", "distilled"): distilled, **sets}


def transfer(experiment: Experiment, *, name: str) -> None:
    """Other architectures trained from scratch by Adam on a set and on its controls, each with the step size that is
    best on validation images."""
    dataset, adam = dataset_of(experiment, name), Adam((3e-4, 1e-3, 1e-2), networks=5, seen=9_600)
    sets = set_and_controls(experiment, name).items()
    networks = experiment.some(TESTED_ON.items())
    for (network, factory), (content, images) in itertools.product(networks, sets):
        ways = {"": None}
        if "batch norm" in network:
            ways[", real statistics"] = dataset.train.images[:2500]
        for way, statistics in ways.items():
            options = {"statistics": statistics}
            accuracies = train_by_adam(experiment, dataset, images, factory, adam, **options)
            columns = {"set": name, "network": network, "training": ADAM + way}
            columns |= dict(zip(("images", "labels"), content, strict=True))
            experiment.measure(accuracies.values, step_sizes="constant", **columns)


# ----------------------------------------------------------------------------------- compressed sets
def compressed_set(experiment: Experiment, *, recipe: Compressed) -> None:
    """Fits a decoder with codes and soft labels, and distills them further if there is a schedule; networks are trained
    from scratch on the set and on its controls. Sets of other seeds than 0 are tested on LeNets.

    Controls are random real images as multi-formation, with soft labels of the same teacher or true ones.
    """
    dataset, seed = dataset_of(experiment, experiment.name), experiment.seed
    teacher, compressed, true = fit(experiment, dataset, recipe, seed=seed)
    if recipe.schedule:
        compressed = in_steps(compressed, **recipe.schedule)
        name = experiment.distill(compressed, dataset, **recipe.outer)
        measure_schedule(experiment, compressed, name, networks=100)
    else:
        name = experiment.save(compressed, dataset)
    options = {"steps": 1, "per_class": 4 * recipe.per_class, "seed": seed}
    real = multi_formation(*du.initialize(dataset, "real", **options), factor=2)
    labels = teach(teacher, real.decode().flatten(0, 1)).unflatten(0, real.labels.shape[:2])
    kind = ("distilled", "distilled") if recipe.schedule else ("compressed", "teacher")
    sets = {
        kind: compressed,
        ("compressed", "true"): true,
        ("random real", "teacher"): with_schedule_of(real, real.images, labels),
        ("random real", "true"): real,
    }
    networks = experiment.some(recipe.networks) if seed == 0 else ["LeNet"]
    for network, (content, images), way in itertools.product(networks, sets.items(), recipe.ways):
        if way == "" or content[1] != "true":  # soft labels are the stronger control
            measure_adam(experiment, dataset, images, name, network, content, way)


def fit(
    experiment: Experiment, dataset: du.Dataset, recipe: Compressed, *, seed: int
) -> tuple[nn.Module, du.DistilledSet, du.DistilledSet]:
    """A teacher, and the sets of `fit_decoder` with its labels and with true ones."""
    epochs, iterations = experiment.reduced(6), experiment.reduced(recipe.iterations)
    teacher = train_teacher(dataset, networks=TEACHERS, epochs=epochs, seed=seed)
    options = {"floats": recipe.floats, "codes": recipe.codes, "channels": recipe.channels}
    return teacher, *fit_decoder(dataset, teacher, iterations=iterations, seed=seed, **options)


def in_steps(
    compressed: du.DistilledSet, *, steps: int, per_class: int, **inner
) -> du.DistilledSet:
    """The first images of a compressed set in so many steps, with options of the inner loop."""
    n = per_class * compressed.labels.shape[-1]  # images in a step; the classes take turns
    tensors = (compressed.images, compressed.labels)
    content = [part.detach()[0, : steps * n].unflatten(0, (steps, n)) for part in tensors]
    return du.DistilledSet(*content, decoder=copy.deepcopy(compressed.decoder), **inner)


def measure_adam(
    experiment: Experiment,
    dataset: du.Dataset,
    images: du.DistilledSet,
    name: str,
    network: str,
    content: tuple[str, str],
    way: str = "",
) -> None:
    """Keeps what an architecture reaches from scratch by Adam, plain or augmented."""
    options = {"black": float(dataset.train.images.min())} if way == AUGMENTED else {}
    adam, factory = EVERY[network], TESTED_ON[network]
    accuracies = train_by_adam(experiment, dataset, images, factory, adam, **options)
    columns = dict(zip(("images", "labels"), content, strict=True))
    columns |= {"set": name, "network": network, "training": ADAM + way}
    experiment.measure(accuracies.values, step_sizes="constant", **columns)


def compressed_controls(experiment: Experiment, *, name: str) -> None:
    """A distilled set of codes before its distillation: by as many updates, and from scratch."""
    dataset, distilled, recipe = (
        dataset_of(experiment, name),
        experiment.load(name),
        COMPRESSED[name],
    )
    inner = {**recipe.schedule, "soft_labels": False, "label_smoothing": 0.5}
    taught, true = (
        in_steps(fitted, **inner) for fitted in fit(experiment, dataset, recipe, seed=0)[1:]
    )
    labels = {**label_kinds(distilled, true.labels), "teacher": taught.labels}
    sets = {
        kind: with_schedule_of(taught, taught.images, values) for kind, values in labels.items()
    }
    options = {"networks": 50, "images": "compressed", "set": name}
    compare_schedules(experiment, dataset, distilled, sets, du.LeNet, **options)
    content = ("compressed", "teacher, as many")
    measure_adam(experiment, dataset, sets["teacher"], name, "LeNet", content)


def whole_set(experiment: Experiment) -> None:
    """What all real images teach in five epochs."""
    for name in ("mnist", "fashion"):
        dataset, values = dataset_of(experiment, name), []
        for seed in range(experiment.reduced(2)):
            with du.seeded(seed):
                network = du.LeNet().to(experiment.device)
                du.train(network, dataset.train, epochs=experiment.reduced(5))
            values.append(du.accuracy(network, dataset.test))
        columns = {"images": "all real", "labels": "true", "training": "5 epochs"}
        experiment.measure(values, set=name, **columns)


# -------------------------------------------------------------------------------------------- rivals
@dataclass(frozen=True)
class Rival:
    """Whole images that a method improves in two minutes, from random real ones."""

    per_class: int
    method: str
    network: str = ""
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = ["rival", self.method, f"ipc{self.per_class}", self.network]
        return "-".join(words).strip("-").replace(" ", "-").lower()


MATCHED = {"matches": 10, "updates": 5, "batch_size": 32, "learning_rate": 0.1}
UNROLLED = {"batch_size": 512, "learning_rate": 0.05, "step_size_learning_rate": 0}
RIVAL_NETWORKS = {"LeNet": du.LeNet, "ConvNet-3": ConvNet}
DISTANCES = {"gradient matching": gradient_distance, "distribution matching": feature_distance}
RIVALS = (  # learning rates chosen on validation images
    *itertools.starmap(Rival, itertools.product((1, 10), UNDISTILLED)),
    Rival(1, "gradient matching", "LeNet", {"iterations": 1000, "learning_rate": 1.0}),
    Rival(1, "distribution matching", "LeNet", {"iterations": 2200, "learning_rate": 1.0}),
    Rival(1, "unrolled training", "LeNet", {**UNROLLED, "iterations": 200, "window": 60}),
    Rival(1, "gradient matching", "ConvNet-3", {"iterations": 280, "learning_rate": 1.0}),
    Rival(1, "distribution matching", "ConvNet-3", {"iterations": 700, "learning_rate": 0.3}),
    Rival(1, "unrolled training", "ConvNet-3", {**UNROLLED, "iterations": 100, "window": 20}),
    Rival(10, "gradient matching", "LeNet", {**MATCHED, "iterations": 70}),
    Rival(10, "distribution matching", "LeNet", {"iterations": 2000, "learning_rate": 1.0}),
    Rival(10, "unrolled training", "LeNet", {**UNROLLED, "iterations": 85, "window": 30}),
)


def rivalry(experiment: Experiment, *, rival: Rival) -> None:
    """Whole images improved by one of three methods in about the same time, or left as they are; two networks are
    trained on them from scratch."""
    mnist, begin, options = experiment.mnist, time.process_time(), dict(rival.options)
    kind = UNDISTILLED.get(rival.method, "real")
    images = du.initialize(mnist, kind, steps=1, per_class=rival.per_class)
    distilled = du.DistilledSet(*images)
    if options:
        options["iterations"] = experiment.reduced(options["iterations"])
    if rival.method == "unrolled training":
        distilled = du.DistilledSet(*images, epochs=300, **CONSTANT)
        options["unroll"] = NetworkPool(10, window=options.pop("window"))
        options |= {"validation_networks": 1, "validate_every": 10**6, "progress": False}
        du.distill(distilled, mnist, RIVAL_NETWORKS[rival.network], **options)
    elif rival.method in DISTANCES:
        distance = DISTANCES[rival.method]
        match(distilled, mnist, RIVAL_NETWORKS[rival.network], distance=distance, **options)
    columns = {"set": rival.name, "images": rival.method}
    columns["labels"] = "distilled" if rival.method == "unrolled training" else "true"
    seconds = [time.process_time() - begin]
    experiment.measure(seconds, metric="seconds", network=rival.network, **columns)
    for network, factory in RIVAL_NETWORKS.items():
        networks = experiment.reduced(20 if network == "LeNet" else 5)
        options = {"networks": networks, "epochs": experiment.reduced(300)}
        accuracies = train_from_scratch(distilled, mnist.test, factory, **options)
        columns |= {"network": network, "training": SCRATCH, "step_sizes": "constant"}
        experiment.measure(accuracies.values, **columns)


# --------------------------------------------------------------------------------------- experiments
SEEDED = ("mnist-ipc1-mf2-50updates", "mnist-ipc10-30updates", "mnist-ipc10-mf2-30updates")
SEEDS = (0, 1, 2)
SCHEDULED = tuple(filter(is_scheduled, RECIPES))


def seeds_of(name: str) -> Sequence[int]:
    return SEEDS if name in SEEDED or name in COMPRESSED else (0,)


EXPERIMENTS = {
    **{
        name: Recipe(partial(distilled_set, recipe=recipe), seeds_of(name))
        for name, recipe in RECIPES.items()
    },
    **{
        name: Recipe(partial(compressed_set, recipe=recipe), seeds_of(name))
        for name, recipe in COMPRESSED.items()
    },
    **{f"controls-{name}": Recipe(partial(controls, name=name), needs=name) for name in SCHEDULED},
    **{
        f"controls-{name}": Recipe(partial(compressed_controls, name=name), needs=name)
        for name in filter(is_scheduled, COMPRESSED)
    },
    "augmented": Recipe(partial(augmented_training, name=AUGMENTED_SET), needs=AUGMENTED_SET),
    "transfer": Recipe(partial(transfer, name=TRANSFERRED), needs=TRANSFERRED),
    "whole-set": Recipe(whole_set),
    **{rival.name: Recipe(partial(rivalry, rival=rival)) for rival in RIVALS},
}
