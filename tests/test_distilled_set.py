"""The distilled set: its initialization, its parameters, its file."""

import itertools
import json
import math
import os

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch.nn import functional as F

import distill_utils as du
from tests.conftest import decoder_weights


def make_set(toy, *, factor=1, **options) -> du.DistilledSet:
    images, labels = du.init_from_real(toy, steps=2, per_class=factor**2)
    options = {"epochs": 2, "step_size": 0.1, **options}
    if factor > 1:
        return du.MultiFormation.from_images(images, labels, factor=factor, **options)
    return du.DistilledSet(images, labels, **options)


# ---------------------------------------------------------------------------------- initialization
def test_real_images_show_every_class_in_each_step_and_no_image_twice(toy):
    images, labels = du.init_from_real(toy, steps=3, per_class=2, seed=5)
    assert images.shape == (3, 6, 1, 4, 4)
    assert labels.sum(1).tolist() == [[2, 2, 2]] * 3
    assert len(images.flatten(0, 1).unique(dim=0)) == 18
    assert all(any(torch.equal(image, real) for real in toy.train.images) for image in images.flatten(0, 1))
    assert torch.equal(images, du.init_from_real(toy, steps=3, per_class=2, seed=5)[0])
    assert not torch.equal(images, du.init_from_real(toy, steps=3, per_class=2, seed=6)[0])


@pytest.mark.parametrize("initialize", [du.init_from_real, du.init_from_kmeans])
def test_labels_are_the_images_own(toy, initialize):
    images, labels = initialize(toy, steps=2, per_class=2)
    brightest = images.mean(-1).flatten(2).argmax(-1)  # class k of the toy set has row k bright
    assert torch.equal(brightest, labels.argmax(-1))


@pytest.mark.parametrize("std", [1.0, 0.3])
def test_noise_is_normal_and_repeatable(toy, std):
    """However few real images there are."""
    images, labels = du.init_from_noise(toy, steps=30, per_class=2, std=std, seed=1)
    assert abs(float(images.mean())) < 0.1 * std
    assert float(images.std()) == pytest.approx(std, rel=0.1)
    assert torch.equal(images, du.init_from_noise(toy, steps=30, per_class=2, std=std, seed=1)[0])
    assert not torch.equal(images, du.init_from_noise(toy, steps=30, per_class=2, std=std, seed=2)[0])
    assert torch.equal(labels[:5], du.init_from_real(toy, steps=5, per_class=2)[1])


def test_one_center_of_a_class_is_its_mean(toy):
    images, labels = du.init_from_kmeans(toy, steps=1)
    assert labels[0].argmax(-1).tolist() == [0, 1, 2]
    for label in range(3):
        torch.testing.assert_close(images[0, label], toy.train.images[toy.train.labels == label].mean(0))


def test_centers_lie_closer_to_their_class_than_random_images_do(toy):
    def mean_distance(images, labels):
        kinds, distances = labels.argmax(-1), []
        for label in range(3):
            real = toy.train.images[toy.train.labels == label].flatten(1)
            distances.append(torch.cdist(real, images[kinds == label].flatten(1)).amin(1).mean())
        return sum(distances)

    random = du.init_from_real(toy, steps=2, per_class=2)
    assert mean_distance(*du.init_from_kmeans(toy, steps=2, per_class=2)) < mean_distance(*random)


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize("initialize", [du.init_from_real, du.init_from_kmeans])
def test_no_more_images_are_taken_than_there_are(toy, initialize):
    with pytest.raises(ValueError, match=r"steps=99 × per_class=1 asks for 99 images of class 0, which has"):
        initialize(toy, steps=99)


# -------------------------------------------------------------------------------------- parameters
@pytest.mark.parametrize("step_size", [1e-30, 1e-4, 0.02, 1.0, 200.0, 1e30])
def test_step_sizes_begin_where_asked(toy, step_size):
    distilled = make_set(toy, step_size=step_size)
    torch.testing.assert_close(distilled.step_sizes, torch.full((4,), step_size), rtol=1e-4, atol=0)
    assert distilled.set_step_sizes(0.5) is distilled
    torch.testing.assert_close(distilled.step_sizes, torch.full((4,), 0.5))


def test_the_schedule_repeats_the_steps_epoch_by_epoch(toy):
    distilled = make_set(toy, step_size=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert (distilled.steps, distilled.epochs, distilled.updates) == (2, 2, 4)
    schedule = list(distilled.schedule())
    assert [float(step_size.detach()) for *_, step_size in schedule] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    for update, step in enumerate([0, 1, 0, 1]):
        assert torch.equal(schedule[update][0], distilled.images[step])
        assert torch.equal(schedule[update][1], distilled.labels[step])


def test_labels_are_learned_only_where_asked(toy):
    fixed, soft = make_set(toy), make_set(toy, soft_labels=True)
    assert {name for name, _ in fixed.named_parameters()} == {"images", "raw_step_sizes"}
    assert {name for name, _ in soft.named_parameters()} == {"images", "raw_step_sizes", "label_scores"}
    torch.testing.assert_close(soft.labels.sum(-1), torch.ones(2, 3))
    assert torch.equal(soft.labels.argmax(-1), fixed.labels.argmax(-1))


def test_label_smoothing_mixes_the_given_labels_with_uniform_ones(toy):
    labels = make_set(toy, soft_labels=True, label_smoothing=0.1).labels
    torch.testing.assert_close(labels, 0.9 * make_set(toy).labels + 0.1 / 3)


def test_a_set_keeps_copies_of_what_it_is_given(toy):
    images, labels = du.init_from_real(toy, steps=2)
    distilled, before = du.DistilledSet(images, labels), [images.clone(), labels.clone()]
    images.zero_(), labels.zero_()
    assert torch.equal(distilled.images, before[0])
    assert torch.equal(distilled.labels, before[1])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_labels_of_any_number_type_are_taken(toy, dtype):
    images, labels = du.init_from_real(toy, steps=2)
    taken = du.DistilledSet(images, labels.to(dtype)).labels
    assert taken.dtype == torch.float32
    assert torch.equal(taken, labels)


def test_images_of_any_memory_layout_are_taken(toy, smooth, tmp_path):
    images, labels = du.init_from_real(toy, steps=2)
    turned, plain = images.transpose(-1, -2), images.transpose(-1, -2).contiguous()
    values = [
        du.evaluate(du.DistilledSet(each, labels, step_size=0.1), toy.test, smooth, networks=3).values
        for each in (turned, plain)
    ]
    assert torch.equal(*values)
    du.DistilledSet(turned, labels).save(tmp_path / "turned.safetensors", dataset=toy)
    assert torch.equal(du.DistilledSet.load(tmp_path / "turned.safetensors").images, plain)


def test_a_multi_formation_holds_more_images_in_as_many_pixels():
    """Images of one brightness each, which survive being made smaller and larger, come back in their order."""
    images = torch.arange(24.0).view(2, 12, 1, 1, 1).expand(2, 12, 1, 4, 8)
    labels = torch.eye(12).expand(2, 12, 12)
    distilled = du.MultiFormation.from_images(images, labels, factor=2)
    assert distilled.images.shape == (2, 3, 1, 4, 8)
    torch.testing.assert_close(distilled.images[0, 0, 0, ::2, ::4], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert distilled.decode().shape == images.shape
    for update, (shown, shown_labels, _) in enumerate(distilled.schedule()):
        torch.testing.assert_close(shown, images[update])
        assert torch.equal(shown_labels, labels[update])


def test_a_factor_of_one_changes_nothing(toy):
    images, labels = du.init_from_real(toy, steps=2)
    assert torch.equal(du.MultiFormation(images, labels, factor=1).decode(), images)
    assert torch.equal(du.MultiFormation.from_images(images, labels, factor=1).images, images)
    assert du.DistilledSet(images, labels).decode().shape == images.shape


def make_decoded(toy) -> du.DistilledSet:
    with du.seeded(0):
        codes, labels = torch.randn(2, 3, 5, 1, 1).to(toy.train.images), torch.eye(3).repeat(2, 1, 1)
        return du.Decoded(codes, labels, epochs=2, **decoder_weights())


def test_a_decoder_turns_codes_into_images_and_comes_back_from_its_file(toy, tmp_path):
    distilled = make_decoded(toy)
    assert distilled.decode().shape == (2, 3, 1, 4, 4)
    distilled.save(tmp_path / "toy.safetensors", dataset=toy)
    loaded = du.DistilledSet.load(tmp_path / "toy.safetensors")
    assert torch.equal(loaded.decode(), distilled.decode())


def test_distillation_improves_codes_and_decoder(toy, smooth):
    distilled = make_decoded(toy)
    before = {name: value.detach().clone() for name, value in distilled.named_parameters()}
    history = du.distill(
        distilled, toy, smooth, iterations=60, batch_size=32, validate_every=60, validation_networks=1, progress=False
    )
    assert sum(history.loss[-5:]) < sum(history.loss[:5])
    assert all(not torch.equal(value, before[name]) for name, value in distilled.named_parameters())


@pytest.mark.fault("damaged files refused")
def test_a_file_without_its_decoder_is_refused(toy, tmp_path, monkeypatch):
    distilled = make_decoded(toy)
    monkeypatch.setattr(du.Decoded, "shared", du.Decoded.shared[1:])
    distilled.save(tmp_path / "toy.safetensors", dataset=toy)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"no whole and sound distilled set .bias0, .*: Decoded takes weight0"):
        du.DistilledSet.load(tmp_path / "toy.safetensors")


@pytest.mark.fault("bad calls named")
def test_a_misspelled_option_is_named(toy):
    with pytest.raises(ValueError, match="epoch: DistilledSet takes no such argument"):
        du.DistilledSet(*du.init_from_real(toy, steps=2), epoch=3)


@pytest.mark.fault("bad calls named")
def test_images_and_labels_must_fit_the_factor(toy):
    images, labels = du.init_from_real(toy, steps=2)
    with pytest.raises(ValueError, match=r"factor=2: a step has 3 images; give a multiple of 4"):
        du.MultiFormation.from_images(images, labels, factor=2)
    for factor in (3, 8):
        with pytest.raises(ValueError, match=rf"factor={factor}: give a number that divides .* \[4, 4\]"):
            du.MultiFormation(images, labels, factor=factor)
    with pytest.raises(ValueError, match=r"labels: shape \[2, 3, 3\].* give a tensor \[2, 12\]"):
        du.MultiFormation(images, labels, factor=2)


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 10**9}, r"epochs=1000000000: makes 2,000,000,000 updates; give at most a million"),
        ({"optimizer": "RMSprop"}, "optimizer='RMSprop': give SGD or Adam"),
        ({"optimizer": "Adam", "momentum": 0.5}, r"momentum=0\.5: .*Adam"),
        ({"label_smoothing": 0}, "label_smoothing=0: give more than 0"),
        ({"label_smoothing": 1.1}, r"label_smoothing=1\.1: .* at most 1"),
        ({"momentum": 1.0}, r"momentum=1\.0: give at least 0 and less than 1"),
        ({"momentum": float("nan")}, "momentum=nan"),
        ({"step_size": -0.1}, r"step_size=-0\.1: give positive numbers"),
        ({"step_size": float("nan")}, "step_size=nan: give positive numbers"),
        ({"step_size": float("inf")}, "step_size=inf: give positive numbers"),
        ({"step_size": torch.ones(3)}, r"step_size: shape \[3\]; give one number or \[4\]"),
    ],
)
def test_bad_options_are_named(toy, options, message):
    with pytest.raises(ValueError, match=message):
        make_set(toy, **options)


BAD = {
    "no steps": (lambda images, labels: (images[0], labels), r"images: shape \[3, 1, 4, 4\]; give a tensor \[steps, n"),
    "empty": (lambda images, labels: (images[:0], labels[:0]), r"images: shape \[0, 3, 1, 4, 4\]"),
    "NaN images": (lambda images, labels: (images * math.nan, labels), "images: .*finite"),
    "infinite images": (lambda images, labels: (images / 0, labels), "images: .*finite"),
    "numpy": (lambda images, labels: (images.numpy(), labels), r"images: shape .*; give a tensor"),
    "a list": (lambda images, labels: (images.tolist(), labels), r"images: shape \[2, 3, 1, 4, 4\]; give a tensor"),
    "None": (lambda images, labels: (None, labels), r"images: shape \[\]; give a tensor"),
    "integers": (lambda images, labels: (images.long(), labels), "images: give finite floating-point ones"),
    "too few labels": (lambda images, labels: (images, labels[:, :2]), r"labels: shape \[2, 2, 3\].* tensor \[2, 3\]"),
    "integer labels": (lambda images, labels: (images, labels.argmax(-1)), r"for integer labels F\.one_hot\(labels"),
    "numpy labels": (lambda images, labels: (images, labels.numpy()), r"labels: shape \[2, 3, 3\]; give a tensor"),
    "no probabilities": (lambda images, labels: (images, 2 * labels), "labels: give probabilities"),
    "negative labels": (lambda images, labels: (images, 2 * labels - 1 / 3), "labels: give probabilities"),
    "NaN labels": (lambda images, labels: (images, labels * math.nan), "labels: give probabilities"),
}


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_images_and_labels_are_named(toy, change, message):
    with pytest.raises(ValueError, match=message):
        du.DistilledSet(*change(*du.init_from_real(toy, steps=2)))


# -------------------------------------------------------------------------------------------- file
def save(distilled, toy, path):
    distilled.save(path, dataset=toy, network="Smooth", seed=7, command="pytest")


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {"optimizer": "Adam"}, {"factor": 2}])
def test_save_and_load_give_the_same_training(toy, smooth, tmp_path, options):
    distilled = make_set(toy, soft_labels=True, step_size=0.5, **options)
    save(distilled, toy, tmp_path / "new" / "toy.safetensors")
    loaded = du.DistilledSet.load(tmp_path / "new" / "toy.safetensors")
    assert type(loaded) is type(distilled)
    assert loaded.metadata() == distilled.metadata()
    assert torch.equal(loaded.images, distilled.images)
    assert torch.equal(loaded.decode(), distilled.decode())
    assert torch.equal(loaded.labels, distilled.labels)
    torch.testing.assert_close(loaded.step_sizes, distilled.step_sizes, rtol=1e-5, atol=0)
    before = du.evaluate(distilled, toy.test, smooth, networks=3).values
    torch.testing.assert_close(du.evaluate(loaded, toy.test, smooth, networks=3).values, before)


class Negative(du.DistilledSet):
    """A parametrization with an option of its own."""

    options = ("offset",)

    def __init__(self, images, labels, *, offset, **options):
        self.__dict__["offset"] = offset
        super().__init__(images, labels, **options)

    def decode(self):
        return self.offset - self.images


def test_another_parametrization_is_saved_and_loaded_by_its_name(toy, tmp_path):
    distilled = Negative(*du.init_from_real(toy, steps=2), offset=0.5)
    save(distilled, toy, tmp_path / "toy.safetensors")
    loaded = du.DistilledSet.load(tmp_path / "toy.safetensors")
    assert type(loaded) is Negative
    assert torch.equal(loaded.decode(), distilled.decode())


def train_from_file(path, weights: list[torch.Tensor], forward) -> list[torch.Tensor]:
    """Trains weights on a set by its documented format alone: nothing of distill_utils is called."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        images, labels, step_sizes = (file.get_tensor(name) for name in ("images", "labels", "step_sizes"))
    factor, (height, width) = int(metadata.get("factor", 1)), images.shape[-2:]
    assert len(step_sizes) == len(images) * int(metadata["epochs"])
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for update, step_size in enumerate(step_sizes.tolist()):
        stored, (h, w) = images[update % len(images)], (height // factor, width // factor)
        small = [
            image[:, row * h : (row + 1) * h, column * w : (column + 1) * w]
            for image, row, column in itertools.product(stored, range(factor), range(factor))
        ]
        seen = F.interpolate(torch.stack(small), (height, width), mode="bilinear", align_corners=False)
        weights = [weight.detach().requires_grad_() for weight in weights]
        scores = forward(weights, seen).log_softmax(-1)
        loss = -(labels[update % len(images)] * scores).sum(-1).mean()
        gradients = torch.autograd.grad(loss, weights)
        if metadata["inner_optimizer"] == "SGD":
            momentum = float(metadata["momentum"])
            first = [momentum * m + g for m, g in zip(first, gradients, strict=True)]
            weights = [weight - step_size * m for weight, m in zip(weights, first, strict=True)]
        else:
            (beta1, beta2), eps, t = json.loads(metadata["betas"]), float(metadata["eps"]), update + 1
            first = [beta1 * m + (1 - beta1) * g for m, g in zip(first, gradients, strict=True)]
            second = [beta2 * v + (1 - beta2) * g * g for v, g in zip(second, gradients, strict=True)]
            size = step_size * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
            weights = [w - size * m / (v.sqrt() + eps) for w, m, v in zip(weights, first, second, strict=True)]
    return weights


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {"optimizer": "Adam"}, {"factor": 2, "optimizer": "Adam"}])
def test_the_file_alone_says_how_to_train(toy, smooth, tmp_path, options):
    distilled, network = make_set(toy, soft_labels=True, epochs=5, **options), smooth()
    save(distilled, toy, tmp_path / "toy.safetensors")

    def forward(weights, images):
        return torch.tanh(images.flatten(1) @ weights[0].T + weights[1]) @ weights[2].T + weights[3]

    found = train_from_file(tmp_path / "toy.safetensors", list(network.parameters()), forward)
    for ours, theirs in zip(du.unroll(network, distilled).parameters(), found, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"momentum": 0.5}, {"parametrization": "DistilledSet", "inner_optimizer": "SGD", "momentum": "0.5"}),
        ({"optimizer": "Adam"}, {"inner_optimizer": "Adam", "betas": "[0.9, 0.999]", "eps": "0.0001"}),
        ({"factor": 2}, {"parametrization": "MultiFormation", "factor": "2"}),
    ],
)
def test_the_file_states_what_it_holds_and_how_it_was_made(toy, tmp_path, options, expected):
    path = tmp_path / "toy.safetensors"
    save(make_set(toy, **options), toy, path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == ["images", "labels", "step_sizes"]
    assert float(metadata["mean"]) == toy.mean
    assert float(metadata["std"]) == toy.std
    assert f"torch=={torch.__version__.split('+')[0]}" in metadata["versions"]
    common = {"dataset": "toy", "epochs": "2", "network": "Smooth", "seed": "7", "command": "pytest"}
    assert {**common, **expected}.items() <= metadata.items()


def test_equal_sets_give_equal_files_which_replace_older_ones(toy, tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for path in paths:
        save(make_set(toy, optimizer="Adam", soft_labels=True), toy, path)
    assert len({path.read_bytes() for path in paths}) == 1
    save(make_set(toy), toy, paths[0])
    assert du.DistilledSet.load(paths[0]).optimizer == "SGD"
    assert sorted(tmp_path.iterdir()) == paths, "and nothing else is left in the folder"


def test_a_set_made_with_numpy_numbers_is_saved(toy, tmp_path):
    save(make_set(toy, epochs=np.int64(2), momentum=np.float64(0.5)), toy, tmp_path / "toy.safetensors")
    assert du.DistilledSet.load(tmp_path / "toy.safetensors").updates == 4


def rewrite(path, *, drop=(), metadata=None, **changes):
    with safetensors.safe_open(path, framework="pt") as file:
        stated = {**file.metadata(), **(metadata or {})}
    tensors = {name: tensor for name, tensor in safetensors.torch.load_file(path).items() if name not in drop}
    tensors |= changes
    stated = {name: value for name, value in stated.items() if value is not None and name != "sha256"}
    safetensors.torch.save_file(tensors, path, {**stated, "sha256": du.checksum(tensors, stated)})


@pytest.mark.fault("damaged files refused")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_sizes": torch.ones(3)}, r"step_size: shape \[3\]; give one number or \[4\]"),
        ({"labels": torch.ones(2, 3)}, r"labels: shape \[2, 3\]"),
        ({"images": torch.full((2, 3, 1, 4, 4), float("nan"))}, "images: .*finite"),
        ({"images": torch.ones(2, 3, 1, 4, 4, dtype=torch.uint8)}, ""),
        ({"step_sizes": torch.full((4,), float("inf"))}, "give positive numbers"),
        ({"step_sizes": torch.tensor([0.1, 0.1, 0.1, -0.1])}, "give positive numbers"),
        ({"labels": torch.ones(2, 3, 3)}, "give probabilities"),
        ({"drop": ["labels"]}, "labels"),
        ({"drop": ["step_sizes"]}, "step_sizes"),
        ({"other": torch.ones(3)}, "other"),
        ({"metadata": {"epochs": None}}, "epochs"),
        ({"metadata": {"epochs": "two"}}, ""),
        ({"metadata": {"epochs": "2.5"}}, r"epochs=2\.5"),
        ({"metadata": {"epochs": "1000000000000000"}}, "give at most a million"),
        ({"metadata": {"epochs": "500000"}, "step_sizes": torch.tensor(0.1)}, r"step_size: shape \[1\]"),
        ({"metadata": {"inner_optimizer": "LBFGS"}}, "optimizer='LBFGS'"),
        ({"metadata": {"inner_optimizer": "Adam", "betas": "[0.5, 0.9]", "eps": "0.0001"}}, "trains unlike"),
        ({"metadata": {"inner_optimizer": "Adam", "betas": "[0.9, 0.999]", "eps": "1e-08"}}, "trains unlike"),
        ({"metadata": {"parametrization": "Nothing"}}, "Nothing"),
    ],
)
def test_an_unsound_file_is_refused(toy, tmp_path, changes, message):
    path = tmp_path / "toy.safetensors"
    save(make_set(toy), toy, path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=rf"toy\.safetensors': no whole and sound distilled set .*{message}"):
        du.DistilledSet.load(path)


@pytest.mark.fault("damaged files refused")
def test_what_is_no_file_of_a_set_is_refused(toy, tmp_path):
    whole, part, text, foreign = (tmp_path / f"{name}.safetensors" for name in ("whole", "part", "text", "foreign"))
    save(make_set(toy), toy, whole)
    part.write_bytes(whole.read_bytes()[:-50])
    text.write_text("no tensors at all")
    safetensors.torch.save_file({"weight": torch.ones(3)}, foreign)
    for path in (part, text, foreign, tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match=rf"path='.*{path.name}': no whole and sound distilled set"):
            du.DistilledSet.load(path)


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize("device", ["tpu", "cpu:x", "cpu:1", "", "CPU"])
def test_a_missing_device_is_named(toy, tmp_path, device):
    save(make_set(toy), toy, tmp_path / "toy.safetensors")
    with pytest.raises(ValueError, match=rf"device='{device}': not on this machine; give auto, .*cpu"):
        du.DistilledSet.load(tmp_path / "toy.safetensors", device=device)


@pytest.mark.fault("bad calls named")
def test_values_that_are_not_finite_are_not_saved_and_replace_nothing(toy, tmp_path):
    path, diverged = tmp_path / "toy.safetensors", make_set(toy)
    save(make_set(toy), toy, path)
    diverged.images.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"toy\.safetensors': the set has values that are not finite"):
        save(diverged, toy, path)
    assert torch.equal(du.DistilledSet.load(path).images, make_set(toy).images)


def test_the_file_says_how_far_distillation_came(toy, smooth, tmp_path):
    distilled, path = make_set(toy), tmp_path / "toy.safetensors"
    run = du.Distillation(distilled, toy, smooth, iterations=5)
    for done in ("0", "1 of 5", "2 of 5"):
        save(distilled, toy, path)
        with safetensors.safe_open(path, framework="pt") as file:
            assert file.metadata()["iterations"] == done
        assert du.DistilledSet.load(path).iterations == done
        run.apply_gradient(run.compute_gradient())


@pytest.mark.fault("bad calls named")
def test_an_unknown_name_is_named():
    with pytest.raises(ValueError, match=r"name='mnist-3': give one of .*mnist-"):
        du.load("mnist-3")


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_others_may_read_the_file_as_any_that_the_user_writes(toy, tmp_path):
    save(make_set(toy), toy, tmp_path / "toy.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "toy.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
