"""Datasets: their splits and ranges, and what happens where one is missing."""

import pytest
import torch
import torchvision

import distill_utils as du


def test_mnist_is_split_55_5_10_and_normalized(mnist_root):
    mnist = du.load_mnist(mnist_root, device="cpu")
    assert mnist.name == "MNIST"
    assert mnist.classes == 10
    for split, n in ((mnist.train, 55_000), (mnist.validation, 5_000), (mnist.test, 10_000)):
        assert split.images.shape == (n, 1, 28, 28)
        assert split.images.dtype == torch.float32
        assert split.labels.shape == (n,)
        assert split.labels.bincount().min() > 0.08 * n
    assert mnist.mean == pytest.approx(0.1307, abs=1e-4)
    assert mnist.std == pytest.approx(0.3081, abs=1e-4)
    everything = torch.cat([mnist.train.images, mnist.validation.images])
    assert float(everything.mean()) == pytest.approx(0, abs=1e-3)
    assert float(everything.std()) == pytest.approx(1, abs=1e-3)

    again = du.load_mnist(mnist_root, device="cpu")
    assert torch.equal(again.validation.images, mnist.validation.images)


def test_splits_are_disjoint_and_the_test_set_is_untouched():
    pixels = torch.arange(100.0).reshape(100, 1, 1, 1) / 100
    labels = torch.arange(100) % 2
    dataset = du.make_dataset("count", (pixels, labels), (pixels, labels), validation=20, device="cpu")
    train, validation, test = (
        (split.images.flatten() * dataset.std + dataset.mean).mul(100).round().int().tolist()
        for split in (dataset.train, dataset.validation, dataset.test)
    )
    assert sorted(train + validation) == list(range(100))
    assert test == list(range(100))
    assert len(validation) == 20
    assert [n % 2 for n in train] == dataset.train.labels.tolist()


def test_digits_are_real_scans_of_mnist_size():
    digits = du.load_digits(device="cpu")
    assert "digits" in digits.name
    assert [len(split.labels) for split in (digits.train, digits.validation, digits.test)] == [1297, 200, 300]
    assert digits.train.images.shape[1:] == (1, 28, 28)
    assert digits.classes == 10


def test_a_dataset_that_cannot_be_had_says_how_to_get_it(tmp_path, monkeypatch):
    def no_network(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
    with pytest.raises(du.DatasetUnavailable, match=r"MNIST is not in root=.*MNIST/raw") as raised:
        du.load_mnist(tmp_path, device="cpu")
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("pixels", "labels", "validation", "message"),
    [
        (torch.rand(9, 4, 4), torch.zeros(9), 3, r"train: pixels \[9, 4, 4\].*give \[n, c, h, w\]"),
        (torch.rand(9, 1, 4, 4), torch.zeros(8), 3, r"train: pixels \[9, 1, 4, 4\], labels \[8\]"),
        (255 * torch.rand(9, 1, 4, 4), torch.zeros(9), 3, r"train: pixels lie in .* scale them to 0\.\.1"),
        (torch.rand(9, 1, 4, 4).numpy(), torch.zeros(9), 3, "train: a pair of ndarray and Tensor; give tensors"),
        (torch.rand(9, 1, 4, 4), torch.eye(9), 3, r"train: pixels .*, labels \[9, 9\]; give .* and \[n\]"),
        (torch.rand(9, 1, 4, 4), torch.arange(9) + 1, 3, r"train: labels \[1, 2, .*; number the classes 0, 1, 2"),
        (torch.rand(9, 1, 4, 4), torch.zeros(9), 9, "validation=9: hold out at least 1 and fewer than the 9"),
        (torch.rand(9, 1, 4, 4), torch.zeros(9), 0, "validation=0: hold out at least 1"),
    ],
)
def test_bad_data_is_named(pixels, labels, validation, message):
    with pytest.raises(ValueError, match=message):
        du.make_dataset("bad", (pixels, labels), (pixels, labels), validation=validation, device="cpu")
