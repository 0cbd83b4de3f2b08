"""The best distilled sets for unseen initializations, and the controls and rivals that tell what they are worth."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

import distill_utils as du
from study.experiments.protocols import (
    UNDISTILLED,
    compare_schedules,
    hard_labels,
    label_kinds,
    schedule_controls,
    train_from_scratch,
    with_schedule_of,
)
from study.methods.architectures import TESTED_ON, ConvNet
from study.methods.decoders import fit_decoder, multi_formation, teach, train_teacher
from study.methods.matching import feature_distance, gradient_distance, match
from study.methods.truncation import NetworkPool
from study.records import Results, Study

SOFT = {"optimizer": "Adam", "soft_labels": True, "step_size": 0.003}
SMOOTHED = {**SOFT, "label_smoothing": 0.1}
SCRATCH = {  # the inner loop is training from scratch itself, with its constant step size
    "inner": {"momentum": 0.9, "soft_labels": True, "step_size": 0.01}, "step_size_learning_rate": 0, "pool": 10,
}  # fmt: skip
LARGE = {**SCRATCH, "window": 30, "batch_size": 512, "few_tests": True}
STEPS = {"batch_size": 128, "inner": SMOOTHED}
IPC10 = {**STEPS, "steps": 10, "per_class": 1}
MF2 = {**STEPS, "factor": 2, "steps": 10, "per_class": 4, "few_tests": True}
# A name says: the dataset; images stored per class; multi-formation by its factor; the updates of the learned schedule,
# or training from scratch, whichever the set is made for. `per_class` counts the images that networks see in a step.
RECIPES = {
    "mnist-ipc1-mf2-50updates": {
        **STEPS, "factor": 2, "steps": 2, "per_class": 2, "epochs": 25, "iterations": 600, "networks": 2,
    },
    "mnist-ipc10-30updates": {**IPC10, "epochs": 3, "iterations": 4000, "inner": SOFT},
    "mnist-ipc10-mf2-30updates": {**MF2, "epochs": 3, "iterations": 600, "inner": SOFT},
    "mnist-ipc10-mf2-100updates": {**MF2, "epochs": 10, "iterations": 300},
    "mnist-ipc10-scratch": {
        **SCRATCH, "steps": 1, "per_class": 10, "epochs": 300, "window": 60, "iterations": 1400, "batch_size": 1024,
        "learning_rate": 0.05,
    },
    "mnist-ipc10-mf2-scratch": {
        **LARGE, "factor": 2, "steps": 2, "per_class": 20, "epochs": 300, "iterations": 700, "learning_rate": 0.03,
    },
    "mnist-ipc50-mf2-scratch": {
        **LARGE, "factor": 2, "steps": 10, "per_class": 20, "epochs": 60, "iterations": 400, "learning_rate": 0.02,
    },
}  # fmt: skip
RECIPES["fashion-ipc1-mf2-50updates"] = RECIPES["mnist-ipc1-mf2-50updates"]  # unchanged
CONTROLS = (
    "distilled images, hard labels", "random real images, true labels", "random real images, soft labels",
    "k-means centers, true labels", "k-means centers, soft labels",
)  # fmt: skip
AUGMENTED = (
    "mnist-ipc10-scratch"  # whose accuracy is compared with published ones that use augmentation
)
TRANSFERRED = ("mnist-ipc10-mf2-scratch",)  # to other architectures
RATES = (3e-4, 1e-3, 1e-2)  # step sizes of Adam that each of them may choose from
SHOWN = 9_600  # images that a network sees in training


def protocol(name: str) -> str:
    """What the set of that name is made for: the row that holds its main accuracy."""
    return "from scratch" if name.endswith("-scratch") else "learned schedule"


def dataset_of(study: Study, name: str) -> du.Dataset:
    """The dataset that a set's name begins with."""
    return getattr(study, name.partition("-")[0])


def initial_set(images: du.Pair, *, factor: int, epochs: int, inner: dict) -> du.DistilledSet:
    """The set that a recipe begins with, of images of full size."""
    if factor > 1:
        return multi_formation(*images, factor=factor, epochs=epochs, **inner)
    return du.DistilledSet(*images, epochs=epochs, **inner)


def distilled_set(
    study: Study, *, steps: int, per_class: int, epochs: int, inner: dict, factor: int = 1, pool: int | None = None,
    window: int | None = None, seed: int = 0, **options,
) -> tuple[du.DistilledSet, str]:  # fmt: skip
    """Distills a set by a recipe; returns it with its file's name."""
    dataset = dataset_of(study, study.name)
    centers = du.initialize(dataset, "k-means", steps=steps, per_class=per_class, seed=seed)
    distilled = initial_set(centers, factor=factor, epochs=epochs, inner=inner)
    unroll = NetworkPool(pool, window=window) if pool else du.unroll
    return distilled, study.distill(
        distilled, dataset, du.LeNet, unroll=unroll, seed=seed, **options
    )


def best_set(study: Study, *, few_tests: bool = False, **recipe) -> None:
    """Distills a set and measures it with its learned schedule and from scratch, beside its controls.

    `few_tests` saves time where images are many: only the protocol that the set is made for gets all networks.
    """
    dataset, networks = dataset_of(study, study.name), max(1, study.networks // 2)
    few = max(1, networks // (25 if few_tests else 10))
    main = protocol(study.name)
    tested = {
        row: few if few_tests and row != main else networks
        for row in ("learned schedule", "from scratch")
    }
    distilled, *files = distilled_set(study, **recipe)
    found = du.evaluate(distilled, dataset.test, du.LeNet, networks=tested["learned schedule"])
    study.add("learned schedule", found.values, files=files)
    found = train_from_scratch(distilled, dataset.test, du.LeNet, networks=tested["from scratch"])
    study.add("from scratch", found.values, files=files)
    soft = distilled.labels
    undistilled = undistilled_sets(dataset, **recipe).values()
    pairs = [(distilled.images, hard_labels(soft))]
    pairs += [(each.images, labels) for each in undistilled for labels in (each.labels, soft)]
    for title, (images, labels) in zip(CONTROLS, pairs, strict=True):
        found = train_from_scratch(
            with_schedule_of(distilled, images, labels), dataset.test, du.LeNet, networks=few
        )
        study.add(f"control: {title}", found.values)


def another_seed(study: Study, *, name: str, seed: int) -> None:
    """Another distillation by the recipe of a set, measured by the protocol that it is made for."""
    recipe = {key: value for key, value in RECIPES[name].items() if key != "few_tests"}
    distilled, *files = distilled_set(study, seed=seed, **recipe)
    test = train_from_scratch if protocol(name) == "from scratch" else du.evaluate
    found = test(
        distilled, dataset_of(study, name).test, du.LeNet, networks=max(1, study.networks // 2)
    )
    study.add(protocol(name), found.values, files=files)


def stored_set(study: Study, name: str) -> du.DistilledSet:
    """The set that the experiment of that name has distilled."""
    return Results(study.folder).load_set(name, protocol(name), device=study.device)


def controls(study: Study, *, name: str) -> None:
    """Undistilled images under as many updates as the learned schedule of a set."""
    networks = max(1, study.networks // 4)
    schedule_controls(study, dataset_of(study, name), stored_set(study, name), networks=networks)


def undistilled_sets(
    dataset: du.Dataset, *, steps: int, per_class: int, factor: int = 1, **_
) -> dict[str, du.DistilledSet]:  # fmt: skip
    """Undistilled images with true labels, as many as a recipe asks for and in its parametrization."""
    images = {
        title: du.initialize(dataset, kind, steps=steps, per_class=per_class)
        for title, kind in UNDISTILLED.items()
    }
    return {
        title: initial_set(pair, factor=factor, epochs=1, inner={})
        for title, pair in images.items()
    }


def set_and_controls(study: Study, name: str) -> dict[str, du.DistilledSet]:
    """A stored set beside undistilled ones."""
    return {
        "distilled": stored_set(study, name),
        **undistilled_sets(dataset_of(study, name), **RECIPES[name]),
    }


def augmented_training(study: Study, *, name: str = AUGMENTED) -> None:
    """Training from scratch on augmented images of a set and of its controls, as long as without."""
    dataset = dataset_of(study, name)
    options = {"networks": max(1, study.networks // 20), "black": float(dataset.train.images.min())}
    for title, images in set_and_controls(study, name).items():
        study.add(
            f"{name}, {title}", train_from_scratch(images, dataset.test, du.LeNet, **options).values
        )


def transfer(study: Study, *, name: str) -> None:
    """Other architectures trained from scratch by Adam on a set and on its controls, each with the step size that is
    best on validation images."""
    dataset, sets = dataset_of(study, name), set_and_controls(study, name)
    epochs = max(1, round(study.fraction * SHOWN / sets["distilled"].labels[..., 0].numel()))
    options = {"optimizer": "Adam", "batch_size": 64, "epochs": epochs, "side_by_side": False}
    for architecture, make_network in TESTED_ON.items():
        for title, images in sets.items():
            train = partial(train_from_scratch, images, make_network=make_network, **options)
            step_size = best_step_size(train, dataset, RATES)
            for way, more in ways_to_train(architecture, dataset).items():
                found = train(
                    dataset.test, networks=max(1, study.networks // 40), step_size=step_size, **more
                )
                study.add(f"{architecture}, {title}, {way}", found.values)


def best_step_size(
    train: Callable[..., du.Accuracies], dataset: du.Dataset, rates: Sequence[float]
) -> float:
    """The one that gives the best accuracy on validation images."""
    return max(
        rates,
        key=lambda rate: (
            train(dataset.validation, networks=1, step_size=rate, seed=du.VALIDATION_SEED).mean
        ),
    )


def ways_to_train(architecture: str, dataset: du.Dataset) -> dict[str, dict]:
    """Options of `train_from_scratch` by name."""
    ways = {"plain": {}}
    if "batch norm" in architecture:
        ways["real statistics"] = {"statistics": dataset.train.images[:2500]}
    return ways


# ------------------------------------------------------------------------------------------------------- decoded sets
def decoded_set(
    study: Study, *, steps: int, per_class: int, architectures: Sequence[str], ways: Sequence[str],
    schedule: dict | None = None, outer: dict | None = None, seed: int = 0, **options,
) -> None:  # fmt: skip
    """Fits a decoder with codes and soft labels, and distills them further if there is a `schedule`; architectures are
    trained from scratch on the set and on its controls. The seed is that of all but these networks.

    Controls are random real images as multi-formation, with soft labels of the same teacher or true ones.
    """
    dataset, begin = dataset_of(study, study.name), time.perf_counter()
    teacher, decoded, true_labels = fit(study, dataset, seed=seed, **options)
    study.distillation_seconds = round(time.perf_counter() - begin)
    if schedule:
        decoded = in_steps(decoded, **schedule, **SMOOTHED)
        file = study.distill(decoded, dataset, du.LeNet, seed=seed, **outer)
        found = du.evaluate(decoded, dataset.test, du.LeNet, networks=max(1, study.networks // 2))
        study.add("learned schedule", found.values, files=[file])
    else:
        file = study.save(decoded, dataset, seed=seed)
    real = du.initialize(dataset, "real", steps=steps, per_class=4 * per_class, seed=seed)
    packed = initial_set(real, factor=2, epochs=1, inner={})
    taught = teach(teacher, packed.decode().flatten(0, 1)).unflatten(0, packed.labels.shape[:2])
    taught = with_schedule_of(packed, packed.images, taught)
    sets = dict(zip(DECODED_ROWS, (decoded, true_labels, taught, packed), strict=True))
    for architecture, (title, images), way in itertools.product(architectures, sets.items(), ways):
        if way == "plain" or "true" not in title:  # soft labels are the stronger control
            found = train_by_adam(study, dataset, images, architecture, way)
            study.add(
                f"{architecture}, {title}, {way}",
                found.values,
                files=[file] * (images is decoded) or None,
            )


def fit(
    study: Study, dataset: du.Dataset, *, iterations: int, seed: int, **options
) -> tuple[nn.Module, du.DistilledSet, du.DistilledSet]:  # fmt: skip
    """A teacher, and the sets of `fit_decoder` with its labels and with true ones."""
    teacher = train_teacher(
        dataset, networks=TEACHERS, epochs=max(1, round(6 * study.fraction)), seed=seed
    )
    options["iterations"] = max(1, round(study.fraction * iterations))
    return teacher, *fit_decoder(dataset, teacher, seed=seed, **options)


def in_steps(decoded: du.DistilledSet, *, steps: int, per_class: int, **inner) -> du.DistilledSet:
    """The first images of a decoded set in so many steps, with options of the inner loop."""
    n = per_class * decoded.labels.shape[-1]  # images in a step; the classes take turns
    content = [
        part.detach()[0, : steps * n].unflatten(0, (steps, n))
        for part in (decoded.images, decoded.labels)
    ]
    return du.DistilledSet(*content, decoder=copy.deepcopy(decoded.decoder), **inner)


def train_by_adam(
    study: Study, dataset: du.Dataset, images: du.DistilledSet, architecture: str, way: str
) -> du.Accuracies:  # fmt: skip
    """An architecture trained from scratch on a set, plain or augmented, with its best step size of Adam."""
    rates, networks, shown = GENERAL[architecture]
    fill = float(dataset.train.images.min()) if way == "augmented" else None
    train = partial(
        train_from_scratch, images, make_network=TESTED_ON[architecture], optimizer="Adam", batch_size=64, black=fill,
        epochs=max(1, round(study.fraction * shown / images.labels[..., 0].numel())), side_by_side=False,
    )  # fmt: skip
    step_size = best_step_size(train, dataset, rates)
    return train(
        dataset.test, networks=max(1, study.networks * networks // 200), step_size=step_size
    )


def decoded_controls(study: Study, *, name: str) -> None:
    """A distilled decoded set before its distillation: by as many updates, and from scratch."""
    dataset, distilled, recipe = dataset_of(study, name), stored_set(study, name), DECODED[name]
    options = {key: recipe[key] for key in ("floats", "codes", "channels", "iterations")}
    fitted = fit(study, dataset, seed=0, **options)[1:]
    before, true_labels = (
        in_steps(each, **recipe["schedule"], optimizer="Adam") for each in fitted
    )
    kinds = {**label_kinds(distilled, true_labels.labels), "labels of the teacher": before.labels}
    sets = {kind: with_schedule_of(before, before.images, labels) for kind, labels in kinds.items()}
    options = {"title": BEFORE, "networks": max(1, study.networks // 4)}
    compare_schedules(study, dataset, distilled, sets, du.LeNet, **options)
    found = train_by_adam(study, dataset, sets["labels of the teacher"], "LeNet", "plain")
    study.add(f"LeNet, {BEFORE}, soft labels, plain", found.values)


BEFORE = "before distillation"


def whole_set(study: Study) -> None:
    """What all real images teach in five epochs."""
    for name in ("mnist", "fashion"):
        values, dataset, epochs = [], dataset_of(study, name), max(1, round(5 * study.fraction))
        for seed in range(max(1, study.networks // 100)):
            with du.seeded(seed):
                network = du.train(du.LeNet().to(study.device), dataset.train, epochs=epochs)
            values.append(du.accuracy(network, dataset.test))
        study.add(f"{name}, {epochs} epochs", values)


# ------------------------------------------------------------------------------------------------------------- rivals
def rivalry(study: Study, *, method: str, network: str, per_class: int, **options) -> None:
    """Whole images that start as random real ones and are improved by one of three methods in about the same time, or
    left as they are; two networks are trained on them from scratch."""
    mnist, begin = study.mnist, time.perf_counter()
    kind = UNDISTILLED.get(method, "real")
    distilled = du.DistilledSet(*du.initialize(mnist, kind, steps=1, per_class=per_class))
    if options:
        options["iterations"] = max(1, round(study.fraction * options["iterations"]))
    if method == "unrolled training":
        distilled = initial_set(
            (distilled.images, distilled.labels), factor=1, epochs=300, inner=SCRATCH["inner"]
        )
        options["unroll"] = NetworkPool(SCRATCH["pool"], window=options.pop("window"))
        options |= {"step_size_learning_rate": 0, "validation_networks": 1, "validate_every": 10**6}
        du.distill(distilled, mnist, RIVAL_NETWORKS[network], progress=False, **options)
    elif method in DISTANCES:
        match(distilled, mnist, RIVAL_NETWORKS[network], distance=DISTANCES[method], **options)
    study.distillation_seconds = round(time.perf_counter() - begin)
    for title, make_network in RIVAL_NETWORKS.items():
        networks = max(1, study.networks // (10 if title == "LeNet" else 40))
        study.add(
            title, train_from_scratch(distilled, mnist.test, make_network, networks=networks).values
        )


RIVAL_NETWORKS = {"LeNet": du.LeNet, "ConvNet-3": ConvNet}
DISTANCES = {"gradient matching": gradient_distance, "distribution matching": feature_distance}


TEACHERS = 4  # LeNets
DECODED_ROWS = (
    "decoded, soft labels", "decoded, true labels",
    "random real images, soft labels", "random real images, true labels",
)  # fmt: skip
GENERAL = {  # step sizes of Adam to choose from, networks tested, images that each sees in training
    "LeNet": ((1e-3, 3e-3), 5, 192_000), "MLP": ((1e-3, 3e-3), 5, 192_000),
    "MLP-Mixer": ((1e-3, 3e-3), 3, 64_000), "ViT": ((1e-3, 3e-3), 3, 64_000),
    "GRU over rows": ((1e-3, 3e-3), 3, 64_000), "ConvNeXt-like": ((1e-3, 3e-3), 2, 64_000),
    "ConvNet-3, instance norm": ((1e-3,), 2, 32_000),
}  # fmt: skip
EVERY = {"architectures": tuple(GENERAL), "ways": ("plain", "augmented")}
MAIN = {"architectures": ("LeNet",), "ways": ("plain",)}
DECODED = {  # floats of 10, 100 and 500 images, all codes, labels and the decoder counted
    "mnist-ipc1-decoded-50updates": {
        "floats": 7_840, "steps": 1, "per_class": 1, "codes": 12, "channels": [6, 4], "iterations": 6_000,
        **MAIN,
        "schedule": {"steps": 5, "per_class": 3, "epochs": 10},
        "outer": {"iterations": 600, "batch_size": 256, "learning_rate": 0.01},
    },
    **{
        name: {
            **EVERY, "floats": 78_400, "steps": 1, "per_class": 10, "codes": 16, "channels": [16, 12],
            "iterations": 15_000,
        }
        for name in ("mnist-ipc10-compressed", "fashion-ipc10-compressed")
    },
    "mnist-ipc50-compressed": {
        "floats": 392_000, "steps": 1, "per_class": 50, "codes": 24, "channels": [32, 16], "iterations": 6_000,
        **MAIN,
    },
}  # fmt: skip
# of the decoded sets
DISTILLED = tuple(name for name, recipe in DECODED.items() if "schedule" in recipe)
SCHEDULED = tuple(name for name in RECIPES if protocol(name) == "learned schedule")
# distilled three times
SEEDED = ("mnist-ipc1-mf2-50updates", "mnist-ipc10-30updates", "mnist-ipc10-mf2-30updates")
# more than one image per class
MATCHED = {"matches": 10, "updates": 5, "batch_size": 32, "learning_rate": 0.1}
UNROLLED = {"window": 30, "batch_size": 512, "learning_rate": 0.05}
RIVALS = {  # two minutes each; learning rates chosen on validation images
    "-".join(["rival", method.replace(" ", "-"), f"ipc{per_class}", *([network.lower()] if network else [])]): {
        "method": method, "network": network, "per_class": per_class, **options,
    }
    for per_class, network, method, options in (
        (1, "", "random real images", {}),
        (1, "", "k-means centers", {}),
        (1, "LeNet", "gradient matching", {"iterations": 1000, "learning_rate": 1.0}),
        (1, "LeNet", "distribution matching", {"iterations": 2200, "learning_rate": 1.0}),
        (1, "LeNet", "unrolled training", {**UNROLLED, "iterations": 200, "window": 60}),
        (1, "ConvNet-3", "gradient matching", {"iterations": 280, "learning_rate": 1.0}),
        (1, "ConvNet-3", "distribution matching", {"iterations": 700, "learning_rate": 0.3}),
        (1, "ConvNet-3", "unrolled training", {**UNROLLED, "iterations": 100, "window": 20}),
        (10, "", "random real images", {}),
        (10, "", "k-means centers", {}),
        (10, "LeNet", "gradient matching", {**MATCHED, "iterations": 70}),
        (10, "LeNet", "distribution matching", {"iterations": 2000, "learning_rate": 1.0}),
        (10, "LeNet", "unrolled training", {**UNROLLED, "iterations": 85}),
    )
}  # fmt: skip
NEEDS = {  # experiments that load the set of another one
    "augmented": AUGMENTED,
    **{f"transfer-{name}": name for name in TRANSFERRED},
    **{f"controls-{name}": name for name in (*SCHEDULED, *DISTILLED)},
}
EXPERIMENTS: dict[str, Callable[[Study], None]] = {
    **{name: partial(best_set, **recipe) for name, recipe in RECIPES.items()},
    **{
        f"{name}-seed{seed}": partial(another_seed, name=name, seed=seed)
        for name in SEEDED
        for seed in (1, 2)
    },
    **{name: partial(decoded_set, **recipe) for name, recipe in DECODED.items()},
    **{
        f"{name}-seed{seed}": partial(decoded_set, **{**recipe, **MAIN}, seed=seed)
        for name, recipe in DECODED.items()
        for seed in (1, 2)
    },
    "whole-set": whole_set,
    "augmented": augmented_training,
    **{f"transfer-{name}": partial(transfer, name=name) for name in TRANSFERRED},
    **{f"controls-{name}": partial(controls, name=name) for name in SCHEDULED},
    **{f"controls-{name}": partial(decoded_controls, name=name) for name in DISTILLED},
    **{name: partial(rivalry, **options) for name, options in RIVALS.items()},
}
