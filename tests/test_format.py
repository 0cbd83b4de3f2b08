"""The documented file format is enough to train on a distilled set, without this project's code."""

import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

import distill_utils as du

FOLDER = Path(du.__file__).with_name("distilled")
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
READ, ADAM, SEEN, *_ = re.findall(
    r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL
)


def read_as_documented(name: str) -> dict:
    """Runs the README's snippets that read a file and decode its images."""
    found = {"torch": torch}
    exec(READ.replace("distilled/mnist-ipc10-30updates", str(FOLDER / name)) + SEEN, found)
    return found


def train_as_documented(network: torch.nn.Module, found: dict, updates: int) -> None:
    """Trains `network` in place for some updates, with nothing but torch and the README's rule for Adam."""
    metadata, steps = found["metadata"], len(found["images"])
    weights = list(network.parameters())
    states = [{"m": torch.zeros_like(weight), "v": torch.zeros_like(weight)} for weight in weights]
    for u in range(updates):
        loss = F.cross_entropy(network(found["seen"][u % steps]), found["labels"][u % steps])
        for weight, state, g in zip(
            weights, states, torch.autograd.grad(loss, weights), strict=True
        ):
            names = {
                **state,
                "g": g,
                "t": u + 1,
                "weight": weight.detach(),
                "step_size": found["step_sizes"][u],
            }
            if metadata["inner"]["optimizer"] == "Adam":
                names |= metadata["Adam"]
                exec(ADAM, names)
                state.update(m=names["m"], v=names["v"])
            else:
                state["m"] = metadata["inner"]["momentum"] * state["m"] + g
                names["weight"] = weight.detach() - names["step_size"] * state["m"]
            weight.data.copy_(names["weight"])


@pytest.mark.parametrize("name", NAMES)
def test_training_by_the_documented_format_alone_equals_unroll(name):
    """In float64 and after ten updates, as rounding errors grow with their number."""
    torch.manual_seed(0)
    network, found, distilled = du.LeNet().double(), read_as_documented(name), du.load(name)
    updates, few = min(10, distilled.updates), 500  # images of a step are enough
    found |= {key: found[key][:, :few].double() for key in ("seen", "labels")}
    found["step_sizes"] = found["step_sizes"].double()
    first = list(itertools.islice(distilled.schedule(), updates))
    images, labels, sizes = (torch.stack(part).detach() for part in zip(*first, strict=True))
    torch.set_default_dtype(torch.float64)
    inner = {**distilled.inner, "epochs": 1}
    begin = du.DistilledSet(images[:, :few], labels[:, :few], step_size=sizes, **inner)
    trained = du.unroll(network, begin, differentiable=False)
    train_as_documented(network, found, updates)
    for ours, theirs in zip(trained.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours[0], rtol=1e-4, atol=1e-6)


def test_a_set_gives_its_accuracy_by_the_documented_format_alone(mnist_root):
    mnist = du.load_mnist(mnist_root, device="cpu")
    name = "mnist-ipc1-mf2-50updates"
    found, accuracies = read_as_documented(name), []
    for seed in range(4):
        with du.seeded(seed):
            network = du.LeNet()
        train_as_documented(network, found, len(found["step_sizes"]))
        accuracies.append(float(du.accuracy(network, mnist.test)))
    stated = float(re.search(r"(\d+\.\d) ± ", (FOLDER / f"{name}.md").read_text()).group(1))
    assert abs(sum(accuracies) / 4 - stated) < 2, accuracies


def test_every_set_states_how_it_was_made():
    for name in NAMES:
        metadata = read_as_documented(name)["metadata"]
        assert {
            "dataset",
            "mean",
            "std",
            "network",
            "seed",
            "command",
            "versions",
            "iterations",
        } <= set(metadata)
        assert (metadata["iterations"] > 0) == (not name.endswith("-compressed"))


def test_the_documented_checksum_is_that_of_the_file():
    for name in NAMES:
        found = read_as_documented(name)
        metadata, tensors = found["metadata"], found["tensors"]
        expected = metadata.pop("sha256")
        whole = safetensors.torch.save(tensors, {"distilled_set": json.dumps(metadata)})
        assert hashlib.sha256(whole).hexdigest() == expected
