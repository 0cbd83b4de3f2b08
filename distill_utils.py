"""Dataset distillation: learn a few images that train a network, by differentiating through its training.

After Wang, Zhu, Torralba and Efros, "Dataset Distillation", 2018 (arXiv 1811.10959). The pieces stand in the
order the data flows (what is asked of arguments is in `checks`; what saves time and memory, as the `Stack` of
networks, in `performance`; seeds, processes and checkpoints in `runs`; the command line in `command_line`):

    data            Split, Dataset, make_dataset, load_mnist, load_torchvision, load_digits, relabel
    networks        LeNet, fixed_initialization, one_of
    distilled set   real_start, noise_start, k_means_start, tiled, DistilledSet, load
    inner loop      inner_loop, unroll
    outer loop      outer_loss, distill, History
    evaluation      accuracy, evaluate, Accuracies
    baselines       train, retrain, tuned
    figures         draw_images, draw_history

A *network factory* is any callable that takes no arguments and returns a freshly initialized `nn.Module`, whose
output for images [n, c, h, w] is class scores [n, classes]. Networks stay in training mode throughout, so choose ones
without dropout and batch normalization. Several networks of a factory are trained at once, as a `Stack`.
Images are "normalized" when `(pixel - mean) / std` has been applied to pixels in 0..1. Accuracies are in percent.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import higher
import matplotlib.pyplot as plt
import safetensors
import safetensors.torch
import sklearn.cluster
import sklearn.datasets
import sklearn.model_selection
import torch
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from checks import (
    check_class_size,
    check_factory,
    check_file,
    check_images_and_labels,
    check_network,
    check_outer_loop,
    check_pixels,
    check_step_sizes,
    check_tiles,
    check_training,
    check_weights,
    require,
    require_one_of,
    require_positive,
)
from performance import Segment, in_parts, side_by_side, stack_size
from runs import (
    Checkpoint,
    atomic_write,
    average_over_processes,
    chunks,
    mixed,
    pick_device,
    process_rank,
    progress_bar,
    seeded,
    stop_on_interrupt,
)

NetworkFactory = Callable[[], nn.Module]


# ---------------------------------------------------------------------------------------------- data


class DatasetUnavailable(RuntimeError):
    """A dataset is neither on disk nor can it be downloaded."""


class Split(NamedTuple):
    """Images and their labels, on one device."""

    images: Tensor  # [n, c, h, w], float32, normalized
    labels: Tensor  # [n], int64, 0..classes-1


@dataclass(frozen=True)
class Dataset:
    """A labelled image set held whole on one device, split three ways."""

    name: str
    mean: float  # of the training pixels, in 0..1
    std: float
    train: Split = field(repr=False)
    validation: Split = field(repr=False)  # for every choice of a setting
    test: Split = field(repr=False)  # for final figures alone
    classes: int


def make_dataset(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, validation: int, device: torch.device | str
) -> Dataset:
    """A `Dataset` from pixels [n, c, h, w] in 0..1 and integer labels [n], as (pixels, labels) pairs.

    `validation` images are taken out of `train` by a fixed shuffle, the same in every run. Raises ValueError where
    shapes or ranges are off.
    """
    check_pixels(train, test, validation)
    pixels, labels = train
    mean, std = float(pixels.float().mean()), float(pixels.float().std())
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))

    def split(pixels: Tensor, labels: Tensor) -> Split:
        return Split(((pixels.float() - mean) / std).to(device), labels.long().to(device))

    held_out, kept = order[:validation], order[validation:]
    train, validation = split(pixels[kept], labels[kept]), split(pixels[held_out], labels[held_out])
    return Dataset(name, mean, std, train, validation, split(*test), classes=int(labels.max()) + 1)


TORCHVISION = ("MNIST", "FashionMNIST", "KMNIST", "USPS", "SVHN")  # what load_torchvision knows


def load_torchvision(name: str, root: str | Path, *, device: torch.device | str) -> Dataset:
    """One of torchvision's datasets MNIST, FashionMNIST, KMNIST, USPS and SVHN, downloaded to `root` where missing.

    Images are made grey and 28×28 where they are not; one training image in twelve is held out for validation.
    Raises DatasetUnavailable, with the remedy, where the dataset is neither in `root` nor downloadable.
    """
    require_one_of(TORCHVISION, name=name)
    require(not Path(root).is_file(), f"root='{root}': is a file; give the folder that holds the data, or is to")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            source = getattr(torchvision.datasets, name)
            splits = [{"split": "train"}, {"split": "test"}] if name == "SVHN" else [{"train": True}, {"train": False}]
            parts = [source(root, download=True, **split) for split in splits]
    except (OSError, RuntimeError) as error:
        where = f"a folder {name}/raw with its four files" if "MNIST" in name else "its two files"
        raise DatasetUnavailable(
            f"{name} is not in root='{root}' and could not be downloaded there ({type(error).__name__}). "
            f"Connect to the internet once, or copy {where} into root."
        ) from error
    train, test = (
        (small_and_grey(torch.as_tensor(part.data)), torch.as_tensor(part.labels if name == "SVHN" else part.targets))
        for part in parts
    )
    return make_dataset(name, train, test, validation=len(train[1]) // 12, device=device)


def small_and_grey(pixels: Tensor) -> Tensor:
    """Pixels [n, h, w] or [n, 3, h, w] in 0..255 as [n, 1, 28, 28] in 0..1."""
    pixels = (pixels[:, None] if pixels.dim() == 3 else pixels).float().mean(1, keepdim=True) / 255
    if pixels.shape[-2:] != (28, 28):
        pixels = F.interpolate(pixels, size=(28, 28), mode="bilinear", antialias=True)
    return pixels


def load_mnist(root: str | Path, *, device: torch.device | str) -> Dataset:
    """MNIST from `root`, downloaded where missing: 55,000 training, 5,000 validation and 10,000 test images.

    Raises DatasetUnavailable as `load_torchvision` does.
    """
    return load_torchvision("MNIST", root, device=device)


def load_digits(*, device: torch.device | str) -> Dataset:
    """scikit-learn's bundled handwritten digits: 1,297 training, 200 validation and 300 test images.

    The 8×8 scans are enlarged to 20×20 and set into the middle of 28×28, as MNIST's digits are.
    """
    digits = sklearn.datasets.load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 16  # [1797, 1, 8, 8]
    pixels = F.pad(F.interpolate(pixels, size=(20, 20), mode="bilinear"), [4, 4, 4, 4])
    kept, held_out = sklearn.model_selection.train_test_split(
        range(len(pixels)), test_size=300, random_state=0, stratify=digits.target
    )
    labels = torch.from_numpy(digits.target)
    train, test = ((pixels[rows], labels[rows]) for rows in (kept, held_out))
    return make_dataset("scikit-learn digits", train, test, validation=200, device=device)


def relabel(dataset: Dataset, source: int, target: int) -> Dataset:
    """`dataset` with the images of class `source` labelled `target`: what the paper's data poisoning attack teaches."""
    for name, label in {"source": source, "target": target}.items():
        require(0 <= label < dataset.classes, f"{name}={label}: give a class, 0 to {dataset.classes - 1}")

    def attacked(split: Split) -> Split:
        return Split(split.images, split.labels.where(split.labels != source, target))

    splits = {name: attacked(getattr(dataset, name)) for name in ("train", "validation", "test")}
    return replace(dataset, name=f"{dataset.name}, {source} as {target}", **splits)


# ------------------------------------------------------------------------------------------ networks


class LeNet(nn.Sequential):
    """The paper's LeNet for 28×28 images: Xavier-normal weights, zero biases, drawn from torch's random state."""

    def __init__(self, *, classes: int = 10, initialize: Callable[[Tensor], object] = nn.init.xavier_normal_) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),  # [n, 6, 14, 14]
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),  # [n, 16, 5, 5]
            nn.Flatten(),
            nn.Linear(400, 120), nn.ReLU(),
            nn.Linear(120, 84), nn.ReLU(),
            nn.Linear(84, classes),
        )  # fmt: skip
        for parameter in self.parameters():
            initialize(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)


def fresh_network(make_network: NetworkFactory, device: torch.device) -> nn.Module:
    """A new network of the factory's, on `device`; raises ValueError where it is none or has frozen weights."""
    check_factory(make_network)
    network = make_network().to(device)
    check_weights(network)
    return network


def fixed_initialization(make_network: NetworkFactory, *, seed: int) -> NetworkFactory:
    """A factory that returns copies of one network drawn from `seed`: the paper's known initialization."""
    with seeded(seed):
        network = fresh_network(make_network, torch.device("cpu"))
    return lambda: copy.deepcopy(network)


def one_of(networks: Sequence[nn.Module]) -> NetworkFactory:
    """A factory that returns one of `networks` at random: the paper's pretrained, unknown initialization."""
    require(len(networks) > 0, "networks: none given; train at least one")
    return lambda: networks[int(torch.randint(len(networks), ()))]


# ------------------------------------------------------------------------------------- distilled set


def real_start(dataset: Dataset, *, steps: int, per_class: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random training images [steps, n, c, h, w] and one-hot labels [steps, n, classes], n = per_class × classes.

    No image is drawn twice. Raises ValueError where a class has too few.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = []  # one [steps × per_class] tensor of rows of the training set for each class
    for label in range(dataset.classes):
        rows = (dataset.train.labels == label).nonzero().flatten().cpu()
        check_class_size(label, len(rows), steps=steps, per_class=per_class)
        columns.append(rows[torch.randperm(len(rows), generator=generator)[: steps * per_class]])
    rows = torch.stack(columns, dim=-1).reshape(steps, per_class * dataset.classes)
    return dataset.train.images[rows], F.one_hot(dataset.train.labels[rows], dataset.classes).float()


def noise_start(
    dataset: Dataset, *, steps: int, per_class: int = 1, std: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random pixels in the shape of `real_start`, and its labels.

    steps:      batches of images, one for each inner gradient step of an epoch
    per_class:  images of each class in a batch
    std:        standard deviation of normal pixels, for a start from noise, in normalized units; the paper's is 1
    seed:       of the pixels
    """
    labels = torch.eye(dataset.classes).repeat(steps, per_class, 1)
    shape = (*labels.shape[:2], *dataset.train.images.shape[1:])
    images = std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return images.to(dataset.train.images), labels.to(dataset.train.images)


def k_means_start(dataset: Dataset, *, steps: int, per_class: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """K-means centers of each class of the training images, and labels, as of `real_start`.

    With one image of each class, they are the means of the classes. Raises ValueError where a class has too few.
    """
    centers = []
    for label in range(dataset.classes):
        images = dataset.train.images[dataset.train.labels == label].flatten(1).cpu()
        check_class_size(label, len(images), steps=steps, per_class=per_class)
        clusters = sklearn.cluster.KMeans(steps * per_class, n_init=1, random_state=seed).fit(images.numpy())
        centers.append(torch.from_numpy(clusters.cluster_centers_))  # [steps × per_class, c × h × w]
    images = torch.stack(centers, dim=1).unflatten(-1, dataset.train.images.shape[1:])
    labels = torch.eye(dataset.classes).repeat(steps, per_class, 1)
    return images.reshape(*labels.shape[:2], *images.shape[2:]).to(dataset.train.images), labels.to(images)


def tiled(images: Tensor, labels: Tensor, *, tiles: int) -> tuple[Tensor, Tensor]:
    """A start for `DistilledSet(tiles=)`: images [steps, n, c, h, w] made smaller, tiles × tiles of them to an image.

    Gives images [steps, n / tiles², c, h, w], and the labels as they were. Raises ValueError where they do not fit.
    """
    steps, n, _, *size = images.shape
    check_tiles(size, tiles)
    require(
        n % tiles**2 == 0,
        f"tiles={tiles}: a step has {n} images; give a multiple of {tiles**2}, as with per_class={tiles**2}",
    )
    size = [length // tiles for length in size]
    small = F.interpolate(images.flatten(0, 1), size=size, mode="bilinear", antialias=True)
    grid = small.unflatten(0, (steps, -1, tiles, tiles))  # [steps, n / tiles², rows, columns, c, h / tiles, w / tiles]
    return grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(steps, -1, *images.shape[2:]), labels


class DistilledSet(nn.Module):
    """What is learned: images, their labels where asked, and a positive step size for each update.

    images:            [steps, n, c, h, w], normalized; step s trains on the n images of row s
    labels:            [steps, n, classes], probabilities
    epochs:            how often the steps are gone through; `updates` = steps × epochs
    step_size:         the start for every update, or one for each as a tensor [updates]
    learn_labels:      learn the labels as class scores
    label_smoothing:   how far these start towards uniform, above 0, at most 1: the score of a probability 0 would be
                       infinite, and near 0 and 1 scores hardly move
    share_step_sizes:  one step size per step, the same in every epoch, in place of one per update
    optimizer:         of the inner loop, SGD or Adam
    momentum:          of SGD, 0 ≤ momentum < 1
    tiles:             each image holds tiles × tiles smaller ones, which networks see enlarged to its size: more
                       images from as many pixels (multi-formation, Kim et al. 2022). Then `labels` are those of the
                       smaller ones, [steps, n × tiles², classes], as from `tiled`

    Raises ValueError where shapes or ranges are off.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        epochs: int = 1,
        step_size: float | Tensor = 0.02,
        learn_labels: bool = False,
        label_smoothing: float = 0.5,
        share_step_sizes: bool = False,
        optimizer: str = "SGD",
        momentum: float = 0.0,
        tiles: int = 1,
    ) -> None:
        super().__init__()
        check_images_and_labels(images, labels, tiles=tiles)
        check_training(epochs=epochs, label_smoothing=label_smoothing, optimizer=optimizer, momentum=momentum)
        labels = labels.to(images)
        self.steps, self.epochs, self.tiles = len(images), epochs, tiles
        self.optimizer, self.momentum = optimizer, momentum
        learned = self.steps if share_step_sizes else self.updates
        check_step_sizes(step_size, count=learned)
        step_sizes = torch.as_tensor(step_size, dtype=images.dtype, device=images.device)
        self.images = nn.Parameter(images.clone())
        # The inverse of softplus, log(exp(s) - 1), in the form that does not overflow for a large s.
        self.raw_step_sizes = nn.Parameter((step_sizes + (-torch.expm1(-step_sizes)).log()).expand(learned).clone())
        if learn_labels:
            smoothed = (1 - label_smoothing) * labels + label_smoothing / labels.shape[-1]
            self.label_scores = nn.Parameter(smoothed.log())
        else:
            self.register_buffer("fixed_labels", labels.clone())

    def extra_repr(self) -> str:
        steps, n, *shape = self.images.shape
        labels = "learned" if hasattr(self, "label_scores") else "fixed"
        return (
            f"{steps} steps of {n} images {shape}, {labels} labels, {self.epochs} epochs, "
            f"{len(self.raw_step_sizes)} step sizes, {self.optimizer}, momentum {self.momentum}"
            + (f", {self.tiles} × {self.tiles} tiles" if self.tiles > 1 else "")
        )

    @property
    def updates(self) -> int:
        """The number of gradient steps in one unroll."""
        return self.steps * self.epochs

    @property
    def labels(self) -> Tensor:
        """[steps, n, classes], probabilities."""
        return self.label_scores.softmax(-1) if hasattr(self, "label_scores") else self.fixed_labels

    @property
    def step_sizes(self) -> Tensor:
        """[updates], positive."""
        sizes = F.softplus(self.raw_step_sizes)
        return sizes.repeat(self.updates // len(sizes))

    def decoded(self) -> Tensor:
        """The images as networks see them, [steps, n × tiles², c, h, w]; without tiles, `images` themselves."""
        if self.tiles == 1:
            return self.images
        grid = self.images.unflatten(-2, (self.tiles, -1)).unflatten(-1, (self.tiles, -1))
        small = grid.permute(0, 1, 3, 5, 2, 4, 6).flatten(0, 3)  # [steps × n × rows × columns, c, h / tiles, w / tiles]
        enlarged = F.interpolate(small, size=self.images.shape[-2:], mode="bilinear")
        return enlarged.unflatten(0, (self.steps, -1))

    def schedule(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each update in turn: images [n, c, h, w], labels [n, classes] and the step size []."""
        images, labels = self.decoded(), self.labels
        for update, step_size in enumerate(self.step_sizes):
            step = update % self.steps
            yield images[step], labels[step], step_size

    def save(self, path: str | Path, *, dataset: Dataset, network: str, seed: int, command: str) -> None:
        """Writes one safetensors file: `images`, `labels`, `step_sizes` [updates], and how they were made.

        `network` names the architecture, `command` is what a reader runs to make the file again.
        """
        tensors = {"images": self.images, "labels": self.labels, "step_sizes": self.step_sizes}
        metadata = {
            "dataset": dataset.name,
            "mean": repr(dataset.mean),
            "std": repr(dataset.std),
            "epochs": str(self.epochs),
            "network": network,
            "inner_optimizer": self.optimizer,
            "momentum": repr(self.momentum),
            "tiles": str(self.tiles),
            "seed": str(seed),
            "versions": " ".join(f"{name}=={version(name)}" for name in ("torch", "torchvision", "higher")),
            "command": command,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_write(path) as partial:
            partial.write_bytes(safetensors.torch.save(tensors, metadata))  # save_file's own mode would be 0600

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> DistilledSet:
        """The set that `save` wrote, ready for `evaluate`. Raises ValueError where the file is not whole and sound."""
        require(Path(path).is_file(), f"path='{path}': no such file; load(name) knows the sets that come along")
        device = pick_device(str(device))
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except safetensors.SafetensorError as error:
            raise ValueError(f"path='{path}': not a whole safetensors file ({error}); copy it again") from error
        check_file(path, tensors, metadata)
        try:
            return cls(
                tensors["images"],
                tensors["labels"],
                epochs=int(metadata["epochs"]),
                step_size=tensors["step_sizes"],
                optimizer=metadata["inner_optimizer"],
                momentum=float(metadata["momentum"]),
                tiles=int(metadata.get("tiles", 1)),
            )
        except ValueError as error:
            raise ValueError(f"path='{path}': {error}") from error


def load(name: str, *, device: torch.device | str = "cpu") -> DistilledSet:
    """A set that comes with this project, by its name in the folder `distilled`, where a card tells of each."""
    folder = Path(__file__).with_name("distilled")
    names = sorted(path.stem for path in folder.glob("*.safetensors"))
    require(name in names, f"name='{name}': give one of {', '.join(names)}; DistilledSet.load reads other files")
    return DistilledSet.load(folder / f"{name}.safetensors", device=device)


# ---------------------------------------------------------------------------------------- inner loop


Update = tuple[Tensor, Tensor, Tensor]  # images [n, c, h, w], labels [n, classes], step size []


def inner_optimizer(name: str, momentum: float) -> tuple[Callable, list[str]]:
    """What makes an optimizer for given weights, and the moments that it keeps of each, as torch names them.

    The learning rate of 1 is a placeholder: each update brings its own.
    """
    if name == "Adam":
        # Near a gradient of 0 a step goes from full to none within eps; with 1e-8 there would be no slope to follow.
        return functools.partial(torch.optim.Adam, lr=1.0, eps=1e-4), ["exp_avg", "exp_avg_sq"]
    return functools.partial(torch.optim.SGD, lr=1.0, momentum=momentum), ["momentum_buffer"] if momentum else []


def inner_loop(
    network: nn.Module,
    start: list[Tensor],
    updates: Sequence[Update],
    *,
    make_optimizer: Callable,
    moments: list[str],
    track_higher_grads: bool,
    done: int = 0,
) -> tuple[nn.Module, list[Tensor]]:
    """The inner loop of Algorithm 1: θ_{i+1} = θ_i - η̃_i ∇ℓ(x̃_i, θ_i) for each of `updates`, or Adam's rule.

    `start` holds the weights θ_0 and the moments of each, as left by `done` updates before. Returns the trained
    network, a function of `start` and `updates` where `track_higher_grads` keeps the graph, and the weights and
    moments at the end.
    """
    optimizer = make_optimizer(network.parameters())
    with higher.innerloop_ctx(network, optimizer, track_higher_grads=track_higher_grads) as (trained, inner):
        weights = len(trained.fast_params)
        trained.update_params(start[:weights])
        for name, values in zip(moments, chunks(start[weights:], weights), strict=True):
            for index, value in enumerate(values):
                inner.state[0][index].update({name: value, "step": done})
        for images, labels, step_size in updates:
            loss = training_loss(trained(images), labels)
            inner.step(loss, override={"lr": [step_size]})
    return trained, [*trained.fast_params, *(state[name] for name in moments for state in inner.state[0].values())]


def training_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [] of scores [n, classes], a mean over images, with labels [n, classes].

    Of a stack's scores [networks, n, classes] it is the sum over networks, so that each has a gradient of its own.
    """
    labels = labels.expand_as(scores).flatten(0, -2)
    return F.cross_entropy(scores.flatten(0, -2), labels, reduction="sum") / scores.shape[-2]


def unroll(
    network: nn.Module,
    distilled: DistilledSet,
    *,
    window: tuple[int, int] | None = None,
    segment: int | None = None,
    kept: list[Tensor] | None = None,
    track_higher_grads: bool = True,
) -> nn.Module:
    """Trains `network`, or a `Stack`, on the distilled set; returns it trained, `network` itself stays as it was.

    With `track_higher_grads` the result is a differentiable function of the distilled set, and memory grows with the
    number of updates; without, it is plain training on the same path. Two options bound that memory:

    window:   (first, last): run `first` updates without gradient, then go on with it up to update `last`, and stop
    segment:  store only the weights that every `segment` updates start from; the backward pass runs the updates again.
              The gradient is the same; about the square root of the number of updates takes the least memory
    kept:     weights and moments that an earlier call left here: the window starts from these, with nothing run
              before it. From an empty list it starts as without; either way, those at its end are left here
    """
    updates = list(distilled.schedule())
    first, last = window or (0, len(updates))
    make_optimizer, moments = inner_optimizer(distilled.optimizer, distilled.momentum)
    train = functools.partial(inner_loop, network, make_optimizer=make_optimizer, moments=moments)
    state = [each.detach().to(distilled.images.device).requires_grad_() for each in kept or network.parameters()]
    if not kept:
        state += [torch.zeros_like(weight) for _ in moments for weight in state]
    if first > 0 and not kept:
        _, state = train(state, updates[:first], track_higher_grads=False)
    if segment and track_higher_grads:
        for place in range(first, last, segment):
            part = updates[place : min(place + segment, last)]
            state = Segment.train(functools.partial(train, done=place), state, part)
        first = last
    trained, end = train(state, updates[first:last], done=first, track_higher_grads=track_higher_grads)
    if kept is not None:
        kept[:] = [tensor.detach() for tensor in end]
    return trained


# ---------------------------------------------------------------------------------------- outer loop


def outer_loss(network: nn.Module, distilled: DistilledSet, real: Split, **options) -> Tensor:
    """The loss [] on real images of `network` once trained on the distilled set: what Algorithm 1 lowers.

    Of a `Stack`, the mean over its networks; real images [networks, n, c, h, w] and labels [networks, n] give each
    network its own. `options` go to `unroll`.
    """
    trained = unroll(network, distilled, **options)
    loss = 0
    for images, labels in in_parts(trained, *real):
        scores = trained(images)  # [n, classes], or [networks, n, classes]
        part = F.cross_entropy(scores.flatten(0, -2), labels.expand(scores.shape[:-1]).flatten())
        loss = loss + part * labels.shape[-1] / real.labels.shape[-1]
    return loss


def outer_gradient(
    distilled: DistilledSet,
    draws: list[Draw],
    *,
    stack: int | None = None,
    kept: dict[int, list[Tensor]] | None = None,
    **options,
) -> float:
    """The mean outer loss over `draws`, a network and a real batch each; leaves its gradient in `distilled`.

    Up to `stack` networks are trained at once, by default `stack_size`; `kept` holds what `unroll` keeps of each such
    stack. `options` go to `unroll`.
    """
    distilled.zero_grad()
    mean_loss = 0.0
    for number, part in enumerate(chunks(draws, stack or stack_size(distilled.images.device))):
        networks, batches = zip(*part, strict=True)
        real = Split(*map(torch.stack, zip(*batches, strict=True))) if len(part) > 1 else batches[0]
        if kept is not None:
            options["kept"] = kept.setdefault(number, [])
        loss = outer_loss(side_by_side(networks), distilled, real, **options) * len(part) / len(draws)
        loss.backward()  # here, not after the loop: one stack's graph in memory at a time
        mean_loss += loss.item()
    return mean_loss


def distill(
    distilled: DistilledSet,
    dataset: Dataset,
    make_network: NetworkFactory,
    *,
    iterations: int,
    networks: int = 1,
    batch_size: int = 256,
    learning_rate: float = 0.03,
    step_size_learning_rate: float = 0.01,
    validate_every: int = 100,
    validation_networks: int = 5,
    window: int | None = None,
    pool: int | None = None,
    segment: int | None = None,
    stack: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Algorithm 1's outer loop (arXiv 1811.10959): improves `distilled` in place and returns its `History`.

    distilled:               where to start, on the device of `dataset`
    dataset:                 trains on its training images, validates on its validation images
    make_network:            a network factory; with `fixed_initialization`, the paper's known initialization
    iterations:              steps of the outer optimizer, Adam
    networks:                initializations drawn per iteration by each process, their gradients averaged
    batch_size:              real images drawn for each of them
    learning_rate:           Adam's for images and learned labels, falling to 0 along a half cosine
    step_size_learning_rate: the same for step sizes: roughly, their relative change in one iteration; 0 fixes them
    validate_every:          iterations between validations, each on the same `validation_networks` networks
    validation_networks:     initializations behind each validation accuracy
    window:                  differentiate through so many consecutive updates only, at a random place: those before
                             run without gradient, those after are left out (RaT-BPTT, Feng et al. 2024); validation
                             goes through all updates
    pool:                    keep so many sets of `networks` between iterations, take one in turn, and go on with its
                             training where its last window ended; after the last update it is drawn anew. So a window
                             costs nothing but itself (compare FRePo, Zhou et al. 2022, and RCIG, Loo et al. 2023)
    segment:                 save memory: store only the weights that every so many updates start from; the backward
                             pass runs the updates again
    stack:                   networks trained at once; by default 8 on a CPU and 64 elsewhere
    seed:                    of networks, batches and windows; on the command line, also of the start; at least 0
    checkpoint:              a file, written at each validation and at the end; where it is there already, the run
                             goes on from it, on CPU to the bit-identical result. Runs that differ in nothing but
                             start or network need files of their own: a checkpoint does not know these
    progress:                show a bar with the outer loss and the last validation accuracy

    In a job of several processes (torch.distributed), each draws networks and batches of its own, gradients are
    averaged over all of them, and the first process alone validates and writes. All start from what the first one has.

    Ctrl-C ends the run after the iteration at hand. Raises ValueError for bad arguments or another run's checkpoint,
    FloatingPointError where training diverges (`distilled` is then as the last good iteration left it).
    """
    settings = {
        "dataset": dataset.name, "distilled": distilled.extra_repr(), "iterations": iterations, "networks": networks,
        "batch_size": batch_size, "learning_rate": learning_rate, "step_size_learning_rate": step_size_learning_rate,
        "validate_every": validate_every, "validation_networks": validation_networks, "window": window, "pool": pool,
        "stack": stack if pool else None, "seed": seed,
    }  # fmt: skip
    check_outer_loop(settings, updates=distilled.updates, segment=segment, stack=stack)
    optimizer = outer_optimizer(distilled, learning_rate, step_size_learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    history = History()
    rank, _ = process_rank()
    networks_kept = Pool(pool, window, distilled.updates) if pool else None
    parts = [distilled, optimizer, cosine, history, *([networks_kept] if pool else [])]
    saved = Checkpoint(checkpoint, settings, parts)

    with stop_on_interrupt() as interrupted:
        saved.resume()
        done = len(history.loss)
        todo = progress_bar(range(done, iterations), initial=done, total=iterations, disable=not progress or rank > 0)
        for iteration in todo:
            if iteration % validate_every == 0 and rank == 0:
                history.validate(distilled, dataset, make_network, networks=validation_networks)
                saved.write()
                todo.set_description(f"validation {history.accuracy[-1]:.1f}%", refresh=False)
            if pool:
                span, kept = networks_kept.turn(iteration)
            else:
                span, kept = draw_window(distilled.updates, window, seed=(seed, iteration)), None
            numbers = range(rank * networks, (rank + 1) * networks)
            draws = [
                draw(make_network, dataset.train, batch_size, seed=(seed, iteration, number)) for number in numbers
            ]
            loss = outer_gradient(distilled, draws, stack=stack, segment=segment, window=span, kept=kept)
            gradients = [parameter.grad for parameter in distilled.parameters()]
            loss, stop = average_over_processes(gradients, loss, interrupted.is_set())
            history.clip_gradient(distilled)
            optimizer.step()
            cosine.step()
            history.loss.append(loss)
            todo.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if stop:
                break
        else:
            if rank == 0:
                history.validate(distilled, dataset, make_network, networks=validation_networks)
        saved.write()
    return history


def outer_optimizer(
    distilled: DistilledSet, learning_rate: float, step_size_learning_rate: float
) -> torch.optim.Optimizer:
    """Adam with the original code's betas, one rate for images and labels, another for the step sizes."""
    step_sizes = [distilled.raw_step_sizes]
    content = [parameter for parameter in distilled.parameters() if parameter is not distilled.raw_step_sizes]
    groups = [{"params": content, "lr": learning_rate}, {"params": step_sizes, "lr": step_size_learning_rate}]
    return torch.optim.Adam(groups, betas=(0.5, 0.999))


Draw = tuple[nn.Module, Split]  # a fresh network, and real images and labels to test it on once trained


def draw(make_network: NetworkFactory, split: Split, batch_size: int, *, seed: tuple[int, ...]) -> Draw:
    """A network and `batch_size` random rows of `split`, with replacement, both from `seed` alone.

    So it is the same on every device, in whichever process, and after whatever was drawn before.
    """
    with seeded(mixed(seed)):
        network = fresh_network(make_network, split.images.device)
        rows = torch.randint(len(split.labels), (batch_size,)).to(split.labels.device)
    return network, Split(split.images[rows], split.labels[rows])


def draw_window(updates: int, length: int | None, *, seed: tuple[int, ...]) -> tuple[int, int]:
    """First and last update of a random window of `length`, or of them all."""
    if length is None:
        return 0, updates
    generator = torch.Generator().manual_seed(mixed((*seed, 0, 1)))  # which no network has
    first = int(torch.randint(updates - length + 1, (), generator=generator))
    return first, first + length


class Pool:
    """Networks kept between iterations: weights and moments of `size` sets of them, each somewhere in training."""

    def __init__(self, size: int, window: int, updates: int) -> None:
        self.window, self.windows = window, updates // window
        self.sets: list[dict[int, list[Tensor]]] = [{} for _ in range(size)]  # the keys number stacks

    def turn(self, iteration: int) -> tuple[tuple[int, int], dict[int, list[Tensor]]]:
        """The window of the set whose turn it is, and what is kept of it: nothing where it starts anew.

        The sets begin at different windows, so that at any time the pool holds networks of every age.
        """
        size = len(self.sets)
        slot = iteration % size
        number = (iteration // size + slot) % self.windows
        if number == 0:
            self.sets[slot].clear()
        return (number * self.window, (number + 1) * self.window), self.sets[slot]

    def state_dict(self) -> dict:
        return {"sets": self.sets}

    def load_state_dict(self, state: dict) -> None:
        self.sets = state["sets"]


@dataclass
class History:
    """What `distill` saw: the loss at each iteration, the lists below it at each validation."""

    loss: list[float] = field(default_factory=list)  # outer loss, mean over the iteration's networks
    iterations: list[int] = field(default_factory=list)  # how many were done, from 0
    accuracy: list[float] = field(default_factory=list)  # percent, mean over the validation networks
    images: list[Tensor] = field(default_factory=list)  # [steps, n, c, h, w] each, on the CPU
    step_sizes: list[Tensor] = field(default_factory=list)  # [updates] each, on the CPU
    running_norm: float = math.inf  # of the clipped gradient, see clip_gradient

    def validate(
        self, distilled: DistilledSet, dataset: Dataset, make_network: NetworkFactory, *, networks: int
    ) -> None:
        """Adds one entry to each list of validations, unless a resumed run has it already."""
        if self.iterations[-1:] == [len(self.loss)]:
            return
        self.iterations.append(len(self.loss))
        self.accuracy.append(round(validated(distilled, dataset, make_network, networks=networks), 2))
        self.images.append(distilled.images.detach().cpu().clone())
        self.step_sizes.append(distilled.step_sizes.detach().cpu())

    def clip_gradient(self, distilled: DistilledSet) -> None:
        """Scales the gradient down to at most twice its running norm, the rule of RaT-BPTT (Feng et al. 2024).

        Unrolled training now and then gives a gradient a hundred times the usual one, and Adam would remember it
        for a thousand iterations. Raises FloatingPointError where the gradient is not finite.
        """
        norm = float(nn.utils.clip_grad_norm_(distilled.parameters(), 2 * self.running_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the outer gradient is not finite at iteration {len(self.loss)}: training on the distilled set "
                f"diverged, with step sizes up to {distilled.step_sizes.max().item():.3g}. Start from a lower "
                "step_size=, or lower learning_rate= and step_size_learning_rate="
            )
        clipped = min(norm, 2 * self.running_norm)
        if self.running_norm in (0, math.inf):  # nothing to average with yet
            self.running_norm = norm or math.inf
        else:
            self.running_norm = 0.9 * self.running_norm + 0.1 * clipped

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


# ---------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Accuracies:
    """Accuracies of several networks; `std` is their spread, not the error of the mean."""

    values: Tensor  # [networks], percent

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def std(self) -> float:
        return float(self.values.std()) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        spread = f" ± {self.std:.1f}" if len(self.values) > 1 else ""
        return f"{self.mean:.1f}{spread}%"


@torch.no_grad()
def accuracy(network: nn.Module, split: Split) -> Tensor:
    """The percentage [] of `split` that `network` classifies as labelled, or [networks] of a `Stack`."""
    right = sum((network(images).argmax(-1) == labels).sum(-1) for images, labels in in_parts(network, *split))
    return 100 * right / split.labels.shape[-1]


def evaluate(
    distilled: DistilledSet,
    split: Split,
    make_network: NetworkFactory,
    *,
    networks: int = 100,
    stack: int | None = None,
    seed: int = 10_000,
) -> Accuracies:
    """Accuracies on `split` of `networks` fresh networks, each trained on `distilled` as it was distilled.

    The networks are drawn from `seed`, and up to `stack` of them, by default `stack_size`, trained at once.
    """
    require_positive(networks=networks, stack=stack)
    device, values = split.images.device, []
    with seeded(seed):
        for part in chunks(range(networks), stack or stack_size(device)):
            drawn = [fresh_network(make_network, device) for _ in part]
            check_network(drawn[0], split.images[:1], distilled.labels.shape[-1])
            values.append(accuracy(unroll(side_by_side(drawn), distilled, track_higher_grads=False), split))
    return Accuracies(torch.cat([value.flatten().cpu() for value in values]))


def validated(distilled: DistilledSet, dataset: Dataset, make_network: NetworkFactory, *, networks: int) -> float:
    """Mean accuracy on validation images, of networks that are not those of a test: what choices are made by."""
    return evaluate(distilled, dataset.validation, make_network, networks=networks, seed=20_000).mean


# ----------------------------------------------------------------------------------------- baselines


def train(
    network: nn.Module,
    split: Split,
    *,
    epochs: int,
    batch_size: int = 64,
    step_size: float = 0.02,
) -> nn.Module:
    """Trains `network` in place by shuffled SGD with momentum 0.9, and returns it; torch's random state shuffles.

    Labels may be probabilities [n, classes]. The networks of a `Stack` see the images in one order.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=step_size, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(split.labels)).to(split.labels.device).split(batch_size):
            scores, labels = network(split.images[rows]), split.labels[rows]
            if labels.dim() == 1:
                labels = F.one_hot(labels, scores.shape[-1]).to(scores)
            optimizer.zero_grad()
            training_loss(scores, labels).backward()
            optimizer.step()
    return network


def retrain(
    distilled: DistilledSet,
    split: Split,
    make_network: NetworkFactory,
    *,
    networks: int = 10,
    epochs: int = 300,
    batch_size: int = 256,
    step_size: float = 0.01,
    stack: int | None = None,
    seed: int = 10_000,
) -> Accuracies:
    """Accuracies on `split` of `networks` fresh networks trained on the images and labels alone, by `train`.

    Free retraining, as someone would who knows nothing of steps and step sizes. The defaults are the protocol that
    dataset condensation is published with (Zhao et al. 2021), without its augmentation. With `stack` = 1, networks
    may have batch normalization or dropout.
    """
    require_positive(networks=networks, epochs=epochs, batch_size=batch_size, stack=stack)
    images, labels = (each.detach().flatten(0, 1).to(split.images) for each in (distilled.decoded(), distilled.labels))
    values = []
    with seeded(seed):
        for part in chunks(range(networks), stack or stack_size(split.images.device)):
            network = side_by_side([fresh_network(make_network, split.images.device) for _ in part])
            train(network, Split(images, labels), epochs=epochs, batch_size=batch_size, step_size=step_size)
            values.append(accuracy(network.eval(), split).flatten().cpu())
    return Accuracies(torch.cat(values))


def tuned(
    images: Tensor,
    labels: Tensor,
    dataset: Dataset,
    make_network: NetworkFactory,
    *,
    epochs: int,
    networks: int = 5,
    step_sizes: Sequence[float] = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5),
) -> DistilledSet:
    """Images [steps, n, c, h, w] left as they are, with the constant step size that does best on validation.

    What any distilled set has to beat: the same number of updates on images that nothing was learned for.
    """
    candidates = [DistilledSet(images, labels, epochs=epochs, step_size=size) for size in step_sizes]
    return max(candidates, key=lambda each: validated(each, dataset, make_network, networks=networks))


# ------------------------------------------------------------------------------------------- figures


def draw_images(panels: dict[str, Tensor], *, columns: int = 10, stacked: bool = False) -> Figure:
    """Titled grids of images [..., c, h, w], normalized, side by side or `stacked`; -2 is drawn black, 4 white."""
    grids = [
        torchvision.utils.make_grid(
            images.detach().cpu().flatten(0, -4), columns, normalize=True, value_range=(-2, 4), pad_value=0.5
        )
        for images in panels.values()
    ]  # [3, height, width] each
    heights = [4.5 * grid.shape[1] / grid.shape[2] for grid in grids]  # inches, for a width of 4.5
    if stacked:
        layout = {"nrows": len(grids), "height_ratios": heights, "figsize": (4.5, sum(heights) + 0.4 * len(grids))}
    else:
        layout = {"ncols": len(grids), "figsize": (4.5 * len(grids), max(heights) + 0.6)}
    figure, axes = plt.subplots(squeeze=False, layout="constrained", **layout)
    for axis, title, grid in zip(axes.flat, panels, grids, strict=True):
        axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize="medium")
        axis.axis("off")
    return figure


def draw_history(histories: dict[str, History]) -> Figure:
    """Outer loss, smoothed over twenty iterations, and validation accuracy, of several runs."""
    smoothing = 20
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for title, history in histories.items():
        means = torch.tensor(history.loss).unfold(0, min(smoothing, len(history.loss)), 1).mean(-1)
        left.plot(range(len(history.loss) - len(means) + 1, len(history.loss) + 1), means.tolist(), label=title)
        right.plot(history.iterations, history.accuracy, marker=".", label=title)
    left.set(xlabel="outer iteration", ylabel=f"outer loss, mean over {smoothing}")
    right.set(xlabel="outer iteration", ylabel="validation accuracy (%)")
    right.legend()
    return figure


if __name__ == "__main__":
    import command_line

    command_line.main()
