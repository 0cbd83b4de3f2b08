"""The sets in distilled/ are what their names and cards say."""

import functools
import re
from pathlib import Path

import pytest
import safetensors.torch

import distill_utils as du

FOLDER = Path(du.__file__).with_name("distilled")
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
load_mnist = functools.cache(du.load_mnist)


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
    per_class = int((re.search(r"ipc(\d+)", name) or [0, 0])[1])
    if size := re.search(r"(\d+)kB", name):
        tensors = safetensors.torch.load_file(FOLDER / f"{name}.safetensors").values()
        assert sum(tensor.nbytes for tensor in tensors) < 1000 * int(size[1])
    elif isinstance(distilled.decoder, du.CodeDecoder):
        parts = [distilled.images, distilled.labels, *distilled.decoder.parameters()]
        assert sum(part.numel() for part in parts) <= 784 * 10 * per_class
    else:
        assert distilled.images[..., 0, 0, 0].numel() == 10 * per_class
        assert seen[..., 0, 0, 0].numel() == 10 * per_class * (4 if "-mf2" in name else 1)
    if updates := re.search(r"(\d+)updates", name):
        assert distilled.updates == int(updates[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_program_of_a_card_reaches_the_cards_accuracy(name, mnist_root, monkeypatch, capsys):
    """In fewer epochs, and so with less accuracy, where it trains from scratch."""
    card = (FOLDER / f"{name}.md").read_text()
    stated = float(re.search(r"\*\*(\d+\.\d) ± ", card)[1])
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.setattr(du, "load_mnist", lambda root, **options: load_mnist(mnist_root, **options))
    epochs = 36_000 // du.load(name).labels[..., 0].numel()
    exec(re.sub(r"epochs=(\d+)", lambda e: f"epochs={min(int(e[1]), epochs)}", program), {})
    reached = float(re.search(r"(\d+\.\d)%", capsys.readouterr().out)[1])
    assert reached > stated - (8 if "epochs" in program else 5)
