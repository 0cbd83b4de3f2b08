"""The method on every device of the machine, and on an emulated accelerator without float64."""

import pytest
import torch
from torch import Tensor

import distill_utils as du
from study.methods.decoders import multi_formation
from tests.conftest import make_decoder

SETTINGS = {"iterations": 3, "batch_size": 8, "validate_every": 2, "progress": False}


def make_set(dataset: du.Dataset, *, factor=1, decoded=False, **options) -> du.DistilledSet:
    images, labels = du.initialize(dataset, "real", steps=2, per_class=factor**2)
    options = {"epochs": 2, "step_size": 0.1, **options}
    if decoded:
        with du.seeded(0):
            codes, options["decoder"] = torch.rand(2, 3, 5, 1, 1), make_decoder()
        return du.DistilledSet(codes, labels.cpu(), **options).to(images.device)
    if factor > 1:
        return multi_formation(images, labels, factor=factor, **options)
    return du.DistilledSet(images, labels, **options)


KINDS = pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"optimizer": "Adam"},
        {"soft_labels": True},
        {"factor": 2, "soft_labels": True},
        {"decoded": True, "soft_labels": True},
    ],
    ids=["momentum", "Adam", "soft labels", "multi-formation", "decoded"],
)


def assert_all_on(device: torch.device, *tensors: Tensor) -> None:
    assert {tensor.device.type for tensor in tensors} == {device.type}
    assert not {tensor.dtype for tensor in tensors} & {torch.float64, torch.float16}


@pytest.mark.parametrize("kind", ["noise", "real", "k-means"])
def test_initial_images_are_on_the_datasets_device(device, toy_on_device, kind):
    images = du.initialize(toy_on_device, kind, steps=2, per_class=2)
    assert_all_on(device, *toy_on_device.train, *images)


@KINDS
def test_a_set_trains_on_the_device_as_on_the_cpu(device, toy_on_device, toy, smooth, options):
    distilled = make_set(toy_on_device, **options)
    assert_all_on(
        device, *distilled.parameters(), distilled.decode(), distilled.labels, distilled.step_sizes
    )
    network = smooth()
    loss = du.outer_loss(network, on_cpu := make_set(toy, **options), toy.test)
    loss.backward()
    loss_on_device = du.outer_loss(network.to(device), distilled, toy_on_device.test)
    loss_on_device.backward()
    assert loss_on_device.item() == pytest.approx(loss.item(), rel=1e-4)
    for there, here in zip(distilled.parameters(), on_cpu.parameters(), strict=True):
        assert_all_on(device, there.grad)
        torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-3, atol=1e-5)


@KINDS
@pytest.mark.parametrize("networks", [1, 3])
def test_distillation_on_the_device_does_what_it_does_on_the_cpu(
    device, toy_on_device, toy, smooth, options, networks
):
    there, here = make_set(toy_on_device, **options), make_set(toy, **options)
    history = du.distill(there, toy_on_device, smooth, networks=networks, **SETTINGS)
    expected = du.distill(here, toy, smooth, networks=networks, **SETTINGS)
    assert history.loss == pytest.approx(expected.loss, rel=1e-3)
    assert {images.device.type for images in history.images} == {"cpu"}
    assert_all_on(device, there.images)
    torch.testing.assert_close(
        there.images.detach().cpu(), here.images.detach(), rtol=1e-2, atol=1e-3
    )


def test_evaluation_and_training_on_the_device_do_what_they_do_on_the_cpu(
    device, toy_on_device, toy, smooth
):
    options = {"soft_labels": True, "optimizer": "Adam", "step_size": 0.02}
    there, here = (
        du.evaluate(make_set(dataset, **options), dataset.test, smooth, networks=9)
        for dataset in (toy_on_device, toy)
    )
    assert there.values.device.type == "cpu"
    # one image in thirty
    assert there.values.tolist() == pytest.approx(here.values.tolist(), abs=4)
    best = du.best_constant_step_size(
        make_set(toy_on_device), toy_on_device, smooth, step_sizes=(0.01, 0.1)
    )
    assert_all_on(device, best.step_sizes)
    network = du.train(smooth().to(device), toy_on_device.train, epochs=20, batch_size=10)
    assert float(du.accuracy(network, toy_on_device.test)) > 95


def test_a_set_is_saved_from_the_device(device, toy_on_device, tmp_path):
    distilled = make_set(toy_on_device, factor=2, soft_labels=True)
    du.save(distilled, tmp_path / "toy.safetensors", dataset=toy_on_device)
    assert torch.equal(
        du.load(tmp_path / "toy.safetensors").images, distilled.images.detach().cpu()
    )


def test_a_set_is_loaded_on_every_real_device(device, toy, smooth, tmp_path):
    if device.type == "meta":
        pytest.skip("files are read by safetensors, which does not know the emulated device")
    du.save(make_set(toy), tmp_path / "toy.safetensors", dataset=toy)
    assert_all_on(device, *du.load(tmp_path / "toy.safetensors", device=device).parameters())


def test_the_emulated_accelerator_refuses_what_a_real_one_refuses(device):
    if device.type != "meta":
        pytest.skip("a real device needs no check")
    there, here = torch.ones(3).to(device), torch.ones(3)
    assert (there + torch.tensor(1.0)).cpu().tolist() == [2, 2, 2], "scalars may be on the CPU"
    assert there[torch.tensor([0, 1])].cpu().tolist() == [1, 1], "indices may be on the CPU"
    with pytest.raises(TypeError, match="float64"):
        there.double()
    for mix in (lambda: there + here, lambda: here[there.long()], lambda: there.add_(here)):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
