"""The unroll's gradients, against two computations that share no code with it."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import distill_utils as du
import performance

SGD, MOMENTUM, ADAM = {"momentum": 0.0}, {"momentum": 0.9}, {"optimizer": "Adam"}  # inner loops


def make_problem(toy, *, learn_labels=False, share_step_sizes=False, epochs=2, optimizer="SGD", momentum=0.0):
    """A distilled set of 2 steps × 3 images and a real batch, in float64."""
    torch.set_default_dtype(torch.float64)
    images, labels = du.noise_start(toy, steps=2)
    distilled = du.DistilledSet(
        images.double(),
        labels.double(),
        epochs=epochs,
        step_size=0.3 if optimizer == "SGD" else 0.02,
        optimizer=optimizer,
        momentum=momentum,
        learn_labels=learn_labels,
        share_step_sizes=share_step_sizes,
    )
    return distilled, du.Split(toy.train.images.double(), toy.train.labels)


def functional_loss(network, real, images, labels, step_sizes, *, optimizer="SGD", momentum=0.0):
    """The outer loss by a hand-written loop over `torch.func.functional_call`; its own update order, SGD and Adam."""
    weights = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
    square = {name: torch.zeros_like(value) for name, value in weights.items()}
    for update in range(len(step_sizes)):
        x, y = images[update % len(images)], labels[update % len(images)]
        loss = -(y * functional_call(network, weights, x).log_softmax(-1)).sum(-1).mean()
        gradients = dict(
            zip(weights, torch.autograd.grad(loss, list(weights.values()), create_graph=True), strict=True)
        )
        if optimizer == "SGD":
            velocity = {name: momentum * velocity[name] + gradient for name, gradient in gradients.items()}
            weights = {name: weights[name] - step_sizes[update] * velocity[name] for name in weights}
        else:
            velocity = {name: 0.9 * velocity[name] + 0.1 * gradient for name, gradient in gradients.items()}
            square = {name: 0.999 * square[name] + 0.001 * gradient**2 for name, gradient in gradients.items()}
            size = step_sizes[update] * (1 - 0.999 ** (update + 1)) ** 0.5 / (1 - 0.9 ** (update + 1))
            weights = {
                name: weights[name] - size * velocity[name] / ((square[name] + 1e-40).sqrt() + 1e-4) for name in weights
            }
    return F.cross_entropy(functional_call(network, weights, real.images), real.labels)


@pytest.mark.parametrize("inner", [SGD, MOMENTUM, ADAM])
@pytest.mark.parametrize("learn_labels", [False, True])
@pytest.mark.parametrize("make_network", ["smooth", "lenet"])
def test_gradients_equal_a_functional_loop(toy, smooth, inner, learn_labels, make_network):
    distilled, real = make_problem(toy, learn_labels=learn_labels, **inner)
    if make_network == "lenet":
        distilled.images.data = torch.randn(2, 3, 1, 28, 28)
        real = du.Split(torch.randn(20, 1, 28, 28), torch.randint(0, 3, (20,)))
    network = smooth() if make_network == "smooth" else du.LeNet(classes=3)
    loss = du.outer_loss(network, distilled, real)
    expected = functional_loss(network, real, distilled.images, distilled.labels, distilled.step_sizes, **inner)

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    learned = list(distilled.parameters())
    assert len(learned) == 2 + learn_labels
    gradients = zip(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned), strict=True)
    for ours, theirs in gradients:
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradients_reach_tiled_images(toy, smooth):
    """Against the functional loop on images cut out and enlarged one by one."""
    _, real = make_problem(toy)
    labels = torch.eye(3).repeat(2, 4, 1)
    distilled = du.DistilledSet(torch.randn(2, 3, 1, 4, 4), labels, epochs=2, step_size=0.3, tiles=2)
    network = smooth()
    loss = du.outer_loss(network, distilled, real)
    cut = [
        F.interpolate(image[None, :, row : row + 2, column : column + 2], scale_factor=2, mode="bilinear")[0]
        for image in distilled.images.flatten(0, 1)
        for row in (0, 2)
        for column in (0, 2)
    ]
    images = torch.stack(cut).unflatten(0, (2, 12))
    expected = functional_loss(network, real, images, labels, distilled.step_sizes)
    ours, theirs = (torch.autograd.grad(each, distilled.images)[0] for each in (loss, expected))
    assert ours.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inner", [SGD, MOMENTUM, ADAM])
@pytest.mark.parametrize("share_step_sizes", [False, True])
def test_gradients_equal_finite_differences(toy, smooth, inner, share_step_sizes):
    distilled, real = make_problem(toy, learn_labels=True, share_step_sizes=share_step_sizes, **inner)
    network = smooth()

    def loss() -> float:
        trained = du.unroll(network, distilled, track_higher_grads=False)
        return F.cross_entropy(trained(real.images), real.labels).item()

    du.outer_loss(network, distilled, real).backward()
    for name, parameter in distilled.named_parameters():
        entries, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for entry in range(0, len(entries), max(1, len(entries) // 7)):
            start = entries[entry].item()
            entries[entry] = start + 1e-5
            above = loss()
            entries[entry] = start - 1e-5
            below = loss()
            entries[entry] = start
            assert gradient[entry].item() == pytest.approx((above - below) / 2e-5, rel=1e-5, abs=1e-9), (name, entry)


def test_evaluation_unrolls_as_training_does(toy, smooth):
    distilled, real = make_problem(toy, momentum=0.9)
    network = smooth()
    tracked = du.unroll(network, distilled)(real.images)
    plain = du.unroll(network, distilled, track_higher_grads=False)(real.images)
    assert torch.equal(tracked, plain)


def test_unroll_is_ordinary_sgd_and_spares_the_network(toy, smooth):
    distilled, real = make_problem(toy, momentum=0.0, epochs=3)
    network = smooth()
    before = [parameter.clone() for parameter in network.parameters()]
    trained = du.unroll(network, distilled)(real.images)
    assert all(map(torch.equal, before, network.parameters()))

    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    for _ in range(3):
        for step in range(2):
            optimizer.zero_grad()
            F.cross_entropy(network(distilled.images[step].detach()), distilled.labels[step]).backward()
            optimizer.step()
    torch.testing.assert_close(trained, network(real.images))


class Shifted(nn.Module):
    """Convolutions, a parameter outside torch.nn's layers, an unused one, and a buffer that differs in each network."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.unused = nn.Parameter(torch.rand(2))
        self.register_buffer("shift", torch.rand(4, 1, 1))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.tanh(self.scale * self.convolution(images) + self.shift))


@pytest.mark.parametrize("options", [{}, {"segment": 3}, {"window": (1, 3)}])
@pytest.mark.parametrize("stack", [1, 2, 3, 64])
@pytest.mark.parametrize("make_network", ["smooth", Shifted])
@pytest.mark.parametrize("one_by_one", [("cpu",), ()])
def test_a_stack_has_the_gradient_of_networks_one_by_one(
    toy, smooth, make_network, stack, options, one_by_one, monkeypatch
):
    """However three networks are stacked, the gradient is the mean of three separate ones'; also as on a GPU."""
    monkeypatch.setattr(performance.Stack, "ONE_BY_ONE", one_by_one)
    distilled, real = make_problem(toy, momentum=0.5, learn_labels=True)
    make_network = smooth if make_network == "smooth" else make_network
    draws = [
        (make_network(), du.Split(images, labels))
        for images, labels in zip(real.images.chunk(3), real.labels.chunk(3), strict=True)
    ]
    losses = [du.outer_loss(network, distilled, batch, window=options.get("window")) for network, batch in draws]
    learned = list(distilled.parameters())
    expected = torch.autograd.grad(sum(losses) / 3, learned)

    mean_loss = du.outer_gradient(distilled, draws, stack=stack, **options)
    assert mean_loss == pytest.approx((sum(losses) / 3).item(), rel=1e-12)
    for parameter, gradient in zip(learned, expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-13)


def test_a_stack_of_lenets_has_their_gradient(toy):
    distilled, _ = make_problem(toy, momentum=0.0)
    distilled.images.data = torch.randn(2, 3, 1, 28, 28)
    draws = [(du.LeNet(classes=3), du.Split(torch.randn(7, 1, 28, 28), torch.randint(0, 3, (7,)))) for _ in range(4)]
    gradients = {}
    for stack in (1, 4):
        du.outer_gradient(distilled, draws, stack=stack)
        gradients[stack] = distilled.images.grad
    torch.testing.assert_close(gradients[1], gradients[4], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("inner", [SGD, MOMENTUM, ADAM])
@pytest.mark.parametrize("segment", [1, 2, 4, 6, 100])
def test_segments_give_the_same_gradient(toy, smooth, inner, segment):
    distilled, real = make_problem(toy, learn_labels=True, epochs=3, **inner)
    network, learned = smooth(), list(distilled.parameters())
    losses = [du.outer_loss(network, distilled, real, segment=length) for length in (None, segment)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-14, atol=0)
    gradients = [torch.autograd.grad(loss, learned) for loss in losses]
    for whole, segmented in zip(*gradients, strict=True):
        torch.testing.assert_close(segmented, whole, rtol=1e-12, atol=1e-15)


class Kept:
    """A tensor that autograd keeps for the backward pass, for as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_segments_take_less_memory(toy):
    """What an unroll of 64 updates keeps: a fifth or less in eight segments of eight."""
    distilled, real = make_problem(toy, momentum=0.0, epochs=32)

    def kept(segment: int | None) -> int:
        """Bytes kept once the loss is there."""
        alive = weakref.WeakSet()

        def pack(tensor: torch.Tensor) -> Kept:
            holder = Kept(tensor)
            alive.add(holder)
            return holder

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            loss = du.outer_loss(Shifted(), distilled, real, segment=segment)
        gc.collect()
        storages = [holder.tensor.untyped_storage() for holder in alive]
        assert loss.requires_grad
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    assert kept(8) < 0.2 * kept(None)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_window_differentiates_its_own_updates_alone(toy, smooth, momentum):
    """As if the first updates had been done before, and the last ones did not exist."""
    distilled, real = make_problem(toy, momentum=momentum, epochs=3)
    network = smooth()
    du.outer_loss(network, distilled, real, window=(1, 4)).backward()

    weights = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
    images, step_sizes = distilled.images.detach().clone().requires_grad_(), distilled.step_sizes.detach()
    for update in range(4):
        loss = F.cross_entropy(functional_call(network, weights, images[update % 2]), distilled.labels[update % 2])
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        velocity = {name: momentum * velocity[name] + g for name, g in zip(weights, gradients, strict=True)}
        weights = {name: weights[name] - step_sizes[update] * velocity[name] for name in weights}
        if update == 0:
            weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
            velocity = {name: value.detach() for name, value in velocity.items()}
    loss = F.cross_entropy(functional_call(network, weights, real.images), real.labels)
    torch.testing.assert_close(distilled.images.grad, torch.autograd.grad(loss, images)[0], rtol=1e-9, atol=1e-12)
    assert distilled.raw_step_sizes.grad.nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("segment", [None, 2])
@pytest.mark.parametrize(("inner", "moments"), [(SGD, 0), (MOMENTUM, 1), (ADAM, 2)])
@pytest.mark.parametrize("networks", [1, 3])
def test_what_is_kept_stands_for_the_updates_before(toy, smooth, inner, moments, networks, segment):
    """The second window has the same gradient whether the first was just run, or long ago."""
    distilled, real = make_problem(toy, epochs=3, **inner)
    draws = [(smooth(), real) for _ in range(networks)]
    kept = {}
    gradients = []
    for options in ({"window": (0, 3), "kept": kept}, {"window": (3, 6), "kept": kept}, {"window": (3, 6)}):
        loss = du.outer_gradient(distilled, draws, stack=2, segment=segment, **options)
        gradients.append((loss, distilled.images.grad))
    assert gradients[1][0] == pytest.approx(gradients[2][0], rel=1e-12)
    assert gradients[1][1].abs().max() > 0
    torch.testing.assert_close(gradients[1][1], gradients[2][1], rtol=1e-9, atol=1e-13)
    assert not torch.allclose(gradients[0][1], gradients[1][1])
    assert [len(kept[stack]) for stack in kept] == [4 * (1 + moments)] * math.ceil(networks / 2)


def test_a_stack_shares_real_images_or_has_its_own(toy, smooth):
    distilled, real = make_problem(toy, momentum=0.0)
    networks = [smooth() for _ in range(3)]
    alone = sum(du.outer_loss(network, distilled, real) for network in networks) / 3
    own = du.Split(*(torch.stack([part] * 3) for part in real))
    for given in (real, own):
        torch.testing.assert_close(du.outer_loss(performance.Stack(networks), distilled, given), alone)
