"""What training sets of equal size teach, from 4 to 314 kB: real images, compressed sets and distilled ones.

Networks are trained from scratch on all of them: LeNets, and `HELD_OUT`, which no set was made for. Sets distilled for
a learned schedule are tested by that, too.
"""

from __future__ import annotations

import copy
from functools import partial

import torch

import distill_utils as du
from study.experiments.experiment import Experiment, Recipe, find_set
from study.experiments.protocols import (
    Controls,
    hard_labels,
    measure_schedule,
    measure_scratch,
    neighbor_accuracy,
)
from study.methods.architectures import make_narrow_lenet
from study.methods.compression import (
    CODE_BITS,
    FewBits,
    compress,
    fit_decoder,
    real_images,
    stored_bytes,
    train_teacher,
)

SEEDS = (0, 1, 2)  # of the sets of 8 kB of MNIST; the others have one
HELD_OUT = ("ViT", "MLP-Mixer", "GRU over rows", "ConvNeXt-like")
TESTED = {"LeNet": 3, **dict.fromkeys(HELD_OUT, 1)}  # networks behind each row
SIZES = {"mnist": (4, 8, 31, 80, 314), "fashion": (8, 31)}  # kB
FORMATS = {"real": (28, 256), "small real": (14, 16)}  # pixels across, levels of gray
REAL = ("real", "true"), ("real", "teacher"), ("small real", "teacher")  # and their labels
GENERATED, CODED = dict(generator=True, beta=2.0), dict(generator=False, beta=0.5)
NARROW = {"whole": 1, "half": 2}  # a divisor of its width
COMPRESSED = {  # training from scratch
    "mnist-8kB": dict(GENERATED, kilobytes=8, codes=8, channels=(8, 8)),
    "mnist-31kB": dict(GENERATED, kilobytes=31, codes=12, channels=(16, 12)),
    "mnist-80kB": dict(GENERATED, kilobytes=80, codes=16, channels=(32, 16)),
    "mnist-314kB": dict(CODED, kilobytes=314, codes=24, channels=(32, 16)),
    "fashion-8kB": dict(GENERATED, kilobytes=8, codes=8, channels=(8, 8)),
    "fashion-31kB": dict(GENERATED, kilobytes=31, codes=12, channels=(16, 12)),
}
DISTILLED = {  # for a learned schedule, of so many steps, images in each and epochs
    "mnist-4kB-50updates": dict(
        CODED, kilobytes=4, codes=12, channels=(6, 4), size=(5, 30, 10), iterations=1600
    ),
}


# ---------------------------------------------------------------------------------------- compressed
def load_teacher(experiment: Experiment) -> du.Ensemble:
    """Four LeNets trained on all real images, which are kept for other experiments of the same dataset and seed."""
    name = f"teacher-{experiment.dataset.name}-{experiment.seed}{'-quick' * experiment.quick}.pt"
    path = experiment.checkpoints.with_name(name)
    if not path.exists():
        options = {"epochs": experiment.reduced(6), "seed": experiment.seed}
        teacher = train_teacher(experiment.dataset, networks=4, **options)
        with du.replacing(path) as unfinished:
            torch.save(teacher, unfinished)
    return torch.load(path, map_location=experiment.device, weights_only=False)


def make_compressed(experiment: Experiment, *, kilobytes: float, **options) -> du.DistilledSet:
    """As many images with soft labels as fit, nothing of which is distilled."""
    teacher, seed = load_teacher(experiment), {"seed": experiment.seed}
    options["iterations"] = experiment.reduced(15_000)
    fitted = fit_decoder(experiment.dataset, **options, **seed)
    return compress(experiment.dataset, teacher, *fitted, kilobytes=kilobytes, **seed)


def measure_bytes(experiment: Experiment, *, set: str, **columns: str) -> None:
    """Measures the size of a saved set."""
    size = stored_bytes(find_set(set, experiment.folder))
    experiment.measure([size], metric="bytes", network="", set=set, **columns)


def compressed(experiment: Experiment, **options) -> None:
    """A compressed set, with its labels and with the most probable classes alone."""
    fitted = make_compressed(experiment, **options)
    columns = {"set": experiment.save(fitted, from_scratch=True), "images": "compressed"}
    measure_bytes(experiment, **columns)
    measure_scratch(experiment, fitted, TESTED, labels="teacher", **columns)
    hard = du.DistilledSet(fitted.decode().detach(), hard_labels(fitted.labels.detach()))
    measure_scratch(experiment, hard, {"LeNet": 3}, labels="hard", **columns)


# --------------------------------------------------------------------------------------------- real
def real(experiment: Experiment, *, kilobytes: float) -> None:
    """Real images, losslessly compressed or small and of few gray levels, with true labels or a teacher's; and what
    the nearest of them says of a test image, without a network."""
    dataset, teacher = experiment.dataset, load_teacher(experiment)
    for images, labels in REAL:
        (size, levels), taught = FORMATS[images], teacher if labels == "teacher" else None
        options = {"size": size, "levels": levels, "seed": experiment.seed}
        chosen, stored = real_images(dataset, taught, kilobytes=kilobytes, **options)
        columns = {"set": f"{kilobytes} kB", "images": images, "labels": labels}
        experiment.measure([stored], metric="bytes", **columns | {"network": ""})
        measure_scratch(experiment, chosen, TESTED, **columns)
        if labels == "true":
            pair = chosen.decode().detach(), chosen.labels
            neighbor = neighbor_accuracy(*pair, dataset.test, 2, 1)
            experiment.measure([neighbor], **columns | {"network": "nearest neighbor"})


# ---------------------------------------------------------------------------------------- distilled
def distilled(
    experiment: Experiment, *, size: tuple[int, int, int], iterations: int, **options
) -> None:
    """A compressed set, distilled for a learned schedule through the rounding of its numbers; beside it, the set before
    distillation, whose step sizes were learned for as many iterations.

    Args:
        size: steps, images in each, and epochs.
        iterations: of distillation.
        options: of `make_compressed`.
    """
    start = in_steps(make_compressed(experiment, **options), size)
    control = Controls(experiment).with_learned_step_sizes(start, iterations=iterations)
    rates = {"learning_rate": 0.01, "step_size_learning_rate": 0.01}
    name = experiment.distill(start, iterations=iterations, batch_size=256, **rates)
    stored = experiment.load(name)
    measure_bytes(experiment, set=name, images="distilled", labels="distilled")
    measure_schedule(experiment, stored, labels="distilled", set=name)
    columns = {"set": name, "images": "compressed", "labels": "teacher"}
    measure_schedule(experiment, control, step_sizes="learned", **columns)
    measure_scratch(experiment, control, TESTED, **columns)
    measure_scratch(experiment, stored, TESTED, set=name, images="distilled", labels="distilled")


def in_steps(fitted: du.DistilledSet, size: tuple[int, int, int]) -> du.DistilledSet:
    """The first images of a compressed set in steps, of which the classes take turns, for Adam."""
    steps, n, epochs = size
    content = [part.detach()[0, : steps * n] for part in (fitted.images, fitted.labels)]
    content = [part.unflatten(0, (steps, -1)) for part in content]
    # Labels get 4 bits, as a small part of the set, and start soft, which makes them easier to learn.
    options = {"soft_labels": True, "label_smoothing": 0.1, "bits": fitted.bits}
    options |= {"optimizer": "Adam", "step_size": 0.003, "epochs": epochs}
    return du.DistilledSet(*content, decoder=copy.deepcopy(fitted.decoder), **options)


# ---------------------------------------------------------------------------- networks in place of sets
def networks(experiment: Experiment) -> None:
    """LeNets trained on all real images, which could be stored in place of a set, as floats or in few bits."""
    kinds = {"LeNet": du.LeNet}
    for name, divisor in NARROW.items():
        make_network = partial(make_narrow_lenet, divisor)
        kinds[f"LeNet, {name}, 4 bits"] = lambda make=make_network: FewBits(make())
    for name, make_network in kinds.items():
        with du.seeded(experiment.seed):
            network = make_network().to(experiment.device)
            du.train(network, experiment.dataset.train, epochs=experiment.reduced(5))
        bits = (CODE_BITS, 16) if isinstance(network, FewBits) else (32, 32)  # weights, biases
        sizes = [bits[w.dim() == 1] * w.numel() / 8 for w in network.parameters()]
        columns = {"network": name, "images": "all real", "labels": "true", "training": "5 epochs"}
        experiment.measure([du.accuracy(network, experiment.dataset.test)], **columns)
        experiment.measure([sum(sizes)], metric="bytes", **columns)


# --------------------------------------------------------------------------------------- experiments
RUNS = {
    **{name: partial(compressed, **options) for name, options in COMPRESSED.items()},
    **{name: partial(distilled, **options) for name, options in DISTILLED.items()},
    **{
        f"{dataset}-{size}kB-real": partial(real, kilobytes=size)
        for dataset, sizes in SIZES.items()
        for size in sizes
    },
    "mnist-networks": networks,
    "fashion-networks": networks,
}
EXPERIMENTS = {
    name: Recipe(run, SEEDS if name.startswith("mnist-8kB") else (0,)) for name, run in RUNS.items()
}
