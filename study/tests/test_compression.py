"""Training sets of few bytes: what they hold, how much of it fits, and that networks see what is stored."""

import lzma
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

import distill_utils as du
from study.methods.compression import (
    compress,
    fit_decoder,
    real_images,
    stored_bytes,
    teach,
    train_teacher,
)

KINDS = {"generator": dict(generator=True, beta=2.0), "codes": dict(generator=False, beta=0.5)}


@pytest.fixture(scope="module")
def digits() -> du.Dataset:
    return du.load_digits(device="cpu")


@pytest.fixture(scope="module")
def teacher(digits) -> du.Ensemble:
    return train_teacher(digits, networks=2, epochs=5)


def fit(digits, kind, *, iterations, seed=0):
    options = {"codes": 6, "channels": (6, 4), "iterations": iterations}
    return fit_decoder(digits, **options, **KINDS[kind], seed=seed)


@pytest.fixture(scope="module", params=KINDS)
def fitted(request, digits):
    """A kind of decoder, with its encoder."""
    return request.param, *fit(digits, request.param, iterations=150)


def test_a_teacher_gives_the_geometric_mean_of_its_probabilities(digits, teacher):
    images, labels = digits.test
    product = teacher(images).softmax(-1).prod(0).sqrt()
    expected = product / product.sum(-1, keepdim=True)
    torch.testing.assert_close(teach(teacher, images), expected, rtol=1e-3, atol=1e-5)
    assert (expected.argmax(-1) == labels).float().mean() > 0.9


def test_a_decoder_learns_and_has_weights_of_four_bits(digits, teacher, fitted):
    kind, decoder, encoder = fitted
    for weight in decoder.parameters():
        values = weight.detach().unique()
        assert weight.dim() == 1 or (values.diff() > 1e-4).sum() < 16  # others differ by rounding
    untrained, _ = fit(digits, kind, iterations=1)
    (images,), labels = du.initialize(digits, "real", steps=1, per_class=20)
    if kind == "generator":
        codes = torch.zeros(1, 200, 6, 1, 1)
        right = teach(teacher, decoder(codes)[0]).argmax(-1) == labels[0].argmax(-1)
        assert right.float().mean() > 0.4  # chance is 0.1
    else:
        codes = encoder(images.flatten(1))[None, :, :6, None, None]
    errors = [F.mse_loss(made(codes)[0], images) for made in (decoder, untrained)]
    assert errors[0] < 0.8 * errors[1]


def test_a_compressed_set_holds_as_many_images_as_fit(digits, teacher, fitted, tmp_path):
    kind, decoder, encoder = fitted
    distilled = compress(digits, teacher, decoder, encoder, kilobytes=3)
    path = tmp_path / "set.safetensors"
    du.save(distilled, path, dataset=digits)
    sizes = [8 + tensor.nbytes for tensor in safetensors.torch.load_file(path).values()]
    assert 2900 < sum(sizes) <= 3000
    assert stored_bytes(path) == sum(sizes)
    learned = {name.split(".")[0] for name, w in distilled.named_parameters() if w.requires_grad}
    assert ("images" in learned) == (kind == "codes")

    loaded = du.load(path)
    torch.testing.assert_close(loaded.decode(), decoder(distilled.images))
    taught, uniform = teach(teacher, loaded.decode()[0].detach()), torch.full((10,), 0.1)
    errors = [(labels - taught).abs().sum(-1).mean() for labels in (loaded.labels[0], uniform)]
    assert errors[0] < 0.3 * errors[1]
    with pytest.raises(ValueError, match=r"kilobytes=0\.5: an image of each class takes more"):
        compress(digits, teacher, decoder, encoder, kilobytes=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_compressed_sets(digits, teacher, kind):
    sets = []
    for seed in (3, 3, 4):
        made = fit(digits, kind, iterations=2, seed=seed)
        sets.append(compress(digits, teacher, *made, kilobytes=3, seed=seed).decode())
    assert torch.equal(sets[0], sets[1])
    assert not torch.equal(sets[0][:, :10], sets[2][:, :10])


@pytest.fixture(scope="module")
def binary() -> du.Dataset:
    """Digits in black and white, which LZMA packs well."""
    digits = du.load_digits(device="cpu")
    pixels = (digits.train.images * digits.std + digits.mean > 0.5).float()
    images = (pixels - digits.mean) / digits.std
    return replace(digits, train=du.Split(images, digits.train.labels))


def test_real_images_are_those_of_the_dataset_and_fit_as_lzma_packs_them(binary):
    distilled, stored = real_images(binary, kilobytes=3)
    (images,), (labels,) = distilled.images.detach(), distilled.labels.argmax(-1)
    real, classes = binary.train.images.flatten(1), binary.train.labels
    distances, nearest = torch.cdist(images.flatten(1), real).min(1)
    assert distances.max() < 0.1
    assert torch.equal(classes[nearest], labels)
    assert labels.bincount().unique().tolist() == [len(labels) // 10]
    pixels = (255 * (images * binary.std + binary.mean)).round().byte()[labels.argsort()]
    packed = min(len(lzma.compress(x.numpy().tobytes())) for x in (pixels, pixels.mT))
    assert 0.85 * packed < stored <= 3000
    others, _ = real_images(binary, kilobytes=3, seed=1)
    assert not torch.equal(others.images[:, :10], distilled.images[:, :10])
    with pytest.raises(ValueError, match=r"kilobytes=0\.1: an image of each class takes more"):
        real_images(binary, kilobytes=0.1)


def test_small_images_and_few_gray_levels_take_fewer_bytes_and_labels_some(digits, teacher):
    digits = replace(digits, train=du.Split(*(part[:260] for part in digits.train)))
    fine, coarse, small = (
        real_images(digits, kilobytes=6, **options)[0]
        for options in ({}, {"levels": 2}, {"size": 14, "levels": 16})
    )
    assert len(fine.labels[0]) < len(coarse.labels[0])
    assert len(fine.labels[0]) < len(small.labels[0])
    limits = [(pixel - digits.mean) / digits.std for pixel in (0, 1)]
    torch.testing.assert_close(coarse.images.unique(), torch.tensor(limits))
    rows = slice(len(fine.labels[0]))  # the same images, drawn from the same seed
    assert F.mse_loss(small.images[:, rows], fine.images) < 0.1
    taught, stored = real_images(digits, teacher, kilobytes=6, size=14, levels=16)
    assert len(taught.labels[0]) <= len(small.labels[0])
    assert 5400 < stored <= 6000
    expected = teach(teacher, taught.images[0].detach())
    assert (taught.labels[0] - expected).abs().sum(-1).mean() < 0.3
