"""Datasets: their splits and ranges, and what happens where one is missing."""

import numpy as np
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


def test_a_file_in_place_of_the_data_folder_is_named(tmp_path):
    (tmp_path / "data").touch()
    with pytest.raises(ValueError, match=r"root='.*data': is a file; give the folder"):
        du.load_mnist(tmp_path / "data", device="cpu")


def fake_source(data, labels: dict):
    """A class like torchvision's, which holds 24 images `data` and whose labels are called as in `labels`."""

    class Source:
        def __init__(self, root, download, train=True, split="train"):
            vars(self).update(data=data, **labels)

    return Source


@pytest.mark.parametrize(
    ("name", "data", "labels"),
    [
        ("USPS", np.full((24, 16, 16), 51, dtype=np.uint8), {"targets": [0, 1, 2] * 8}),
        ("SVHN", np.full((24, 3, 32, 32), 51, dtype=np.uint8), {"labels": np.array([0, 1, 2] * 8)}),
    ],
)
def test_other_digits_come_grey_and_in_mnists_size(name, data, labels, monkeypatch):
    """In the form that torchvision gives them; the files themselves are not at hand."""
    data[0] += 51  # so that they have a spread to be normalized by
    monkeypatch.setattr(torchvision.datasets, name, fake_source(data, labels))
    dataset = du.load_torchvision(name, "anywhere", device="cpu")
    assert (dataset.name, dataset.classes) == (name, 3)
    assert dataset.train.images.shape == (22, 1, 28, 28)
    assert len(dataset.validation.labels) == 2
    pixels = dataset.test.images * dataset.std + dataset.mean
    torch.testing.assert_close(pixels[0], torch.full((1, 28, 28), 0.4))
    torch.testing.assert_close(pixels[1], torch.full((1, 28, 28), 0.2))
    assert dataset.test.labels.tolist() == [0, 1, 2] * 8


def test_an_unknown_dataset_is_named():
    with pytest.raises(ValueError, match="name='CIFAR10': give one of MNIST, FashionMNIST"):
        du.load_torchvision("CIFAR10", "anywhere", device="cpu")


@pytest.mark.parametrize(
    ("pixels", "labels", "validation", "message"),
    [
        (torch.rand(9, 4, 4), torch.zeros(9), 3, r"train: pixels \[9, 4, 4\].*give \[n, c, h, w\]"),
        (torch.rand(9, 1, 4, 4), torch.zeros(8), 3, r"train: pixels \[9, 1, 4, 4\], labels \[8\]"),
        (255 * torch.rand(9, 1, 4, 4), torch.zeros(9), 3, r"train: pixels lie in .* scale them to 0\.\.1"),
        (torch.rand(9, 1, 4, 4).numpy(), torch.zeros(9), 3, "train: a pair of ndarray and Tensor; give tensors"),
        (torch.rand(9, 1, 4, 4), torch.eye(9), 3, r"train: pixels .*, labels \[9, 9\]; give .* and \[n\]"),
        (torch.rand(9, 1, 4, 4), torch.arange(9) + 1, 3, r"train: labels \[1, 2, .*; number the classes 0, 1, 2"),
        (torch.rand(9, 1, 4, 4), torch.zeros(9), 9, "validation=9: hold out at least 1, fewer than the 9"),
        (torch.rand(9, 1, 4, 4), torch.zeros(9), 0, "validation=0: hold out at least 1"),
        (torch.rand(9, 1, 4, 4), torch.zeros(9), 0.2, r"validation=0\.2: hold out .* a whole number"),
    ],
)
def test_bad_data_is_named(pixels, labels, validation, message):
    with pytest.raises(ValueError, match=message):
        du.make_dataset("bad", (pixels, labels), (pixels, labels), validation=validation, device="cpu")


def test_bad_test_labels_are_named_as_such():
    pixels, labels = torch.rand(9, 1, 4, 4), torch.arange(9) % 3
    with pytest.raises(ValueError, match="test: labels 1 to 3; give those of train, 0 to 2"):
        du.make_dataset("bad", (pixels, labels), (pixels, labels + 1), validation=3, device="cpu")
