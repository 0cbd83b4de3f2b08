"""Decoded sets: a teacher, a decoder, and what they cost."""

import pytest
import torch

import distill_utils as du
from study.methods.decoders import count_codes, fit_decoder, stored_floats, teach, train_teacher


@pytest.fixture(scope="module")
def digits() -> du.Dataset:
    return du.load_digits(device="cpu")


@pytest.fixture(scope="module")
def teacher(digits) -> du.Ensemble:
    return train_teacher(digits, networks=2, epochs=8)


def fit(digits, teacher, **options) -> tuple[du.DistilledSet, du.DistilledSet]:
    options = {"floats": 12_000, "codes": 8, "channels": [8, 4], "iterations": 150, **options}
    return fit_decoder(digits, teacher, **options)


@pytest.fixture(scope="module")
def pair(digits, teacher) -> tuple[du.DistilledSet, du.DistilledSet]:
    return fit(digits, teacher)


def test_a_set_costs_no_more_than_its_floats_and_hard_labels_leave_room_for_more(pair):
    soft, hard = pair
    assert 12_000 - 10 * (8 + 10) < stored_floats(soft) <= 12_000
    assert stored_floats(hard) - hard.labels.numel() + hard.labels.shape[1] <= 12_000
    assert hard.images.shape[1] > soft.images.shape[1]
    assert hard.labels.max(-1).values.min() == 1 > soft.labels.max(-1).values.min()


def test_decoded_images_come_closer_to_real_ones_with_training(digits, teacher, pair):
    real = du.initialize(digits, "real", steps=1, per_class=40)[0][0]

    def error(decoded: du.DistilledSet) -> float:
        return float((decoded.decode().detach()[0][:400] - real).square().mean())

    assert error(pair[0]) < 0.5 < error(fit(digits, teacher, iterations=1)[0])


def test_labels_are_those_of_the_teacher_on_decoded_images(digits, teacher, pair):
    soft, _ = pair
    torch.testing.assert_close(soft.labels[0], teach(teacher, soft.decode().detach()[0]))
    torch.testing.assert_close(soft.labels.sum(-1), torch.ones(soft.labels.shape[:2]))
    right = teach(teacher, digits.test.images).argmax(-1) == digits.test.labels
    assert right.float().mean() > 0.8


def test_equal_seeds_give_equal_sets(digits, teacher):
    first, again, other = (fit(digits, teacher, iterations=5, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first.decode(), again.decode())
    assert not torch.equal(first.decode(), other.decode())


@pytest.mark.fault("bad calls named")
def test_too_few_floats_are_named_with_what_the_decoder_takes():
    with pytest.raises(ValueError, match="floats=100: the decoder alone has 90; give more"):
        count_codes(100, 90, 8, 10)
    assert count_codes(126, 90, 8, 10) == 2
