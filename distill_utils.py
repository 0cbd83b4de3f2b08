"""Dataset distillation (Wang, Zhu, Torralba and Efros 2018, arXiv 1811.10959): learn a few images that train a network.

Brackets give shapes. A *network factory* is a callable that returns a freshly initialized `nn.Module`, which turns
images [n, c, h, w] into class scores [n, classes]. *Normalized* images are `(pixel - mean) / std`, of pixels in 0..1.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import files, version
from pathlib import Path
from typing import NamedTuple

import higher
import numpy as np
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

Factory = Callable[[], nn.Module]
Pair = tuple[Tensor, Tensor]  # images and labels
ADAM = {"betas": (0.9, 0.999), "eps": 1e-4}  # torch's eps of 1e-8 would leave no slope to follow where gradients are 0


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_counts(**counts: object) -> None:
    """Raises ValueError that names the first argument that is not a whole number of at least 1."""
    for name, count in counts.items():
        sound = isinstance(count, (int, np.integer)) and not isinstance(count, bool) and count >= 1
        require(sound, f"{name}={count!r}: give a whole number of at least 1")


def pick_device(device: str = "auto") -> torch.device:
    """The named device; "auto" picks cuda where there is one, else mps, else cpu. Raises ValueError if missing."""
    names = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    device = names[0] if device == "auto" else device
    there = {*names, *(f"{name}:{number}" for name in names for number in range(max(1, torch.cuda.device_count())))}
    require(device in there, f"device={device!r}: not on this machine; give auto, {' or '.join(names)}")
    return torch.device(device)


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Runs a block from a seed, or one derived from up to four numbers, and restores the random state afterwards."""
    seed = numbers[0] if len(numbers) == 1 else int(np.random.SeedSequence(numbers).generate_state(1)[0])
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield


# ----------------------------------------------------------------------------------------------------------------- data
class Split(NamedTuple):
    """Images and their labels, on one device."""

    images: Tensor  # [n, c, h, w], float32, normalized
    labels: Tensor  # [n], int64, 0..classes-1


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled image set, held whole on one device and split three ways."""

    name: str
    mean: float  # of the training pixels, in 0..1
    std: float
    train: Split = field(repr=False)
    validation: Split = field(repr=False)  # for every choice of a setting
    test: Split = field(repr=False)  # for final figures only
    classes: int


def make_dataset(name: str, train: Pair, test: Pair, *, validation: int, device: torch.device | str) -> Dataset:
    """Makes a `Dataset` of (pixels [n, c, h, w] in 0..1, integer labels [n]) pairs. A fixed shuffle, the same in every
    run, moves `validation` images out of `train`. Raises ValueError where shapes or ranges are wrong."""
    for argument, (pixels, labels) in {"test": test, "train": train}.items():  # train last, as it is used below
        sound = isinstance(pixels, Tensor) and isinstance(labels, Tensor) and pixels.ndim == 4 and len(labels) > 0
        found = f"{argument}: pixels {list(np.shape(pixels))}, labels {list(np.shape(labels))}"
        require(sound and labels.shape == pixels.shape[:1], f"{found}; give tensors [n, c, h, w], [n]")
        low, high = float(pixels.min()), float(pixels.max())
        require(0 <= low < high <= 1, f"{argument}: pixels lie in {low:g}..{high:g}; scale them to 0..1")
    classes, tested = labels.unique().tolist(), test[1].unique().tolist()
    require(classes == list(range(len(classes))), f"train: labels {classes[:12]}; number the classes 0, 1, 2, ...")
    require(set(tested) <= set(classes), f"test: labels {tested[:12]}; give those of train, 0 to {classes[-1]}")
    require_counts(validation=validation)
    require(validation < len(labels), f"validation={validation}: give fewer than the {len(labels)} training images")
    mean, std = float(pixels.float().mean()), float(pixels.float().std())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pairs = [(pixels[rows], labels[rows]) for rows in (order[validation:], order[:validation])]
    splits = [Split(((p.float() - mean) / std).to(device), y.long().to(device)) for p, y in (*pairs, test)]
    return Dataset(name, mean, std, *splits, classes=len(classes))


def load_torchvision(name: str, root: str | Path, *, device: torch.device | str) -> Dataset:
    """Loads torchvision's MNIST, FashionMNIST or KMNIST from the folder `root`, or downloads it there; one training
    image in twelve is held out for validation. Raises FileNotFoundError, with the remedy, where neither works."""
    require(name in ("MNIST", "FashionMNIST", "KMNIST"), f"name={name!r}: give one of MNIST, FashionMNIST, KMNIST")
    raw, known, patience = Path(root) / name / "raw", Path(root).exists(), socket.getdefaulttimeout()
    socket.setdefaulttimeout(patience or 30)  # seconds; torchvision would wait forever
    try:
        parts = [getattr(torchvision.datasets, name)(root, download=True, train=train) for train in (True, False)]
    except Exception as error:  # damaged files meet torchvision with errors of many kinds
        for folder in (raw, raw.parent, *([] if known else [Path(root)])):  # which torchvision has made
            with contextlib.suppress(OSError):  # it holds files, or is not there
                folder.rmdir()
        remedy = f"delete {raw} and connect to the internet once, or put {name}'s four files there"
        raise FileNotFoundError(f"root='{root}': {name} is missing or damaged; {remedy}") from error
    finally:
        socket.setdefaulttimeout(patience)
    train, test = ((part.data[:, None] / 255, part.targets) for part in parts)
    return make_dataset(name, train, test, validation=len(train[1]) // 12, device=device)


def load_mnist(root: str | Path, *, device: torch.device | str) -> Dataset:
    """Loads MNIST as `load_torchvision` does: 55,000 training, 5,000 validation and 10,000 test images."""
    return load_torchvision("MNIST", root, device=device)


def load_digits(*, device: torch.device | str) -> Dataset:
    """Loads scikit-learn's 8×8 digits, enlarged to 20×20 in 28×28: 1,297 training, 200 validation, 300 test images."""
    from sklearn import datasets, model_selection  # here, as importing it takes most of a second

    digits = datasets.load_digits()
    pixels, labels = torch.from_numpy(digits.images).float()[:, None] / 16, torch.from_numpy(digits.target)
    pixels = F.pad(F.interpolate(pixels, size=(20, 20), mode="bilinear"), [4, 4, 4, 4])  # [1797, 1, 28, 28]
    rows = model_selection.train_test_split(range(len(labels)), test_size=300, random_state=0, stratify=labels)
    pairs = ((pixels[part], labels[part]) for part in rows)
    return make_dataset("scikit-learn digits", *pairs, validation=200, device=device)


# ------------------------------------------------------------------------------------------------------------- networks
class LeNet(nn.Sequential):
    """The paper's LeNet for 28×28 images: Xavier-normal weights and zero biases, drawn from torch's random state."""

    def __init__(self, *, classes: int = 10, initialize: Callable[[Tensor], object] = nn.init.xavier_normal_) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),  # [n, 6, 14, 14]
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),  # [n, 16, 5, 5]
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
        )  # fmt: skip
        for parameter in self.parameters():
            initialize(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)


def fixed_initialization(make_network: Factory, *, seed: int) -> Factory:
    """A factory that returns copies of one network drawn from `seed`: the paper's fixed initialization."""
    with seeded(seed):
        network = sample_networks(make_network, 1, torch.device("cpu"))
    return lambda: copy.deepcopy(network)


def sample_networks(make_network: Factory, count: int, device: torch.device) -> nn.Module:
    """Samples networks from torch's random state, as one module. Raises ValueError for a network in place of a factory,
    for frozen weights, and for layers such as dropout and batch norm, as networks stay in training mode here."""
    found = f"make_network={type(make_network).__name__}(...): give the factory, or fixed_initialization(...)"
    require(not isinstance(make_network, nn.Module), found)
    networks = [make_network().to(device) for _ in range(count)]
    frozen = [name for name, weight in networks[0].named_parameters() if not weight.requires_grad]
    require(not frozen, f"make_network: {', '.join(frozen)} require no gradient; register constants as buffers")
    modal = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    found = sorted({type(module).__name__ for module in networks[0].modules() if isinstance(module, modal)})
    require(not found, f"make_network: {', '.join(found)} tests unlike it trains; leave it out, or use GroupNorm")
    return Ensemble(networks) if count > 1 else networks[0]  # an ensemble of one would only be slower


class Ensemble(nn.Module):
    """Copies of networks of one architecture, which run in one call: images [n, c, h, w] give scores [networks, n,
    classes]. Meant for GPUs, where small networks mostly wait for kernel launches."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        parameters, buffers = torch.func.stack_module_state(list(networks))
        self.names = [*parameters, *buffers]
        for name in self.names:
            value = nn.Parameter(parameters[name]) if name in parameters else nn.Buffer(buffers[name])
            setattr(self, name.replace(".", "/"), value)
        self.template = (copy.deepcopy(networks[0]),)  # in a tuple, so that its weights do not count as ours

    def forward(self, images: Tensor) -> Tensor:
        state = dict(zip(self.names, [*self.parameters(), *self.buffers()], strict=True))
        run = partial(torch.func.functional_call, self.template[0])
        return torch.vmap(run, in_dims=(0, None), randomness="different")(state, (images,))

    def train(self, mode: bool = True) -> Ensemble:
        self.template[0].train(mode)  # the template has the layers, and so their mode
        return super().train(mode)


# -------------------------------------------------------------------------------------------------------- distilled set
def init_from_noise(dataset: Dataset, *, steps: int, per_class: int = 1, std: float = 1.0, seed: int = 0) -> Pair:
    """Normal pixels [steps, n, c, h, w] of standard deviation `std`, 1 in the paper, in normalized units, and one-hot
    labels [steps, n, classes]; n = per_class × classes."""
    require_counts(steps=steps, per_class=per_class)
    labels, real = torch.eye(dataset.classes).repeat(steps, per_class, 1), dataset.train.images
    noise = torch.randn(*labels.shape[:2], *real.shape[1:], generator=torch.Generator().manual_seed(seed))
    return (std * noise).to(real), labels.to(real)


def init_from_real(dataset: Dataset, *, steps: int, per_class: int = 1, seed: int = 0) -> Pair:
    """Random training images, no image twice; shapes as `init_from_noise`."""
    shuffle = partial(torch.randperm, generator=torch.Generator().manual_seed(seed))
    return init_per_class(dataset, steps, per_class, lambda images, count: images[shuffle(len(images))[:count]])


def init_from_kmeans(dataset: Dataset, *, steps: int, per_class: int = 1, seed: int = 0) -> Pair:
    """K-means centers of each class of the training images; shapes as `init_from_noise`. A single one is its mean."""
    from sklearn.cluster import KMeans

    def centers(images: Tensor, count: int) -> Tensor:
        clusters = KMeans(count, n_init=1, random_state=seed).fit(images.flatten(1).cpu().numpy())
        return torch.from_numpy(clusters.cluster_centers_).view(count, *images.shape[1:])

    return init_per_class(dataset, steps, per_class, centers)


def init_per_class(dataset: Dataset, steps: int, per_class: int, choose: Callable[[Tensor, int], Tensor]) -> Pair:
    """Arranges what `choose` makes of each class's images as [steps, n, c, h, w], with one-hot labels."""
    require_counts(steps=steps, per_class=per_class)
    chosen = []  # [steps × per_class, c, h, w] for each class
    for label in range(dataset.classes):
        images = dataset.train.images[dataset.train.labels == label]
        asked = f"steps={steps} × per_class={per_class} asks for {steps * per_class} images of class {label}"
        require(steps * per_class <= len(images), f"{asked}, which has {len(images)}")
        chosen.append(choose(images, steps * per_class))
    images = torch.stack(chosen, 1).unflatten(0, (steps, per_class)).flatten(1, 2).to(dataset.train.images)
    return images, torch.eye(dataset.classes).repeat(steps, per_class, 1).to(images)


class DistilledSet(nn.Module):
    """What is learned: synthetic images, soft labels if asked for, and a positive step size for every update.

    Args:
        images: [steps, n, c, h, w], normalized; step s of an epoch trains on images[s].
        labels: [steps, n, classes], probabilities.
        epochs: how often the steps are repeated; the inner loop makes `updates` = steps × epochs updates.
        step_size: initial value of every step size, or one for each update as a tensor [updates].
        soft_labels: learn the labels, as scores behind a softmax (Sucholutsky and Schonlau 2019).
        label_smoothing: how far soft labels start towards uniform, above 0 and at most 1; near 0 they hardly move.
        optimizer: the inner optimizer, "SGD" or "Adam".
        momentum: of SGD, 0 ≤ momentum < 1.
        shared: of a parametrization, learned tensors that all images share, by the names in its `shared`.

    Raises ValueError where shapes or ranges are wrong. A *parametrization* is a subclass that overrides `decode`. The
    attributes that its `options` and `shared` name are saved, and given to its constructor on loading.
    """

    options: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()

    def __init__(
        self, images: Tensor, labels: Tensor, *, epochs: int = 1, step_size: float | Tensor = 0.02,
        soft_labels: bool = False, label_smoothing: float = 0.5, optimizer: str = "SGD", momentum: float = 0.0,
        **shared: Tensor,
    ) -> None:  # fmt: skip
        super().__init__()
        sound = isinstance(images, Tensor) and images.dim() == 5 and images.numel() > 0
        require(sound, f"images: shape {list(np.shape(images))}; give a tensor [steps, n, c, h, w]")
        require(images.is_floating_point() and bool(images.isfinite().all()), "images: give finite floating-point ones")
        require_counts(epochs=epochs)
        require(0 < label_smoothing <= 1, f"label_smoothing={label_smoothing}: give more than 0 and at most 1")
        require(optimizer in ("SGD", "Adam"), f"optimizer={optimizer!r}: give SGD or Adam")
        sound = 0 <= momentum < 1 and (momentum == 0 or optimizer == "SGD")
        require(sound, f"momentum={momentum}: give at least 0 and less than 1; 0 with Adam, which has its own moments")
        self.steps, self.epochs, self.updates = len(images), int(epochs), len(images) * int(epochs)
        require(self.updates <= 10**6, f"epochs={epochs}: makes {self.updates:,} updates; give at most a million")
        takes = ", ".join(self.shared) or "no such argument"
        require(shared.keys() == set(self.shared), f"{', '.join(shared)}: {type(self).__name__} takes {takes}")
        self.optimizer, self.momentum = optimizer, float(momentum)
        self.iterations = "0"  # of the outer loop, as "7 of 400" where it was interrupted; `Distillation` counts
        for name, tensor in {"images": images, **shared}.items():
            setattr(self, name, nn.Parameter(tensor.clone()))
        self.set_step_sizes(step_size)
        shape, remedy = list(self.decode().shape[:2]), "for integer labels F.one_hot(labels, classes)"
        sound = isinstance(labels, Tensor) and labels.dim() == 3 and list(labels.shape[:2]) == shape
        require(sound, f"labels: shape {list(np.shape(labels))}; give a tensor {shape} and classes, {remedy}")
        labels = labels.to(images)
        sound = (labels >= 0).all() & ((labels.sum(-1) - 1).abs() < 1e-4).all()
        require(bool(sound), "labels: give probabilities, which are at least 0 and add up to 1 for each image")
        if soft_labels:
            self.label_scores = nn.Parameter(torch.lerp(labels, labels.mean(-1, keepdim=True), label_smoothing).log())
        else:
            self.register_buffer("hard_labels", labels.clone())

    @property
    def labels(self) -> Tensor:
        """[steps, n, classes], probabilities."""
        return self.label_scores.softmax(-1) if hasattr(self, "label_scores") else self.hard_labels

    @property
    def step_sizes(self) -> Tensor:
        """[updates], positive."""
        return F.softplus(self.raw_step_sizes)

    def set_step_sizes(self, step_size: float | Tensor) -> DistilledSet:
        """Sets all step sizes to one number, or to those of a tensor [updates], and returns the set."""
        sizes = torch.as_tensor(step_size).detach().to(self.images)
        sound = sizes.shape in ((), (self.updates,))
        require(sound, f"step_size: shape {list(sizes.shape)}; give one number or [{self.updates}]")
        require(bool((sizes > 0).all() & sizes.isfinite().all()), f"step_size={step_size}: give positive numbers")
        # The inverse of softplus, log(exp(s) - 1), in the form that does not overflow for a large s.
        self.raw_step_sizes = nn.Parameter((sizes + (-torch.expm1(-sizes)).log()).expand(self.updates).clone())
        return self

    def decode(self) -> Tensor:
        """The images as networks see them, [steps, n, c, h, w]; the one method that a parametrization overrides."""
        return self.images

    def schedule(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images [n, c, h, w], labels [n, classes] and step size [] of each update in turn."""
        images, labels = self.decode(), self.labels
        for update, step_size in enumerate(self.step_sizes):
            yield images[update % self.steps], labels[update % self.steps], step_size

    def make_optimizer(self, parameters: Iterator[Tensor]) -> torch.optim.Optimizer:
        """The inner optimizer; its learning rate is a placeholder, as every update brings its own step size."""
        if self.optimizer == "Adam":
            return torch.optim.Adam(parameters, lr=1.0, **ADAM)
        return torch.optim.SGD(parameters, lr=1.0, momentum=self.momentum)

    def metadata(self) -> dict[str, str]:
        """How to train on the set, as its file says it."""
        numbers = {name: getattr(self, name) for name in ("epochs", "momentum", *self.options)}
        numbers |= ADAM if self.optimizer == "Adam" else {}
        words = {"parametrization": type(self).__name__, "inner_optimizer": self.optimizer}
        return words | {name: json.dumps(value) for name, value in numbers.items()}

    def save(self, path: str | Path, *, dataset: Dataset, **notes: object) -> None:
        """Writes a safetensors file in the format of `distilled/README.md`; `notes`, as network="LeNet", go with it."""
        tensors = {name: getattr(self, name) for name in ("images", "labels", "step_sizes", *self.shared)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        sound = all(tensor.isfinite().all() for tensor in tensors.values())
        require(sound, f"path='{path}': the set has values that are not finite; distill again with a lower step_size=")
        made = {"dataset": dataset.name, "mean": dataset.mean, "std": dataset.std, "iterations": self.iterations}
        made["versions"] = " ".join(f"{name}=={version(name)}" for name in ("torch", "torchvision", "higher"))
        metadata = {name: str(value) for name, value in {**made, **notes}.items()} | self.metadata()
        content = safetensors.torch.save(tensors, {**metadata, "sha256": checksum(tensors, metadata)})
        unfinished = Path(f"{path}.{os.getpid()}.partial")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        end = 8 + int.from_bytes(content[:8], "little")  # of the header, whose order varies from call to call
        header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        unfinished.write_bytes(content[:8] + header.encode().ljust(end - 8) + content[end:])
        unfinished.replace(path)  # so that the file is there whole or not at all

    @staticmethod
    def load(path: str | Path, *, device: torch.device | str = "cpu") -> DistilledSet:
        """Reads what `save` wrote, ready for `evaluate`. Raises ValueError where the file is not whole and sound."""
        device, kinds = pick_device(str(device)), (DistilledSet, *DistilledSet.__subclasses__())
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            require(metadata.pop("sha256") == checksum(tensors, metadata), "its checksum does not fit")
            kind = {kind.__name__: kind for kind in kinds}[metadata["parametrization"]]
            options = {name: json.loads(metadata[name]) for name in ("epochs", "momentum", *kind.options)}
            options |= {"optimizer": metadata["inner_optimizer"], "step_size": tensors.pop("step_sizes").flatten()}
            loaded = kind(**tensors, **options)
            require(loaded.metadata().items() <= metadata.items(), f"trains unlike {loaded.metadata()}")
        except (OSError, safetensors.SafetensorError, AttributeError, KeyError, RuntimeError, TypeError,
                ValueError) as error:  # fmt: skip
            raise ValueError(f"path='{path}': no whole and sound distilled set ({error})") from error
        loaded.iterations = metadata.get("iterations", "0")
        return loaded


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of what a set's file holds."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode() + safetensors.torch.save(tensors)).hexdigest()


class MultiFormation(DistilledSet):
    """Stored images that hold factor × factor smaller ones each, which networks see enlarged (Kim et al. 2022): factor²
    times as many images from as many pixels. `images` are the stored ones, [steps, n, c, h, w], `labels` those of the
    smaller ones, [steps, n × factor², classes]; `from_images` starts from images of full size."""

    options = ("factor",)

    def __init__(self, images: Tensor, labels: Tensor, *, factor: int, **options) -> None:
        require_counts(factor=factor)
        size, rest = list(images.shape[-2:]), [length % factor for length in images.shape[-2:]]
        require(not any(rest), f"factor={factor}: give a number that divides the images' height and width, {size}")
        self.factor = int(factor)  # before the rest, which decodes
        super().__init__(images, labels, **options)

    @classmethod
    def from_images(cls, images: Tensor, labels: Tensor, *, factor: int, **options) -> MultiFormation:
        """Shrinks images [steps, n, c, h, w] and packs them, row by row, into [steps, n / factor², c, h, w]."""
        require_counts(factor=factor)
        n, size = images.shape[1], [length // factor for length in images.shape[-2:]]
        require(n % factor**2 == 0, f"factor={factor}: a step has {n} images; give a multiple of {factor**2}")
        small = F.interpolate(images.flatten(0, 1), size, mode="bilinear", antialias=True)
        grid = small.unflatten(0, (len(images), -1, factor, factor))  # [steps, stored, rows, columns, c, *size]
        return cls(grid.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4), labels, factor=factor, **options)

    def decode(self) -> Tensor:
        """[steps, n × factor², c, h, w]"""
        grid = self.images.unflatten(-2, (self.factor, -1)).unflatten(-1, (self.factor, -1))
        small = grid.permute(0, 1, 3, 5, 2, 4, 6).flatten(0, 3)  # [steps × n × rows × columns, c, *size]
        return F.interpolate(small, self.images.shape[-2:], mode="bilinear").unflatten(0, (self.steps, -1))


class Decoded(DistilledSet):
    """Codes [steps, n, d, 1, 1], stored as `images`, which a small decoder, shared by all, turns into images (Lee et
    al. 2022): a hundred images' floats make thousands. Its layers are transposed convolutions: `weight0` [d, c1, h / 4,
    w / 4], then `weight1` [c1, c2, 4, 4] and `weight2` [c2, c, 4, 4], which double height and width; `bias0` to 2."""

    shared = ("weight0", "bias0", "weight1", "bias1", "weight2", "bias2")

    def decode(self) -> Tensor:
        """[steps, n, c, h, w]"""
        hidden = F.conv_transpose2d(self.images.flatten(0, 1), self.weight0, self.bias0).relu()
        hidden = F.conv_transpose2d(hidden, self.weight1, self.bias1, stride=2, padding=1).relu()
        images = F.conv_transpose2d(hidden, self.weight2, self.bias2, stride=2, padding=1)
        return images.unflatten(0, self.images.shape[:2])


def load(name: str, *, device: torch.device | str = "cpu") -> DistilledSet:
    """Loads a set of the folder `distilled` by its name; a card beside it says how it was made and how well it does."""
    folder = Path(__file__).with_name("distilled")
    if not folder.is_dir():  # but where pip has put the sets
        folder = next(file for file in files("distill-utils") if file.suffix == ".safetensors").locate().parent
    paths = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    require(name in paths, f"name={name!r}: give one of {', '.join(paths)}; DistilledSet.load reads other files")
    return DistilledSet.load(paths[name], device=device)


# ------------------------------------------------------------------------------------ Algorithm 1: inner and outer loop
def training_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [] of scores [..., n, classes] with probabilities [n, classes]: the mean over images, and the sum
    over the networks of an ensemble, so that each gets the gradient that it would get alone."""
    labels = labels.expand(*scores.shape[:-1], -1).flatten(0, -2)
    return F.cross_entropy(scores.flatten(0, -2), labels, reduction="sum") / scores.shape[-2]


@torch.enable_grad()  # training takes gradients, even where the caller wants none
def unroll(network: nn.Module, distilled: DistilledSet, *, differentiable: bool = True) -> nn.Module:
    """Trains a copy of `network` on the distilled set: θ_{i+1} = θ_i - η̃_i ∇ℓ(x̃_i, ỹ_i; θ_i), or Adam's rule. The
    result is a differentiable function of the set, unless `differentiable` is off, which saves memory."""
    optimizer = distilled.make_optimizer(network.parameters())
    with higher.innerloop_ctx(network, optimizer, track_higher_grads=differentiable) as (trained, inner):
        for images, labels, step_size in distilled.schedule():
            inner.step(training_loss(trained(images), labels), override={"lr": [step_size]})
    return trained


def outer_loss(network: nn.Module, distilled: DistilledSet, real: Split, *, unroll: Callable = unroll) -> Tensor:
    """The loss [] on real images after training on the distilled set, a mean over networks: what Algorithm 1 lowers."""
    scores = unroll(network, distilled)(real.images)  # [n, classes], or [networks, n, classes]
    return F.cross_entropy(scores.flatten(0, -2), real.labels.expand(scores.shape[:-1]).flatten())


@dataclass(eq=False)
class History:
    """The loss of every iteration; the other lists gain an entry at every validation."""

    loss: list[float] = field(default_factory=list, repr=False)
    iterations: list[int] = field(default_factory=list)  # completed before the validation
    accuracy: list[float] = field(default_factory=list)  # percent, mean over the validation networks
    images: list[Tensor] = field(default_factory=list, repr=False)  # [steps, n, c, h, w] each, as stored, on the CPU


class Distillation:
    """The outer loop of Algorithm 1 (arXiv 1811.10959), one iteration at a time; improves `distilled` in place.

    Args:
        iterations: steps of the outer optimizer, Adam.
        networks: initializations drawn in each iteration, whose losses are averaged.
        batch_size: real images drawn in each iteration.
        learning_rate: of images and soft labels, falling to 0 along a half cosine.
        step_size_learning_rate: the same for step sizes, roughly their relative change in an iteration; 0 keeps them.
        clip: limit of a meta-gradient's norm, in units of its running mean; math.inf does not clip.
        unroll: the inner loop, a callable like `unroll`; `study/truncation.py` has others for long ones.
        seed: of initializations and real batches, at least 0.
    """

    def __init__(
        self, distilled: DistilledSet, dataset: Dataset, make_network: Factory, *, iterations: int,
        networks: int = 1, batch_size: int = 256, learning_rate: float = 0.03, step_size_learning_rate: float = 0.01,
        clip: float = 2.0, unroll: Callable = unroll, seed: int = 0,
    ) -> None:  # fmt: skip
        require_counts(iterations=iterations, networks=networks, batch_size=batch_size)
        require(clip > 0, f"clip={clip}: give more than 0; math.inf does not clip")
        least = {"learning_rate": learning_rate, "step_size_learning_rate": step_size_learning_rate, "seed": seed}
        for name, value in least.items():
            require(0 <= value < math.inf, f"{name}={value}: give at least 0, and a finite number")
        ours, theirs = ((images.dtype, images.device) for images in (distilled.images, dataset.train.images))
        require(ours == theirs, f"distilled: images are {ours}, those of the dataset {theirs}; make both alike")
        self.distilled, self.dataset, self.make_network = distilled, dataset, make_network
        self.iterations, self.networks, self.batch_size, self.clip = iterations, networks, batch_size, clip
        self.iteration, self.running_norm, self.history = 0, math.inf, History()
        self.unroll, self.seed, self.rank = unroll, seed, 0  # rank: of several processes, which sample their own
        sizes = [distilled.raw_step_sizes]
        content = [parameter for parameter in distilled.parameters() if parameter is not sizes[0]]
        groups = [{"params": content, "lr": learning_rate}, {"params": sizes, "lr": step_size_learning_rate}]
        self.optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999))  # the betas of the authors' code
        self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, iterations)

    def compute_gradient(self) -> float:
        """Lines 3 to 7 of Algorithm 1: leaves the meta-gradient in the distilled set and returns the loss."""
        train = self.dataset.train
        with seeded(self.seed, self.iteration, self.rank):  # and so the same however the iteration was reached
            network = sample_networks(self.make_network, self.networks, train.images.device)
            rows = torch.randint(len(train.labels), (self.batch_size,)).to(train.labels.device)
        self.distilled.zero_grad()
        loss = outer_loss(network, self.distilled, Split(train.images[rows], train.labels[rows]), unroll=self.unroll)
        loss.backward()
        return loss.item()

    def apply_gradient(self, loss: float) -> None:
        """Line 8: one step of Adam downhill. Raises FloatingPointError where the meta-gradient is not finite."""
        limit = self.clip * self.running_norm  # as unrolled training now and then gives a huge gradient
        norm = float(nn.utils.clip_grad_norm_(self.distilled.parameters(), limit))
        if not math.isfinite(norm):
            sizes = f"step sizes up to {self.distilled.step_sizes.max():.3g}; lower step_size= or the learning rates"
            raise FloatingPointError(f"the meta-gradient is not finite at iteration {self.iteration}, with {sizes}")
        first = self.running_norm in (0, math.inf)  # nothing to average with yet
        self.running_norm = (norm or math.inf) if first else 0.9 * self.running_norm + 0.1 * min(norm, limit)
        self.optimizer.step()
        self.cosine.step()
        self.history.loss.append(loss)
        self.iteration += 1
        self.distilled.iterations = f"{self.iteration} of {self.iterations}"

    def validate(self, networks: int) -> None:
        """Adds a validation to the history, unless it ends with one of this iteration."""
        if self.history.iterations[-1:] != [self.iteration]:
            found = validation_accuracy(self.distilled, self.dataset, self.make_network, networks=networks)
            self.history.iterations.append(self.iteration)
            self.history.accuracy.append(round(found, 2))
            self.history.images.append(self.distilled.images.detach().cpu().clone())


def distill(
    distilled: DistilledSet, dataset: Dataset, make_network: Factory, *, iterations: int,
    validate_every: int = 100, validation_networks: int = 5, progress: bool = True, **options,
) -> History:  # fmt: skip
    """Runs Algorithm 1 with the options of `Distillation`: improves `distilled` in place, and validates it every
    `validate_every` iterations on the same `validation_networks` networks. Raises ValueError for bad arguments and
    FloatingPointError where it diverges; then, as after an interrupt, `distilled` is as the last iteration left it."""
    require_counts(validate_every=validate_every, validation_networks=validation_networks)
    run = Distillation(distilled, dataset, make_network, iterations=iterations, **options)
    bar = tqdm(range(iterations), file=sys.stdout, ncols=100, mininterval=1.0, disable=not progress)  # as plain text
    for iteration in bar:
        if iteration % validate_every == 0:
            run.validate(validation_networks)
        run.apply_gradient(run.compute_gradient())
        validation = f"validation {run.history.accuracy[-1]:.1f}% at {run.history.iterations[-1]}"
        bar.set_postfix_str(f"loss {run.history.loss[-1]:.3f}, {validation}", refresh=False)
    run.validate(validation_networks)
    return run.history


class Accuracies:
    """Accuracies [networks] of several networks, in percent; `std` is their spread, not the error of the mean."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.mean = values, float(values.mean())
        self.std = float(values.std()) if len(values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f}%" if len(self.values) > 1 else f"{self.mean:.1f}%"


@torch.no_grad()
def accuracy(network: nn.Module, split: Split) -> Tensor:
    """The percentage [] of `split` that `network` classifies as labelled, or [networks] of an ensemble."""
    size = 100 if split.images.device.type == "cpu" else 1000  # what fits a processor's cache, or a GPU's memory
    parts = zip(split.images.split(size), split.labels.split(size), strict=True)
    return 100 * sum((network(images).argmax(-1) == labels).sum(-1) for images, labels in parts) / len(split.labels)


def evaluate(distilled: DistilledSet, split: Split, make_network: Factory, *, networks: int = 100,
             seed: int = 10_000) -> Accuracies:  # fmt: skip
    """Accuracies on `split` of fresh networks drawn from `seed`, each trained on `distilled` with its schedule."""
    require_counts(networks=networks)
    require(bool(split.images.isfinite().all()), "split: some images are not finite; see make_dataset")
    at_once, values = 8 if split.images.device.type == "cpu" else 64, []  # on a CPU, more gain nothing
    with seeded(seed):
        for first in range(0, networks, at_once):
            network = sample_networks(make_network, min(at_once, networks - first), split.images.device)
            values.append(accuracy(unroll(network, distilled, differentiable=False), split).flatten().cpu())
    return Accuracies(torch.cat(values))


def validation_accuracy(distilled: DistilledSet, dataset: Dataset, make_network: Factory, *, networks: int) -> float:
    """The mean accuracy on validation images, to choose settings by; its networks are never those of a test."""
    return evaluate(distilled, dataset.validation, make_network, networks=networks, seed=20_000).mean


def train(network: nn.Module, split: Split, *, epochs: int, batch_size: int = 64, step_size: float = 0.02,
          optimizer: torch.optim.Optimizer | None = None, transform: Callable = lambda x: x) -> nn.Module:  # fmt: skip
    """Trains `network` in place by SGD with momentum 0.9, or by `optimizer`, and returns it. Torch's random state
    shuffles. Labels may be probabilities [n, classes]; an ensemble sees one order of batches, each as transformed."""
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=step_size, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(split.labels)).to(split.labels.device).split(batch_size):
            scores, labels = network(transform(split.images[rows])), split.labels[rows]
            labels = F.one_hot(labels, scores.shape[-1]).to(scores) if labels.dim() == 1 else labels
            optimizer.zero_grad()
            training_loss(scores, labels).backward()
            optimizer.step()
    return network


def best_constant_step_size(
    distilled: DistilledSet, dataset: Dataset, make_network: Factory, *, networks: int = 5,
    step_sizes: Sequence[float] = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5),
) -> DistilledSet:  # fmt: skip
    """A copy of the set with the step size, one for all updates, that has the best validation accuracy."""
    candidates = [copy.deepcopy(distilled).set_step_sizes(step_size) for step_size in step_sizes]
    return max(candidates, key=lambda each: validation_accuracy(each, dataset, make_network, networks=networks))
