"""Networks, their training and their evaluation."""

import copy

import pytest
import torch
from torch import nn

import distill_utils as du


def test_lenet_is_the_papers():
    network = du.LeNet()
    shapes = [list(parameter.shape) for parameter in network.parameters()]
    assert shapes == [[6, 1, 5, 5], [6], [16, 6, 5, 5], [16], [120, 400], [120], [84, 120], [84], [10, 84], [10]]
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert all(not parameter.any() for parameter in network.parameters() if parameter.dim() == 1)
    weight = network[7].weight  # 400 → 120; Xavier: variance 2 / (fan in + fan out)
    assert float(weight.detach().std()) == pytest.approx((2 / 520) ** 0.5, rel=0.02)


def test_auto_device_is_one_that_is_there():
    device = du.pick_device("auto")
    assert torch.zeros(1, device=device).sum() == 0
    assert du.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"name='gpu': not on this machine; give auto or one of .*cpu"):
        du.pick_device("gpu")


def test_accuracy_counts_the_whole_split(toy):
    class Bright(nn.Module):
        def forward(self, images):
            return images.mean((1, 3))[:, :3]  # class k of the toy set has row k bright

    assert du.accuracy(Bright(), toy.test) == 100
    wrong = du.Split(toy.test.images, (toy.test.labels + (torch.arange(30) < 6)) % 3)
    assert du.accuracy(Bright(), wrong) == 80
    repeated = du.Split(wrong.images.repeat(60, 1, 1, 1), wrong.labels.repeat(60))  # more than one part's
    assert du.accuracy(Bright(), repeated) == 80


def test_frozen_weights_are_refused(toy, smooth):
    def frozen():
        network = smooth()
        network[1].weight.requires_grad_(False)
        return network

    with pytest.raises(ValueError, match=r"make_network: 1\.weight require no gradient; register what is not trained"):
        du.evaluate(du.DistilledSet(*du.real_start(toy, steps=1)), toy.test, frozen, networks=2)


def test_evaluate_draws_fresh_networks_and_repeats_them(toy, smooth):
    distilled = du.DistilledSet(*du.real_start(toy, steps=1), step_size=0.05)
    accuracies = du.evaluate(distilled, toy.test, smooth, networks=8)
    assert len(accuracies.values) == 8
    assert accuracies.std > 0
    assert torch.equal(accuracies.values, du.evaluate(distilled, toy.test, smooth, networks=8).values)
    assert not torch.equal(accuracies.values, du.evaluate(distilled, toy.test, smooth, networks=8, seed=1).values)
    assert str(du.Accuracies(torch.tensor([90.0, 92.0]))) == "91.0 ± 1.4%"
    assert str(du.Accuracies(torch.tensor([90.0]))) == "90.0%"
    with pytest.raises(ValueError, match="networks=0: give more than 0"):
        du.evaluate(distilled, toy.test, smooth, networks=0)


def test_a_network_in_place_of_a_factory_is_named(toy, smooth):
    distilled = du.DistilledSet(*du.real_start(toy, steps=1))
    for call in (
        lambda: du.evaluate(distilled, toy.test, smooth()),
        lambda: du.fixed_initialization(smooth(), seed=0),
        lambda: du.distill(distilled, toy, smooth(), iterations=1, progress=False),
    ):
        with pytest.raises(ValueError, match=r"make_network=Smooth\(\.\.\.\): give the factory, Smooth"):
            call()


def test_train_learns(toy, smooth):
    network = du.train(smooth(), toy.train, epochs=20, batch_size=10)
    assert du.accuracy(network, toy.test) > 95


def test_figures_are_drawn_and_labelled(toy, smooth):
    history = du.distill(
        du.DistilledSet(*du.real_start(toy, steps=1)), toy, smooth, iterations=3, batch_size=8, progress=False
    )
    figure = du.draw_history({"a run": history})
    assert [axis.get_xlabel() for axis in figure.axes] == ["outer iteration"] * 2
    assert all(axis.get_ylabel() for axis in figure.axes)
    figure = du.draw_images({"first": history.images[0], "last": history.images[-1]}, columns=3)
    assert [axis.get_title() for axis in figure.axes] == ["first", "last"]


def test_a_network_that_does_not_fit_is_refused_before_any_work(toy):
    distilled = du.DistilledSet(*du.real_start(toy, steps=1))
    with pytest.raises(ValueError, match=r"make_network: it makes \[1, 2\] of images \[1, 1, 4, 4\]; .* \[1, 3\]"):
        du.distill(distilled, toy, lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), iterations=1, progress=False)
    with pytest.raises(ValueError, match=r"make_network: it fails \(.*\) on images \[1, 1, 4, 4\]"):
        du.evaluate(distilled, toy.test, du.LeNet, networks=1)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(1), nn.Dropout()])
def test_a_network_that_works_otherwise_in_testing_is_refused_and_retrained_alone(toy, layer):
    """Its accuracy would depend on the other images of a batch, or on chance."""
    distilled = du.DistilledSet(*du.real_start(toy, steps=1))

    def make_network():
        return nn.Sequential(copy.deepcopy(layer), nn.Flatten(), nn.Linear(16, 3))

    message = rf"make_network: {type(layer).__name__} in it works otherwise in training .* use retrain with stack=1"
    with pytest.raises(ValueError, match=message):
        du.distill(distilled, toy, make_network, iterations=1, progress=False)
    with pytest.raises(ValueError, match=message):
        du.evaluate(distilled, toy.test, make_network, networks=1)
    assert du.retrain(distilled, toy.test, make_network, networks=1, step_size=0.1, stack=1).mean > 50
