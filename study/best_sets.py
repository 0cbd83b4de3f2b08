"""The best distilled sets for unseen initializations, and the controls that tell what they are worth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import distill_utils as du
from study.controls import schedule_controls
from study.evaluation import ARCHITECTURES, hard_labels, train_from_scratch, with_schedule_of
from study.parametrizations import augmented
from study.records import Results, Study
from study.truncation import NetworkPool

SOFT = {"optimizer": "Adam", "soft_labels": True, "step_size": 0.003}
SMOOTHED = {**SOFT, "label_smoothing": 0.1}
SCRATCH = {  # the inner loop is training from scratch itself, with its constant step size
    "inner": {"momentum": 0.9, "soft_labels": True, "step_size": 0.01}, "step_size_learning_rate": 0, "pool": 10,
}  # fmt: skip
LARGE = {**SCRATCH, "window": 30, "batch_size": 512, "few_tests": True}
STEPS = {"batch_size": 128, "inner": SMOOTHED}
IPC10 = {**STEPS, "steps": 10, "per_class": 1}
MF2 = {**STEPS, "factor": 2, "steps": 10, "per_class": 4, "few_tests": True}
# A name says: images stored per class; multi-formation by its factor; the updates of the learned schedule, or
# training from scratch, whichever the set is made for. `per_class` counts the images that networks see in a step.
RECIPES = {
    "mnist-ipc1-50steps": {**STEPS, "steps": 1, "per_class": 1, "epochs": 50, "iterations": 100, "networks": 8},
    "mnist-ipc1-mf2-50steps": {
        **STEPS, "factor": 2, "steps": 2, "per_class": 2, "epochs": 25, "iterations": 600, "networks": 2,
    },
    "mnist-ipc10-30steps": {**IPC10, "epochs": 3, "iterations": 4000, "inner": SOFT},
    "mnist-ipc10-mf2-30steps": {**MF2, "epochs": 3, "iterations": 600, "inner": SOFT},
    "mnist-ipc10-100steps": {**IPC10, "epochs": 10, "iterations": 2000},
    "mnist-ipc10-mf2-100steps": {**MF2, "epochs": 10, "iterations": 300},
    "mnist-ipc10-scratch": {
        **SCRATCH, "steps": 1, "per_class": 10, "epochs": 300, "window": 60, "iterations": 1400, "batch_size": 1024,
        "learning_rate": 0.05,
    },
    "mnist-ipc10-mf2-scratch": {
        **LARGE, "factor": 2, "steps": 2, "per_class": 20, "epochs": 300, "iterations": 700, "learning_rate": 0.03,
    },
    "mnist-ipc50-scratch": {
        **LARGE, "steps": 2, "per_class": 25, "epochs": 300, "iterations": 1000, "learning_rate": 0.02,
    },
    "mnist-ipc50-mf2-scratch": {
        **LARGE, "factor": 2, "steps": 10, "per_class": 20, "epochs": 60, "iterations": 400, "learning_rate": 0.02,
    },
}  # fmt: skip
CONTROLS = (
    "distilled images, hard labels", "random real images, true labels", "random real images, soft labels",
    "k-means centers, true labels", "k-means centers, soft labels",
)  # fmt: skip
AUGMENTED = "mnist-ipc10-scratch"  # whose accuracy is compared with published ones that use augmentation
TRANSFERRED = ("mnist-ipc1-50steps", "mnist-ipc10-scratch", "mnist-ipc10-mf2-scratch")  # to other architectures


def protocol(name: str) -> str:
    """What the set of that name is made for: the row that holds its main accuracy."""
    return "from scratch" if name.endswith("-scratch") else "learned schedule"


def initial_set(images: du.Pair, *, factor: int, epochs: int, inner: dict) -> du.DistilledSet:
    """The set that a recipe begins with, of images of full size."""
    if factor > 1:
        return du.MultiFormation.from_images(*images, factor=factor, epochs=epochs, **inner)
    return du.DistilledSet(*images, epochs=epochs, **inner)


def distilled_set(
    study: Study, *, steps: int, per_class: int, epochs: int, inner: dict, factor: int = 1, pool: int | None = None,
    window: int | None = None, seed: int = 0, **options,
) -> tuple[du.DistilledSet, str]:  # fmt: skip
    """Distills a set by a recipe; returns it with its file's name."""
    centers = du.init_from_kmeans(study.mnist, steps=steps, per_class=per_class, seed=seed)
    distilled = initial_set(centers, factor=factor, epochs=epochs, inner=inner)
    unroll = NetworkPool(pool, window=window) if pool else du.unroll
    return distilled, study.distill(distilled, study.mnist, du.LeNet, unroll=unroll, seed=seed, **options)


def best_set(study: Study, *, few_tests: bool = False, **recipe) -> None:
    """Distills a set and measures it with its learned schedule and from scratch, beside its controls.

    `few_tests` saves time where images are many: only the protocol that the set is made for gets all networks.
    """
    mnist, networks = study.mnist, max(1, study.networks // 2)
    few = max(1, networks // (25 if few_tests else 10))
    main = protocol(study.name)
    tested = {row: few if few_tests and row != main else networks for row in ("learned schedule", "from scratch")}
    counts = {name: recipe[name] for name in ("steps", "per_class")}
    kmeans, real = du.init_from_kmeans(mnist, **counts), du.init_from_real(mnist, **counts)
    build = partial(initial_set, factor=recipe.get("factor", 1), epochs=recipe["epochs"], inner=recipe["inner"])
    centers, sample = build(kmeans).images, build(real).images
    distilled, *files = distilled_set(study, **recipe)
    found = du.evaluate(distilled, mnist.test, du.LeNet, networks=tested["learned schedule"])
    study.add("learned schedule", found.values, files=files)
    found = train_from_scratch(distilled, mnist.test, du.LeNet, networks=tested["from scratch"])
    study.add("from scratch", found.values, files=files)
    soft = distilled.labels
    pairs = (
        (distilled.images, hard_labels(soft)), (sample, real[1]), (sample, soft), (centers, kmeans[1]), (centers, soft),
    )  # fmt: skip
    for title, (images, labels) in zip(CONTROLS, pairs, strict=True):
        found = train_from_scratch(with_schedule_of(distilled, images, labels), mnist.test, du.LeNet, networks=few)
        study.add(f"control: {title}", found.values)


def another_seed(study: Study, *, name: str, seed: int) -> None:
    """Another distillation by the recipe of a set, measured by the protocol that it is made for."""
    recipe = {key: value for key, value in RECIPES[name].items() if key != "few_tests"}
    distilled, *files = distilled_set(study, seed=seed, **recipe)
    test = train_from_scratch if protocol(name) == "from scratch" else du.evaluate
    found = test(distilled, study.mnist.test, du.LeNet, networks=max(1, study.networks // 2))
    study.add(protocol(name), found.values, files=files)


def stored_set(study: Study, name: str) -> du.DistilledSet:
    """The set that the experiment of that name has distilled."""
    return Results(study.folder).load_set(name, protocol(name), device=study.device)


def controls(study: Study, *, name: str) -> None:
    """Undistilled images under as many updates as the learned schedule of a set."""
    schedule_controls(study, stored_set(study, name), networks=max(1, study.networks // 4))


def augmented_training(study: Study, *, name: str = AUGMENTED, copies: int = 10) -> None:
    """Training from scratch on augmented copies of a set and of its controls, with more images in each epoch."""
    mnist, distilled = study.mnist, stored_set(study, name)
    counts = {"steps": distilled.steps, "per_class": RECIPES[name]["per_class"]}
    for title, (images, labels) in {
        "distilled": (distilled.images.detach(), distilled.labels.detach()),
        "random real images": du.init_from_real(mnist, **counts),
        "k-means centers": du.init_from_kmeans(mnist, **counts),
    }.items():
        images = augmented(images.flatten(0, 1), black=float(mnist.train.images.min()), copies=copies)
        copied = du.DistilledSet(images[None], labels.flatten(0, 1).repeat(copies, 1)[None])
        found = train_from_scratch(copied, mnist.test, du.LeNet, networks=max(1, study.networks // 50))
        study.add(f"{name}, {title}", found.values)


def transfer(study: Study, *, name: str) -> None:
    """Other architectures trained from scratch on a set distilled for LeNet, and on random real images."""
    mnist, distilled = study.mnist, stored_set(study, name)
    images, labels = du.init_from_real(mnist, steps=distilled.steps, per_class=RECIPES[name]["per_class"])
    sample = initial_set((images, labels), factor=RECIPES[name].get("factor", 1), epochs=distilled.epochs, inner={})
    real = with_schedule_of(distilled, sample.images, labels)
    for architecture, make_network in ARCHITECTURES.items():
        options = {"networks": max(1, study.networks // 100), "side_by_side": False}
        for title, each in (("distilled", distilled), ("random real images", real)):
            found = train_from_scratch(each, mnist.test, make_network, **options)
            study.add(f"{architecture}, {title}", found.values)


def whole_set(study: Study) -> None:
    """What all real images teach: the upper bound of every set."""
    values, epochs = [], max(1, round(5 * study.fraction))
    for seed in range(max(1, study.networks // 100)):
        with du.seeded(seed):
            network = du.train(du.LeNet().to(study.device), study.mnist.train, epochs=epochs)
        values.append(du.accuracy(network, study.mnist.test))
    study.add("ordinary training", values)


SCHEDULED = tuple(name for name in RECIPES if protocol(name) == "learned schedule")
SEEDED = ("mnist-ipc1-mf2-50steps", "mnist-ipc10-30steps", "mnist-ipc10-mf2-30steps")  # distilled three times
NEEDS = {  # experiments that load the set of another one
    "augmented": AUGMENTED,
    **{f"transfer-{name}": name for name in TRANSFERRED},
    **{f"controls-{name}": name for name in SCHEDULED},
}
EXPERIMENTS: dict[str, Callable[[Study], None]] = {
    **{name: partial(best_set, **recipe) for name, recipe in RECIPES.items()},
    **{f"{name}-seed{seed}": partial(another_seed, name=name, seed=seed) for name in SEEDED for seed in (1, 2)},
    "whole-set": whole_set,
    "augmented": augmented_training,
    **{f"transfer-{name}": partial(transfer, name=name) for name in TRANSFERRED},
    **{f"controls-{name}": partial(controls, name=name) for name in SCHEDULED},
}
