"""Datasets: their splits and ranges, and what happens where one is missing or damaged."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import MNIST

import distill_utils as du


def test_mnist_is_split_55_5_10_and_normalized(mnist_root):
    mnist = du.load_mnist(mnist_root, device="cpu")
    for split, n in ((mnist.train, 55_000), (mnist.validation, 5_000), (mnist.test, 10_000)):
        assert split.images.shape == (n, 1, 28, 28)
        assert split.labels.bincount(minlength=10).min() > 0.08 * n
    assert (mnist.mean, mnist.std) == pytest.approx((0.1307, 0.3081), abs=1e-4)
    images = torch.cat([mnist.train.images, mnist.validation.images])
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_splits_are_disjoint_the_same_in_every_run_and_leave_the_test_images_as_given():
    pixels, labels = torch.arange(100.0).view(100, 1, 1, 1) / 100, torch.arange(100) % 2
    pairs = [(pixels, labels)] * 2
    options = {"validation": 20, "device": "cpu"}
    dataset, again = (du.make_dataset("count", *pairs, **options) for _ in range(2))
    splits = (split.images.flatten() for split in (dataset.train, dataset.validation, dataset.test))
    numbers = [(part * dataset.std + dataset.mean).mul(100).round().long() for part in splits]
    assert torch.equal(torch.cat(numbers[:2]).sort().values, torch.arange(100))
    assert torch.equal(numbers[2], torch.arange(100))
    assert torch.equal(numbers[0] % 2, dataset.train.labels)
    assert len(numbers[1]) == 20
    assert torch.equal(again.validation.images, dataset.validation.images)


def test_torch_datasets_of_images_and_labels_are_taken():
    pixels, labels = torch.rand(40, 1, 4, 4), torch.arange(40) % 4
    options = {"validation": 10, "device": "cpu"}
    of_tensors = du.make_dataset("tensors", *[(pixels, labels)] * 2, **options)
    collection = torch.utils.data.TensorDataset(pixels, labels)
    dataset = du.make_dataset("torch", collection, collection, **options)
    assert torch.equal(dataset.train.images, of_tensors.train.images)
    assert torch.equal(dataset.test.labels, labels)


def test_arrays_lists_three_channels_and_other_number_types_are_taken():
    pixels = np.random.default_rng(0).integers(0, 2, (40, 4, 4, 3), "uint8").transpose(0, 3, 1, 2)
    labels = [0, 1] * 20
    dataset = du.make_dataset("color", *[(pixels, labels)] * 2, validation=10, device="cpu")
    assert (dataset.train.images.dtype, dataset.train.labels.dtype) == (torch.float32, torch.int64)
    assert dataset.test.labels.tolist() == labels
    assert len(repr(dataset)) < 200, "tensors are not printed"
    assert du.initialize(dataset, "real", steps=2)[0].shape == (2, 2, 3, 4, 4)


def test_a_missing_dataset_says_how_to_get_it(tmp_path, monkeypatch):
    def no_network(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(MNIST, "download", no_network)
    root = tmp_path / "mistyped"
    message = rf"^root='{root}': MNIST is missing or damaged; delete .*MNIST/raw and .*there$"
    with pytest.raises(FileNotFoundError, match=message):
        du.load_mnist(root, device="cpu")


def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getdefaulttimeout", lambda: 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(MNIST, "mirrors", [address])
        with pytest.raises(FileNotFoundError, match="MNIST is missing or damaged"):
            du.load_mnist(tmp_path / "data", device="cpu")


DAMAGES = [lambda content: content[:4000], lambda content: bytes(len(content)), lambda _: b"<html>"]


@pytest.mark.parametrize("damage", DAMAGES, ids=["cut", "zeroed", "junk"])
def test_damaged_mnist_files_are_named_and_kept(tmp_path, mnist_root, damage):
    source, raw = Path(mnist_root) / "MNIST" / "raw", tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        content = (source / f"t10k-{kind}").read_bytes()  # also for training, as it is smaller
        for part in ("train", "t10k"):
            (raw / f"{part}-{kind}").write_bytes(content)
    path = raw / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    message = "MNIST is missing or damaged; delete|test:? pixels"
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        du.load_mnist(tmp_path, device="cpu")
    assert len([*raw.iterdir()]) == 4
