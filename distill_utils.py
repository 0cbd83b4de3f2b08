"""Dataset distillation (Wang, Zhu, Torralba and Efros 2018, arXiv 1811.10959): learn a few images
that train a network.

In this order: inner loop, outer loop, distilled set, decoders, initialization, networks, data,
evaluation, files, pictures, helpers. Brackets give shapes. A *network factory* is a callable that
returns a freshly initialized `nn.Module`, which turns images [n, c, h, w] into scores [n, classes],
before any softmax. *Normalized* images are `(pixel - mean) / std`, of pixels in 0..1.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import socket
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import higher
import numpy as np
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

Factory = Callable[[], nn.Module]
Pair = tuple[Tensor, Tensor]
Data = Pair | torch.utils.data.Dataset
Device = torch.device | str
# `higher` adds eps before the bias correction, torch.optim.Adam after it. With torch's eps of 1e-8,
# the slope of an update explodes where a gradient is 0.
ADAM = {"betas": [0.9, 0.999], "eps": 1e-4}
VALIDATION_SEED = 20_000  # of the networks that choose settings; results are from other networks


# ------------------------------------------------------------------------------------ inner loop
def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """The loss [] of scores [..., n, classes] for classes [n] or probabilities [n, classes]: a mean
    over images and a sum over networks, so that each network gets the gradient it gets alone."""
    labels = labels.expand(*scores.shape[:-1], *labels.shape[1:]).flatten(0, scores.dim() - 2)
    return F.cross_entropy(scores.flatten(0, -2), labels, reduction="sum") / scores.shape[-2]


@torch.enable_grad()  # training takes gradients, even where the caller wants none
def unroll(
    network: nn.Module, distilled: DistilledSet, *, differentiable: bool = True
) -> nn.Module:
    """Trains a copy of a network, or of each in an `Ensemble`, on the distilled set:

        θ_{i+1} = θ_i - η̃_i ∇ℓ(x̃_i, ỹ_i; θ_i), or Adam's rule.

    The result turns images [n, c, h, w] into scores [networks, n, classes]. It is a differentiable
    function of the set, unless `differentiable` is False, which saves memory. For an ordinary
    trained network, call `train_on`.
    """
    network = as_ensemble(network)
    optimizer = distilled.make_optimizer(network.parameters())
    context = higher.innerloop_ctx(network, optimizer, track_higher_grads=differentiable)
    with context as (trained, optimizer):
        for images, labels, step_size in distilled.schedule():
            optimizer.step(cross_entropy(trained(images), labels), override={"lr": [step_size]})
    return trained


# ------------------------------------------------------------------------------------ outer loop
def outer_loss(
    network: nn.Module, distilled: DistilledSet, real: Split, *, unroll: Callable = unroll
) -> Tensor:
    """The loss [] on real images after training on the distilled set, a mean over networks: what
    Algorithm 1 minimizes."""
    scores = unroll(network, distilled)(real.images)  # [networks, n, classes]
    return cross_entropy(scores, real.labels) / len(scores)


@dataclass(eq=False)
class History:
    """The loss of every iteration; the other lists gain an entry at every validation."""

    loss: list[float] = field(default_factory=list, repr=False)
    iterations: list[int] = field(default_factory=list)  # completed at each validation
    accuracy: list[float] = field(default_factory=list)  # percent, mean over validation networks
    images: list[Tensor] = field(default_factory=list, repr=False)  # before decoding, on the CPU


@dataclass(eq=False, repr=False)
class Distillation:
    """The outer loop of Algorithm 1, which improves `distilled` in place.

    Args:
        distilled: the set, on the device of the dataset.
        dataset: what to distill.
        make_network: a network factory.
        iterations: steps of the outer optimizer, Adam.
        networks: initializations drawn in each iteration, whose losses are averaged.
        batch_size: real images drawn in each iteration.
        learning_rate: initial learning rate of everything but the step sizes, annealed to 0 along
            a half cosine.
        step_size_learning_rate: the same for step sizes, roughly their relative change in an
            iteration; 0 keeps them.
        clip: limits a meta-gradient's norm to this multiple, above 1, of its running mean;
            math.inf does not clip.
        unroll: computes the meta-gradient, a callable like `unroll`; validation always trains
            by `unroll` itself.
        seed: seed of initializations, real batches and random decoders, at least 0.
        validate_every: iterations between validations.
        validation_networks: networks behind a validation accuracy, the same every time.
        progress: whether to show a progress bar.

    Raises ValueError for bad arguments, among them a network that `check_network` refuses.
    """

    distilled: DistilledSet
    dataset: Dataset
    make_network: Factory
    _: KW_ONLY
    iterations: int
    networks: int = 1
    batch_size: int = 256
    learning_rate: float = 0.03
    step_size_learning_rate: float = 0.01
    clip: float = 2.0
    unroll: Callable = unroll
    seed: int = 0
    validate_every: int = 100
    validation_networks: int = 5
    progress: bool = True

    def __post_init__(self) -> None:
        names = ("iterations", "networks", "batch_size", "validate_every", "validation_networks")
        require_counts(**{name: getattr(self, name) for name in names})
        require(self.clip > 1, f"clip={self.clip}: give more than 1; math.inf does not clip")
        for name in ("learning_rate", "step_size_learning_rate"):
            rate = getattr(self, name)
            require(0 <= rate < math.inf, f"{name}={rate}: give at least 0, and a finite number")
        ours = (self.distilled.labels.shape[-1], *self.distilled.decode().shape[2:])
        theirs = (self.dataset.classes, *self.dataset.train.images.shape[1:])
        sizes = f"{ours} are its classes and decoded image size, the dataset has {theirs}"
        require(ours == theirs, f"distilled: {sizes}")
        self.running_norm, self.history = math.inf, History()
        sizes = self.distilled.raw_step_sizes
        content = [weight for weight in self.distilled.parameters() if weight is not sizes]
        self.optimizer = torch.optim.Adam(
            [
                {"params": content, "lr": self.learning_rate},
                {"params": sizes, "lr": self.step_size_learning_rate},
            ],
            betas=(0.5, 0.999),  # of the authors' code
        )
        self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.iterations)
        check_network(self.make_network, self.dataset.train.images, self.dataset.classes)

    @property
    def iteration(self) -> int:
        """Number of iterations completed."""
        return len(self.history.loss)

    def run(self) -> History:
        """Runs the remaining iterations. Raises FloatingPointError where training diverges, and
        KeyboardInterrupt when stopped; the set keeps what it has learned, and another `run` resumes
        from there."""
        left = range(self.iteration, self.iterations)
        bar = tqdm(left, file=sys.stdout, ncols=100, disable=not self.progress)
        try:
            for iteration in bar:
                if iteration % self.validate_every == 0 or not self.history.accuracy:
                    self.validate()
                loss = self.step()
                if self.iteration == self.iterations:
                    self.validate()
                accuracy = self.history.accuracy[-1]
                bar.set_postfix_str(f"loss {loss:.3f}, validation {accuracy:.1f}%", refresh=False)
            self.validate()  # if an interrupt came before it did
        except KeyboardInterrupt:
            done = f"{self.iteration} of {self.iterations} iterations"
            raise KeyboardInterrupt(f"stopped after {done}, which the set keeps") from None
        return self.history

    def step(self) -> float:
        """One iteration; returns its loss."""
        loss = self.compute_gradient()
        self.apply_gradient()
        self.history.loss.append(loss)
        return loss

    def compute_gradient(self) -> float:
        """Lines 3 to 7 of Algorithm 1: leaves the meta-gradient in the set and returns the loss."""
        images, labels = self.dataset.train
        with seeded(self.seed, self.iteration):  # the same however the iteration was reached
            network = Ensemble(sample_networks(self.make_network, self.networks, images.device))
            rows = torch.randint(len(labels), (self.batch_size,)).to(labels.device)
            real = Split(images[rows], labels[rows])
            loss = outer_loss(network, self.distilled, real, unroll=self.unroll)
        self.distilled.zero_grad()
        loss.backward()
        return loss.item()

    def apply_gradient(self) -> None:
        """Line 8, by Adam. Raises FloatingPointError where the meta-gradient is not finite."""
        limit = self.clip * self.running_norm  # as unrolled training now and then gives a huge one
        norm = float(nn.utils.clip_grad_norm_(self.distilled.parameters(), limit))
        if not math.isfinite(norm):
            found = f"the meta-gradient is not finite at iteration {self.iteration}"
            raise FloatingPointError(f"{found}; lower step_size= or the learning rates")
        first = self.running_norm in (0, math.inf)  # nothing to average with yet
        mean = 0.9 * self.running_norm + 0.1 * min(norm, limit)
        self.running_norm = (norm or math.inf) if first else mean
        self.optimizer.step()
        self.cosine.step()
        self.distilled.iterations += 1

    def validate(self) -> None:
        """Adds a validation to the history, unless it ends with one of this iteration."""
        if self.history.iterations[-1:] == [self.iteration]:
            return
        split, networks = self.dataset.validation, self.validation_networks
        accuracies = evaluate(
            self.distilled, split, self.make_network, networks=networks, seed=VALIDATION_SEED
        )
        self.history.iterations.append(self.iteration)
        self.history.accuracy.append(round(accuracies.mean, 2))
        self.history.images.append(self.distilled.images.detach().cpu().clone())

    def state_dict(self) -> dict:
        """What a run with the same arguments needs to resume; deep-copy it to keep it in memory."""
        state = {name: getattr(self, name).state_dict() for name in STATEFUL}
        return {**state, "running_norm": self.running_norm, "history": vars(self.history)}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.running_norm = state["running_norm"]
        self.history = History(**copy.deepcopy(state["history"]))


STATEFUL = ("distilled", "optimizer", "cosine")


def distill(distilled: DistilledSet, dataset: Dataset, make_network: Factory, **options) -> History:
    """Algorithm 1 in one call: runs a `Distillation` with these arguments."""
    return Distillation(distilled, dataset, make_network, **options).run()


# --------------------------------------------------------------------------------- distilled set
class DistilledSet(nn.Module):
    """What is learned: images, a positive step size for every update, and optionally soft labels
    and a decoder.

    Args:
        images: [steps, n, c, h, w], normalized images, or the decoder's input; update u trains on
            step u % steps.
        labels: [steps, n, classes], probabilities, one row for each decoded image.
        decoder: a module that turns `images` into those that networks see, [steps, n, c, h, w]; it
            is learned, too.
        epochs: passes over the steps; the inner loop makes steps × epochs updates.
        step_size: initial value of every step size, or one for each update as a tensor [updates].
        soft_labels: whether to learn the labels, as scores behind a softmax (Sucholutsky and
            Schonlau 2019).
        label_smoothing: share of the uniform distribution in initial soft labels, above 0, up to 1.
        optimizer: the inner optimizer, "SGD" or "Adam".
        momentum: momentum of SGD.
        bits: bits per stored number, 2 to 16; None stores floats. Images, labels and the decoder's
            weights are rounded, and gradients pass as if they were not (Bengio et al. 2013).
        label_bits: the same for labels, where they have fewer.

    `inner` holds epochs, optimizer and momentum; `iterations` [] counts outer iterations so far.
    Raises ValueError where shapes or ranges are wrong.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        decoder: nn.Module | None = None,
        epochs: int = 1,
        step_size: float | Tensor = 0.02,
        soft_labels: bool = False,
        label_smoothing: float = 0.5,
        optimizer: str = "SGD",
        momentum: float = 0.0,
        bits: int | None = None,
        label_bits: int | None = None,
    ) -> None:
        super().__init__()
        images = torch.as_tensor(images, dtype=torch.get_default_dtype())
        labels = torch.as_tensor(labels).detach().to(images)
        sound = images.dim() == 5 and 0 not in images.shape and images.isfinite().all()
        require(sound, f"images: {list(images.shape)}; give finite numbers [steps, n, c, h, w]")
        require_counts(epochs=epochs)
        sound = bits is label_bits is None or {bits, label_bits or bits} <= {*range(2, 17)}
        require(sound, f"{bits=}, {label_bits=}: give whole numbers of 2 to 16")
        require(0 < label_smoothing <= 1, f"{label_smoothing=}: give more than 0 and at most 1")
        sound = optimizer == "SGD" or (optimizer == "Adam" and momentum == 0)
        require(sound, f"{optimizer=}, {momentum=}: give SGD, or Adam and no momentum")
        self.inner = {"epochs": int(epochs), "optimizer": optimizer, "momentum": float(momentum)}
        self.images, self.decoder = nn.Parameter(images.clone()), decoder or nn.Identity()
        self.bits, self.label_bits = bits, label_bits or bits
        self.register_buffer("iterations", torch.tensor(0))
        self.raw_step_sizes = nn.Parameter(images.new_empty(self.updates))
        self.set_step_sizes(step_size)
        shape = self.decode().shape[:2]
        require(shape[0] == len(images), f"decoder: turns {len(images)} steps into {shape[0]}")
        sound = labels.shape[:-1] == shape and (labels >= 0).all()
        sound = sound and ((labels.sum(-1) - 1).abs() < 1e-4).all()
        remedy = f"give probabilities {[*shape, 'classes']}, as F.one_hot makes of integers"
        require(sound, f"labels: {list(labels.shape)}; {remedy}")
        if soft_labels:
            smooth = torch.lerp(labels, labels.mean(-1, keepdim=True), label_smoothing)
            self.label_scores = nn.Parameter(smooth.log())
        else:
            self.register_buffer("hard_labels", labels.clone())

    @property
    def updates(self) -> int:
        """Number of updates of the inner loop."""
        return len(self.images) * self.inner["epochs"]

    @property
    def labels(self) -> Tensor:
        """[steps, n, classes], probabilities."""
        if hasattr(self, "label_scores"):
            return rounded(self.label_scores, self.label_bits).softmax(-1)
        return self.hard_labels

    @property
    def step_sizes(self) -> Tensor:
        """[updates], positive."""
        return F.softplus(self.raw_step_sizes)

    def set_step_sizes(self, step_size: float | Tensor) -> DistilledSet:
        """Sets all step sizes to one number, or to those of a tensor [updates]; returns the set."""
        sizes = torch.as_tensor(step_size).detach().to(self.images)
        sound = sizes.shape in ((), (self.updates,)) and (sizes > 0).all() & sizes.isfinite().all()
        require(sound, f"step_size={step_size}: give a positive number, or [{self.updates}]")
        # The inverse of softplus, log(exp(s) - 1), in the form that does not overflow for large s.
        self.raw_step_sizes.detach().copy_(sizes + (-torch.expm1(-sizes)).log())
        return self

    def decode(self) -> Tensor:
        """The images as networks see them, [steps, n, c, h, w]."""
        if self.bits is None:
            return self.decoder(self.images)
        weights = {name: rounded(w, self.bits) for name, w in self.decoder.named_parameters()}
        return functional_call(self.decoder, weights, (rounded(self.images, self.bits),))

    def schedule(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images [n, c, h, w], labels [n, classes] and step size [] of each update in turn."""
        images, labels = self.decode(), self.labels
        for update, step_size in enumerate(self.step_sizes):
            step = update % len(images)
            yield images[step], labels[step], step_size

    def make_optimizer(self, parameters: Iterator[Tensor]) -> torch.optim.Optimizer:
        """The inner optimizer; each update replaces its learning rate by its own step size."""
        if self.inner["optimizer"] == "Adam":
            return torch.optim.Adam(parameters, lr=1.0, **ADAM)
        return torch.optim.SGD(parameters, lr=1.0, momentum=self.inner["momentum"])


def quantize(values: Tensor, bits: int) -> tuple[Tensor, int, Tensor, Tensor]:
    """Whole numbers below 2**bits on a grid, their bits, and its scale [] and offset []: values are
    about numbers × scale + offset. Extreme values are clipped, more of them where bits are few.
    Tensors of one dimension hold few numbers, as step sizes, and get 16 bits."""
    bits = bits if values.dim() > 1 else 16
    tail, most = min(4.0**-bits, 0.5 / values.shape[-1]), 2**bits - 1  # spares one-hot labels
    ordered, cut = values.flatten().sort().values, int(tail * values.numel())
    low, high = ordered[cut], ordered[-1 - cut]  # values, so rounding again changes nothing
    scale = ((high - low) / most).clamp_min(1e-12)
    return ((values - low) / scale).round().clamp(0, most), bits, scale, low


def rounded(values: Tensor, bits: int | None) -> Tensor:
    """Values on the grid of `quantize`, with the gradient of the values themselves."""
    if bits is None:
        return values
    numbers, _, scale, offset = quantize(values.detach(), bits)
    return values + (numbers * scale + offset - values).detach()


# -------------------------------------------------------------------------------------- decoders
class CodeDecoder(nn.Sequential):
    """Decodes short codes by three transposed convolutions that all images share (Lee et al. 2022).
    With `classes`, it is a generator, whose codes need not be stored: image i is of class
    i % classes, and its code is point i // classes of a sequence, moved by the stored one.

    Args:
        codes: numbers in a code.
        channels: of the two layers between code and image.
        size: of an image, (c, h, w); h and w are multiples of 4.
        classes: of a generator, else 0.
    """

    def __init__(
        self, codes: int, channels: Sequence[int], size: Sequence[int], classes: int = 0
    ) -> None:
        (c1, c2), (c, h, w) = channels, size
        double = partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1)
        first = nn.ConvTranspose2d(codes + classes, c1, (h // 4, w // 4))
        super().__init__(first, nn.ReLU(), double(c1, c2), nn.ReLU(), double(c2, c))
        self.options = {"codes": codes, "channels": channels, "size": size, "classes": classes}

    def forward(self, codes: Tensor) -> Tensor:
        """[steps, n, codes, 1, 1] to [steps, n, c, h, w]; zeros move no point."""
        size, classes, codes = codes.shape[:2], self.options["classes"], codes.flatten(0, 1)
        if classes:
            rows = torch.arange(len(codes))
            points = normal_points(*codes.shape[:2])[rows // classes]
            inputs = torch.cat([points, torch.eye(classes)[rows % classes]], 1)
            codes = F.pad(codes, [0] * 5 + [classes]) + inputs[..., None, None].to(codes)
        return super().forward(codes).unflatten(0, size)


def normal_points(count: int, dimensions: int) -> Tensor:
    """[count, dimensions], spread like normal samples but more evenly: a Sobol sequence."""
    sobol = torch.quasirandom.SobolEngine(dimensions).fast_forward(1)  # without the corner
    return torch.special.ndtri(sobol.draw(count))


# -------------------------------------------------------------------------------- initialization
def initialize(
    dataset: Dataset, kind: str, *, steps: int, per_class: int = 1, std: float = 1.0, seed: int = 0
) -> Pair:
    """Images [steps, n, c, h, w] to start from, and one-hot labels [steps, n, classes]; n is
    per_class × classes, and the classes take turns.

    Args:
        kind: "noise" is normal, of standard deviation `std` in normalized units, 1 in the paper;
            "real" takes random training images, none twice; "k-means" takes the centers of each
            class, of which a single one is its mean.
    """
    require(kind in ("noise", "real", "k-means"), f"{kind=}: give noise, real or k-means")
    require_counts(steps=steps, per_class=per_class)
    real, count = dataset.train.images, steps * per_class
    labels = torch.eye(dataset.classes).repeat(steps, per_class, 1).to(real)
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        noise = torch.randn(*labels.shape[:2], *real.shape[1:], generator=generator)
        return (std * noise).to(real), labels
    chosen = []  # [count, c, h, w] for each class
    for label in range(dataset.classes):
        images = real[dataset.train.labels == label]
        found = f"{steps=}, {per_class=}: class {label} has {len(images)} images"
        require(count <= len(images), f"{found}; ask for no more")
        if kind == "real":
            chosen.append(images[torch.randperm(len(images), generator=generator)[:count]])
        else:
            from sklearn.cluster import KMeans  # here, as importing it takes most of a second

            means = KMeans(count, n_init=1, random_state=seed).fit(images.flatten(1).cpu().numpy())
            chosen.append(torch.from_numpy(means.cluster_centers_).to(real).view_as(images[:count]))
    return torch.stack(chosen, 1).unflatten(0, (steps, per_class)).flatten(1, 2), labels


# -------------------------------------------------------------------------------------- networks
class LeNet(nn.Sequential):
    """The paper's LeNet for 28×28 images, with Xavier-normal weights and zero biases from torch's
    random state. ReLU follows pooling: the same function, for a quarter of the work."""

    def __init__(self, *, classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),  # [n, 6, 14, 14]
            nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU(),  # [n, 16, 5, 5]
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(),
            nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)
        )  # fmt: skip
        for weight in self.parameters():
            nn.init.xavier_normal_(weight) if weight.dim() > 1 else nn.init.zeros_(weight)


class Ensemble(nn.ModuleList):
    """Networks as one module: images [n, c, h, w] give scores [networks, n, classes].

    `higher` copies modules and loses hooks, lists of layers and patched forwards. So it gets this
    module, which has nothing but weights, and which calls the networks themselves with them.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        alike = len({*map(describe, networks)}) == 1
        super().__init__(map(Stack, [networks] if alike else zip(networks)))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([stack(images) for stack in self])


class Stack(nn.Module):
    """Networks that differ only in their weights, which are stacked. Frozen ones are constants."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        parameters, buffers = stack_module_state([*networks])
        self.names = [*parameters, *buffers]
        for name, value in (parameters | buffers).items():
            learned = name in parameters and networks[0].get_parameter(name).requires_grad
            if value.dim() == 5:  # convolutions, which are faster with channels last
                value = value.movedim(2, -1).contiguous().movedim(-1, 2)
            value = nn.Parameter(value.detach()) if learned else nn.Buffer(value.detach())
            setattr(self, slashed(name), value)
        self.networks = tuple(networks)  # in a tuple, so that their weights do not count as ours

    def weights(self) -> dict[str, Tensor]:
        """Weights and buffers [networks, ...] by their names in a network."""
        return {name: getattr(self, slashed(name)) for name in self.names}

    def forward(self, images: Tensor) -> Tensor:
        weights = self.weights()
        with sdpa_kernel(SDPBackend.MATH):  # attention that can be differentiated twice
            if len(self.networks) > 1:
                run = partial(functional_call, self.networks[0], args=(images,))
                with suppress(RuntimeError):  # vmap cannot run, say, recurrent networks
                    return torch.vmap(run, randomness="different")(weights)
            scores = []
            for i, network in enumerate(self.networks):
                own = {name: value[i] for name, value in weights.items()}
                scores.append(functional_call(network, own, (images,)))
            return torch.stack(scores)

    def train(self, mode: bool = True) -> Stack:
        for network in self.networks:  # which have the layers, and so their mode
            network.train(mode)
        return super().train(mode)


def slashed(name: str) -> str:
    """The name of a network's weight among our attributes: without dots, and like none of ours."""
    return "/" + name.replace(".", "/")


def describe(network: nn.Module) -> str:
    """All but the values of weights: networks of the same description can run in one call."""
    state = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
    parts = [[weight.shape, weight.requires_grad] for weight in network.parameters()]
    for module in network.modules():
        for name, value in vars(module).items():
            plain = callable(value) or isinstance(value, (int, float, str, tuple, type(None)))
            plain |= isinstance(value, dict) and not value
            if name not in state:  # what is not plain may differ, say tensors, lists and hooks
                parts.append([type(module), name, value if plain else id(value)])
    return str(parts)


def as_ensemble(network: nn.Module) -> nn.Module:
    """An ensemble of a copy of the network; an ensemble, trained or not, stays as it is."""
    return network if isinstance(network, Ensemble) else Ensemble([copy.deepcopy(network)])


def sample_networks(make_network: Factory, count: int, device: Device) -> list[nn.Module]:
    """Samples networks from torch's random state."""
    remedy = "give the factory, or fixed_initialization(...)"
    require(not isinstance(make_network, nn.Module), f"make_network: is a network; {remedy}")
    return [make_network().to(device) for _ in range(count)]


def fixed_initialization(make_network: Factory, *, seed: int) -> Factory:
    """A factory of copies of one network drawn from `seed`: the paper's fixed initialization."""
    with seeded(seed):
        (network,) = sample_networks(make_network, 1, "cpu")
    return lambda: copy.deepcopy(network)


@torch.enable_grad()
def check_network(
    make_network: Factory, images: Tensor, classes: int, *, differentiable: bool = True
) -> None:
    """Tries a network on four of `images` [n, c, h, w]. Raises ValueError where training would be
    impossible or silently wrong: scores are not [n, classes], a weight gets no gradient, an answer
    or a buffer changes from call to call or in evaluation mode, or, for `differentiable` training,
    second derivatives are missing or make a Hessian that is not symmetric."""
    images = images[:4].clone().requires_grad_()
    with seeded(0):
        (network,) = sample_networks(make_network, 1, images.device)
        ensemble = Ensemble([network])
        modes = {module: module.training for module in network.modules()}
        buffers = [buffer.clone() for buffer in ensemble.buffers()]
        inputs = [*ensemble.parameters()] + [images] * differentiable
        names = [name for name, weight in network.named_parameters() if weight.requires_grad]
        require(names, "make_network: has no weights to train")
        try:
            alone = network(images)
            shape, needed = getattr(alone, "shape", type(alone)), (len(images), classes)
            remedy = f"give scores {needed}, [images, classes]"
            require(shape == needed, f"make_network: returns {shape}; {remedy}")
            likely = (alone.sum(-1) - 1).abs().max() < 1e-4
            require(not likely, "make_network: returns probabilities; leave out the softmax")
            scores = ensemble(images)
            loss = cross_entropy(scores, torch.arange(len(images), device=images.device) % classes)
            slopes = torch.autograd.grad(
                loss, inputs, create_graph=differentiable, allow_unused=True
            )
            found = zip([*names, "images"], slopes, strict=False)
            lost = ", ".join(name for name, slope in found if slope is None)
            require(not lost, f"make_network: no gradient reaches {lost}; freeze what is unused")
            if differentiable:
                direction = [*map(torch.randn_like, slopes)]
                # `grad` passes over a missing derivative that `backward` raises an error for.
                torch.autograd.backward(slopes, direction, retain_graph=True)
                multiply = partial(torch.autograd.grad, slopes, inputs, materialize_grads=True)
                # Hv = multiply(v). H is symmetric, so that v·HHv = Hv·Hv, unless torch is wrong.
                once = multiply(direction, retain_graph=True)
                pairs = zip(direction, once, multiply(once), strict=True)
                change = sum((v * hhv - hv * hv).sum() for v, hv, hhv in pairs)
                symmetric = change.abs() <= 1e-2 * sum(hv.square().sum() for hv in once)
                require(symmetric, "make_network: torch gets its second derivatives wrong")
        except RuntimeError as error:
            trial = f"images {list(images.shape)}{', differentiated twice' * differentiable}"
            raise ValueError(f"make_network: fails on {trial} ({error})") from None
        with torch.no_grad():
            others = torch.cat([alone[None], ensemble(images), ensemble.eval()(images)])
        for module, mode in modes.items():
            module.training = mode
    same = (others - scores).abs().max() <= 1e-3 * scores.abs().max()
    same &= all(map(torch.equal, buffers, ensemble.buffers()))
    found = "make_network: a network changes when it is tested or called again"
    require(same, f"{found}; leave out dropout, take GroupNorm for batch norm, keep no state")


# ------------------------------------------------------------------------------------------ data
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


def make_dataset(name: str, train: Data, test: Data, *, validation: int, device: Device) -> Dataset:
    """Makes a `Dataset` of pixels [n, c, h, w] in 0..1 and integer labels [n]: pairs of tensors, or
    torch datasets of images and labels. A fixed shuffle, the same in every run, moves `validation`
    images out of `train`. Raises ValueError where shapes or ranges are wrong."""
    collate = torch.utils.data.default_collate
    pairs = (part if isinstance(part, Sequence) else collate([*part]) for part in (train, test))
    train, test = (tuple(map(torch.as_tensor, pair)) for pair in pairs)
    for part, (pixels, labels) in {"test": test, "train": train}.items():
        sound = pixels.ndim == 4 and len(pixels) > 0 and labels.shape == pixels.shape[:1]
        sound = sound and (pixels.shape[1] <= 4 or pixels.shape[3] > 4)  # else channels last
        found = f"{part}: pixels {list(pixels.shape)}, labels {list(labels.shape)}"
        require(sound, f"{found}; give [n, c, h, w], as by permute(0, 3, 1, 2), and [n]")
        low, high = pixels.aminmax()
        require(
            0 <= low < high <= 1, f"{part}: pixels lie in {low:g}..{high:g}; scale them to 0..1"
        )
    classes = labels.unique()
    found = f"train: labels {classes.tolist()[:12]}"
    require(classes.tolist() == [*range(len(classes))], f"{found}; number the classes 0, 1, 2, ...")
    found = f"test: labels {test[1].unique().tolist()[:12]}"
    require(torch.isin(test[1], classes).all(), f"{found}; give those of train")
    require_counts(validation=validation)
    require(validation < len(labels), f"{validation=}: give fewer than the {len(labels)} of train")
    mean, std = float(pixels.float().mean()), float(pixels.float().std())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = [(pixels[rows], labels[rows]) for rows in (order[validation:], order[:validation])]
    splits = [
        Split(((pixels.float() - mean) / std).to(device), labels.long().to(device))
        for pixels, labels in (*parts, test)
    ]
    return Dataset(name, mean, std, *splits, len(classes))


def load_mnist(root: str | Path, *, device: Device, name: str = "MNIST") -> Dataset:
    """Loads MNIST, FashionMNIST or KMNIST from the folder `root`, or downloads it there: 55,000
    training, 5,000 validation and 10,000 test images. Raises FileNotFoundError, with the remedy,
    where neither works."""
    names = "MNIST", "FashionMNIST", "KMNIST"
    require(name in names, f"{name=}: give one of {', '.join(names)}")
    load = getattr(torchvision.datasets, name)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(patience or 30)  # seconds; torchvision would wait forever
    try:
        parts = [load(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # damaged files raise errors of many kinds
        folder = f"{root}/{name}/raw"
        remedy = (
            f"delete {folder} and connect to the internet once, or put {name}'s four files there"
        )
        raise FileNotFoundError(f"root='{root}': {name} is missing or damaged; {remedy}") from error
    finally:
        socket.setdefaulttimeout(patience)
    train, test = ((part.data[:, None] / 255, part.targets) for part in parts)
    return make_dataset(name, train, test, validation=len(train[1]) // 12, device=device)


def load_digits(*, device: Device) -> Dataset:
    """Scikit-learn's 8×8 digits, enlarged to 20×20 in 28×28: 1,297 training, 200 validation and
    300 test images."""
    from sklearn import datasets, model_selection

    pixels, labels = map(torch.from_numpy, datasets.load_digits(return_X_y=True))
    pixels = F.interpolate(pixels.float().view(-1, 1, 8, 8) / 16, size=20, mode="bilinear")
    parts = model_selection.train_test_split(
        F.pad(pixels, [4] * 4), labels, test_size=300, random_state=0, stratify=labels
    )
    pairs = parts[::2], parts[1::2]
    return make_dataset("scikit-learn digits", *pairs, validation=200, device=device)


# ------------------------------------------------------------------------------------ evaluation
class Accuracies:
    """Accuracies [networks] in percent; `std` is their standard deviation, not that of the mean."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.mean = values, float(values.mean())
        self.std = float(values.std()) if len(values) > 1 else 0.0

    def __repr__(self) -> str:
        return f"{self.mean:.1f}" + f" ± {self.std:.1f}" * (len(self.values) > 1) + "%"


@torch.no_grad()
def accuracy(network: nn.Module, split: Split) -> Tensor:
    """The percentage [] of `split` that a network classifies as labelled, or [networks] of an
    ensemble."""
    size = 100 if split.images.device.type == "cpu" else 1000  # what fits a cache, or a GPU
    parts = zip(split.images.split(size), split.labels.split(size), strict=True)
    correct = sum((network(images).argmax(-1) == labels).sum(-1) for images, labels in parts)
    return 100 * correct / len(split.labels)


def evaluate(
    distilled: DistilledSet,
    split: Split,
    make_network: Factory,
    *,
    networks: int = 100,
    seed: int = 10_000,
) -> Accuracies:
    """Accuracies on `split` of fresh networks drawn from `seed`, each trained on `distilled` with
    its schedule. Raises ValueError for a network that `check_network` refuses."""
    require_counts(networks=networks)
    require(split.images.isfinite().all(), "split: some images are not finite; see make_dataset")
    check_network(make_network, split.images, distilled.labels.shape[-1], differentiable=False)
    device, values = split.images.device, []
    at_once = 8 if device.type == "cpu" else 64  # on a CPU, more are no faster
    with seeded(seed):
        for first in range(0, networks, at_once):
            members = sample_networks(make_network, min(at_once, networks - first), device)
            with seeded(seed, first):  # so that random decoders do not change the networks
                trained = unroll(Ensemble(members), distilled, differentiable=False)
            values.append(accuracy(trained, split).cpu())
    return Accuracies(torch.cat(values))


def best_constant_step_size(
    distilled: DistilledSet,
    dataset: Dataset,
    make_network: Factory,
    *,
    networks: int = 5,
    step_sizes: Sequence[float] = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5),
) -> DistilledSet:
    """A copy of the set with the one step size that has the best validation accuracy."""
    options = {"networks": networks, "seed": VALIDATION_SEED}
    sets = [copy.deepcopy(distilled).set_step_sizes(size) for size in step_sizes]
    return max(
        sets, key=lambda each: evaluate(each, dataset.validation, make_network, **options).mean
    )


def train_on(network: nn.Module, distilled: DistilledSet) -> nn.Module:
    """A copy of the network, trained on the distilled set: an ordinary module, to use and save.
    Raises ValueError for a network that `check_network` refuses, and for a set without a schedule.
    """
    scheduled = "from_scratch" not in getattr(distilled, "metadata", ())
    require(scheduled, "distilled: has no schedule; train from scratch, as its card shows")
    images, classes = distilled.decode()[0].detach(), distilled.labels.shape[-1]
    check_network(lambda: copy.deepcopy(network), images, classes, differentiable=False)
    (trained,) = unroll(network, distilled, differentiable=False)
    network, weights = copy.deepcopy(network), trained.weights()
    for name, value in network.named_parameters():  # buffers stay: see check_network
        value.data.copy_(weights[name][0])
    return network


def train(
    network: nn.Module,
    split: Split,
    *,
    epochs: int,
    batch_size: int = 64,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Trains a network or an ensemble in place, by SGD with momentum or by `optimizer`, and returns
    it. Labels may be probabilities [n, classes]. Torch's random state shuffles."""
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(split.labels)).to(split.labels.device).split(batch_size):
            optimizer.zero_grad()
            cross_entropy(network(split.images[rows]), split.labels[rows]).backward()
            optimizer.step()
    return network


# ----------------------------------------------------------------------------------------- files
TENSORS = ("images", "labels", "step_sizes")  # beside those of a decoder
DECODERS = {kind.__name__: kind for kind in (nn.Identity, CodeDecoder)}


def save(distilled: DistilledSet, path: str | Path, *, dataset: Dataset, **notes: object) -> None:
    """Writes a safetensors file in the format of `distilled/README.md`, whole or not at all;
    `notes`, as network="LeNet", go with it."""
    decoder, tensors = distilled.decoder, {name: getattr(distilled, name) for name in TENSORS}
    tensors |= decoder.state_dict(prefix="decoder.")
    if distilled.bits:
        scores = tensors.pop("labels").clamp_min(1e-4).log()
        tensors["label_scores"] = getattr(distilled, "label_scores", scores)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    finite = all(tensor.isfinite().all() for tensor in tensors.values())
    require(finite, f"path='{path}': the set has values that are not finite, and load refuses them")
    metadata = {
        **notes,
        "dataset": dataset.name,
        "mean": dataset.mean,
        "std": dataset.std,
        "iterations": int(distilled.iterations),
        "inner": distilled.inner,
        "Adam": ADAM,
        "decoder": type(decoder).__name__,
        "decoder_options": getattr(decoder, "options", {}),
    }
    if distilled.bits:
        metadata["grids"] = {}
        weights = [f"decoder.{name}" for name, _ in decoder.named_parameters()]
        for name in ("images", "label_scores", "step_sizes", *weights):
            bits = distilled.label_bits if name == "label_scores" else distilled.bits
            tensors[name], metadata["grids"][name] = pack(tensors[name], bits)
    metadata["sha256"] = hashlib.sha256(to_bytes(tensors, metadata)).hexdigest()
    with replacing(path) as unfinished:
        unfinished.write_bytes(to_bytes(tensors, metadata))


def pack(values: Tensor, bits: int) -> tuple[Tensor, list]:
    """Rounded values as bytes, and their bits, scale, offset and shape: see the format."""
    numbers, bits, scale, offset = quantize(values, bits)
    binary = numbers.long().flatten()[:, None] >> torch.arange(bits) & 1
    packed = zlib.compress(np.packbits(binary.numpy()), 9)
    grid = [int(bits), float(scale), float(offset), [*values.shape]]
    return torch.tensor([*packed], dtype=torch.uint8), grid


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and puts that file in the place of `path` once it is
    whole and on the disk; where writing fails, `path` stays as it was."""
    unfinished = Path(f"{path}.{os.getpid()}.partial")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@torch.no_grad()  # decoding all images takes less memory
def load(
    name: str | Path, *, device: Device = "cpu", decoder: nn.Module | None = None
) -> DistilledSet:
    """Loads a set of the folder `distilled` by its name, or what `save` wrote by its path.

    A set with a decoder of your own needs a `decoder` of that class, which takes the weights of the
    file. Labels come back fixed, soft ones too, and a set of few bits as floats. `metadata` of the
    set has what the file says, such as the mean and the std of pixels, to normalize others. Raises
    ValueError where there is no such set, or where its file is damaged or contradicts itself.
    """
    folder = Path(__file__).with_name("distilled")
    known = {file.stem: file for file in folder.glob("*.safetensors")}
    path = known.get(str(name), name)
    try:
        with safetensors.safe_open(path, "pt", device=str(device)) as file:
            metadata = json.loads(file.metadata()["distilled_set"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        checksum, kind = metadata.pop("sha256"), metadata["decoder"]
        same = checksum == hashlib.sha256(to_bytes(tensors, metadata)).hexdigest()
        require(same, "its checksum differs")
        require(metadata["Adam"] == ADAM, f"it asks for another Adam, {metadata['Adam']}")
        remedy = f"give its decoder, as in load(path, decoder={kind}())"
        require(decoder or kind in DECODERS, remedy)
        decoder = (decoder or DECODERS[kind](**metadata["decoder_options"])).to(device)
        require(type(decoder).__name__ == kind, f"its decoder is of the class {kind}")
        for key, (bits, scale, offset, shape) in metadata.get("grids", {}).items():
            packed = zlib.decompress(tensors[key].cpu().numpy())
            binary = np.unpackbits(np.frombuffer(packed, np.uint8), count=bits * math.prod(shape))
            numbers = binary.reshape(*shape, bits) @ 2.0 ** np.arange(bits) * scale + offset
            tensors[key] = torch.tensor(numbers, dtype=torch.float32, device=device)
        if "label_scores" in tensors:
            tensors["labels"] = tensors.pop("label_scores").softmax(-1)
        images, labels, step_size = (tensors.pop(key) for key in TENSORS)
        nn.ModuleDict({"decoder": decoder}).load_state_dict(tensors)
        inner = metadata["inner"]
        distilled = DistilledSet(images, labels, decoder=decoder, step_size=step_size, **inner)
        distilled.iterations += metadata["iterations"]
        distilled.metadata = metadata
    except Exception as error:  # damaged files raise errors of many kinds
        others = "" if Path(path).exists() else f"; there are {', '.join(sorted(known))}"
        raise ValueError(f"cannot load a distilled set from {name} ({error}){others}") from error
    return distilled


def to_bytes(tensors: dict[str, Tensor], metadata: dict) -> bytes:
    """A safetensors file; metadata in one entry, as several would stand in an order that varies."""
    return safetensors.torch.save(tensors, {"distilled_set": json.dumps(metadata, default=str)})


# -------------------------------------------------------------------------------------- pictures
def draw_images(
    axis,
    images: Tensor,
    title: str = "",
    *,
    columns: int = 10,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draws images [..., c, h, w], gray or in color, in rows on a matplotlib axis. Black and white
    are the values `limits`, by default the 1st and the 99th percentile."""
    images = images.detach().cpu().float().flatten(0, -4)
    low, high = limits or np.nanpercentile(images.numpy(), [1, 99])
    limits = (low, high) if low < high else images.aminmax()
    grid = torchvision.utils.make_grid(
        images, columns, padding=1, normalize=True, value_range=limits, pad_value=0.5
    )
    axis.imshow(grid.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[])


# --------------------------------------------------------------------------------------- helpers
def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_counts(**counts: object) -> None:
    """Raises ValueError that names the first argument that is not a whole number of at least 1."""
    for name, count in counts.items():
        sound = isinstance(count, (int, np.integer)) and count >= 1
        require(sound, f"{name}={count!r}: give a whole number of at least 1")


def pick_device(device: str = "auto") -> torch.device:
    """The named device; "auto" picks a GPU or another accelerator where there is one, else cpu.
    Raises ValueError where there is no such device."""
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return torch.empty(1, device=here if device == "auto" else device).device
    except (AssertionError, RuntimeError):
        raise ValueError(f"{device=}: not on this machine; give auto, cuda, mps or cpu") from None


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Runs a block from a seed, or one derived from several numbers, and restores the random state
    afterwards."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    with torch.random.fork_rng(
        [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    ):
        torch.manual_seed(numbers[0] if len(numbers) == 1 else seed)
        yield
