"""Users' networks: each kind gets its exact meta-gradient or is refused by name. A report of a
network that fails becomes a line."""

import copy
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import distill_utils as du
from tests.conftest import assert_same, make_set, train_plainly

linear = partial(partial, nn.Linear)
transformer = partial(nn.TransformerEncoderLayer, 4, 2, 8, 0.0, F.gelu, batch_first=True)


class Calls(nn.Module):
    """A network or layer that does in `forward` what a function does with it and its input."""

    def __init__(self, function: Callable, **parts: object) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def calls(function: Callable, **parts: Callable) -> du.Factory:
    """A factory of networks that call one function with parts of their own."""
    return lambda: Calls(function, **{name: make() for name, make in parts.items()})


def dense(middle: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), middle or nn.Tanh(), nn.Linear(5, 3))


def changed(change: Callable[[nn.Module], object]) -> du.Factory:
    """A factory of dense networks after a change."""

    def make_network() -> nn.Module:
        network = dense()
        change(network)
        return network

    return make_network


def patch_forward(network: nn.Module) -> None:
    plain = network.forward
    network.forward = lambda x: 2 * plain(x)


class Listed(nn.Module):
    """Layers of which the first `count` are also in a list, through which `forward` calls them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 5), nn.Linear(5, 3)
        self.layers = [self.first, self.last][:count]

    def forward(self, x):
        return [*self.layers, self.last][1](self.layers[0](x.flatten(1)).tanh())


class ListOfModules(nn.ModuleList):
    def forward(self, x):
        return self[1](self[0](x))


def recurrent(kind: type[nn.Module]) -> du.Factory:
    rnn = partial(kind, 4, 5, batch_first=True)
    return calls(lambda n, x: n.last(n.rnn(x[:, 0])[0][:, -1]), rnn=rnn, last=linear(5, 3))


def frozen_batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(1).eval()
    norm.running_mean += 0.5
    return nn.Sequential(norm, *dense())


def tied() -> nn.Module:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, nn.Tanh(), nn.Linear(16, 3))


def convolutional() -> nn.Module:
    norms = nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)
    last = nn.Tanh(), nn.Dropout(0.0), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *norms, *last)


def one_of_two_widths() -> nn.Module:
    width = random.choice([4, 5])
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 3))
    network[1].requires_grad_(random.random() < 0.5)
    return network


activation = calls(lambda n, x: n.act(x), act=lambda: random.choice([torch.tanh, torch.sigmoid]))
EXACT = {
    "dense": dense,
    "layers in a list": partial(Listed, 2),
    "some layers in a list": partial(Listed, 1),
    "forward hook": changed(lambda n: n[1].register_forward_hook(lambda *call: 2 * call[-1])),
    "patched forward": changed(patch_forward),
    "compiled": lambda: torch.compile(dense(), backend="eager"),
    "frozen layer": changed(lambda n: n[1].weight.requires_grad_(False)),
    "frozen batch norm": frozen_batch_norm,
    "LSTM": recurrent(nn.LSTM),
    "GRU": recurrent(nn.GRU),
    "attention": calls(lambda n, x: n.b(n.a(x[:, 0]).mean(1)), a=transformer, b=linear(4, 3)),
    "branching": partial(dense, Calls(lambda n, x: x.tanh() if x.sum() > -1e9 else x)),
    "tied weights": tied,
    "parameters and buffers": calls(  # one of them an integer, one not saved
        lambda n, x: n.count * (x.flatten(1) @ n.weights[0] + n.shift),
        weights=lambda: nn.ParameterList([torch.randn(16, 3) / 4]),
        count=lambda: nn.Buffer(torch.tensor(2)),
        shift=lambda: nn.Buffer(torch.rand(3), persistent=False),
    ),
    "convolutions and norms": convolutional,
    "in place": partial(dense, Calls(lambda n, x: x.mul_(2).tanh_())),
    "log-probabilities": lambda: nn.Sequential(*dense(), nn.LogSoftmax(-1)),
    "a list of modules": lambda: ListOfModules([nn.Flatten(), nn.Linear(16, 3)]),
    "names of ours": calls(
        lambda n, x: n.weights(x.flatten(1)) + n.names * n.networks,
        weights=linear(16, 3),
        names=lambda: nn.Parameter(torch.randn(3)),
        networks=lambda: nn.Buffer(torch.ones(1)),
    ),
    "several tensors": calls(  # a plain tensor, and a dictionary
        lambda n, x: n.scale["scale"] * n.net(x.flatten(1)[:, n.order]),
        net=dense,
        order=lambda: torch.randperm(16),
        scale=lambda: {"scale": random.choice([1, -1])},
    ),
    "several widths, partly frozen": one_of_two_widths,
    "several activations": lambda: dense(activation()),
    "several architectures": lambda: random.choice(
        [dense(), nn.Sequential(nn.Flatten(), linear(16, 3)())]
    ),
}


def sample(make_network: du.Factory, count: int) -> list[nn.Module]:
    """The same networks at every call."""
    random.seed(2)
    with du.seeded(2):
        return [make_network() for _ in range(count)]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("make_network", EXACT.values(), ids=EXACT)
def test_a_network_gets_its_exact_meta_gradient(toy, make_network, count):
    """Loss, accuracy, and the slope along a direction over all pixels and step sizes, against
    ordinary training and finite differences, in float64."""
    torch.set_default_dtype(torch.float64)
    distilled = make_set(toy, "noise", step_size=0.3, momentum=0.5)
    real = du.Split(toy.train.images.double(), toy.train.labels)
    du.check_network(make_network, real.images, 3)
    ensemble = du.Ensemble(sample(make_network, count))
    trained = du.unroll(ensemble, distilled, differentiable=False)
    loss = du.outer_loss(ensemble, distilled, real)
    loss.backward()
    learned, losses = [*distilled.parameters()], []
    start = nn.utils.parameters_to_vector(learned).detach()
    direction = torch.randn_like(start)
    slope = nn.utils.parameters_to_vector([part.grad for part in learned]) @ direction
    for change in (1e-5, -1e-5, 0):
        nn.utils.vector_to_parameters(start + change * direction, learned)
        networks = [train_plainly(network, distilled) for network in sample(make_network, count)]
        scores = [network(real.images) for network in networks]
        losses.append(sum(F.cross_entropy(s, real.labels).item() for s in scores) / count)
    assert loss.item() == pytest.approx(losses[2], rel=1e-9)
    assert slope.item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5)
    accuracies = torch.stack([du.accuracy(network, real) for network in networks])
    torch.testing.assert_close(du.accuracy(trained, real), accuracies)


ORDINARY = ["frozen layer", "tied weights", "forward hook", "frozen batch norm", "attention"]


@pytest.mark.parametrize("kind", ORDINARY)
def test_train_on_returns_an_ordinary_module_and_leaves_the_network_as_it_is(toy, kind):
    distilled, network, images = make_set(toy), EXACT[kind](), toy.test.images
    before = copy.deepcopy(network)
    trained = du.train_on(network, distilled)
    assert_same(network, before)
    expected = du.unroll(network, distilled)(images)[0]
    torch.testing.assert_close(trained(images), expected, rtol=1e-4, atol=1e-5)
    network.load_state_dict(trained.state_dict())
    torch.testing.assert_close(network(images), trained(images))
    du.train(trained, toy.train, epochs=1)
    assert not torch.equal(network(images), trained(images))


def test_a_network_that_a_factory_returns_again_and_again_stays_as_it_is(toy):
    network, distilled = frozen_batch_norm(), make_set(toy)
    before, modes = copy.deepcopy(network), [module.training for module in network.modules()]
    du.distill(distilled, toy, lambda: network, iterations=2, networks=2, progress=False)
    assert du.evaluate(distilled, toy.test, lambda: network, networks=3).std == 0
    assert_same(network, before)
    assert [module.training for module in network.modules()] == modes


# ---------------------------------------------------------------------------------------- refused
class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        return 2 * slope


def count_calls(network: nn.Module, images):
    network.count += 1
    return network.count * network.net(images)


UNLIKE = "a network changes when it is tested or called again; leave out dropout"
WRONG = "torch gets its second derivatives wrong"
lost = "no gradient reaches {}, .*; freeze what is unused".format
REFUSED = {
    "dropout": (partial(dense, nn.Dropout()), UNLIKE),
    "dropout function": (partial(dense, Calls(lambda n, x: F.dropout(x, 0.5, n.training))), UNLIKE),
    "batch norm": (partial(dense, nn.BatchNorm1d(5)), UNLIKE),
    "spectral norm": (changed(lambda n: parametrizations.spectral_norm(n[1])), UNLIKE),
    "state from call to call": (calls(count_calls, net=dense, count=int), UNLIKE),
    "a tuple": (changed(lambda n: n.append(Calls(lambda n, x: (x, x)))), "returns .*'tuple'>; gi"),
    "ten classes": (changed(lambda n: n.append(nn.Linear(3, 10))), r"returns .*, 10.*give scores"),
    "another size": (du.LeNet, r"fails on images \[[34], 1, 4, 4\]"),
    "unused layer": (changed(lambda n: n[2].add_module("a", linear(2, 2)())), lost("2.a.weight")),
    "detached layer": (partial(dense, Calls(lambda n, x: x.detach())), lost("1.weight")),
    "probabilities": (changed(lambda n: n.append(nn.Softmax(-1))), "returns probabilities; leave"),
    "no weights": (lambda: Calls(lambda n, x: x.flatten(1)[:, :3]), "has no weights to train"),
    "a module for a factory": (dense(), "is a network; give the factory, or fixed_initialization"),
}
ONCE = r"fails on images .*, differentiated twice \(.*once_differentiable"
NOT_TWICE = {
    "weight norm by hook": (changed(lambda n: nn.utils.weight_norm(n[1])), WRONG),
    "weight norm": (changed(lambda n: parametrizations.weight_norm(n[1])), WRONG),
    "once differentiable": (partial(dense, Calls(lambda n, x: OnceDifferentiable.apply(x))), ONCE),
}


@pytest.mark.parametrize(("make_network", "message"), REFUSED.values(), ids=REFUSED)
def test_a_network_that_would_be_silently_wrong_is_refused(toy, make_network, message):
    distilled, match = make_set(toy), f"make_network: {message}"
    with pytest.raises(ValueError, match=match):
        du.distill(distilled, toy, make_network, iterations=1, progress=False)
    with pytest.raises(ValueError, match=match):
        du.evaluate(distilled, toy.test, make_network, networks=1)
    if not isinstance(make_network, nn.Module):
        network = make_network()
        before = copy.deepcopy(network)
        with pytest.raises(ValueError, match=match):
            du.train_on(network, distilled)
        assert_same(network, before)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(("make_network", "message"), NOT_TWICE.values(), ids=NOT_TWICE)
def test_a_network_without_second_derivatives_can_only_be_evaluated(toy, make_network, message):
    distilled = make_set(toy)
    assert du.evaluate(distilled, toy.test, make_network, networks=2).mean >= 0
    with pytest.raises(ValueError, match=f"make_network: {message}"):
        du.distill(distilled, toy, make_network, iterations=1, progress=False)
