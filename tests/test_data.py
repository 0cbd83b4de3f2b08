"""Datasets: their splits and ranges, and what happens where one is missing."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import distill_utils as du
from tests.conftest import Smooth


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


def test_splits_are_disjoint_the_same_in_every_run_and_leave_the_test_images_as_given():
    pixels = torch.arange(100.0).reshape(100, 1, 1, 1) / 100
    labels = torch.arange(100) % 2
    dataset, again = (
        du.make_dataset("count", (pixels, labels), (pixels, labels), validation=20, device="cpu")
        for _ in range(2)
    )
    train, validation, test = (
        (split.images.flatten() * dataset.std + dataset.mean).mul(100).round().int().tolist()
        for split in (dataset.train, dataset.validation, dataset.test)
    )
    assert sorted(train + validation) == list(range(100))
    assert test == list(range(100))
    assert len(validation) == 20
    assert [n % 2 for n in train] == dataset.train.labels.tolist()
    assert torch.equal(again.validation.images, dataset.validation.images)


def test_digits_are_real_scans_of_mnist_size():
    digits = du.load_digits(device="cpu")
    assert "digits" in digits.name
    assert [len(split.labels) for split in (digits.train, digits.validation, digits.test)] == [
        1297,
        200,
        300,
    ]
    assert digits.train.images.shape[1:] == (1, 28, 28)
    assert digits.classes == 10


def test_images_may_have_three_channels_other_number_types_and_any_memory_layout(smooth):
    rows = torch.randint(0, 2, (40, 4, 4, 3), dtype=torch.uint8)  # channels last, 0 and 1
    pixels, labels = rows.permute(0, 3, 1, 2), (torch.arange(40) % 2).to(torch.int32)
    dataset = du.make_dataset(
        "color", (pixels, labels), (pixels, labels), validation=10, device="cpu"
    )
    assert (dataset.train.images.dtype, dataset.train.labels.dtype) == (torch.float32, torch.int64)

    def make_network():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))

    distilled = du.DistilledSet(*du.initialize(dataset, "real", steps=2))
    du.distill(distilled, dataset, make_network, iterations=2, progress=False)
    assert distilled.images.shape == (2, 2, 3, 4, 4)
    assert du.evaluate(distilled, dataset.test, make_network, networks=2).mean >= 0


def test_numpy_arrays_and_lists_are_taken():
    pixels, labels = np.random.default_rng(0).random((9, 1, 4, 4)), [0, 1, 2] * 3
    dataset = du.make_dataset(
        "arrays", (pixels, labels), (pixels, labels), validation=3, device="cpu"
    )
    assert dataset.train.images.dtype == torch.float32
    assert dataset.test.labels.tolist() == labels


def test_a_missing_dataset_says_how_to_get_it(tmp_path, monkeypatch):
    def no_network(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
    root = tmp_path / "mistyped"
    with pytest.raises(
        FileNotFoundError, match=r"MNIST is missing or damaged; delete .*MNIST/raw and "
    ) as raised:
        du.load_mnist(root, device="cpu")
    assert str(root) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not root.exists(), "no folder is left behind"


@pytest.mark.fault("bad calls named")
def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getdefaulttimeout", lambda: 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [address])
        with pytest.raises(FileNotFoundError, match="MNIST is missing or damaged"):
            du.load_mnist(tmp_path / "data", device="cpu")
    assert list(tmp_path.iterdir()) == []


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


DAMAGES = {
    "empty": lambda data: b"",
    "cut": cut,
    "zeroed": lambda data: bytes(len(data)),
    "junk": lambda data: b"<html>",
}


@pytest.mark.fault("damaged files refused")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_mnist_files_are_named_and_kept(tmp_path, mnist_root, file, damage):
    source, raw = Path(mnist_root) / "MNIST" / "raw", tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{part}-{kind}-ubyte"
            # the smaller ones
            (raw / name).write_bytes((source / name.replace("train", "t10k")).read_bytes())
    (raw / file).write_bytes(damage((raw / file).read_bytes()))
    with pytest.raises(
        (FileNotFoundError, ValueError), match=r"MNIST is missing or damaged; delete|test: pixels"
    ):
        du.load_mnist(tmp_path, device="cpu")
    assert len(list(raw.iterdir())) == 4


@pytest.mark.fault("bad calls named")
def test_a_file_in_place_of_the_data_folder_is_named(tmp_path):
    (tmp_path / "data").touch()
    with pytest.raises(FileNotFoundError, match=r"root='.*data'"):
        du.load_mnist(tmp_path / "data", device="cpu")


@pytest.mark.fault("bad calls named")
def test_an_unknown_dataset_is_named():
    with pytest.raises(ValueError, match="name='CIFAR10': give MNIST, FashionMNIST or KMNIST"):
        du.load_mnist("anywhere", name="CIFAR10", device="cpu")


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize(
    ("pixels", "labels", "validation", "message"),
    [
        (
            torch.rand(9, 1, 4, 4),
            torch.tensor([0] * 8 + [3 * 10**8]),
            3,
            r"train: labels \[0, 300000000\]; number",
        ),
        (
            torch.rand(9, 4, 4),
            torch.zeros(9),
            3,
            r"pixels \[9, 4, 4\].*give \[n, c, h, w\]",
        ),
        (torch.rand(9, 1, 4, 4), torch.zeros(8), 3, r"pixels \[9, 1, 4, 4\], labels \[8\]"),
        (torch.rand(0, 1, 4, 4), torch.zeros(0), 3, r"pixels \[0, 1, 4, 4\].*; give"),
        (
            torch.rand(9, 1, 4, 4),
            torch.eye(9),
            3,
            r"pixels .*, labels \[9, 9\]; give .* \[n\]",
        ),
        (255 * torch.rand(9, 1, 4, 4), torch.zeros(9), 3, r"pixels lie in .* scale them to 0\.\.1"),
        (torch.full((9, 1, 4, 4), float("nan")), torch.zeros(9), 3, "pixels lie in nan"),
        (torch.zeros(9, 1, 4, 4), torch.zeros(9), 3, r"pixels lie in 0\.\.0"),
        (
            torch.rand(9, 1, 4, 4),
            torch.arange(9) + 1,
            3,
            r"train: labels \[1, 2, .*; number the classes 0, 1, 2",
        ),
        (torch.rand(9, 1, 4, 4), torch.zeros(9), 9, "validation=9: give fewer than the 9"),
        (
            torch.rand(9, 1, 4, 4),
            torch.zeros(9),
            0,
            "validation=0: give a whole number of at least 1",
        ),
        (torch.rand(9, 1, 4, 4), torch.zeros(9), 0.2, r"validation=0\.2: give a whole number"),
    ],
)
def test_bad_data_is_named(pixels, labels, validation, message):
    with pytest.raises(ValueError, match=message):
        du.make_dataset(
            "bad", (pixels, labels), (pixels, labels), validation=validation, device="cpu"
        )


@pytest.mark.fault("bad calls named")
def test_bad_test_images_and_labels_are_named_as_such():
    pixels, labels = torch.rand(9, 1, 4, 4), torch.arange(9) % 3
    with pytest.raises(ValueError, match=r"test: labels \[1, 2, 3\]; give those of train"):
        du.make_dataset("bad", (pixels, labels), (pixels, labels + 1), validation=3, device="cpu")
    with pytest.raises(ValueError, match=r"test: pixels lie in .* scale them"):
        du.make_dataset("bad", (pixels, labels), (255 * pixels, labels), validation=3, device="cpu")


def test_datasets_can_be_compared_and_printed_in_a_line(toy):
    assert toy == toy
    assert toy != du.make_dataset(
        "toy", *[(torch.rand(9, 1, 4, 4), torch.arange(9) % 3)] * 2, validation=3, device="cpu"
    )
    assert "toy" in repr(toy)
    assert len(repr(toy)) < 200


@pytest.mark.parametrize("count", [np.int64(2), np.int32(2)])
def test_numpy_integers_are_counts(toy, smooth, count):
    du.require_counts(count=count)
    distilled = du.DistilledSet(
        *du.initialize(toy, "real", steps=count, per_class=count), epochs=count
    )
    du.distill(
        distilled, toy, smooth, iterations=count, networks=count, batch_size=count, progress=False
    )
    assert len(du.evaluate(distilled, toy.test, smooth, networks=count).values) == 2


COUNTED = {
    "steps": lambda toy, count: du.initialize(toy, "noise", steps=count),
    "per_class": lambda toy, count: du.initialize(toy, "real", steps=1, per_class=count),
    "epochs": lambda toy, count: du.DistilledSet(
        *du.initialize(toy, "real", steps=1), epochs=count
    ),
    "factor": lambda toy, count: du.MultiFormation(count),
    "networks": lambda toy, count: du.evaluate(make_set(toy), toy.test, Smooth, networks=count),
    "iterations": lambda toy, count: du.distill(make_set(toy), toy, Smooth, iterations=count),
    "batch_size": lambda toy, count: du.distill(
        make_set(toy), toy, Smooth, iterations=1, batch_size=count
    ),
    "validate_every": lambda toy, count: du.distill(
        make_set(toy), toy, Smooth, iterations=1, validate_every=count
    ),
}


def make_set(toy: du.Dataset) -> du.DistilledSet:
    return du.DistilledSet(*du.initialize(toy, "real", steps=1))


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize(
    "count", [0, -1, 2.0, 2.5, np.True_, np.float32(2), float("nan"), "2", None]
)
@pytest.mark.parametrize("name", COUNTED)
def test_other_things_are_refused_as_counts(toy, name, count):
    with pytest.raises(ValueError, match=f"^{name}=.*: give a whole number of at least 1"):
        COUNTED[name](toy, count)
