"""Files of sets: round trips, the documented format, which needs nothing of this project, damages."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

import distill_utils as du
from tests.conftest import Smooth, make_decoder, make_set

FOLDER = Path(du.__file__).with_name("distilled")
README = (FOLDER / "README.md").read_text()
READ, ADAM, SEEN, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
KINDS = {
    "floats": {"soft_labels": True, "momentum": np.float64(0.5), "epochs": np.int64(2)},
    "Adam": {"soft_labels": True, "optimizer": "Adam"},
    "codes": {"codes": "random"},
    "few bits": {"codes": "random", "soft_labels": True, "bits": 5, "label_bits": 2},
    "few bits, true labels": {"bits": 8},
    "generator": {"codes": "generated", "soft_labels": True, "bits": 4},
}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "new" / "toy.safetensors"


@pytest.fixture(params=KINDS)
def distilled(request, toy, path) -> du.DistilledSet:
    """A set of each kind, saved in `path`."""
    distilled = make_set(toy, **KINDS[request.param])
    distilled.images.data = distilled.images.data.transpose(-1, -2)  # not as memory has them
    distilled.iterations += 7
    notes = {"network": "Smooth", "seed": np.int64(3), "command": path}
    du.save(distilled, path, dataset=toy, **notes)
    return distilled


def test_a_loaded_set_is_the_saved_one(path, distilled, toy):
    loaded = du.load(path)
    assert type(loaded.decoder) is type(distilled.decoder)
    assert (loaded.inner, int(loaded.iterations)) == (distilled.inner, 7)
    assert (loaded.metadata["mean"], loaded.metadata["network"]) == (toy.mean, "Smooth")
    exact = {"rtol": 0, "atol": 0 if distilled.bits is None else 1e-5}
    for ours, theirs in zip(loaded.schedule(), distilled.schedule(), strict=True):
        torch.testing.assert_close(ours[0], theirs[0], **exact)
        near = {"rtol": 0, "atol": 1e-3} if distilled.bits == 8 else exact  # of 0 as of 1e-4
        torch.testing.assert_close(ours[1], theirs[1], **near)
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=0)


def read_as_documented(path: Path) -> dict:
    """What the README's programs make of a file: they read it and decode its images."""
    names = {"torch": torch}
    exec(READ.replace("distilled/mnist-4kB-50updates.safetensors", str(path)) + SEEN, names)
    return names


def train_as_documented(network: nn.Module, names: dict) -> None:
    """Trains a network in place, with nothing but torch and the README's rule for Adam."""
    adam, inner, steps = *map(names["metadata"].get, ("Adam", "inner")), len(names["images"])
    weights = [*network.parameters()]
    states = [{"m": torch.zeros_like(weight), "v": torch.zeros_like(weight)} for weight in weights]
    for u, step_size in enumerate(names["step_sizes"]):
        loss = F.cross_entropy(network(names["seen"][u % steps]), names["labels"][u % steps])
        slopes = torch.autograd.grad(loss, weights)
        for weight, state, g in zip(weights, states, slopes, strict=True):
            if inner["optimizer"] == "Adam":
                state |= {**adam, "g": g, "t": u + 1, "weight": weight.data}
                exec(ADAM, {"step_size": step_size}, state)
                weight.data = state["weight"]
            else:
                state["m"] = inner["momentum"] * state["m"] + g
                weight.data -= step_size * state["m"]


def test_training_by_the_documented_format_alone_equals_unroll(toy, path, distilled):
    names, network = read_as_documented(path), Smooth()
    torch.testing.assert_close(names["seen"], distilled.decode())
    trained = du.unroll(network, du.load(path), differentiable=False)  # as true labels are rounded
    train_as_documented(network, names)
    images = toy.test.images
    torch.testing.assert_close(network(images), trained(images)[0], rtol=1e-4, atol=1e-5)
    stated = {"dataset": "toy", "mean": toy.mean, "std": toy.std, "iterations": 7, "seed": "3"}
    assert stated.items() <= names["metadata"].items()
    assert names["metadata"]["command"] == str(path)


def test_stored_sets_say_how_they_were_made_and_have_the_documented_checksum():
    for path in FOLDER.glob("*.safetensors"):
        tensors, metadata = safetensors.torch.load_file(path), read_as_documented(path)["metadata"]
        assert {"network", "seed", "command", "versions", "iterations"} <= metadata.keys()
        assert (metadata["iterations"] > 0) == ("updates" in path.stem)
        checksum = metadata.pop("sha256")
        whole = safetensors.torch.save(tensors, {"distilled_set": json.dumps(metadata)})
        assert hashlib.sha256(whole).hexdigest() == checksum


def test_codes_of_a_generator_take_almost_no_bytes(toy, path):
    codes, labels = torch.zeros(1, 3000, 5, 1, 1), torch.eye(3).repeat(1, 1000, 1)
    distilled = du.DistilledSet(codes, labels, decoder=make_decoder(classes=3), bits=4)
    du.save(distilled, path, dataset=toy)
    assert safetensors.torch.load_file(path)["images"].nbytes < 50


def test_a_decoder_of_ones_own_is_learned_saved_and_loaded(toy, path):
    distilled = make_set(toy, decoder=nn.Linear(4, 4))
    before = distilled.decoder.weight.detach().clone()
    du.distill(distilled, toy, Smooth, iterations=3, batch_size=8, progress=False)
    assert not torch.equal(distilled.decoder.weight, before)
    du.save(distilled, path, dataset=toy)
    assert torch.equal(du.load(path, decoder=nn.Linear(4, 4)).decode(), distilled.decode())
    with pytest.raises(ValueError, match=r"give its decoder, as in load\(path, decoder=Linear\(\)"):
        du.load(path)
    with pytest.raises(ValueError, match="its decoder is of the class Linear"):
        du.load(path, decoder=nn.Identity())


def test_equal_sets_give_equal_files_which_replace_older_ones_whole_or_not_at_all(toy, path):
    du.save(make_set(toy), path, dataset=toy)
    contents = set()
    for _ in range(8):
        du.save(make_set(toy, codes="random"), path, dataset=toy)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    diverged = make_set(toy)
    diverged.images.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"toy\.safetensors': the set has values that are not fin"):
        du.save(diverged, path, dataset=toy)
    with pytest.raises(KeyboardInterrupt), du.replacing(path) as unfinished:  # noqa: PT012
        unfinished.write_text("half of it")
        raise KeyboardInterrupt
    assert {path.read_bytes()} == contents
    assert [*path.parent.iterdir()] == [path], "and nothing else is left in the folder"


UNSOUND = [
    (lambda m, t: t.update(step_sizes=torch.ones(3)), r"give a positive number, or \[4\]"),
    (lambda m, t: t.update(step_sizes=-t["step_sizes"]), "give a positive number"),
    (lambda m, t: t.update(labels=torch.ones(2, 3, 3)), "give probabilities"),
    (lambda m, t: t.update(images=t["images"] * math.nan), "images: .*finite"),
    (lambda m, t: t.update(other=torch.ones(3)), "other"),
    (lambda m, t: t.pop("labels"), "labels"),
    (lambda m, t: m.pop("inner"), "inner"),
    (lambda m, t: m["inner"].update(epochs="two"), "epochs='two'"),
    (lambda m, t: m["Adam"].update(eps=1e-8), "another Adam"),
    (lambda m, t: m.update(decoder="CodeDecoder"), "CodeDecoder"),
]


@pytest.mark.parametrize(("change", "message"), UNSOUND, ids=[message for _, message in UNSOUND])
def test_an_unsound_file_is_refused(toy, path, change, message):
    du.save(make_set(toy), path, dataset=toy)
    names = read_as_documented(path)
    metadata, tensors = names["metadata"], names["tensors"]
    del metadata["sha256"]
    change(metadata, tensors)
    metadata["sha256"] = hashlib.sha256(du.to_bytes(tensors, metadata)).hexdigest()
    path.write_bytes(du.to_bytes(tensors, metadata))
    with pytest.raises(ValueError, match=rf"(?s)cannot load .*toy\.safetensors \(.*{message}"):
        du.load(path)


DAMAGES = {
    "cut": lambda content: content[:-50],
    "one bit": lambda content: content[:-200] + bytes([content[-200] ^ 1]) + content[-199:],
    "empty": lambda content: b"",
    "foreign": lambda content: safetensors.torch.save({"weight": torch.ones(3)}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused(toy, path, damage):
    du.save(make_set(toy), path, dataset=toy)
    path.write_bytes(damage(path.read_bytes()))
    for place in (path, path.parent, path.with_name("missing")):
        with pytest.raises(ValueError, match=rf"(?s)cannot load .*{place.name} \("):
            du.load(place)
