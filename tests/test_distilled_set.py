"""The distilled set: its starts, its parameters, its file."""

import pytest
import safetensors.torch
import torch

import distill_utils as du


def make_set(toy, *, tiles=1, **options) -> du.DistilledSet:
    start = du.tiled(*du.real_start(toy, steps=2, per_class=tiles**2), tiles=tiles)
    return du.DistilledSet(*start, **{"epochs": 2, "step_size": 0.1, "tiles": tiles, **options})


def test_real_start_takes_every_class_once_a_step_and_no_image_twice(toy):
    images, labels = du.real_start(toy, steps=3, per_class=2, seed=5)
    assert images.shape == (3, 6, 1, 4, 4)
    assert labels.sum(1).tolist() == [[2, 2, 2]] * 3
    assert len(images.flatten(0, 1).unique(dim=0)) == 18
    assert all(any(torch.equal(image, real) for real in toy.train.images) for image in images.flatten(0, 1))
    assert torch.equal(images, du.real_start(toy, steps=3, per_class=2, seed=5)[0])
    assert not torch.equal(images, du.real_start(toy, steps=3, per_class=2, seed=6)[0])


def test_real_start_labels_are_the_images_own(toy):
    images, labels = du.real_start(toy, steps=2)
    brightest = images.mean(-1).flatten(2).argmax(-1)  # class k of the toy set has row k bright
    assert torch.equal(brightest, labels.argmax(-1))


@pytest.mark.parametrize("std", [1.0, 0.3])
def test_noise_start_is_normal_and_repeatable(toy, std):
    images, labels = du.noise_start(toy, steps=10, per_class=2, std=std, seed=1)
    assert abs(float(images.mean())) < 0.1 * std
    assert float(images.std()) == pytest.approx(std, rel=0.1)
    assert torch.equal(images, du.noise_start(toy, steps=10, per_class=2, std=std, seed=1)[0])
    assert torch.equal(labels[:5], du.real_start(toy, steps=5, per_class=2)[1])


@pytest.mark.parametrize("start", [du.real_start, du.k_means_start])
def test_start_asks_for_no_more_than_there_is(toy, start):
    with pytest.raises(ValueError, match=r"steps=99 × per_class=1 asks for 99 images of class 0, which has"):
        start(toy, steps=99)


@pytest.mark.parametrize("step_size", [1e-4, 0.02, 1.0, 200.0])
def test_step_sizes_start_where_asked(toy, step_size):
    distilled = make_set(toy, step_size=step_size)
    torch.testing.assert_close(distilled.step_sizes, torch.full((4,), step_size), rtol=1e-4, atol=0)


def test_schedule_goes_through_the_steps_epoch_by_epoch(toy):
    distilled = make_set(toy, step_size=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    schedule = list(distilled.schedule())
    assert [float(step_size.detach()) for *_, step_size in schedule] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    for update, step in enumerate([0, 1, 0, 1]):
        assert torch.equal(schedule[update][0], distilled.images[step])
        assert torch.equal(schedule[update][1], distilled.labels[step])


def test_shared_step_sizes_are_one_per_step(toy):
    distilled = make_set(toy, step_size=torch.tensor([0.1, 0.2]), share_step_sizes=True)
    assert distilled.raw_step_sizes.shape == (2,)
    torch.testing.assert_close(distilled.step_sizes, torch.tensor([0.1, 0.2, 0.1, 0.2]))


def test_labels_are_learned_only_where_asked(toy):
    fixed, learned = make_set(toy), make_set(toy, learn_labels=True)
    assert {name for name, _ in fixed.named_parameters()} == {"images", "raw_step_sizes"}
    assert {name for name, _ in learned.named_parameters()} == {"images", "raw_step_sizes", "label_scores"}
    torch.testing.assert_close(learned.labels.sum(-1), torch.ones(2, 3))
    assert torch.equal(learned.labels.argmax(-1), fixed.labels.argmax(-1))


def test_learned_labels_start_near_the_given_ones(toy):
    labels = make_set(toy, learn_labels=True, label_smoothing=0.1).labels
    expected = 0.9 * make_set(toy).labels + 0.1 / labels.shape[-1]
    torch.testing.assert_close(labels, expected)


def test_tiles_hold_more_images_in_as_many_pixels():
    """Images of one brightness each, which survive being made smaller and larger, come back in their order."""
    images = torch.arange(24.0).view(2, 12, 1, 1, 1).expand(2, 12, 1, 4, 8)
    labels = torch.eye(12).expand(2, 12, 12)
    distilled = du.DistilledSet(*du.tiled(images, labels, tiles=2), tiles=2)
    assert distilled.images.shape == (2, 3, 1, 4, 8)
    torch.testing.assert_close(distilled.images[0, 0, 0, ::2, ::4], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    for update, (shown, shown_labels, _) in enumerate(distilled.schedule()):
        torch.testing.assert_close(shown, images[update])
        assert torch.equal(shown_labels, labels[update])


def test_without_tiles_networks_see_the_images_themselves(toy):
    distilled = make_set(toy)
    assert distilled.decoded() is distilled.images
    assert torch.equal(du.tiled(distilled.images, distilled.labels, tiles=1)[0], distilled.images)


def test_tiles_must_fit(toy):
    images, labels = du.real_start(toy, steps=2)
    with pytest.raises(ValueError, match=r"tiles=2: a step has 3 images; give a multiple of 4, as with per_class=4"):
        du.tiled(images, labels, tiles=2)
    for tiles in (0, 3):
        with pytest.raises(ValueError, match=rf"tiles={tiles}: give a number that divides .* \[4, 4\]"):
            du.tiled(images, labels, tiles=tiles)
    with pytest.raises(ValueError, match=r"tiles=3: give a number that divides .* \[4, 4\]"):
        du.DistilledSet(images, labels, tiles=3)
    with pytest.raises(ValueError, match=r"labels: shape \[2, 3, 3\] .* and tiles=2; give \[2, 12\] .*tiled"):
        du.DistilledSet(images, labels, tiles=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0: give at least 1"),
        ({"optimizer": "RMSprop"}, "optimizer='RMSprop': give one of SGD, Adam"),
        ({"optimizer": "Adam", "momentum": 0.5}, r"momentum=0\.5: is SGD's"),
        ({"label_smoothing": 0}, "label_smoothing=0: give more than 0"),
        ({"momentum": 1.0}, r"momentum=1\.0: give at least 0 and less than 1"),
        ({"step_size": -0.1}, r"step_size=-0\.1: give positive numbers"),
        ({"step_size": float("nan")}, "step_size=nan: give positive numbers"),
        ({"step_size": torch.ones(3)}, r"step_size: shape \[3\]; give one number or \[4\]"),
    ],
)
def test_bad_options_are_named(toy, options, message):
    with pytest.raises(ValueError, match=message):
        make_set(toy, **options)


def test_bad_shapes_are_named(toy):
    images, labels = du.real_start(toy, steps=2)
    with pytest.raises(ValueError, match=r"images: shape \[3, 1, 4, 4\]; give \[steps, n, c, h, w\]"):
        du.DistilledSet(images[0], labels)
    with pytest.raises(ValueError, match=r"labels: shape \[2, 2, 3\] with images \[2, 3, 1, 4, 4\]"):
        du.DistilledSet(images, labels[:, :2])


def test_integer_labels_are_refused_with_the_remedy_and_integer_one_hot_is_taken(toy):
    images, labels = du.real_start(toy, steps=2)
    with pytest.raises(ValueError, match=r"for integer labels F\.one_hot\(labels, classes\)"):
        du.DistilledSet(images, labels.argmax(-1))
    assert torch.equal(du.DistilledSet(images, labels.long()).labels, labels)


def save(distilled, toy, path):
    distilled.save(path, dataset=toy, network="Smooth", seed=7, command="pytest")


@pytest.mark.parametrize("inner", [{"momentum": 0.5}, {"optimizer": "Adam"}, {"tiles": 2}])
def test_save_and_load_give_the_same_training(toy, smooth, tmp_path, inner):
    distilled = make_set(toy, learn_labels=True, share_step_sizes=True, step_size=0.5, **inner)
    save(distilled, toy, tmp_path / "new" / "toy.safetensors")
    loaded = du.DistilledSet.load(tmp_path / "new" / "toy.safetensors")

    assert (loaded.epochs, loaded.optimizer, loaded.momentum) == (2, distilled.optimizer, distilled.momentum)
    assert torch.equal(loaded.images, distilled.images)
    assert torch.equal(loaded.decoded(), distilled.decoded())
    assert torch.equal(loaded.labels, distilled.labels)
    torch.testing.assert_close(loaded.step_sizes, distilled.step_sizes, rtol=1e-5, atol=0)
    before = du.evaluate(distilled, toy.test, smooth, networks=3).values
    torch.testing.assert_close(du.evaluate(loaded, toy.test, smooth, networks=3).values, before)


def test_the_file_is_readable_without_this_project(toy, tmp_path):
    path = tmp_path / "toy.safetensors"
    save(make_set(toy), toy, path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == ["images", "labels", "step_sizes"]
        assert file.get_tensor("images").shape == (2, 3, 1, 4, 4)
        assert file.get_tensor("labels").shape == (2, 3, 3)
        assert file.get_tensor("step_sizes").shape == (4,)
    assert metadata["dataset"] == "toy"
    assert float(metadata["mean"]) == toy.mean
    assert metadata["epochs"] == "2"
    assert metadata["inner_optimizer"] == "SGD"
    assert metadata["seed"] == "7"
    assert f"torch=={torch.__version__.split('+')[0]}" in metadata["versions"]


def test_a_truncated_file_is_refused(toy, tmp_path):
    path = tmp_path / "toy.safetensors"
    save(make_set(toy), toy, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"toy\.safetensors': not a whole safetensors file"):
        du.DistilledSet.load(path)


def test_a_missing_file_and_a_missing_device_are_named(toy, tmp_path):
    with pytest.raises(ValueError, match=r"path='.*nope': no such file; load\(name\) knows"):
        du.DistilledSet.load(tmp_path / "nope")
    save(make_set(toy), toy, tmp_path / "toy.safetensors")
    with pytest.raises(ValueError, match="'tpu': not on this machine; give auto or one of cpu"):
        du.DistilledSet.load(tmp_path / "toy.safetensors", device="tpu")


def test_others_may_read_the_file_as_any_that_the_user_writes(toy, tmp_path):
    save(make_set(toy), toy, tmp_path / "toy.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "toy.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def rewrite(path, *, drop=(), metadata_drop=(), **changes):
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name not in metadata_drop}
    tensors = {name: t for name, t in safetensors.torch.load_file(path).items() if name not in drop}
    safetensors.torch.save_file({**tensors, **changes}, path, metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_sizes": torch.ones(3)}, r"step_size: shape \[3\]; give one number or \[4\]"),
        ({"labels": torch.ones(2, 3)}, r"labels: shape \[2, 3\]"),
        ({"images": torch.full((2, 3, 1, 4, 4), float("nan"))}, "'images' holds values that are not finite"),
        ({"step_sizes": torch.full((4,), float("inf"))}, "'step_sizes' holds values that are not finite"),
        ({"step_sizes": torch.tensor([0.1, 0.1, 0.1, -0.1])}, "give positive numbers"),
        ({"labels": torch.ones(2, 3, 3)}, "give probabilities"),
        ({"drop": ["labels"]}, "no tensors named labels"),
        ({"metadata_drop": ["epochs"]}, "no metadata named epochs"),
    ],
)
def test_an_unsound_file_is_refused(toy, tmp_path, changes, message):
    path = tmp_path / "toy.safetensors"
    save(make_set(toy), toy, path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=rf"toy\.safetensors': .*{message}"):
        du.DistilledSet.load(path)
