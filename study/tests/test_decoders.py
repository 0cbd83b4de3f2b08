"""Decoders: what networks see of stored images, what moves when they are augmented, and what a set costs."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

import distill_utils as du
from study.methods import decoders
from study.methods.decoders import augment, fit_decoder, teach

SMALLER = [
    (decoders.low_resolution, (4, 14)),
    (partial(decoders.multi_formation, factor=2), (1, 28)),
]


@pytest.mark.parametrize(("parametrize", "shape"), SMALLER)
def test_smooth_images_come_back_from_fewer_pixels(parametrize, shape):
    ramps = torch.linspace(-1, 1, 28) * torch.tensor([1.0, 0.5, -0.5, -1.0]).view(1, 4, 1, 1, 1)
    ramps = ramps.expand(1, 4, 1, 28, 28)
    distilled = parametrize(ramps, torch.eye(4)[None])
    assert distilled.images.shape[1::3] == shape  # n, w
    torch.testing.assert_close(distilled.decode(), ramps, atol=0.06, rtol=0)
    distilled.decode().square().sum().backward()
    assert distilled.images.grad.abs().min() > 0


# -------------------------------------------------------------------------------------------- augmentation
def test_every_step_and_call_draws_transforms(toy):
    images, labels = du.initialize(toy, "real", steps=1)
    state = torch.get_rng_state()
    distilled = decoders.augmented(images.repeat(2, 1, 1, 1, 1), labels.repeat(2, 1, 1), epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    first, again = distilled.decode(), distilled.decode()
    assert not torch.equal(first, again)
    assert not torch.equal(first[0], first[1])  # of equal images
    torch.set_rng_state(state)
    assert torch.equal(distilled.decode(), first)
    seen = [update[0] for update in distilled.schedule()]
    assert torch.equal(seen[0], seen[2])  # the epochs of an unroll see the same images


def test_images_move_by_themselves_on_their_background():
    images = torch.full((3, 1, 12, 12), -0.4)
    images[:, :, 5:7, 5:7] = 2.0
    moved = augment(images, black=-0.4)
    torch.testing.assert_close(moved[..., 0, 0], images[..., 0, 0])
    assert moved.max() > 1
    assert len(moved.unique(dim=0)) == 3
    small = torch.randn(2, 1, 4, 4).double().requires_grad_()

    def repeatable(images: Tensor) -> Tensor:
        with du.seeded(0):
            return augment(images, black=0.3)

    assert torch.autograd.gradcheck(repeatable, (small,))


def test_augmentation_turns_shifts_and_scales_a_little(monkeypatch):
    """Against torchvision's transform, at the limits of every range."""
    image = torch.zeros(1, 1, 28, 28)
    image[..., 8:20, 11:15] = 1.0
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.ones(shape))
    found = augment(image, black=0.0)
    angle, scale, bilinear = math.radians(10), 1.1, v2.InterpolationMode.BILINEAR
    cos, sin = 2 * math.cos(angle) / scale, 2 * math.sin(angle) / scale
    options = {"angle": -10, "scale": 1 / scale, "shear": [0.0, 0.0], "interpolation": bilinear}
    # Torchvision shifts what it has turned, `augment` turns what it has shifted.
    shift = [-(cos + sin), -(cos - sin)]
    expected = v2.functional.affine(image, translate=shift, fill=None, **options)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------------ compressed sets
@pytest.fixture(scope="module")
def digits() -> du.Dataset:
    return du.load_digits(device="cpu")


@pytest.fixture(scope="module")
def teacher(digits) -> du.Ensemble:
    return decoders.train_teacher(digits, networks=2, epochs=6)


def fit(digits, teacher, **options) -> tuple[du.DistilledSet, du.DistilledSet]:
    options = {"floats": 12_000, "codes": 8, "channels": [8, 4], "iterations": 150, **options}
    return fit_decoder(digits, teacher, **options)


def stored_floats(distilled: du.DistilledSet) -> int:
    """Codes, labels and the decoder's weights, together."""
    tensors = distilled.images, distilled.labels, *distilled.decoder.parameters()
    return sum(tensor.numel() for tensor in tensors)


def test_a_compressed_set_holds_what_its_floats_pay_for(digits, teacher):
    soft, hard = fit(digits, teacher)
    assert 12_000 - 10 * (8 + 10) < stored_floats(soft) <= 12_000
    true_labels = len(hard.labels[0])  # which are a single float for each image
    floats = stored_floats(hard) - hard.labels.numel() + true_labels
    assert 12_000 - 10 * (8 + 1) < floats <= 12_000
    assert (hard.labels.max(-1).values == 1).all()

    seen = soft.decode().detach()[0]
    torch.testing.assert_close(soft.labels[0], teach(teacher, seen))
    right = teach(teacher, digits.test.images).argmax(-1) == digits.test.labels
    assert right.float().mean() > 0.8

    images = du.initialize(digits, "real", steps=1, per_class=len(seen) // 10)[0][0]
    untrained = fit(digits, teacher, iterations=1)[0].decode().detach()[0]
    assert F.mse_loss(seen, images) < 0.5 < F.mse_loss(untrained, images)


def test_equal_seeds_give_equal_compressed_sets(digits, teacher):
    first, again, other = (fit(digits, teacher, iterations=5, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first.decode(), again.decode())
    assert not torch.equal(first.decode(), other.decode())


def test_too_few_floats_are_named(digits, teacher):
    decoder = du.CodeDecoder(8, [8, 4], [1, 28, 28])
    least = sum(weight.numel() for weight in decoder.parameters()) + 10 * (8 + 10)
    soft, _ = fit(digits, teacher, floats=least, iterations=1)
    assert stored_floats(soft) == least
    with pytest.raises(ValueError, match=f"floats={least - 1}: give at least {least}, for an"):
        fit(digits, teacher, floats=least - 1)
