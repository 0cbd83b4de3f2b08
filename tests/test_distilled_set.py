"""The distilled set: its initialization, its parameters, its decoders, its pictures."""

import math
from statistics import NormalDist

import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import qmc

import distill_utils as du
from tests.conftest import Smooth, make_decoder, make_set


def test_real_images_show_every_class_in_each_step_and_no_image_twice(toy):
    images, labels = du.initialize(toy, "real", steps=3, per_class=2, seed=5)
    assert images.shape == (3, 6, 1, 4, 4)
    assert labels.argmax(-1).tolist() == [[0, 1, 2, 0, 1, 2]] * 3
    drawn, real = images.flatten(0, 1), toy.train.images
    assert len(drawn.unique(dim=0)) == 18
    assert len(torch.cat([drawn, real]).unique(dim=0)) == len(real.unique(dim=0))
    assert torch.equal(images, du.initialize(toy, "real", steps=3, per_class=2, seed=5)[0])
    assert not torch.equal(images, du.initialize(toy, "real", steps=3, per_class=2, seed=6)[0])


@pytest.mark.parametrize("kind", ["real", "k-means"])
def test_labels_are_the_images_own(toy, kind):
    images, labels = du.initialize(toy, kind, steps=2, per_class=2)
    brightest = images.mean(-1).flatten(2).argmax(-1)  # class k of the toy data has row k bright
    assert torch.equal(brightest, labels.argmax(-1))
    if kind == "k-means":  # of which a single one is the mean
        means = [toy.train.images[toy.train.labels == label].mean(0) for label in range(3)]
        center, _ = du.initialize(toy, kind, steps=1)
        torch.testing.assert_close(center[0], torch.stack(means))


def test_noise_is_normal_and_repeatable_and_not_limited_by_the_real_images(toy):
    options = {"steps": 30, "per_class": 2, "std": 0.3}
    images, labels = du.initialize(toy, "noise", seed=1, **options)
    assert images.mean().item() == pytest.approx(0, abs=0.03)
    assert images.std().item() == pytest.approx(0.3, rel=0.1)
    assert torch.equal(images, du.initialize(toy, "noise", seed=1, **options)[0])
    assert not torch.equal(images, du.initialize(toy, "noise", seed=2, **options)[0])
    assert torch.equal(labels[:5], du.initialize(toy, "real", steps=5, per_class=2)[1])


@pytest.mark.parametrize("step_size", [1e-30, 1e-4, 0.02, 1.0, 200.0, 1e30])
def test_step_sizes_begin_where_asked(toy, step_size):
    distilled = make_set(toy, step_size=step_size)
    torch.testing.assert_close(distilled.step_sizes, torch.full((4,), step_size), rtol=1e-4, atol=0)
    parameter = distilled.raw_step_sizes
    assert distilled.set_step_sizes(0.5) is distilled
    assert distilled.raw_step_sizes is parameter, "an optimizer goes on with it"
    torch.testing.assert_close(distilled.step_sizes, torch.full((4,), 0.5))


def test_labels_are_learned_where_asked_and_begin_mixed_with_uniform_ones(toy):
    fixed, soft = make_set(toy), make_set(toy, soft_labels=True, label_smoothing=0.1)
    learned = {name for name, _ in soft.named_parameters()}
    assert learned == {"images", "raw_step_sizes", "label_scores"}
    assert learned - {name for name, _ in fixed.named_parameters()} == {"label_scores"}
    torch.testing.assert_close(soft.labels, 0.9 * fixed.labels + 0.1 / 3)


def test_a_set_copies_what_it_is_given_also_from_another_set(toy):
    soft = make_set(toy, soft_labels=True)
    images, labels = soft.images.detach(), soft.labels.detach().clone()
    fixed, copied = du.DistilledSet(images, labels), du.DistilledSet(soft.images, soft.labels)
    before = images.clone(), labels.clone()
    images.zero_(), labels.zero_()
    for distilled in (fixed, copied):
        assert torch.equal(distilled.images, before[0])
        assert torch.equal(distilled.labels, before[1])
        assert not distilled.labels.requires_grad


def test_a_generator_shows_all_classes_at_each_point_of_a_sobol_sequence():
    """That of scipy, turned into normal samples by the standard library; codes move the points."""
    decoder, codes = make_decoder(classes=3), torch.randn(2, 6, 5)
    points = qmc.Sobol(5, scramble=False).random_base2(3)[1:5]  # 12 images of 3 classes
    points = torch.tensor(points).apply_(NormalDist().inv_cdf).repeat_interleave(3, 0)
    inputs = torch.cat([points.float() + codes.flatten(0, 1), torch.eye(3).repeat(4, 1)], 1)
    plain = du.CodeDecoder(8, [4, 3], [1, 4, 4])
    plain.load_state_dict(decoder.state_dict())
    expected = plain(inputs.view(2, 6, 8, 1, 1))
    torch.testing.assert_close(decoder(codes[..., None, None]), expected)


@pytest.mark.parametrize(("channels", "columns"), [(1, 3), (3, 5)])
def test_images_are_drawn_in_rows(channels, columns):
    axis, images = Figure().add_subplot(), torch.zeros(2, 5, channels, 4, 6, requires_grad=True)
    images.data[0, 0, :, 1, 1] = 1  # few values, which percentiles would lose
    du.draw_images(axis, images, "title", columns=columns)
    drawn, rows = axis.images[0].get_array(), math.ceil(10 / columns)
    assert drawn.shape == (rows * 5 + 1, columns * 7 + 1, 3)
    assert (drawn.min(), drawn.max(), axis.get_title()) == (0, 1, "title")


def test_gradients_pass_through_the_rounding(toy):
    """They are those of an ordinary set that holds the rounded numbers, of which there are few."""
    options = {"codes": "random", "soft_labels": True}
    few, plain = make_set(toy, **options, bits=3, label_bits=2), make_set(toy, **options)
    tensors = few.label_scores, few.images, *few.decoder.parameters()
    twins = plain.label_scores, plain.images, *plain.decoder.parameters()
    few.label_scores.data += torch.randn(2, 3, 3)
    for tensor, twin in zip(tensors, twins, strict=True):
        most = 2 ** (bits := 2 if tensor is few.label_scores else 3)
        twin.data = du.rounded(tensor, bits).detach()
        assert tensor.dim() == 1 or len(twin.unique()) <= most
        assert (tensor - twin).abs().mean() <= (tensor.max() - tensor.min()) / (most - 1)
    network = Smooth()
    for distilled in (few, plain):
        du.outer_loss(network, distilled, toy.train).backward()
    for tensor, twin in zip(tensors, twins, strict=True):
        torch.testing.assert_close(tensor.grad, twin.grad, rtol=1e-4, atol=1e-7)
