"""Random windows, network pools and gradient checkpointing, against computations that share no code with them."""

import copy
import gc
import re
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import distill_utils as du
from study.methods.truncation import Checkpointed, InnerRun, NetworkPool, RandomWindow
from tests.conftest import Smooth

INNERS = {"SGD": {}, "momentum": {"momentum": 0.9}, "Adam": {"optimizer": "Adam"}}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Counting(nn.Module):
    """A network that shifts its hidden units by a running mean, and counts its calls; one parameter is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.classifier = nn.Linear(16, 8), nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.rand(2))
        self.register_buffer("mean", torch.rand(8))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(images.flatten(1))
        self.mean.mul_(0.5).add_(0.5 * hidden.mean(0))
        self.calls.add_(1)
        return self.classifier(torch.tanh(hidden - self.mean))


def make_problem(toy, *, epochs=3, optimizer="SGD", **options) -> tuple[du.DistilledSet, du.Split]:
    """A distilled set of 2 steps × 3 images and a real batch, in float64."""
    images, labels = du.initialize(toy, "noise", steps=2)
    step_size = 0.3 if optimizer == "SGD" else 0.02
    options |= {"epochs": epochs, "step_size": step_size, "optimizer": optimizer}
    real = du.Split(toy.train.images.double(), toy.train.labels)
    return du.DistilledSet(images, labels, **options).double(), real


def make_network(count: int = 1, kind: type[nn.Module] = Smooth) -> nn.Module:
    """A network, or an ensemble of several."""
    networks = [kind().double() for _ in range(count)]
    return du.Ensemble(networks) if count > 1 else networks[0]


def gradients(network, distilled, real, unroll) -> tuple[torch.Tensor, ...]:
    """The loss and its gradient with respect to all that is learned."""
    loss = du.outer_loss(network, distilled, real, unroll=unroll)
    return loss, *torch.autograd.grad(loss, list(distilled.parameters()))


def functional_window(network, distilled, real, first, last) -> torch.Tensor:
    """The loss by a hand-written loop over `functional_call`, whose graph begins at update `first`."""
    weights = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
    square = {name: torch.zeros_like(value) for name, value in weights.items()}
    for update in range(last):
        if update == first:
            weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
            velocity = {name: each.detach() for name, each in velocity.items()}
            square = {name: each.detach() for name, each in square.items()}
        x, y = distilled.images[update % 2], distilled.labels[update % 2]
        loss = -(y * functional_call(network, weights, x).log_softmax(-1)).sum(-1).mean()
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        slopes, size = dict(zip(weights, slopes, strict=True)), distilled.step_sizes[update]
        if distilled.inner["optimizer"] == "SGD":
            momentum = distilled.inner["momentum"]
            velocity = {name: momentum * velocity[name] + slopes[name] for name in weights}
            weights = {name: weights[name] - size * velocity[name] for name in weights}
        else:
            velocity = {name: 0.9 * velocity[name] + 0.1 * slopes[name] for name in weights}
            square = {name: 0.999 * square[name] + 0.001 * slopes[name] ** 2 for name in weights}
            size = size * (1 - 0.999 ** (update + 1)) ** 0.5 / (1 - 0.9 ** (update + 1))
            scale = {name: (square[name] + 1e-40).sqrt() + 1e-4 for name in weights}
            weights = {
                name: weights[name] - size * velocity[name] / scale[name] for name in weights
            }
    return F.cross_entropy(functional_call(network, weights, real.images), real.labels)


def assert_close(found, expected) -> None:
    assert expected[1].abs().max() > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


# ----------------------------------------------------------------------------------------- random window
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("soft_labels", [False, True])
def test_a_window_has_the_gradient_of_a_functional_loop(toy, inner, soft_labels):
    """As if the first updates had been made before, and the last ones did not exist."""
    distilled, real = make_problem(toy, soft_labels=soft_labels, **INNERS[inner])
    network, window = make_network(), RandomWindow(3, seed=2)
    places = set()
    for _ in range(4):
        first = window.place(6)
        places.add(first)
        found = gradients(network, distilled, real, window)
        loss = functional_window(network, distilled, real, first, first + 3)
        assert_close(found, (loss, *torch.autograd.grad(loss, list(distilled.parameters()))))
        used = found[2].nonzero().flatten().tolist()  # of the step sizes
        assert used == [first, first + 1, first + 2]
    assert len(places) > 1


def test_a_window_is_placed_at_random_and_repeatably():
    places = []
    for seed in (0, 0, 1):
        window = RandomWindow(2, seed=seed)
        places.append([])
        for _ in range(50):
            places[-1].append(window.place(4))
            window.calls += 1
    assert set(places[0]) == {0, 1, 2}
    assert places[0] == places[1] != places[2]
    window = RandomWindow(2)
    window.load_state_dict({"calls": 7})
    assert window.place(4) == places[0][7]


def test_a_window_over_all_updates_is_the_whole_training(toy):
    distilled, real = make_problem(toy, momentum=0.9)
    network = make_network()
    whole = gradients(network, distilled, real, du.unroll)
    assert all(map(torch.equal, whole, gradients(network, distilled, real, RandomWindow(6))))


@pytest.mark.parametrize("networks", [1, 3])
def test_a_window_keeps_the_random_state_and_the_network(toy, networks):
    distilled, _ = make_problem(toy)
    network = make_network(networks, Counting)
    before = [value.clone() for value in network.state_dict().values()]
    state = torch.get_rng_state()
    RandomWindow(2)(network, distilled)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, network.state_dict().values()))


# ------------------------------------------------------------------------------------------ network pool
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("networks", [1, 3])
def test_a_pool_continues_where_the_last_window_ended(toy, inner, networks):
    """The second window has the gradient that it has right after the first, for other networks in between."""
    distilled, real = make_problem(toy, **INNERS[inner])
    pool, network = NetworkPool(1, window=3), make_network(networks)
    first = gradients(network, distilled, real, pool)
    second = gradients(make_network(networks), distilled, real, pool)

    run, updates = InnerRun(network, distilled), list(distilled.schedule())
    run.advance(updates[:3], differentiable=False)
    scores = run.advance(updates[3:])(real.images).reshape(-1, 3)
    loss = F.cross_entropy(scores, real.labels.repeat(networks))
    assert_close(second, (loss, *torch.autograd.grad(loss, list(distilled.parameters()))))
    assert not torch.allclose(first[1], second[1])
    if networks == 1:
        loss = functional_window(network, distilled, real, 3, 6)
        assert_close(second, (loss, *torch.autograd.grad(loss, list(distilled.parameters()))))
    fresh = make_network(networks)  # the third turn starts anew
    expected = gradients(fresh, distilled, real, NetworkPool(1, window=3))
    assert_close(gradients(fresh, distilled, real, pool), expected)


@pytest.mark.parametrize("networks", [1, 3])
def test_a_pool_keeps_buffers(toy, networks):
    """Running means and counts belong to the network that they were made by."""
    distilled, real = make_problem(toy)
    network, pool = make_network(networks, Counting), NetworkPool(2, window=2)
    gradients(network, distilled, real, pool)
    kept = pool.states[0]
    expected = Counting().double()  # of the first network, trained by hand
    values = du.as_ensemble(network)[0].weights()
    expected.load_state_dict({name: value[0] for name, value in values.items()})
    used = [weight for name, weight in expected.named_parameters() if name != "unused"]
    optimizer = torch.optim.SGD(used, lr=0.3)
    for images, labels, _ in list(distilled.schedule())[:2]:
        expected.mean.detach_()
        optimizer.zero_grad()
        F.cross_entropy(expected(images.detach()), labels).backward()
        optimizer.step()
    torch.testing.assert_close(kept["buffer/0./mean"][0], expected.mean.detach())
    assert kept["buffer/0./calls"].tolist() == [2] * networks
    for _ in range(2):
        gradients(make_network(networks, Counting), distilled, real, pool)
    state = pool.states[0]
    assert state["buffer/0./calls"].tolist() == [4] * networks
    assert not any(value.requires_grad for value in state.values() if torch.is_tensor(value))


def test_a_pool_holds_networks_of_every_age_and_makes_all_updates():
    pool, firsts = NetworkPool(3, window=2), []
    for call in range(24):
        slot, first = pool.turn(8)
        assert slot == call % 3
        firsts.append(first)
        pool.calls += 1
    assert firsts[::3] == [0, 2, 4, 6] * 2
    assert firsts[:3] == [0, 2, 4]
    assert firsts[3:6] == [2, 4, 6]


def test_a_pool_distils(toy):
    options = {"epochs": 4, "step_size": 0.02, "momentum": 0.9}
    distilled = du.DistilledSet(*du.initialize(toy, "noise", steps=2), **options)
    history = du.distill(
        distilled, toy, Smooth, iterations=60, networks=2, batch_size=16, step_size_learning_rate=0,
        unroll=NetworkPool(3, window=4), validate_every=60, progress=False,
    )  # fmt: skip
    assert history.accuracy[-1] > history.accuracy[0]
    torch.testing.assert_close(distilled.step_sizes, torch.full((8,), 0.02))


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("make_unroll", [lambda: NetworkPool(3, window=2), lambda: RandomWindow(2)])
def test_a_state_on_disk_continues_bit_identically(toy, inner, make_unroll, tmp_path):
    results = []
    for saved in (False, True):
        torch.manual_seed(0)
        distilled, real = make_problem(toy, **INNERS[inner])
        unroll = make_unroll()
        for call in range(8):
            if saved and call in (2, 5):
                torch.save(unroll.state_dict(), tmp_path / "state.pt")
                unroll = make_unroll()
                unroll.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            results.append(gradients(make_network(2, Counting), distilled, real, unroll))
    for whole, resumed in zip(results[:8], results[8:], strict=True):
        assert all(map(torch.equal, whole, resumed))


# ------------------------------------------------------------------------------- gradient checkpointing
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("segment", [1, 2, 4, 6, 100])
@pytest.mark.parametrize("kind", [Smooth, Counting])
@pytest.mark.parametrize("networks", [1, 3])
def test_checkpointed_gives_the_same_gradient(toy, inner, segment, kind, networks):
    distilled, real = make_problem(toy, soft_labels=True, **INNERS[inner])
    network = make_network(networks, kind)
    whole = gradients(network, distilled, real, du.unroll)
    segmented = gradients(network, distilled, real, Checkpointed(segment))
    torch.testing.assert_close(segmented[0], whole[0], rtol=1e-14, atol=0)
    for ours, theirs in zip(segmented[1:], whole[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-15)


class Held:
    """A tensor that autograd holds for the backward pass, for as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_checkpointed_takes_less_memory(toy):
    """What an unroll of 64 updates stores: a fifth or less in eight segments of eight."""
    distilled, real = make_problem(toy, epochs=32)

    def stored(unroll) -> int:
        """Bytes stored once the loss is there."""
        alive = weakref.WeakSet()

        def pack(tensor: torch.Tensor) -> Held:
            holder = Held(tensor)
            alive.add(holder)
            return holder

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            loss = du.outer_loss(make_network(), distilled, real, unroll=unroll)
        gc.collect()
        storages = [holder.tensor.untyped_storage() for holder in alive]
        assert loss.requires_grad
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    assert stored(Checkpointed(8)) < 0.2 * stored(du.unroll)


# -------------------------------------------------------------------------------------------- arguments
BAD_COUNTS = (0, -1, 1.5, 2.0, "3", None, float("nan"))


@pytest.mark.parametrize("value", BAD_COUNTS)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("length", RandomWindow),
        ("size", lambda value: NetworkPool(value, window=2)),
        ("window", lambda value: NetworkPool(2, window=value)),
        ("segment", Checkpointed),
    ],
)
def test_counts_that_train_nothing_are_named(name, call, value):
    message = re.escape(f"{name}={value!r}: give a whole number of at least 1")
    with pytest.raises(ValueError, match=message):
        call(value)


def test_windows_that_do_not_fit_are_named(toy):
    distilled, _ = make_problem(toy)
    network = make_network()
    message = "length=7: give at most the 6 updates of the distilled set"
    with pytest.raises(ValueError, match=message):
        RandomWindow(7)(network, distilled)
    for window in (4, 7, 12):
        message = f"window={window}: give a number that divides the 6 updates"
        with pytest.raises(ValueError, match=message):
            NetworkPool(2, window=window)(network, distilled)
    with pytest.raises(ValueError, match="seed=-1: give at least 0"):
        RandomWindow(2, seed=-1)
    with pytest.raises(ValueError, match="updates: none; give at least one"):
        InnerRun(network, distilled).advance([])
    assert RandomWindow(np.int64(3)).length == 3  # numpy's integers are whole numbers too


def test_states_of_something_else_are_named(toy):
    distilled, _ = make_problem(toy)
    pool = NetworkPool(1, window=2)
    pool(make_network(), distilled)
    message = r"state: parameter 0 has shape \[1, 8, 16\]; .* \[2, 8, 16\]"
    with pytest.raises(ValueError, match=message):
        pool(make_network(2), distilled)
    with pytest.raises(ValueError, match="state: it has 1 networks; give that of a pool of size=2"):
        NetworkPool(2, window=2).load_state_dict(pool.state_dict())


def test_settings_can_be_read():
    """A checkpoint names by them what a run was made with."""
    assert repr(RandomWindow(25, seed=3)) == "RandomWindow(length=25, seed=3)"
    assert repr(NetworkPool(8, window=25)) == "NetworkPool(size=8, window=25)"
    assert repr(Checkpointed(5)) == "Checkpointed(segment=5)"


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("kind", ["window", "pool", "checkpointed"])
def test_inner_loops_on_the_device_do_what_they_do_on_the_cpu(
    device, toy_on_device, toy, inner, kind
):
    unrolls = {"window": RandomWindow(3), "pool": NetworkPool(1, window=2)}
    unroll = {**unrolls, "checkpointed": Checkpointed(2)}[kind]
    histories = []
    for dataset in (toy_on_device, toy):
        options = {"epochs": 2, "step_size": 0.1, **INNERS[inner]}
        distilled = du.DistilledSet(*du.initialize(dataset, "real", steps=2), **options)
        options = {"iterations": 3, "networks": 2, "unroll": copy.deepcopy(unroll)}
        run = du.Distillation(distilled, dataset, Smooth, **options)
        for _ in range(3):
            run.step()
        for each in (distilled.images, distilled.images.grad):
            assert each.device.type == dataset.train.images.device.type
        histories.append(run.history.loss)
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)
