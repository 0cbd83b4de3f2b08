"""Users' networks: each kind gets its exact meta-gradient or is refused by name. A report becomes a line."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

import distill_utils as du


class Calls(nn.Module):
    """A network that does in `forward` what a function does with some layers."""

    def __init__(
        self, forward: Callable[..., Tensor], **layers: nn.Module | nn.Parameter | object
    ) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, images: Tensor) -> Tensor:
        return self.run(self, images)


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))


def with_list(part: bool) -> nn.Module:
    """Layers, or the first of them, that are also kept in a plain list, through which `forward` calls them."""
    layers = [nn.Linear(16, 5), nn.Linear(5, 3)]

    def forward(self, images: Tensor) -> Tensor:
        last = self.last if part else self.layers[1]
        return last(self.layers[0](images.flatten(1)).tanh())

    return Calls(forward, first=layers[0], last=layers[1], layers=layers[: 1 if part else 2])


def with_hook() -> nn.Module:
    network = dense()
    network[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    return network


def with_patched_forward() -> nn.Module:
    network = dense()
    plain = network.forward
    network.forward = lambda images: 2 * plain(images)
    return network


def partly_frozen() -> nn.Module:
    network = dense()
    network[1].weight.requires_grad_(False)
    return network


def frozen_batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(1).eval()
    norm.running_mean += 0.5
    return nn.Sequential(norm, *dense())


def recurrent(kind: type[nn.Module]) -> nn.Module:
    return Calls(
        lambda self, x: self.last(self.rnn(x[:, 0])[0][:, -1]),
        rnn=kind(4, 5, batch_first=True),
        last=nn.Linear(5, 3),
    )


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation=F.gelu, batch_first=True)
    return Calls(
        lambda self, x: self.last(self.layer(x[:, 0]).mean(1)), layer=layer, last=nn.Linear(4, 3)
    )


def branching() -> nn.Module:
    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images.flatten(1))
        return self.last(hidden.tanh() if hidden.sum() > -1e9 else hidden)

    return Calls(forward, first=nn.Linear(16, 5), last=nn.Linear(5, 3))


def tied() -> nn.Module:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    return Calls(
        lambda self, x: self.last(self.b(self.a(x.flatten(1)).tanh()).tanh()),
        a=first,
        b=second,
        last=nn.Linear(16, 3),
    )


def with_parameters() -> nn.Module:
    """Parameters and buffers without a layer, one of them an integer, one not saved."""
    network = Calls(lambda self, x: self.count * (x.flatten(1) @ self.weights[0] + self.shift))
    network.weights = nn.ParameterList([torch.randn(16, 3) / 4])
    network.register_buffer("count", torch.tensor(2))
    network.register_buffer("shift", torch.rand(3), persistent=False)
    return network


def convolutional() -> nn.Module:
    norms = nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        *norms,
        nn.Tanh(),
        nn.Dropout(0.0),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def in_place() -> nn.Module:
    return Calls(
        lambda self, x: self.last(self.first(x.flatten(1)).mul_(2).tanh_()),
        first=nn.Linear(16, 5),
        last=nn.Linear(5, 3),
    )


def one_of_two_activations() -> nn.Module:
    # which no layer shows, from a generator of the user's own
    activation = random.choice([torch.tanh, torch.sigmoid])
    return Calls(
        lambda self, x: self.last(self.act(self.first(x.flatten(1)))),
        act=activation,
        first=nn.Linear(16, 5),
        last=nn.Linear(5, 3),
    )


def one_of_two_tensors() -> nn.Module:
    """A plain tensor, and a dictionary, that differ from network to network."""
    order, scale = torch.randperm(16), {"scale": random.choice([1, -1])}
    return Calls(
        lambda self, x: self.scale["scale"] * self.net(x.flatten(1)[:, self.order]),
        net=dense(),
        order=order,
        scale=scale,
    )


def one_of_two_widths() -> nn.Module:
    width = random.choice([4, 5])
    network = Calls(lambda self, x: (x.flatten(1) @ self.first).tanh() @ self.last)
    network.first, network.last = (
        nn.Parameter(torch.randn(size) / 4) for size in ((16, width), (width, 3))
    )
    network.last.requires_grad_(random.random() < 0.5)
    return network


def with_names_of_ours() -> nn.Module:
    """Parts that are called as attributes of the module that holds them."""
    network = Calls(lambda self, x: x.flatten(1) @ self.weights + self.names)
    network.weights, network.names = (
        nn.Parameter(torch.randn(16, 3) / 4),
        nn.Parameter(torch.randn(3)),
    )
    network.register_buffer("networks", torch.ones(1))
    return network


class AList(nn.ModuleList):
    """A network that is a list."""

    def forward(self, images: Tensor) -> Tensor:
        return self[1](self[0](images))


def one_of_two_architectures() -> nn.Module:
    return random.choice([dense, lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3))])()


EXACT = {
    "dense": dense,
    "layers in a list": lambda: with_list(part=False),
    "some layers in a list": lambda: with_list(part=True),
    "forward hook": with_hook,
    "patched forward": with_patched_forward,
    "compiled": lambda: torch.compile(dense(), backend="eager"),
    "frozen layer": partly_frozen,
    "frozen batch norm": frozen_batch_norm,
    "LSTM": lambda: recurrent(nn.LSTM),
    "GRU": lambda: recurrent(nn.GRU),
    "attention": attention,
    "branching": branching,
    "tied weights": tied,
    "parameters and buffers": with_parameters,
    "convolutions and norms": convolutional,
    "in place": in_place,
    "log-probabilities": lambda: nn.Sequential(*dense(), nn.LogSoftmax(-1)),
    "a list of modules": lambda: AList([nn.Flatten(), nn.Linear(16, 3)]),
    "names of ours": with_names_of_ours,
    "several tensors": one_of_two_tensors,
    "several widths, partly frozen": one_of_two_widths,
    "several activations": one_of_two_activations,
    "several architectures": one_of_two_architectures,
}  # fmt: skip


@pytest.fixture
def problem(toy) -> tuple[du.DistilledSet, du.Split]:
    """A distilled set of 2 steps × 3 images and 2 epochs, and real images, in float64."""
    torch.set_default_dtype(torch.float64)
    images, labels = du.initialize(toy, "noise", steps=2)
    distilled = du.DistilledSet(images.double(), labels, epochs=2, step_size=0.3, momentum=0.5)
    return distilled, du.Split(toy.train.images.double(), toy.train.labels)


def sample(make_network: du.Factory, networks: int) -> list[nn.Module]:
    """The same networks at every call."""
    random.seed(2)
    with du.seeded(2):
        return [make_network() for _ in range(networks)]


def plain_loss(network: nn.Module, distilled: du.DistilledSet, real: du.Split) -> float:
    """The outer loss after ordinary training, by torch alone."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1.0, momentum=distilled.inner["momentum"])
    for images, labels, step_size in distilled.schedule():
        optimizer.param_groups[0]["lr"] = step_size.item()
        optimizer.zero_grad()
        F.cross_entropy(network(images.detach()), labels).backward()
        optimizer.step()
    return F.cross_entropy(network(real.images), real.labels).item()


@pytest.mark.parametrize("networks", [1, 4])
@pytest.mark.parametrize("make_network", EXACT.values(), ids=EXACT)
def test_a_network_gets_its_exact_meta_gradient(problem, make_network, networks):
    """Loss and slope along a direction over all pixels and step sizes, against plain training and differences."""
    distilled, real = problem
    du.check_network(make_network, real.images, 3)
    loss = du.outer_loss(du.Ensemble(sample(make_network, networks)), distilled, real)
    loss.backward()
    slope, start, losses = 0.0, [weight.detach().clone() for weight in distilled.parameters()], []
    direction = [torch.randn_like(weight) for weight in start]
    for weight, toward in zip(distilled.parameters(), direction, strict=True):
        slope += float((weight.grad * toward).sum())
    for change in (0, 1e-5, -1e-5):
        for weight, value, toward in zip(distilled.parameters(), start, direction, strict=True):
            weight.data.copy_(value + change * toward)
        alone = [plain_loss(network, distilled, real) for network in sample(make_network, networks)]
        losses.append(sum(alone) / networks)
    assert loss.item() == pytest.approx(losses[0], rel=1e-9)
    assert slope == pytest.approx((losses[1] - losses[2]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("make_network", EXACT.values(), ids=EXACT)
def test_a_network_is_distilled_for_evaluated_and_trained(toy, make_network):
    distilled = du.DistilledSet(*du.initialize(toy, "real", steps=2), epochs=2, step_size=0.1)
    before = distilled.images.detach().clone()
    options = {"networks": 2, "batch_size": 8, "validation_networks": 2, "progress": False}
    du.distill(distilled, toy, make_network, iterations=2, **options)
    assert not torch.equal(distilled.images, before)
    random.seed(2)
    found = du.evaluate(distilled, toy.test, make_network, networks=9, seed=2).values
    random.seed(2)
    # as evaluate does, so that both draw the same
    du.check_network(make_network, toy.test.images, 3)
    with du.seeded(2):
        networks = [make_network() for _ in range(9)]
    for network, value in zip(networks, found.tolist(), strict=True):
        plain_loss(network, distilled, toy.test)
        # an image in 30
        assert float(du.accuracy(network, toy.test)) == pytest.approx(value, abs=4)


def test_a_trained_network_is_an_ordinary_module(toy, tmp_path):
    """It can be saved, copied and trained on, and the network given stays as it is."""
    distilled = du.DistilledSet(*du.initialize(toy, "real", steps=2), epochs=2, step_size=0.1)
    for make_network in (partly_frozen, tied, with_hook, frozen_batch_norm, attention):
        network = make_network()
        before = network(toy.test.images)
        trained = du.train_on(network, distilled)
        assert type(trained) is type(network)
        assert torch.equal(network(toy.test.images), before)
        torch.testing.assert_close(
            trained(toy.test.images),
            du.unroll(network, distilled)(toy.test.images)[0],
            rtol=1e-4,
            atol=1e-5,
        )
        torch.save(trained.state_dict(), tmp_path / "network.pt")
        network.load_state_dict(torch.load(tmp_path / "network.pt"))
        torch.testing.assert_close(network(toy.test.images), trained(toy.test.images))
        du.train(trained, toy.train, epochs=1)
    frozen = partly_frozen()
    assert torch.equal(du.train_on(frozen, distilled)[1].weight, frozen[1].weight)


def test_a_network_that_a_factory_returns_again_and_again_stays_as_it_is(toy):
    network = nn.Sequential(*frozen_batch_norm())
    state, modes = [
        {name: value.clone() for name, value in network.state_dict().items()},
        [m.training for m in network.modules()],
    ]
    distilled = du.DistilledSet(*du.initialize(toy, "real", steps=2), epochs=2, step_size=0.1)
    du.distill(distilled, toy, lambda: network, iterations=2, networks=2, progress=False)
    assert du.evaluate(distilled, toy.test, lambda: network, networks=3).std == 0
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes


# ------------------------------------------------------------------------------------------- refused
def counting() -> nn.Module:
    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * self.layer(images.flatten(1))

    return Calls(forward, layer=nn.Linear(16, 3), calls=0)


def unused() -> nn.Module:
    return Calls(
        lambda self, x: self.layer(x.flatten(1)), layer=nn.Linear(16, 3), other=nn.Linear(2, 2)
    )


UNLIKE = "a network changes when it is tested or called again; leave out dropout"
REFUSED = {
    "dropout": (lambda: nn.Sequential(nn.Dropout(), *dense()), UNLIKE),
    "functional dropout": (
        lambda: Calls(lambda self, x: self.net(F.dropout(x, training=self.training)), net=dense()), UNLIKE,
    ),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm2d(1), *dense()), UNLIKE),
    "spectral norm": (
        lambda: nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(16, 8)), nn.Linear(8, 3)), UNLIKE,
    ),
    "state from call to call": (counting, UNLIKE),
    "a tuple": (lambda: Calls(lambda self, x: (self.net(x), x), net=dense()), r"returns <class 'tuple'>; give scores"),
    "ten classes": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 10)), r"returns .*, 10.*give scores"),
    "another size": (du.LeNet, r"fails on images \[[34], 1, 4, 4\]"),
    "an unused layer": (unused, r"no gradient reaches other\.weight, other\.bias; freeze what is unused"),
    "a detached layer": (
        lambda: nn.Sequential(*dense()[:2], Calls(lambda self, x: x.detach()), nn.Linear(5, 3)),
        r"no gradient reaches 1\.weight, 1\.bias",
    ),
    "no weights": (lambda: Calls(lambda self, x: x.flatten(1)[:, :3]), "has no weights to train"),
    "a module for a factory": (dense(), r"is a network; give the factory, or fixed_initialization"),
}  # fmt: skip


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize(("make_network", "message"), REFUSED.values(), ids=REFUSED)
def test_a_network_that_would_be_silently_wrong_is_refused(toy, make_network, message):
    distilled = du.DistilledSet(*du.initialize(toy, "real", steps=2))
    with pytest.raises(ValueError, match=f"make_network: {message}"):
        du.distill(distilled, toy, make_network, iterations=1, progress=False)
    with pytest.raises(ValueError, match=f"make_network: {message}"):
        du.evaluate(distilled, toy.test, make_network, networks=1)
    if not isinstance(make_network, nn.Module):
        network = make_network()
        state = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(ValueError, match=f"make_network: {message}"):
            du.train_on(network, distilled)
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        return 2 * slope


def hook_normalized() -> nn.Module:
    network = dense()
    network[1] = weight_norm(network[1])  # a hook computes its weight before each call
    return network


def parametrized() -> nn.Module:
    network = dense()
    network[1] = parametrizations.weight_norm(network[1])
    return network


WRONG = "torch gets its second derivatives wrong"
WITHOUT_SECOND_DERIVATIVES = {
    "weight norm by hook": (hook_normalized, WRONG),  # as torch.autograd.gradgradcheck says, too
    "weight norm": (parametrized, WRONG),
    "once differentiable": (
        lambda: Calls(lambda self, x: OnceDifferentiable.apply(self.net(x)), net=dense()),
        r"fails on images \[4, 1, 4, 4\], differentiated twice \(.*once_differentiable",
    ),
}  # fmt: skip


@pytest.mark.fault("bad calls named")
@pytest.mark.parametrize(
    ("make_network", "message"), WITHOUT_SECOND_DERIVATIVES.values(), ids=WITHOUT_SECOND_DERIVATIVES
)
def test_a_network_that_cannot_be_differentiated_twice_can_be_evaluated_on_alone(
    toy, make_network, message
):
    distilled = du.DistilledSet(*du.initialize(toy, "real", steps=2))
    assert du.evaluate(distilled, toy.test, make_network, networks=2).mean >= 0
    with pytest.raises(ValueError, match=f"make_network: {message}"):
        du.distill(distilled, toy, make_network, iterations=1, progress=False)
