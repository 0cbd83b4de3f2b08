"""The best sets for unseen initializations, and the controls and rivals that tell what they are worth."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from functools import partial

from torch import nn

import distill_utils as du
from study.experiments.experiment import Experiment, Recipe
from study.experiments.protocols import (
    AUGMENTED,
    NETWORKS,
    REAL_STATISTICS,
    UNDISTILLED,
    Scratch,
    compare_schedules,
    hard_labels,
    label_kinds,
    measure_schedule,
    measure_scratch,
    schedule_controls,
    undistilled_sets,
    with_schedule_of,
)
from study.methods.architectures import TESTED_ON
from study.methods.decoders import fit_decoder, multi_formation, teach, train_teacher
from study.methods.matching import feature_distance, gradient_distance, match
from study.methods.truncation import NetworkPool

SOFT = {"optimizer": "Adam", "soft_labels": True, "step_size": 0.003}
SMOOTHED = {**SOFT, "label_smoothing": 0.1}
CONSTANT = {"momentum": 0.9, "soft_labels": True, "step_size": 0.01}  # training from scratch itself
KEPT = {"batch_size": 512, "step_size_learning_rate": 0}  # keeps the step sizes
IMAGES, CODES = ("distilled", "distilled"), ("compressed", "teacher")  # and their labels
LENET = Scratch(5, (1e-3, 3e-3), seen=192_000)
LARGER = Scratch(3, (1e-3, 3e-3), seen=64_000)
EVERY = {  # networks that the compressed sets are tested on
    "LeNet": LENET,
    "MLP": LENET,
    "MLP-Mixer": LARGER,
    "ViT": LARGER,
    "GRU over rows": LARGER,
    "ConvNeXt-like": Scratch(2, (1e-3, 3e-3), seen=64_000),
    "ConvNet-3, instance norm": Scratch(2, (1e-3,), seen=32_000),
}


def is_scheduled(name: str) -> bool:
    """Whether a set is made for its learned schedule, and not for training from scratch."""
    return name.endswith("updates")


# ------------------------------------------------------------------------------------ distilled sets
def distilled_set(
    experiment: Experiment,
    *,
    size: tuple[int, int, int],
    inner: dict = CONSTANT,
    factor: int = 2,
    window: int | None = None,
    fewer: int = 4,
    **outer,
) -> None:
    """Distills a set and measures it with its learned schedule and from scratch, beside its controls. Sets of other
    seeds than 0 are measured by the protocol that they are made for.

    Args:
        size: steps, images of each class that networks see in a step, and epochs.
        inner: options of `du.DistilledSet`.
        factor: of multi-formation.
        window: updates by which an iteration trains one of a pool of networks on; for training from scratch.
        fewer: networks behind the accuracies of what the set is not made for, and of controls.
        outer: options of `du.Distillation`.
    """
    dataset, first, (steps, per_class, epochs) = experiment.dataset, experiment.seed == 0, size
    options = {"steps": steps, "per_class": per_class, "seed": experiment.seed}
    images, labels = du.initialize(dataset, "k-means", **options)
    make_set = du.DistilledSet if factor == 1 else partial(multi_formation, factor=factor)
    distilled = make_set(images, labels, epochs=epochs, **inner)
    if window:
        outer = {**KEPT, "unroll": NetworkPool(10, window=window), **outer}
    name = experiment.distill(distilled, **{"batch_size": 128, **outer})
    scheduled = is_scheduled(experiment.name)
    if scheduled or first:
        networks = 100 if scheduled else fewer
        measure_schedule(experiment, distilled, networks=networks, set=name)
    if first or not scheduled:
        networks = {"LeNet": Scratch(fewer if scheduled else 100)}
        measure_scratch(experiment, {IMAGES: distilled}, networks, set=name)
    if first:
        labels = distilled.labels.detach()
        hard = with_schedule_of(distilled, distilled.images, hard_labels(labels))
        sets = {("distilled", "hard"): hard}
        for images, control in undistilled_sets(distilled, dataset).items():
            sets[images, "true"] = control
            sets[images, "distilled"] = with_schedule_of(control, control.images, labels)
        measure_scratch(experiment, sets, {"LeNet": Scratch(fewer)}, set=name)


def compare_from_scratch(
    experiment: Experiment, *, name: str, variants: dict[str, dict[str, Scratch]]
) -> None:
    """Networks trained from scratch on a set and on undistilled images with true labels, in several variants."""
    distilled = experiment.load(name)
    undistilled = undistilled_sets(distilled, experiment.dataset).items()
    sets = {IMAGES: distilled} | {(images, "true"): control for images, control in undistilled}
    for variant, networks in variants.items():
        measure_scratch(experiment, sets, networks, variant, set=name)


# ----------------------------------------------------------------------------------- compressed sets
def compressed_set(
    experiment: Experiment, *, per_class: int, thorough: bool = False, **options
) -> None:
    """Fits a decoder with codes and soft labels, and distills them further for a learned schedule; networks are trained
    from scratch on the set and on its controls. Sets of other seeds than 0 are tested on LeNets.

    Controls are random real images as multi-formation, with soft labels of the same teacher or true ones.

    Args:
        per_class: stored images of each class in whose floats are codes, labels and decoder together.
        thorough: whether to test every network, and with augmentation, too.
        options: of `fit_decoder`.
    """
    dataset, content = experiment.dataset, CODES
    teacher, compressed, true = fit(experiment, per_class=per_class, **options)
    if is_scheduled(experiment.name):
        compressed, content = in_steps(compressed, **SMOOTHED), IMAGES
        outer = {"iterations": 600, "batch_size": 256, "learning_rate": 0.01}
        name = experiment.distill(compressed, **outer)
        measure_schedule(experiment, compressed, set=name)
    else:
        name = experiment.save(compressed)
    options = {"steps": 1, "per_class": 4 * per_class, "seed": experiment.seed}
    real = multi_formation(*du.initialize(dataset, "real", **options), factor=2)
    labels = teach(teacher, real.decode().flatten(0, 1))[None]
    taught = with_schedule_of(real, real.images, labels)
    sets = {content: compressed, ("compressed", "true"): true}
    sets |= {("random real", "teacher"): taught, ("random real", "true"): real}
    networks = EVERY if thorough and experiment.seed == 0 else {"LeNet": LENET}
    measure_scratch(experiment, sets, networks, set=name)
    if thorough:  # soft labels are the stronger control
        soft = {content: images for content, images in sets.items() if content[1] != "true"}
        measure_scratch(experiment, soft, networks, AUGMENTED, set=name)


def fit(
    experiment: Experiment, *, per_class: int, iterations: int, **options
) -> tuple[nn.Module, du.DistilledSet, du.DistilledSet]:
    """A teacher of four LeNets, and the sets of `fit_decoder` with its labels and with true ones."""
    dataset, epochs = experiment.dataset, experiment.reduced(6)
    teacher = train_teacher(dataset, networks=4, epochs=epochs, seed=experiment.seed)
    floats = per_class * dataset.classes * dataset.train.images[0].numel()
    options |= {"iterations": experiment.reduced(iterations), "seed": experiment.seed}
    return teacher, *fit_decoder(dataset, teacher, floats=floats, **options)


def in_steps(compressed: du.DistilledSet, **inner) -> du.DistilledSet:
    """The first 150 images of a compressed set, of which the classes take turns, in ten epochs of five steps."""
    tensors = (compressed.images, compressed.labels)
    content = [part.detach()[0, :150].unflatten(0, (5, 30)) for part in tensors]
    decoder = copy.deepcopy(compressed.decoder)
    return du.DistilledSet(*content, decoder=decoder, epochs=10, **inner)


def compressed_controls(experiment: Experiment) -> None:
    """A distilled set of codes before its distillation: by as many updates, and from scratch."""
    name = experiment.name.removeprefix("controls-")
    distilled, (_, *fitted) = experiment.load(name), fit(experiment, **COMPRESSED[name])
    taught, true = (in_steps(each, optimizer="Adam") for each in fitted)
    kinds = {**label_kinds(distilled, true.labels), "teacher": taught.labels}
    compare_schedules(experiment, distilled, taught, kinds, images="compressed", set=name)
    sets = {("compressed", "teacher, as many"): taught}
    measure_scratch(experiment, sets, {"LeNet": LENET}, set=name)


# --------------------------------------------------------------------------------------- few bytes
def few_bits_set(experiment: Experiment, *, bits: int) -> None:
    """Distills a set of codes further, through the rounding of its numbers to few bits."""
    start = experiment.load(START)
    options = {"soft_labels": True, "label_smoothing": 1e-6, "bits": bits, **start.inner}
    options |= {"decoder": start.decoder, "step_size": start.step_sizes.detach()}
    distilled = du.DistilledSet(start.images.detach(), start.labels, **options)
    rates = {"learning_rate": 5e-3, "step_size_learning_rate": 5e-3}
    name = experiment.distill(distilled, iterations=800, batch_size=256, **rates)
    stored = experiment.load(name)
    measure_schedule(experiment, stored, labels="distilled", set=name)
    measure_scratch(experiment, {IMAGES: stored}, {"LeNet": LENET}, set=name)


def whole_set(experiment: Experiment) -> None:
    """What all real images teach in five epochs."""
    for name, title in {"MNIST": "mnist", "FashionMNIST": "fashion"}.items():
        dataset, values = experiment.load_dataset(name), []
        for seed in range(experiment.reduced(2)):
            with du.seeded(seed):
                network = du.LeNet().to(experiment.device)
                du.train(network, dataset.train, epochs=experiment.reduced(5))
            values.append(du.accuracy(network, dataset.test))
        columns = {"images": "all real", "labels": "true", "training": "5 epochs"}
        experiment.measure(values, set=title, **columns)


# -------------------------------------------------------------------------------------------- rivals
@dataclass(frozen=True)
class Rival:
    """Whole images that a method improves for a network in two minutes, from random real ones; or undistilled ones."""

    per_class: int
    method: str
    network: str = ""
    iterations: int = 0
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = ["rival", self.method, f"ipc{self.per_class}", self.network]
        return "-".join(filter(None, words)).replace(" ", "-").lower()


GRADIENTS, FEATURES, UNROLLED = "gradient matching", "distribution matching", "unrolled training"
DISTANCES = {GRADIENTS: gradient_distance, FEATURES: feature_distance}
MATCHED = {"matches": 10, "updates": 5, "batch_size": 32, "learning_rate": 0.1}
RIVALS = (  # learning rates chosen on validation images
    *(Rival(per_class, images) for per_class in (1, 10) for images in UNDISTILLED),
    Rival(1, GRADIENTS, "LeNet", 1000, {"learning_rate": 1.0}),
    Rival(1, FEATURES, "LeNet", 2200, {"learning_rate": 1.0}),
    Rival(1, UNROLLED, "LeNet", 200, {"window": 60}),
    Rival(1, GRADIENTS, "ConvNet-3", 280, {"learning_rate": 1.0}),
    Rival(1, FEATURES, "ConvNet-3", 700, {"learning_rate": 0.3}),
    Rival(1, UNROLLED, "ConvNet-3", 100, {"window": 20}),
    Rival(10, GRADIENTS, "LeNet", 70, MATCHED),
    Rival(10, FEATURES, "LeNet", 2000, {"learning_rate": 1.0}),
    Rival(10, UNROLLED, "LeNet", 85, {"window": 30}),
)


def rivalry(experiment: Experiment, *, rival: Rival) -> None:
    """Whole images improved by one of three methods in about the same time, or left as they are; two networks are
    trained on them from scratch."""
    mnist, method, begin = experiment.dataset, rival.method, time.process_time()
    kind, unrolled = UNDISTILLED.get(method, "real"), method == UNROLLED
    images = du.initialize(mnist, kind, steps=1, per_class=rival.per_class)
    distilled = du.DistilledSet(*images, **({"epochs": 300, **CONSTANT} if unrolled else {}))
    if unrolled:
        options = {**KEPT, "learning_rate": 0.05, "unroll": NetworkPool(10, **rival.options)}
        options |= {"iterations": rival.iterations, "make_network": NETWORKS[rival.network]}
        experiment.improve(distilled, **options)
    elif method in DISTANCES:
        options = {
            "distance": DISTANCES[method],
            "iterations": experiment.reduced(rival.iterations),
        }
        match(distilled, mnist, NETWORKS[rival.network], **options, **rival.options)
    seconds, content = time.process_time() - begin, (method, "distilled" if unrolled else "true")
    columns = dict(zip(("images", "labels"), content, strict=True))
    columns |= {"set": rival.name, "network": rival.network}
    experiment.measure([seconds], metric="seconds", **columns)
    networks = {"LeNet": Scratch(20), "ConvNet-3": Scratch(5)}
    measure_scratch(experiment, {content: distilled}, networks, set=rival.name)


# --------------------------------------------------------------------------------------- experiments
TEN = dict(size=(2, 2, 25), inner=SMOOTHED, iterations=600, networks=2, fewer=10)
PLAIN = dict(factor=1, fewer=10)
# A name says: the dataset; images stored per class; multi-formation by its factor; the updates of the learned schedule,
# or training from scratch, whichever the set is made for.
RECIPES = {
    "mnist-ipc1-mf2-50updates": TEN,
    "mnist-ipc10-30updates": dict(PLAIN, size=(10, 1, 3), inner=SOFT, iterations=4000),
    "mnist-ipc10-mf2-30updates": dict(size=(10, 4, 3), inner=SOFT, iterations=600),
    "mnist-ipc10-mf2-100updates": dict(size=(10, 4, 10), inner=SMOOTHED, iterations=300),
    "mnist-ipc10-scratch": dict(
        PLAIN, size=(1, 10, 300), window=60, iterations=1400, batch_size=1024, learning_rate=0.05
    ),
    "mnist-ipc10-mf2-scratch": dict(
        size=(2, 20, 300), window=30, iterations=700, learning_rate=0.03
    ),
    "mnist-ipc50-mf2-scratch": dict(
        size=(10, 20, 60), window=30, iterations=400, learning_rate=0.02
    ),
    "fashion-ipc1-mf2-50updates": TEN,
}
HUNDRED = dict(per_class=10, codes=16, channels=(16, 12), iterations=15_000, thorough=True)
COMPRESSED = {  # in the floats of 10, 100 and 500 images, all codes, labels and the decoder counted
    "mnist-ipc1-decoded-50updates": dict(per_class=1, codes=12, channels=(6, 4), iterations=6_000),
    "mnist-ipc10-compressed": HUNDRED,
    "fashion-ipc10-compressed": HUNDRED,
    "mnist-ipc50-compressed": dict(per_class=50, codes=24, channels=(32, 16), iterations=6_000),
}
START, FEW_BITS = "mnist-ipc1-decoded-50updates", {"mnist-4kB-50updates": 4}  # bits
SEEDS = (0, 1, 2)
SEEDED = ("mnist-ipc1-mf2-50updates", "mnist-ipc10-30updates", "mnist-ipc10-mf2-30updates")
AUGMENTED_SET, TRANSFERRED = "mnist-ipc10-scratch", "mnist-ipc10-mf2-scratch"
TRANSFER = dict.fromkeys(TESTED_ON, Scratch(5, (3e-4, 1e-3, 1e-2), seen=9_600))
BATCH_NORM = {name: scratch for name, scratch in TRANSFER.items() if "batch norm" in name}
VARIANTS = {"": TRANSFER, REAL_STATISTICS: BATCH_NORM}
augmented = partial(
    compare_from_scratch, name=AUGMENTED_SET, variants={AUGMENTED: {"LeNet": Scratch(10)}}
)
transfer = partial(compare_from_scratch, name=TRANSFERRED, variants=VARIANTS)
EXPERIMENTS = {
    "augmented": Recipe(augmented, needs=AUGMENTED_SET),
    "transfer": Recipe(transfer, needs=TRANSFERRED),
    "whole-set": Recipe(whole_set),
    **{rival.name: Recipe(partial(rivalry, rival=rival)) for rival in RIVALS},
}
for name, options in RECIPES.items():
    seeds = SEEDS if name in SEEDED else (0,)
    EXPERIMENTS[name] = Recipe(partial(distilled_set, **options), seeds)
for name, bits in FEW_BITS.items():
    EXPERIMENTS[name] = Recipe(partial(few_bits_set, bits=bits), SEEDS, needs=START)
for name, options in COMPRESSED.items():
    EXPERIMENTS[name] = Recipe(partial(compressed_set, **options), SEEDS)
for name in filter(is_scheduled, (*RECIPES, *COMPRESSED)):
    controls = compressed_controls if name in COMPRESSED else schedule_controls
    EXPERIMENTS[f"controls-{name}"] = Recipe(controls, needs=name)
