"""The sets in distilled/ are what their cards say."""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import distill_utils as du
from study.experiments.protocols import train_from_scratch
from study.methods.architectures import MLP
from study.methods.decoders import stored_floats

FOLDER = Path(du.__file__).with_name("distilled")
SCHEDULES = [
    "mnist-ipc1-mf2-50updates", "mnist-ipc10-30updates", "mnist-ipc10-mf2-30updates", "mnist-ipc10-mf2-100updates",
    "fashion-ipc1-mf2-50updates",
]  # fmt: skip
SCRATCH = {  # epochs of a shortened training, and an accuracy some five points below what it gives
    "mnist-ipc10-scratch": (60, 82.0), "mnist-ipc10-mf2-scratch": (20, 86.0), "mnist-ipc50-mf2-scratch": (6, 89.0),
}  # fmt: skip
DECODED = {  # floors: a LeNet, an MLP
    "mnist-ipc1-decoded-50updates": (80.0, 65.0),
    "mnist-ipc10-compressed": (88.0, 82.0), "mnist-ipc50-compressed": (90.0, 85.0),
    "fashion-ipc10-compressed": (72.0, 72.0),
}  # fmt: skip
NAMES = [*SCHEDULES, *SCRATCH, *DECODED]


@pytest.fixture(scope="module")
def load_test(mnist_root) -> Callable[[str], du.Split]:
    """Every fifth test image, which is enough to tell, of the dataset that a set was made of."""

    @functools.cache
    def load(kind: str) -> du.Split:
        name = {"mnist": "MNIST", "fashion": "FashionMNIST"}[kind]
        if "CI" not in os.environ and not (Path(mnist_root) / name).is_dir():
            pytest.skip(f"{name} is not in {mnist_root}")
        test = du.load_mnist(mnist_root, name=name, device="cpu").test
        return du.Split(test.images[::5], test.labels[::5])

    return lambda name: load(name.partition("-")[0])


def test_the_folder_holds_these_sets_each_with_a_card_and_an_entry_in_the_list():
    assert sorted(path.stem for path in FOLDER.glob("*.safetensors")) == sorted(NAMES)
    assert sorted(path.stem for path in FOLDER.glob("*.md")) == sorted([*NAMES, "README"])
    listed = (FOLDER / "README.md").read_text()
    for name in NAMES:
        assert f"# {name}\n" in (FOLDER / f"{name}.md").read_text()
        assert f"[`{name}`]({name}.md)" in listed


@pytest.mark.parametrize("name", DECODED)
def test_a_decoded_set_costs_no_more_floats_than_its_name_says(name):
    distilled = du.load(name)
    assert stored_floats(distilled) <= 784 * 10 * int(re.search(r"ipc(\d+)", name)[1])
    assert distilled.decode().shape[1:] == (*distilled.labels.shape[1:2], 1, 28, 28)


@pytest.mark.parametrize("name", DECODED)
def test_a_decoded_set_teaches_two_kinds_of_network_in_a_fraction_of_the_cards_epochs(
    name, load_test
):
    epochs = 36_000 // du.load(name).labels[..., 0].numel()
    options = {
        "networks": 1,
        "epochs": epochs,
        "batch_size": 64,
        "optimizer": "Adam",
        "step_size": 0.001,
        "seed": 77,
    }
    for make_network, floor in zip((du.LeNet, MLP), DECODED[name], strict=True):
        assert (
            train_from_scratch(du.load(name), load_test(name), make_network, **options).mean > floor
        )


@pytest.mark.parametrize("name", [*SCHEDULES, *SCRATCH])
def test_a_set_holds_what_its_name_says(name):
    distilled = du.load(name)
    per_class, factor = int(re.search(r"ipc(\d+)", name).group(1)), 2 if "-mf2-" in name else 1
    assert distilled.images[:, :, 0, 0, 0].numel() == 10 * per_class
    assert isinstance(distilled.decoder, du.MultiFormation) == (factor == 2)
    seen = distilled.decode()
    assert seen.shape[0] * seen.shape[1] == 10 * per_class * factor**2
    assert seen.shape[2:] == (1, 28, 28)
    assert distilled.labels.shape == (*seen.shape[:2], 10)
    if updates := re.search(r"(\d+)updates", name):
        assert distilled.updates == int(updates.group(1))


@pytest.mark.parametrize("name", [*SCHEDULES, "mnist-ipc1-decoded-50updates"])
def test_a_set_with_a_schedule_trains_as_its_card_says(name, load_test):
    """Three networks come within three points of the card's mean."""
    stated = float(re.search(r"(\d+\.\d) ± ", (FOLDER / f"{name}.md").read_text()).group(1))
    assert (
        du.evaluate(du.load(name), load_test(name), du.LeNet, networks=3, seed=77).mean > stated - 3
    )


@pytest.mark.parametrize("name", SCRATCH)
def test_a_set_for_training_from_scratch_trains_well_in_a_fraction_of_the_cards_epochs(
    name, load_test
):
    epochs, floor = SCRATCH[name]
    options = {"networks": 2, "epochs": epochs, "batch_size": 50, "seed": 77}
    assert train_from_scratch(du.load(name), load_test(name), du.LeNet, **options).mean > floor
