"""Undistilled training sets of few bytes: images of a small generator, codes of real images, and real images packed."""

from __future__ import annotations

import lzma
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import distill_utils as du

# Labels: four levels of log-probability, from 1 to 0.001.
LABELS = {"soft_labels": True, "label_smoothing": 0.01, "label_bits": 2}
CODE_BITS = 4  # of a code's number, and of a decoder's weight
BATCH = 13  # images of each class in a minibatch of an autoencoder


# ------------------------------------------------------------------------------------------- labels
def train_teacher(dataset: du.Dataset, *, networks: int, epochs: int, seed: int = 0) -> du.Ensemble:
    """LeNets trained on all real images, side by side."""
    device = dataset.train.images.device
    make_network = partial(du.LeNet, classes=dataset.classes)
    with du.seeded(seed):
        fresh = du.sample_networks(make_network, networks, device)
        return du.train(du.Ensemble(fresh), dataset.train, epochs=epochs)


@torch.no_grad()
def teach(teacher: nn.Module, images: Tensor) -> Tensor:
    """Soft labels [n, classes] of images [n, c, h, w]: the geometric mean of the teacher's probabilities."""
    scores = [teacher(part).log_softmax(-1).mean(0) for part in images.split(500)]
    return torch.cat(scores).softmax(-1)


# ------------------------------------------------------------------------------ a decoder for all images
class FewBits(nn.Module):
    """A network whose weights are rounded to CODE_BITS, biases to 16; its gradients pass as if they were not."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        weights = {name: du.rounded(w, CODE_BITS) for name, w in self.network.named_parameters()}
        return functional_call(self.network, weights, inputs)


def fit_decoder(
    dataset: du.Dataset,
    *,
    codes: int,
    channels: Sequence[int],
    generator: bool,
    beta: float,
    iterations: int,
    seed: int = 0,
) -> tuple[du.CodeDecoder, nn.Module]:
    """A variational autoencoder (Kingma and Welling 2014) whose decoder has weights of few bits.

    Args:
        codes: numbers in a code.
        channels: of the decoder.
        generator: whether the decoder is one, which gets the class beside the code.
        beta: weight of the codes' divergence from normal samples.
        iterations: updates by Adam.

    Returns the decoder and the encoder, which turns pixels [n, c × h × w] into codes [n, codes] and, behind them, the
    logarithms of their standard deviations.
    """
    du.require_counts(codes=codes, iterations=iterations)
    (images, labels), device = dataset.train, dataset.train.images.device
    members = [(labels == label).nonzero().flatten() for label in range(dataset.classes)]
    one_hot = torch.eye(dataset.classes * generator).repeat(BATCH, 1).to(images)
    points = du.normal_points(BATCH, codes).repeat_interleave(dataset.classes, 0)
    points = points.to(images) * generator
    with du.seeded(seed):
        decoder = du.CodeDecoder(codes, channels, images.shape[1:], one_hot.shape[1]).to(device)
        hidden = nn.Linear(images[0].numel() + one_hot.shape[1], 256), nn.ReLU()
        encoder = nn.Sequential(*hidden, nn.Linear(256, 2 * codes)).to(device)
        few_bits = FewBits(decoder)
        optimizer = torch.optim.Adam([*decoder.parameters(), *encoder.parameters()], lr=3e-3)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        for _ in range(iterations):
            rows = [rows[torch.randint(len(rows), (BATCH,))] for rows in members]
            batch = images[torch.stack(rows, 1).flatten()]  # in which the classes take turns
            inputs = torch.cat([batch.flatten(1), *[one_hot] * generator], 1)
            mean, log_std = encoder(inputs).clamp(-6, 6).chunk(2, 1)
            code = mean + log_std.exp() * torch.randn_like(mean)
            (decoded,) = few_bits(stack(code - points))
            divergence = ((mean**2 + (2 * log_std).exp() - 1) / 2 - log_std).sum()
            loss = ((decoded - batch).square().sum() + beta * divergence) / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
    for weight in decoder.parameters():
        weight.data = du.rounded(weight.data, CODE_BITS)
    return decoder, encoder


def stack(codes: Tensor) -> Tensor:
    """Codes [n, codes] as a set stores them, [1, n, codes, 1, 1]."""
    return codes[None, ..., None, None]


@torch.no_grad()
def compress(
    dataset: du.Dataset,
    teacher: nn.Module,
    decoder: du.CodeDecoder,
    encoder: nn.Module,
    *,
    kilobytes: float,
    seed: int = 0,
) -> du.DistilledSet:
    """A step of as many images as fit: those of a generator, whose codes take no bytes and are not learned, or decoded
    codes of random real images. The arguments are what `train_teacher` and `fit_decoder` return."""
    codes, images = decoder.options["codes"], dataset.train.images
    most = most_per_class(dataset, 1000 * kilobytes)  # an image takes a byte at least
    generator = decoder.options["classes"] > 0
    if generator:
        stored = stack(torch.zeros(most * dataset.classes, codes).to(images))
    else:
        (real,), _ = du.initialize(dataset, "real", steps=1, per_class=most, seed=seed)
        stored = stack(du.rounded(encoder(real.flatten(1))[:, :codes], CODE_BITS))
    labels = teach(teacher, decoder(stored)[0])[None]
    options = {"bits": CODE_BITS, **LABELS}
    pool = du.DistilledSet(stored, labels, **options)  # without a decoder, to measure it
    shared = [*decoder.parameters(), pool.step_sizes]  # by all images
    shared_bytes = sum(packed_size(tensor, CODE_BITS) for tensor in shared)

    def count_bytes(per_class: int) -> int:
        rows = slice(per_class * dataset.classes)
        codes, labels = pool.images[:, rows], pool.label_scores[:, rows]
        return shared_bytes + packed_size(codes, pool.bits) + packed_size(labels, pool.label_bits)

    rows = slice(dataset.classes * fitting(most, kilobytes, count_bytes))
    distilled = du.DistilledSet(stored[:, rows], labels[:, rows], decoder=decoder, **options)
    distilled.images.requires_grad_(not generator)
    return distilled


def most_per_class(dataset: du.Dataset, images: float) -> int:
    """The training images of each class in as many as are given, at most as many as all classes have."""
    least = int(dataset.train.labels.bincount().min())
    return max(1, min(int(images) // dataset.classes, least))


def packed_size(values: Tensor, bits: int) -> int:
    """The bytes of values as `du.save` packs them, and 8 for their scale and offset."""
    return 8 + len(du.pack(values, bits)[0])


def fitting(most: int, kilobytes: float, count_bytes: Callable[[int], int]) -> int:
    """The images of each class, at most so many, that fit. Raises ValueError where not even one does."""
    per_class = bisect_right(range(1, most + 1), 1000 * kilobytes, key=count_bytes)
    remedy = "an image of each class takes more"
    du.require(per_class > 0, f"kilobytes={kilobytes}: {remedy}")
    return per_class


def stored_bytes(path: str | Path) -> int:
    """The bytes of a saved set's tensors, and 8 for the scale and the offset of each."""
    return sum(8 + tensor.nbytes for tensor in safetensors.torch.load_file(path).values())


# -------------------------------------------------------------------------------------- real images
def real_images(
    dataset: du.Dataset,
    teacher: nn.Module | None = None,
    *,
    kilobytes: float,
    size: int = 28,
    levels: int = 256,
    seed: int = 0,
) -> tuple[du.DistilledSet, int]:
    """As many random real images as LZMA packs into the bytes, as many of each class; and the bytes that they take.

    Args:
        teacher: gives soft labels, 2 bits for each class; true ones take no bytes, as the classes are in order.
        size: of the images as stored, at most their own.
        levels: of gray, evenly spaced.
    """
    low, high = ((pixel - dataset.mean) / dataset.std for pixel in (0, 1))
    classes = dataset.classes
    most = most_per_class(dataset, 60 * kilobytes)  # an image takes over 16 bytes
    images, labels = du.initialize(dataset, "real", steps=1, per_class=most, seed=seed)
    small = F.interpolate(images[0], (size, size), mode="bilinear", antialias=True)
    numbers = ((small - low) / (high - low) * (levels - 1)).round().clamp(0, levels - 1)
    grays = numbers / (levels - 1) * (high - low) + low
    seen = F.interpolate(grays, images.shape[-2:], mode="bilinear")
    numbers = numbers.byte().cpu().unflatten(0, (-1, classes)).transpose(0, 1)  # class by class
    if teacher is not None:
        soft = du.DistilledSet(seen[None], teach(teacher, seen)[None], bits=CODE_BITS, **LABELS)
        labels = soft.labels.detach()

    def count_bytes(per_class: int) -> int:
        stored = lzma_size(numbers[:, :per_class])
        if teacher is not None:
            stored += packed_size(soft.label_scores.detach()[:, : per_class * classes], 2)
        return stored

    per_class = fitting(most, kilobytes, count_bytes)
    rows = slice(per_class * classes)
    return du.DistilledSet(seen[None, rows], labels[:, rows]), count_bytes(per_class)


def lzma_size(numbers: Tensor) -> int:
    """Bytes of whole numbers [..., h, w] as LZMA packs them, by rows or by columns, whichever takes fewer."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "pb": 0}]
    orders = numbers, numbers.transpose(-2, -1)
    packed = (lzma.compress(x.numpy().tobytes(), lzma.FORMAT_RAW, filters=filters) for x in orders)
    return min(map(len, packed))
