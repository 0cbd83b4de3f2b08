"""The sets in distilled/ are what their names and cards say."""

import functools
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import distill_utils as du
from tests.test_files import read_as_documented, train_as_documented

FOLDER = Path(du.__file__).with_name("distilled")
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
FLOORS = {  # percent that a LeNet and an MLP surely reach
    "mnist-4kB-50updates": (88, 72),
    "mnist-8kB": (90, 82),
    "mnist-31kB": (92, 84),
    "mnist-80kB": (93, 87),
    "fashion-8kB": (68, 66),
    "fashion-31kB": (71, 69),
}
load_mnist = functools.cache(du.load_mnist)


class MLP(nn.Sequential):
    """A network that no set was made for."""

    def __init__(self) -> None:
        layers = nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)
        super().__init__(nn.Flatten(), *layers)


def test_every_set_has_a_card_and_an_entry_in_the_list():
    assert {path.stem for path in FOLDER.glob("*.md")} == {*NAMES, "README"}
    listed = (FOLDER / "README.md").read_text()
    for name in NAMES:
        assert f"# {name}\n" in (FOLDER / f"{name}.md").read_text()
        assert f"[`{name}`]({name}.md)" in listed


@pytest.mark.parametrize("name", NAMES)
def test_a_set_holds_what_its_name_says(name):
    distilled = du.load(name)
    seen = distilled.decode()
    assert seen.shape[2:] == (1, 28, 28)
    assert distilled.labels.shape == (*seen.shape[:2], 10)
    tensors = safetensors.torch.load_file(FOLDER / f"{name}.safetensors").values()
    kilobytes = int(re.search(r"(\d+)kB", name)[1])
    assert sum(8 + tensor.nbytes for tensor in tensors) <= 1000 * kilobytes
    if updates := re.search(r"(\d+)updates", name):
        assert distilled.updates == int(updates[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_program_of_a_card_reaches_the_cards_accuracy(name, mnist_root, monkeypatch, capsys):
    """In fewer epochs, and so with less accuracy, where it trains from scratch."""
    card = (FOLDER / f"{name}.md").read_text()
    stated = float(re.search(r"\*\*(\d+\.\d) ± ", card)[1])
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.setattr(du, "load_mnist", lambda root, **options: load_mnist(mnist_root, **options))
    epochs = max(1, 24_000 // du.load(name).labels[..., 0].numel())
    exec(re.sub(r"epochs=(\d+)", lambda e: f"epochs={min(int(e[1]), epochs)}", program), {})
    reached = float(re.search(r"(\d+\.\d)%", capsys.readouterr().out)[1])
    assert reached > stated - (8 if "epochs" in program else 5)


@pytest.mark.parametrize("name", [name for name in NAMES if "updates" not in name])
def test_a_set_without_a_schedule_is_not_trained_on_by_one(name):
    with pytest.raises(ValueError, match="has no schedule; train from scratch, as its card shows"):
        du.train_on(du.LeNet(), du.load(name))


@pytest.mark.parametrize("name", NAMES)
def test_two_kinds_of_network_learn_from_the_documented_format_alone(name, mnist_root):
    """By the set's schedule, or by Adam, which shows about 20,000 images."""
    names = read_as_documented(FOLDER / f"{name}.safetensors")
    dataset = load_mnist(mnist_root, name=names["metadata"]["dataset"], device="cpu")
    test = du.Split(*(part[:2000] for part in dataset.test))
    for network, floor in zip((du.LeNet(), MLP()), FLOORS[name], strict=True):
        if "updates" in name:
            train_as_documented(network, names)
        else:
            images = du.Split(names["seen"].flatten(0, 1), names["labels"].flatten(0, 1))
            adam = torch.optim.Adam(network.parameters(), lr=2e-3)
            epochs = max(1, round(20_000 / len(images.labels)))
            du.train(network, images, epochs=epochs, batch_size=32, optimizer=adam)
        assert float(du.accuracy(network, test)) > floor
