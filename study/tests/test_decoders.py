"""Decoders: what networks see of small images, and what moves when images are augmented."""

import math

import torch
from torch import Tensor
from torchvision.transforms import v2

import distill_utils as du
from study.methods import decoders
from study.methods.decoders import augment


def test_smooth_images_come_back_from_fewer_pixels():
    """Each channel by itself."""
    ramps = torch.linspace(-1, 1, 28) * torch.tensor([1.0, 0.5, -0.5, -1.0]).view(1, 2, 2, 1, 1)
    ramps = ramps.expand(1, 2, 2, 28, 28)
    distilled = decoders.low_resolution(ramps, torch.eye(2)[None])
    assert distilled.images.shape == (1, 2, 2, 14, 14)
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
