"""What a user relies on, on an emulated accelerator, which is on every machine, and on a real device:
that named by the environment variable DEVICE, or else the fastest, where it is not the CPU."""

import os
import re
import timeit
from pathlib import Path

import pytest
import torch

import distill_utils as du
from study import runs
from tests.conftest import Smooth, make_set

REAL = du.pick_device(os.environ.get("DEVICE") or "auto")
idle = REAL.type == "cpu" and "DEVICE" not in os.environ
on_a_real_device = pytest.mark.skipif(idle, reason="other tests run on the CPU")


@pytest.fixture(autouse=True)
def _no_rounding_to_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


KINDS = {
    "momentum": {"momentum": 0.9},
    "Adam": {"optimizer": "Adam", "step_size": 0.02},
    "soft labels": {"soft_labels": True},
    "codes": {"codes": "random", "soft_labels": True},
    "generator": {"codes": "generated"},
}


@pytest.mark.parametrize(("kind", "networks"), [("momentum", 1), *((kind, 3) for kind in KINDS)])
def test_distillation_is_that_of_the_cpu(device, toy_on_device, toy, kind, networks):
    options = {"iterations": 3, "networks": networks, "validate_every": 2, "progress": False}
    there, here = (
        du.Distillation(make_set(data, **KINDS[kind]), data, Smooth, **options)
        for data in (toy_on_device, toy)
    )
    assert there.compute_gradient() == pytest.approx(here.compute_gradient(), rel=1e-4)
    for ours, theirs in zip(there.distilled.parameters(), here.distilled.parameters(), strict=True):
        assert {ours.device.type, ours.grad.device.type} == {device.type}
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-3, atol=1e-5)
    assert there.run().loss == pytest.approx(here.run().loss, rel=1e-3)


def test_evaluation_training_and_files_are_those_of_the_cpu(device, toy_on_device, toy, tmp_path):
    sets = [make_set(data, **KINDS["codes"], bits=4) for data in (toy_on_device, toy)]
    accuracies = []
    for distilled, data in zip(sets, (toy_on_device, toy), strict=True):
        accuracies.append(du.evaluate(distilled, data.test, Smooth, networks=9).values.tolist())
    assert accuracies[0] == pytest.approx(accuracies[1], abs=4)  # one image in thirty
    du.save(sets[0], tmp_path / "toy.safetensors", dataset=toy_on_device)
    torch.testing.assert_close(du.load(tmp_path / "toy.safetensors").decode(), sets[1].decode())
    network = du.train(Smooth().to(device), toy_on_device.train, epochs=20, batch_size=10)
    assert float(du.accuracy(network, toy_on_device.test)) > 95


@on_a_real_device
def test_the_meta_gradient_of_lenets_is_that_of_the_cpu():
    gradients = []
    for place in ("cpu", REAL):
        digits = du.load_digits(device=place)
        distilled = du.DistilledSet(*du.initialize(digits, "real", steps=5), epochs=2)
        du.Distillation(distilled, digits, du.LeNet, iterations=1, networks=3).compute_gradient()
        gradients.append(torch.cat([part.grad.flatten().cpu() for part in distilled.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()


@on_a_real_device
@pytest.mark.parametrize("to_the_cpu", [True, False])
def test_a_run_continues_elsewhere(tmp_path, to_the_cpu):
    options = {"iterations": 4, "validate_every": 2, "validation_networks": 1, "progress": False}
    made, options["checkpoint"] = [], tmp_path / "run.pt"
    for place in (REAL, "cpu") if to_the_cpu else ("cpu", REAL):
        digits = du.load_digits(device=place)
        distilled = du.DistilledSet(*du.initialize(digits, "real", steps=2))
        made.append(runs.Run(distilled, digits, du.LeNet, **options))
    begun, continued = made
    begun.step()
    begun.step()
    begun.validate()
    assert continued.run().loss[:2] == begun.history.loss


@on_a_real_device
def test_a_shipped_set_trains_a_lenet_to_its_accuracy(mnist_root):
    name = "mnist-4kB-50updates"
    card = Path(du.__file__).with_name("distilled").joinpath(f"{name}.md").read_text()
    mean, std = map(float, re.search(r"(\d+\.\d) ± (\d+\.\d) \(n=", card).groups())
    test = du.load_mnist(mnist_root, device=REAL).test
    network = du.train_on(du.LeNet().to(REAL), du.load(name, device=REAL))
    assert float(du.accuracy(network, test)) == pytest.approx(mean, abs=3 * std)


@on_a_real_device
def test_networks_share_the_work_of_an_iteration():
    """Prints what a network costs, alone and among sixteen."""
    digits, seconds = du.load_digits(device=REAL), []
    distilled = du.DistilledSet(*du.initialize(digits, "real", steps=5), epochs=2)
    for networks in (1, 16):
        run = du.Distillation(distilled, digits, du.LeNet, iterations=3, networks=networks)
        # an iteration ends with a number, and so waits for the device
        seconds.append(min(timeit.repeat(run.step, repeat=3, number=1)) / networks)
    print(f"\n{REAL}: {seconds[0]:.4f} s per network alone, {seconds[1]:.4f} s among 16")
    assert seconds[1] < 1.3 * seconds[0]
