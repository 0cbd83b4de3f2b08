"""Random windows, network pools and gradient checkpointing, against whole unrolls."""

import copy
import gc
import re

import pytest
import torch
from torch import Tensor, nn

import distill_utils as du
from study.methods.truncation import Checkpointed, NetworkPool, RandomWindow
from tests.conftest import Smooth, assert_same, make_set

INNERS = {"SGD": {}, "momentum": {"momentum": 0.9}, "Adam": {"optimizer": "Adam"}}
UNROLLS = {
    "window": lambda: RandomWindow(3),
    "pool": lambda: NetworkPool(2, window=2),
    "checkpointed": lambda: Checkpointed(4),
}


class PartlyFrozen(Smooth):
    """A network whose first layer stays random: part of what a pool has to keep."""

    def __init__(self) -> None:
        super().__init__()
        self[1].requires_grad_(False)


@pytest.fixture(params=INNERS)
def inner(request) -> dict:
    return INNERS[request.param]


@pytest.fixture
def distilled(toy, inner) -> du.DistilledSet:
    """2 steps × 3 images with soft labels and 6 different step sizes, in float64."""
    step_size = torch.linspace(0.02, 0.05, 6)
    return make_set(toy, "noise", epochs=3, step_size=step_size, soft_labels=True, **inner).double()


@pytest.fixture
def real(toy) -> du.Split:
    return du.Split(toy.train.images.double(), toy.train.labels)


def make_networks(count: int, kind: type[nn.Module] = Smooth) -> du.Ensemble:
    return du.Ensemble([kind().double() for _ in range(count)])


def gradients(network, distilled, real, unroll=du.unroll) -> list[Tensor]:
    """The loss and its gradient with respect to all that is learned."""
    loss = du.outer_loss(network, distilled, real, unroll=unroll)
    return [loss, *torch.autograd.grad(loss, list(distilled.parameters()))]


def window_gradients(network, distilled, real, first: int, last: int) -> list[Tensor]:
    """The same for updates `first` to `last`, by a whole unroll of a set that has a step for each update: the
    gradients of the steps before `first` are left out."""
    steps, long = torch.arange(last) % 2, copy.deepcopy(distilled)
    long.inner["epochs"] = 1
    places = {"images": steps, "label_scores": steps, "raw_step_sizes": torch.arange(last)}
    for name, rows in places.items():
        setattr(long, name, nn.Parameter(getattr(distilled, name).detach()[rows]))
    loss, *slopes = gradients(network, long, real)
    slopes = dict(zip([name for name, _ in long.named_parameters()], slopes, strict=True))
    expected = [loss]
    for name, parameter in distilled.named_parameters():
        rows, slope = places[name][first:], slopes[name][first:]
        expected.append(torch.zeros_like(parameter).index_add(0, rows, slope))
    return expected


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert expected[1].abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


# ----------------------------------------------------------------------------------------- random window
@pytest.mark.parametrize("networks", [1, 3])
def test_a_window_has_the_gradient_of_its_updates_alone(distilled, real, networks):
    network, window = make_networks(networks), RandomWindow(3)
    for _ in range(3):
        first = window.place(6)
        expected = window_gradients(network, distilled, real, first, first + 3)
        assert_close(gradients(network, distilled, real, window), expected)


def test_windows_lie_everywhere_and_repeat():
    windows = [RandomWindow(2, seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([w.place(4) for w.calls in range(50)] for w in windows)
    assert set(first) == {0, 1, 2}
    assert first == again != other


# ------------------------------------------------------------------------------------------ network pool
@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("kind", [Smooth, PartlyFrozen])
def test_a_pool_continues_the_training_of_its_own_networks(distilled, real, networks, kind):
    """The first of two begins at the first update, the second one window later; both end after the last."""
    given, pool = [make_networks(networks, kind) for _ in range(6)], NetworkPool(2, window=2)
    windows = [(0, 0), (1, 2), (0, 2), (1, 4), (0, 4), (5, 0)]  # of which network, and from where
    for network, (trained, first) in zip(given, windows, strict=True):
        expected = window_gradients(given[trained], distilled, real, first, first + 2)
        assert_close(gradients(network, distilled, real, pool), expected)


# ------------------------------------------------------------------------------- gradient checkpointing
@pytest.mark.parametrize("segment", [1, 4, 100])
@pytest.mark.parametrize("networks", [1, 3])
def test_checkpointing_does_not_change_the_gradient(distilled, real, segment, networks):
    network = make_networks(networks, PartlyFrozen)
    expected = gradients(network, distilled, real)
    loss = du.outer_loss(network, distilled, real, unroll=Checkpointed(segment))
    for _ in range(2):  # the graph may be kept
        found = torch.autograd.grad(loss, list(distilled.parameters()), retain_graph=True)
        assert_close([loss, *found], expected)


def test_checkpointing_takes_less_memory(toy):
    """In eight segments of eight, less than a fifth of what an unroll of 64 updates stores."""
    distilled = du.DistilledSet(*du.initialize(toy, "noise", steps=2), epochs=32)

    def stored(unroll) -> int:
        """Bytes of all tensors that exist because of a loss."""
        before, network = storages(), Smooth()
        # Autograd holds its tensors in lists, where Python sees them.
        with torch.autograd.graph.saved_tensors_hooks(lambda x: [x], lambda held: held[0]):
            loss = du.outer_loss(network, distilled, toy.train, unroll=unroll)
        assert loss.requires_grad
        return sum(size for place, size in storages().items() if place not in before)

    assert stored(Checkpointed(8)) < stored(du.unroll) / 5


def storages() -> dict[int, int]:
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


# --------------------------------------------------------------------------------------- all of them
@pytest.mark.parametrize("kind", ["window", "pool"])
def test_a_state_on_disk_continues_bit_identically(distilled, real, kind, tmp_path):
    networks = [make_networks(2, PartlyFrozen) for _ in range(8)]
    unroll = UNROLLS[kind]()
    whole = [gradients(network, distilled, real, unroll) for network in networks]
    resumed, unroll = [], UNROLLS[kind]()
    for network in networks:
        resumed.append(gradients(network, distilled, real, unroll))
        torch.save(unroll.state_dict(), tmp_path / "state.pt")
        unroll = UNROLLS[kind]()
        unroll.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(resumed, whole)


@pytest.mark.parametrize("kind", UNROLLS)
def test_networks_and_the_random_state_stay_as_they_are(distilled, kind):
    network, state = make_networks(2, PartlyFrozen), torch.get_rng_state()
    before = copy.deepcopy(network)
    UNROLLS[kind]()(network, distilled)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(network, before)


@pytest.mark.parametrize("kind", UNROLLS)
def test_a_device_gives_what_the_cpu_gives(device, toy_on_device, toy, inner, kind):
    losses = []
    for dataset in (toy_on_device, toy):
        distilled = make_set(dataset, **inner)
        options = {"iterations": 3, "networks": 2, "unroll": UNROLLS[kind]()}
        run = du.Distillation(distilled, dataset, Smooth, **options)
        losses.append([run.step() for _ in range(3)])
        assert distilled.images.grad.device.type == dataset.train.images.device.type
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def load_other_pool() -> None:
    NetworkPool(2, window=1).load_state_dict(NetworkPool(1, window=1).state_dict())


BAD = [
    (lambda: RandomWindow(0), "length=0: give a whole number of at least 1"),
    (lambda: RandomWindow(2, seed=-1), "seed=-1: give at least 0"),
    (lambda: RandomWindow(7).place(6), "length=7: give at most the 6 updates"),
    (lambda: NetworkPool(1.5, window=2), "size=1.5: give a whole number"),
    (lambda: NetworkPool(2, window=None), "window=None: give a whole number"),
    (lambda: NetworkPool(2, window=4).turn(6), "window=4: give a number that divides the 6"),
    (load_other_pool, "state: it has 1 networks; give that of a pool of size=2"),
    (lambda: Checkpointed(-1), "segment=-1: give a whole number"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
