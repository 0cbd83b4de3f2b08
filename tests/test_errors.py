"""Bad arguments: each gives a ValueError that names the argument, its value and the remedy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import distill_utils as du
from tests.conftest import Smooth, make_set

COUNT = "give a whole number of at least 1"
PIXELS, LABELS = torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(9)


def build(toy, images=lambda x: x, labels=lambda y: y, decoder=None) -> du.DistilledSet:
    x, y = du.initialize(toy, "real", steps=2)
    return du.DistilledSet(images(x), labels(y), decoder=decoder)


def distill(toy, distilled=None, **options) -> du.History:
    def no_network():
        pytest.fail("work had begun")

    return du.distill(distilled or make_set(toy), toy, no_network, **{"iterations": 1, **options})


def evaluate(toy, networks=1, **changes) -> du.Accuracies:
    return du.evaluate(make_set(toy), toy.test._replace(**changes), Smooth, networks=networks)


def other_set(classes: int, channels: int) -> du.DistilledSet:
    return du.DistilledSet(torch.rand(1, classes, channels, 4, 4), torch.eye(classes)[None])


def make_dataset(pixels=PIXELS, labels=LABELS, test=None, validation=3) -> du.Dataset:
    pairs = (pixels, labels), test or (pixels, labels)
    return du.make_dataset("bad", *pairs, validation=validation, device="cpu")


BAD = [
    (lambda t: du.initialize(t, "kmeans", steps=1), "kind='kmeans': give noise, real or k-means"),
    (lambda t: du.initialize(t, "real", steps=99), r"steps=99, .*: class 0 has \d+ .*; ask for no"),
    (lambda t: du.initialize(t, "noise", steps=0), f"steps=0: {COUNT}"),
    # du.DistilledSet
    (lambda t: make_set(t, epochs=2.5), rf"epochs=2\.5: {COUNT}"),
    (lambda t: make_set(t, optimizer="RMSprop"), "optimizer='RMSprop', .*give SGD, or Adam and no"),
    (lambda t: make_set(t, optimizer="Adam", momentum=0.5), "momentum=0.5: give SGD, or Adam"),
    (lambda t: make_set(t, bits=1), "bits=1, label_bits=None: give whole numbers of 2 to 16"),
    (lambda t: make_set(t, bits=4, label_bits=17), "bits=4, label_bits=17: give whole numbers"),
    (lambda t: make_set(t, label_bits=2), "bits=None, label_bits=2: give whole numbers of 2"),
    (lambda t: make_set(t, label_smoothing=1.1), r"label_smoothing=1\.1: .* at most 1"),
    (lambda t: make_set(t, step_size=-0.1), r"step_size=-0\.1: give a positive number, or \[4\]"),
    (lambda t: make_set(t, step_size=math.inf), "step_size=inf: give a positive number"),
    (lambda t: make_set(t, step_size=torch.ones(3)), r"step_size=tensor.*: give .*, or \[4\]"),
    (lambda t: build(t, lambda x: x[0]), r"images: \[3, 1, 4, 4\]; give finite numbers \[steps, n"),
    (lambda t: build(t, lambda x: x * math.nan), "images: .*finite"),
    (lambda t: build(t, labels=lambda y: y[:, :2]), r"labels: \[2, 2, 3\]; give probabilities"),
    (lambda t: build(t, labels=lambda y: y.argmax(-1)), r"as F\.one_hot makes of integers"),
    (lambda t: build(t, labels=lambda y: 2 * y), "labels: .*give probabilities"),
    (lambda t: build(t, labels=lambda y: 2 * y - 1 / 3), "labels: .*give probabilities"),
    (lambda t: build(t, decoder=nn.Flatten(0, 1)), "decoder: turns 2 steps into 6"),
    # du.Distillation, before any work
    (lambda t: distill(t, iterations=0), f"iterations=0: {COUNT}"),
    (lambda t: distill(t, batch_size=0), f"batch_size=0: {COUNT}"),
    (lambda t: distill(t, validation_networks=0), f"validation_networks=0: {COUNT}"),
    (lambda t: distill(t, learning_rate=-1), "learning_rate=-1: give at least 0"),
    (lambda t: distill(t, step_size_learning_rate=math.nan), "step_size_learning_rate=nan: give"),
    (lambda t: distill(t, clip=1), "clip=1: give more than 1"),
    (lambda t: distill(t, other_set(3, 3)), r"distilled: \(3, 3, 4, 4\) .* has \(3, 1, 4, 4\)"),
    (lambda t: distill(t, other_set(4, 1)), r"distilled: \(4, 1, 4, 4\) .* has \(3, 1, 4, 4\)"),
    # du.evaluate
    (lambda t: evaluate(t, networks=0), f"networks=0: {COUNT}"),
    (lambda t: evaluate(t, images=t.test.images / 0), "split: some images are not finite"),
    # du.make_dataset
    (lambda t: make_dataset(PIXELS[:, 0]), r"pixels \[9, 4, 4\].*give \[n, c, h, w\]"),
    (lambda t: make_dataset(torch.rand(9, 8, 8, 3)), r"give .* as by permute\(0, 3, 1, 2\)"),
    (lambda t: make_dataset(PIXELS[:0], LABELS[:0]), r"pixels \[0, 1, 4, 4\].*; give"),
    (lambda t: make_dataset(255 * PIXELS), r"pixels lie in .* scale them to 0\.\.1"),
    (lambda t: make_dataset(PIXELS * math.nan), "pixels lie in nan"),
    (lambda t: make_dataset(0 * PIXELS), r"pixels lie in 0\.\.0"),
    (lambda t: make_dataset(labels=LABELS + 3e8), r"train: labels \[3.*; number the classes 0, 1"),
    (lambda t: make_dataset(test=(PIXELS, LABELS + 1)), r"test: labels .*; give those of train"),
    (lambda t: make_dataset(test=(255 * PIXELS, LABELS)), "test:? pixels lie in .* scale them"),
    (lambda t: make_dataset(validation=9), "validation=9: give fewer than the 9"),
    # what is not there
    (
        lambda t: du.load_mnist("any", name="CIFAR10", device="cpu"),
        "name='CIFAR10': give one of MNIST",
    ),
    (lambda t: du.load("mnist-3"), r"cannot load .*mnist-3 .*there are .*mnist-4kB"),
    (lambda t: du.load("mnist-4kB-50updates", device="tpu"), "mnist-4kB-50updates .*tpu"),
    (lambda t: du.pick_device("gpu"), r"device='gpu': not on this machine; give auto, .*cpu"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_argument_is_named(toy, call, message):
    with pytest.raises(ValueError, match=message):
        call(toy)


@pytest.mark.parametrize("count", [0, -1, 2.0, np.True_, np.float32(2), math.nan, "2", None])
def test_only_whole_numbers_are_counts(count):
    du.require_counts(steps=np.int32(2))
    with pytest.raises(ValueError, match=f"^steps=.*: {COUNT}"):
        du.require_counts(steps=count)
