"""Sets with decoders: evaluation, training from scratch, saving and loading all see the same images."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

import distill_utils as du
from study.experiments.protocols import train_from_scratch
from study.methods.decoders import (
    Augment,
    LowResolution,
    augment,
    augmented,
    low_resolution,
    multi_formation,
)


class Linear(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 3))


@pytest.fixture
def low(toy) -> du.DistilledSet:
    """2 steps × 3 images, stored at 2×2 and seen at 4×4."""
    images, labels = du.initialize(toy, "real", steps=2)
    decoder, images = LowResolution([4, 4]), LowResolution.pack(images, stored=2)
    return du.DistilledSet(images, labels, decoder=decoder, epochs=3, step_size=0.1)


def test_low_resolution_is_stored_small_and_seen_large(toy, low):
    images, _ = du.initialize(toy, "real", steps=2)
    assert low.images.shape == (2, 3, 1, 2, 2)
    assert low.decode().shape == images.shape
    seen = [update[0] for update in low.schedule()]
    for step, image in zip(low.images, seen[:2], strict=True):
        assert torch.equal(F.interpolate(step, size=(4, 4), mode="bilinear"), image)
    assert torch.equal(seen[0], seen[2])
    du.outer_loss(Linear(), low, toy.train).backward()
    assert low.images.grad.shape == low.images.shape
    assert low.images.grad.abs().max() > 0


def test_low_resolution_stores_14_by_14_by_default():
    images = torch.randn(1, 2, 1, 28, 28)
    low = low_resolution(images, torch.eye(2)[None])
    assert torch.equal(low.images, LowResolution.pack(images, stored=14))
    assert low.images.shape[-2:] == (14, 14)
    assert low.decode().shape[-2:] == (28, 28)


def test_multi_formation_packs_images_of_full_size(toy):
    images, labels = du.initialize(toy, "real", steps=2, per_class=4)
    distilled = multi_formation(images, labels, factor=2, epochs=3)
    assert torch.equal(distilled.images, du.MultiFormation(2).pack(images))
    assert (distilled.images.shape, distilled.decode().shape) == ((2, 3, 1, 4, 4), images.shape)
    assert distilled.updates == 6


@pytest.mark.parametrize("kind", ["low", "augmented"])
def test_a_saved_set_is_loaded_as_the_same_set(toy, low, tmp_path, kind):
    distilled, decoder, path = low, LowResolution([4, 4]), tmp_path / "set.safetensors"
    if kind == "augmented":
        images, labels = du.initialize(toy, "real", steps=2)
        distilled, decoder = augmented(images, labels, epochs=3, step_size=0.1), Augment()
    du.save(distilled, path, dataset=toy)
    with pytest.raises(ValueError, match=f"decoder={type(decoder).__name__}"):
        du.load(path)
    loaded = du.load(path, decoder=decoder)
    assert loaded.inner == distilled.inner
    for name in ("images", "labels"):
        assert torch.equal(getattr(loaded, name), getattr(distilled, name))
    torch.testing.assert_close(loaded.step_sizes, distilled.step_sizes)
    seen = []
    for each in (distilled, loaded):
        with du.seeded(5):
            seen.append([update[0] for update in each.schedule()])
    assert all(map(torch.equal, *seen))
    pair = (distilled, loaded)
    values = [du.evaluate(each, toy.test, Linear, networks=3).values for each in pair]
    assert torch.equal(*values)


def test_training_from_scratch_sees_the_decoded_images(toy, low):
    """It used to train on the stored ones, which networks for images of full size cannot read."""
    plain = du.DistilledSet(low.decode().detach(), low.labels)
    options = {"networks": 3, "epochs": 4}
    values = [train_from_scratch(each, toy.test, Linear, **options).values for each in (low, plain)]
    assert torch.equal(*values)


def test_augmentation_samples_a_transform_for_every_step_and_call(toy):
    images, labels = du.initialize(toy, "real", steps=1)
    distilled = augmented(images.repeat(2, 1, 1, 1, 1), labels.repeat(2, 1, 1), epochs=2)
    first, second = distilled.decode(), distilled.decode()
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])  # of equal images
    with du.seeded(1):
        one = distilled.decode()
    with du.seeded(1):
        assert torch.equal(distilled.decode(), one)
    seen = [update[0] for update in distilled.schedule()]
    assert torch.equal(seen[0], seen[2])  # the epochs of an unroll see the same images
    du.outer_loss(Linear(), distilled, toy.train).backward()
    assert distilled.images.grad.abs().max() > 0


def test_making_an_augmented_set_leaves_the_random_state_alone(toy):
    images, labels = du.initialize(toy, "real", steps=1)
    state = torch.get_rng_state()
    augmented(images, labels)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_moves_on_its_own_background():
    black = -0.4
    images = torch.full((3, 1, 12, 12), black)
    images[:, :, 5:7, 5:7] = 2.0
    moved = augment(images, black=black)
    torch.testing.assert_close(moved[..., 0, 0], torch.full((3, 1), black))
    assert moved.max() > 1
    assert len({round(float(image.sum()), 4) for image in moved}) == 3  # each in a way of its own


def test_augmentation_turns_shifts_and_scales_a_little(monkeypatch):
    """Against torchvision's affine transform, at the limits of every range."""
    image = torch.zeros(1, 1, 28, 28)
    image[..., 8:20, 11:15] = 1.0
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.ones(*shape))
    ours = augment(image, black=0.0)
    options = {"angle": -10, "translate": [-2, -2], "scale": 1 / 1.1, "shear": [0.0, 0.0]}
    theirs = v2.functional.affine(image, interpolation=v2.InterpolationMode.BILINEAR, **options)
    torch.testing.assert_close(center_and_spread(ours), center_and_spread(theirs), atol=0.6, rtol=0)
    assert (center_and_spread(ours) - center_and_spread(image)).abs().min() > 0.9


def center_and_spread(image: torch.Tensor) -> torch.Tensor:
    """Mean row and column, variance over rows, and ten times the covariance of rows and columns."""
    mass, places = image[0, 0] / image.sum(), torch.arange(28.0)
    row, column = mass.sum(1) @ places, mass.sum(0) @ places
    down, across = places - row, places - column
    return torch.stack([row, column, mass.sum(1) @ down**2, 10 * down @ mass @ across])


def test_a_stored_size_that_is_none_is_named():
    with pytest.raises(ValueError, match="stored=0: give a whole number of at least 1"):
        LowResolution.pack(torch.ones(1, 2, 1, 4, 4), stored=0)
