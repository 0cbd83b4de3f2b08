"""The distilled set: its initialization, its parameters, its decoders, its file, its picture."""

import hashlib
import json
import math
import os

import matplotlib.pyplot as plt
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import distill_utils as du
from study.methods.decoders import multi_formation
from tests.conftest import make_decoder


def make_set(toy, *, factor=1, **options) -> du.DistilledSet:
    images, labels = du.initialize(toy, "real", steps=2, per_class=factor**2)
    options = {"epochs": 2, "step_size": 0.1, **options}
    if factor > 1:
        return multi_formation(images, labels, factor=factor, **options)
    return du.DistilledSet(images, labels, **options)


# ---------------------------------------------------------------------------------- initialization
def test_real_images_show_every_class_in_each_step_and_no_image_twice(toy):
    images, labels = du.initialize(toy, "real", steps=3, per_class=2, seed=5)
    assert images.shape == (3, 6, 1, 4, 4)
    assert labels.sum(1).tolist() == [[2, 2, 2]] * 3
    assert len(images.flatten(0, 1).unique(dim=0)) == 18
    assert all(
        any(torch.equal(image, real) for real in toy.train.images) for image in images.flatten(0, 1)
    )
    assert torch.equal(images, du.initialize(toy, "real", steps=3, per_class=2, seed=5)[0])
    assert not torch.equal(images, du.initialize(toy, "real", steps=3, per_class=2, seed=6)[0])


@pytest.mark.parametrize("kind", ["real", "k-means"])
def test_labels_are_the_images_own(toy, kind):
    images, labels = du.initialize(toy, kind, steps=2, per_class=2)
    brightest = images.mean(-1).flatten(2).argmax(-1)  # class k of the toy set has row k bright
    assert torch.equal(brightest, labels.argmax(-1))


@pytest.mark.parametrize("std", [1.0, 0.3])
def test_noise_is_normal_and_repeatable(toy, std):
    """However few real images there are."""
    images, labels = du.initialize(toy, "noise", steps=30, per_class=2, std=std, seed=1)
    assert abs(float(images.mean())) < 0.1 * std
    assert float(images.std()) == pytest.approx(std, rel=0.1)
    assert torch.equal(
        images, du.initialize(toy, "noise", steps=30, per_class=2, std=std, seed=1)[0]
    )
    assert not torch.equal(
        images, du.initialize(toy, "noise", steps=30, per_class=2, std=std, seed=2)[0]
    )
    assert torch.equal(labels[:5], du.initialize(toy, "real", steps=5, per_class=2)[1])


def test_one_center_of_a_class_is_its_mean(toy):
    images, labels = du.initialize(toy, "k-means", steps=1)
    assert labels[0].argmax(-1).tolist() == [0, 1, 2]
    for label in range(3):
        torch.testing.assert_close(
            images[0, label], toy.train.images[toy.train.labels == label].mean(0)
        )


def test_centers_lie_closer_to_their_class_than_random_images_do(toy):
    def mean_distance(images, labels):
        kinds, distances = labels.argmax(-1), []
        for label in range(3):
            real = toy.train.images[toy.train.labels == label].flatten(1)
            distances.append(torch.cdist(real, images[kinds == label].flatten(1)).amin(1).mean())
        return sum(distances)

    random = du.initialize(toy, "real", steps=2, per_class=2)
    assert mean_distance(*du.initialize(toy, "k-means", steps=2, per_class=2)) < mean_distance(
        *random
    )


@pytest.mark.fault("bad calls named")
def test_other_kinds_and_more_images_than_there_are_are_named(toy):
    with pytest.raises(ValueError, match="kind='kmeans': give noise, real or k-means"):
        du.initialize(toy, "kmeans", steps=1)
    for kind in ("real", "k-means"):
        with pytest.raises(
            ValueError, match=r"steps=99, per_class=1: class 0 has \d+ images; ask for no more"
        ):
            du.initialize(toy, kind, steps=99)


# -------------------------------------------------------------------------------------- parameters
@pytest.mark.parametrize("step_size", [1e-30, 1e-4, 0.02, 1.0, 200.0, 1e30])
def test_step_sizes_begin_where_asked(toy, step_size):
    distilled = make_set(toy, step_size=step_size)
    torch.testing.assert_close(distilled.step_sizes, torch.full((4,), step_size), rtol=1e-4, atol=0)
    assert distilled.set_step_sizes(0.5) is distilled
    torch.testing.assert_close(distilled.step_sizes, torch.full((4,), 0.5))


def test_the_schedule_repeats_the_steps_epoch_by_epoch(toy):
    distilled = make_set(toy, step_size=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert distilled.updates == 4
    schedule = list(distilled.schedule())
    assert [float(step_size.detach()) for *_, step_size in schedule] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4]
    )
    for update, step in enumerate([0, 1, 0, 1]):
        assert torch.equal(schedule[update][0], distilled.images[step])
        assert torch.equal(schedule[update][1], distilled.labels[step])


def test_step_sizes_set_in_a_run_are_learned_on(toy, smooth):
    distilled = make_set(toy)
    run = du.Distillation(distilled, toy, smooth, iterations=2, progress=False)
    distilled.set_step_sizes(0.3)
    run.step()
    assert (distilled.step_sizes - 0.3).abs().min() > 1e-3
    torch.testing.assert_close(distilled.step_sizes, torch.full((4,), 0.3), rtol=0.1, atol=0)


def test_a_set_is_made_of_anothers_labels(toy, smooth):
    soft = make_set(toy, soft_labels=True)
    copy = du.DistilledSet(soft.images, soft.labels)
    du.distill(copy, toy, smooth, iterations=2, progress=False)
    assert torch.equal(copy.labels, soft.labels)


def test_labels_are_learned_only_where_asked(toy):
    fixed, soft = make_set(toy), make_set(toy, soft_labels=True)
    assert {name for name, _ in fixed.named_parameters()} == {"images", "raw_step_sizes"}
    assert {name for name, _ in soft.named_parameters()} == {
        "images",
        "raw_step_sizes",
        "label_scores",
    }
    torch.testing.assert_close(soft.labels.sum(-1), torch.ones(2, 3))
    assert torch.equal(soft.labels.argmax(-1), fixed.labels.argmax(-1))


def test_label_smoothing_mixes_the_given_labels_with_uniform_ones(toy):
    labels = make_set(toy, soft_labels=True, label_smoothing=0.1).labels
    torch.testing.assert_close(labels, 0.9 * make_set(toy).labels + 0.1 / 3)


def test_a_set_keeps_copies_of_what_it_is_given(toy):
    images, labels = du.initialize(toy, "real", steps=2)
    distilled, before = du.DistilledSet(images, labels), [images.clone(), labels.clone()]
    images.zero_(), labels.zero_()
    assert torch.equal(distilled.images, before[0])
    assert torch.equal(distilled.labels, before[1])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_labels_of_any_number_type_are_taken(toy, dtype):
    images, labels = du.initialize(toy, "real", steps=2)
    taken = du.DistilledSet(images, labels.to(dtype)).labels
    assert taken.dtype == torch.float32
    assert torch.equal(taken, labels)


def test_images_of_any_memory_layout_are_taken(toy, smooth, tmp_path):
    images, labels = du.initialize(toy, "real", steps=2)
    turned, plain = images.transpose(-1, -2), images.transpose(-1, -2).contiguous()
    values = [
        du.evaluate(
            du.DistilledSet(each, labels, step_size=0.1), toy.test, smooth, networks=3
        ).values
        for each in (turned, plain)
    ]
    assert torch.equal(*values)
    du.save(du.DistilledSet(turned, labels), tmp_path / "turned.safetensors", dataset=toy)
    assert torch.equal(du.load(tmp_path / "turned.safetensors").images, plain)


def test_a_multi_formation_holds_more_images_in_as_many_pixels():
    """Images of one brightness each, which survive being made smaller and larger, come back in their order."""
    images = torch.arange(24.0).view(2, 12, 1, 1, 1).expand(2, 12, 1, 4, 8)
    labels = torch.eye(12).expand(2, 12, 12)
    distilled = multi_formation(images, labels, factor=2)
    assert distilled.images.shape == (2, 3, 1, 4, 8)
    torch.testing.assert_close(
        distilled.images[0, 0, 0, ::2, ::4], torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    )
    assert distilled.decode().shape == images.shape
    for update, (shown, shown_labels, _) in enumerate(distilled.schedule()):
        torch.testing.assert_close(shown, images[update])
        assert torch.equal(shown_labels, labels[update])


def test_a_factor_of_one_changes_nothing(toy):
    images, _ = du.initialize(toy, "real", steps=2)
    decoder = du.MultiFormation(1)
    assert torch.equal(decoder(images), images)
    assert torch.equal(decoder.pack(images), images)


def make_decoded(toy) -> du.DistilledSet:
    with du.seeded(0):
        codes, labels = torch.randn(2, 3, 5, 1, 1), torch.eye(3).repeat(2, 1, 1)
        return du.DistilledSet(codes, labels, decoder=make_decoder(), epochs=2)


def test_distillation_improves_codes_and_decoder(toy, smooth):
    distilled = make_decoded(toy)
    before = {name: value.detach().clone() for name, value in distilled.named_parameters()}
    history = du.distill(
        distilled,
        toy,
        smooth,
        iterations=60,
        batch_size=32,
        validate_every=60,
        validation_networks=1,
        progress=False,
    )
    assert sum(history.loss[-5:]) < sum(history.loss[:5])
    assert all(not torch.equal(value, before[name]) for name, value in distilled.named_parameters())


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "RMSprop"}, "optimizer='RMSprop', .*give SGD, or Adam and no momentum"),
        (
            {"optimizer": "Adam", "momentum": 0.5},
            r"momentum=0\.5: give SGD, or Adam and no momentum",
        ),
        ({"label_smoothing": 0}, "label_smoothing=0: give more than 0"),
        ({"label_smoothing": 1.1}, r"label_smoothing=1\.1: .* at most 1"),
        ({"step_size": -0.1}, r"step_size=-0\.1: give a positive number, or \[4\]"),
        ({"step_size": float("nan")}, "step_size=nan: give a positive number"),
        ({"step_size": float("inf")}, "step_size=inf: give a positive number"),
        ({"step_size": torch.ones(3)}, r"step_size=tensor.*: give a positive number, or \[4\]"),
    ],
)
def test_bad_options_are_named(toy, options, message):
    with pytest.raises(ValueError, match=message):
        make_set(toy, **options)


class Doubled(nn.Module):
    def forward(self, images):
        return torch.cat([images, images])


BAD = {
    "no steps": (lambda images, labels: (images[0], labels), r"images: \[3, 1, 4, 4\]; give finite numbers \[steps, n"),
    "empty": (lambda images, labels: (images[:0], labels[:0]), r"images: \[0, 3, 1, 4, 4\]"),
    "NaN images": (lambda images, labels: (images * math.nan, labels), "images: .*finite"),
    "infinite images": (lambda images, labels: (images / 0, labels), "images: .*finite"),
    "too few labels": (
        lambda images, labels: (images, labels[:, :2]), r"labels: \[2, 2, 3\]; give probabilities \[2, 3, 'classes'\]",
    ),
    "integer labels": (lambda images, labels: (images, labels.argmax(-1)), r"as F\.one_hot makes of integers"),
    "a decoder that makes other steps": (
        lambda images, labels: (images, labels.repeat(2, 1, 1), Doubled()), "decoder: turns 2 steps into 4",
    ),
    "no probabilities": (lambda images, labels: (images, 2 * labels), "labels: .*give probabilities"),
    "negative labels": (lambda images, labels: (images, 2 * labels - 1 / 3), "labels: .*give probabilities"),
    "NaN labels": (lambda images, labels: (images, labels * math.nan), "labels: .*give probabilities"),
}  # fmt: skip


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_images_and_labels_are_named(toy, change, message):
    images, labels, *decoder = change(*du.initialize(toy, "real", steps=2))
    with pytest.raises(ValueError, match=message):
        du.DistilledSet(images, labels, decoder=decoder[0] if decoder else None)


# -------------------------------------------------------------------------------------------- file
def save(distilled, toy, path):
    du.save(distilled, path, dataset=toy, network="Smooth", seed=7, command="pytest")


KINDS = {
    "momentum": lambda toy: make_set(toy, soft_labels=True, momentum=0.5),
    "Adam": lambda toy: make_set(toy, soft_labels=True, optimizer="Adam"),
    "multi-formation": lambda toy: make_set(toy, factor=2),
    "codes": make_decoded,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_save_and_load_give_the_same_training(toy, smooth, tmp_path, make):
    distilled, path = make(toy), tmp_path / "new" / "toy.safetensors"
    save(distilled, toy, path)
    loaded = du.load(path)
    assert type(loaded.decoder) is type(distilled.decoder)
    assert loaded.inner == distilled.inner
    for name in ("images", "labels"):
        assert torch.equal(getattr(loaded, name), getattr(distilled, name))
    assert torch.equal(loaded.decode(), distilled.decode())
    torch.testing.assert_close(loaded.step_sizes, distilled.step_sizes, rtol=1e-5, atol=0)
    before = du.evaluate(distilled, toy.test, smooth, networks=3).values
    torch.testing.assert_close(du.evaluate(loaded, toy.test, smooth, networks=3).values, before)
    assert du.load(path, device="cpu").updates == distilled.updates


class Shifted(nn.Module):
    """A user's own decoder, with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return images + self.shift


def test_a_decoder_of_ones_own_is_learned_saved_and_loaded(toy, smooth, tmp_path):
    path, distilled = tmp_path / "toy.safetensors", make_set(toy, decoder=Shifted())
    du.distill(distilled, toy, smooth, iterations=3, batch_size=8, progress=False)
    assert distilled.decoder.shift != 0
    save(distilled, toy, path)
    assert torch.equal(du.load(path, decoder=Shifted()).decode(), distilled.decode())
    with pytest.raises(
        ValueError, match=r"give its decoder, as in load\(path, decoder=Shifted\(\)\)"
    ):
        du.load(path)
    with pytest.raises(ValueError, match="its decoder is of the class Shifted"):
        du.load(path, decoder=nn.Identity())


def read(path) -> tuple[dict, dict]:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["distilled_set"]), {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
        }


def test_the_file_states_what_it_holds_and_how_it_was_made(toy, tmp_path):
    path, found = tmp_path / "toy.safetensors", {}
    for name, make in KINDS.items():
        save(make(toy), toy, path)
        found[name], tensors = read(path)
        assert {"images", "labels", "step_sizes"} <= set(tensors)
        assert (found[name]["mean"], found[name]["std"], found[name]["dataset"]) == (
            toy.mean,
            toy.std,
            "toy",
        )
        assert (found[name]["network"], found[name]["seed"], found[name]["command"]) == (
            "Smooth",
            7,
            "pytest",
        )
    assert found["momentum"]["inner"] == {"epochs": 2, "optimizer": "SGD", "momentum": 0.5}
    assert found["Adam"]["Adam"] == {"betas": [0.9, 0.999], "eps": 1e-4}
    assert found["multi-formation"]["decoder_options"] == {"factor": 2}
    assert found["codes"]["decoder_options"] == {"codes": 5, "channels": [4, 3], "size": [1, 4, 4]}
    assert set(tensors) - {"images", "labels", "step_sizes"} == {
        f"decoder.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")
    }


def test_equal_sets_give_equal_files_which_replace_older_ones(toy, tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for path in paths:
        save(make_decoded(toy), toy, path)
    assert len({path.read_bytes() for path in paths}) == 1
    save(make_set(toy), toy, paths[0])
    assert read(paths[0])[0]["decoder"] == "Identity"
    assert sorted(tmp_path.iterdir()) == paths, "and nothing else is left in the folder"


def test_a_set_made_with_numpy_numbers_is_saved(toy, tmp_path):
    distilled = make_set(toy, epochs=np.int64(2), momentum=np.float64(0.5))
    du.save(distilled, tmp_path / "toy.safetensors", dataset=toy, seed=np.int64(7), folder=tmp_path)
    assert du.load(tmp_path / "toy.safetensors").updates == 4


def rewrite(path, *, drop=(), inner=None, tensors=None, **changes) -> None:
    """Changes what a file holds, with a checksum that fits."""
    metadata, stored = read(path)
    metadata = {
        key: value for key, value in {**metadata, **changes}.items() if key not in (*drop, "sha256")
    }
    if inner:
        metadata["inner"] = {**metadata["inner"], **inner}
    stored = {name: tensor.clone() for name, tensor in stored.items() if name not in drop} | (
        tensors or {}
    )
    metadata["sha256"] = hashlib.sha256(du.to_bytes(stored, metadata)).hexdigest()
    path.write_bytes(du.to_bytes(stored, metadata))


@pytest.mark.fault("damaged files refused")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"step_sizes": torch.ones(3)}}, r"give a positive number, or \[4\]"),
        ({"tensors": {"step_sizes": torch.tensor([0.1, 0.1, 0.1, -0.1])}}, "give a positive number"),
        ({"tensors": {"labels": torch.ones(2, 3)}}, r"labels: \[2, 3\]"),
        ({"tensors": {"labels": torch.ones(2, 3, 3)}}, "give probabilities"),
        ({"tensors": {"images": torch.full((2, 3, 1, 4, 4), float("nan"))}}, "images: .*finite"),
        ({"tensors": {"other": torch.ones(3)}}, "other"),
        ({"drop": ["labels"]}, "labels"),
        ({"drop": ["step_sizes"]}, "step_sizes"),
        ({"drop": ["inner"]}, "inner"),
        ({"inner": {"epochs": "two"}}, "epochs='two'"),
        ({"inner": {"epochs": 2.5}}, r"epochs=2\.5"),
        ({"inner": {"optimizer": "LBFGS"}}, "optimizer='LBFGS'"),
        ({"Adam": {"betas": [0.5, 0.9], "eps": 1e-4}}, "another Adam"),
        ({"decoder": "CodeDecoder", "decoder_options": {"codes": 5, "channels": [4, 3], "size": [1, 4, 4]}}, "decoder"),
    ],
)  # fmt: skip
def test_an_unsound_file_is_refused(toy, tmp_path, changes, message):
    path = tmp_path / "toy.safetensors"
    save(make_set(toy), toy, path)
    rewrite(path, **changes)
    with pytest.raises(
        ValueError, match=rf"(?s)cannot load a distilled set from .*toy\.safetensors \(.*{message}"
    ):
        du.load(path)


@pytest.mark.fault("damaged files refused")
def test_what_is_no_file_of_a_set_is_refused(toy, tmp_path):
    whole, part, flipped, text, foreign = (
        tmp_path / f"{name}.safetensors" for name in ("whole", "part", "flipped", "text", "foreign")
    )
    save(make_set(toy), toy, whole)
    content = bytearray(whole.read_bytes())
    part.write_bytes(content[:-50])
    content[-50] ^= 1
    flipped.write_bytes(content)
    text.write_text("no tensors at all")
    safetensors.torch.save_file({"weight": torch.ones(3)}, foreign)
    for path in (part, flipped, text, foreign, tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match=rf"(?s)cannot load .*{path.name} \("):
            du.load(path)


@pytest.mark.fault("bad calls named")
def test_an_unknown_name_and_a_missing_device_are_named():
    with pytest.raises(
        ValueError, match=r"cannot load .*mnist-3 .*there are fashion-ipc1-mf2-50updates, .*mnist-"
    ):
        du.load("mnist-3")
    with pytest.raises(ValueError, match=r"mnist-ipc10-30updates .*tpu"):
        du.load("mnist-ipc10-30updates", device="tpu")


@pytest.mark.fault("bad calls named")
def test_values_that_are_not_finite_are_not_saved_and_replace_nothing(toy, tmp_path):
    path, diverged = tmp_path / "toy.safetensors", make_set(toy)
    save(make_set(toy), toy, path)
    diverged.images.data.fill_(math.nan)
    with pytest.raises(
        ValueError, match=r"toy\.safetensors': the set has values that are not finite"
    ):
        save(diverged, toy, path)
    assert torch.equal(du.load(path).images, make_set(toy).images)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_others_may_read_the_file_as_any_that_the_user_writes(toy, tmp_path):
    save(make_set(toy), toy, tmp_path / "toy.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "toy.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


# ---------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize(("channels", "columns"), [(1, 3), (3, 5)])
def test_images_are_drawn_in_rows(channels, columns):
    figure, axis = plt.subplots()
    du.draw_images(
        axis, torch.randn(2, 5, channels, 4, 6, requires_grad=True), "title", columns=columns
    )
    (drawn,) = axis.images
    rows = math.ceil(10 / columns)
    assert drawn.get_array().shape == (rows * 5 + 1, columns * 7 + 1, 3)
    assert axis.get_title() == "title"
    plt.close(figure)


def test_a_picture_of_few_values_shows_them():
    figure, axis = plt.subplots()
    mostly_black = torch.zeros(1, 1, 20, 20)
    mostly_black[0, 0, 3, 4] = 1
    du.draw_images(axis, mostly_black)
    drawn = axis.images[0].get_array()[1:-1, 1:-1]
    assert (drawn.min(), drawn.max()) == (0, 1)
    plt.close(figure)
