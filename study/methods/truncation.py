"""Inner loops for long training: each is called like `du.unroll`, and differentiates a part of it or saves memory.

    du.distill(distilled, dataset, du.LeNet, iterations=300, unroll=RandomWindow(25))

A window or a pool belongs to one run: it counts its calls, and `state_dict` makes it part of a checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

import higher
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import distill_utils as du

Update = tuple[Tensor, Tensor, Tensor]  # images [n, c, h, w], labels [n, classes], step size []
Moments = dict[int, dict[str, Tensor | int]]  # the inner optimizer's, for each parameter
# Where training stands, without a graph: the ensemble's "weights" by their names, and "moments".
State = dict[str, dict]


@torch.enable_grad()  # training takes gradients, even where the caller wants none
def advance(
    ensemble: nn.Module,
    distilled: du.DistilledSet,
    updates: Iterable[Update],
    state: State | None = None,
    *,
    differentiable: bool = True,
) -> tuple[nn.Module, Moments]:
    """Trains a copy of an ensemble by `updates`, from `state` or else from its own weights.

    Returns the trained ensemble and the optimizer's moments, differentiable functions of the updates, of the moments
    in `state`, and of the weights at the start, `trained.parameters(time=0)`.
    """
    optimizer = distilled.make_optimizer(ensemble.parameters())
    context = higher.innerloop_ctx(ensemble, optimizer, track_higher_grads=differentiable)
    with context as (trained, optimizer):
        if state is not None:
            trained.load_state_dict(state["weights"])
            optimizer.state[0].update({i: {**values} for i, values in state["moments"].items()})
        for images, labels, step_size in updates:
            loss = du.cross_entropy(trained(images), labels)
            optimizer.step(loss, override={"lr": [step_size]})
    return trained, {**optimizer.state[0]}


def detach(trained: nn.Module, moments: Moments) -> State:
    """The state that `advance` has reached; `torch.load` reads it with `weights_only`."""
    detached = {
        i: {name: x.detach() if torch.is_tensor(x) else x for name, x in values.items()}
        for i, values in moments.items()
    }
    return {"weights": trained.state_dict(), "moments": detached}


@dataclass(eq=False)
class RandomWindow:
    """Differentiates a few consecutive updates at a random place: RaT-BPTT (Feng et al. 2024).

    The updates before the window run without gradient, those after it not at all.

    Args:
        length: updates in the window, at most those of the set.
        seed: of the places, at least 0; call number k draws its own from the seed and k.
    """

    length: int
    _: KW_ONLY
    seed: int = 0
    calls: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        du.require_counts(length=self.length)
        du.require(self.seed >= 0, f"seed={self.seed}: give at least 0")

    def __call__(self, network: nn.Module, distilled: du.DistilledSet) -> nn.Module:
        first = self.place(distilled.updates)
        train, updates = (
            partial(advance, du.as_ensemble(network), distilled),
            [*distilled.schedule()],
        )
        state = detach(*train(updates[:first], differentiable=False))
        trained, _ = train(updates[first : first + self.length], state)
        self.calls += 1
        return trained

    def place(self, updates: int) -> int:
        """The first update of the next window, out of so many."""
        remedy = f"give at most the {updates} updates of the distilled set"
        du.require(self.length <= updates, f"length={self.length}: {remedy}")
        with du.seeded(self.seed, self.calls, 0, 1):  # numbers that no initialization is drawn from
            return int(torch.randint(updates - self.length + 1, ()))

    def state_dict(self) -> dict:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict) -> None:
        self.calls = state["calls"]


@dataclass(eq=False)
class NetworkPool:
    """Keeps networks between iterations and continues the training of one of them in each, for one window.

    A window costs nothing but itself, as in FRePo (Zhou et al. 2022) and RCIG (Loo et al. 2023). Each call takes the
    next of `size` networks, or ensembles, in turn. After its last update it is replaced by a new one. Their first
    windows are staggered, so that the pool holds networks of every age.

    Args:
        size: networks kept, or ensembles where an iteration has several networks.
        window: updates in a window; it divides those of the set.
    """

    size: int
    _: KW_ONLY
    window: int
    calls: int = field(default=0, init=False, repr=False)
    states: list[State | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        du.require_counts(size=self.size, window=self.window)
        self.states = [None] * self.size

    def __call__(self, network: nn.Module, distilled: du.DistilledSet) -> nn.Module:
        slot, first = self.turn(distilled.updates)
        train, updates = (
            partial(advance, du.as_ensemble(network), distilled),
            [*distilled.schedule()],
        )
        state = self.states[slot] if first > 0 else None
        if state is None:  # a new network, which starts part-way where the pool is new, too
            state = detach(*train(updates[:first], differentiable=False))
        trained, moments = train(updates[first : first + self.window], state)
        self.states[slot] = detach(trained, moments)
        self.calls += 1
        return trained

    def turn(self, updates: int) -> tuple[int, int]:
        """The slot of the next call, and the first update of its window."""
        windows, rest = divmod(updates, self.window)
        remedy = f"give a number that divides the {updates} updates of the distilled set"
        du.require(windows > 0 and rest == 0, f"window={self.window}: {remedy}")
        slot = self.calls % self.size
        return slot, (self.calls // self.size + slot) % windows * self.window

    def state_dict(self) -> dict:
        return {"calls": self.calls, "states": list(self.states)}

    def load_state_dict(self, state: dict) -> None:
        count = len(state["states"])
        remedy = f"give that of a pool of size={self.size}"
        du.require(count == self.size, f"state: it has {count} networks; {remedy}")
        self.calls, self.states = state["calls"], list(state["states"])


@dataclass(eq=False)
class Checkpointed:
    """Gradient checkpointing: the gradient of `du.unroll` in less memory, for about half as much time again.

    Only the state before every `segment` updates is stored; the backward pass runs a segment's updates again. About
    the square root of the number of updates takes the least memory. The gradient differs in its last digits at most.

    `torch.utils.checkpoint` does not replace it: each inner gradient would run the whole segment again.
    """

    segment: int

    def __post_init__(self) -> None:
        du.require_counts(segment=self.segment)

    def __call__(self, network: nn.Module, distilled: du.DistilledSet) -> nn.Module:
        train = partial(advance, du.as_ensemble(network), distilled)
        content = distilled.decode(), distilled.labels, distilled.step_sizes
        trained, _ = train([])
        trained.update_params(Segments.apply(train, self.segment, *content))
        return trained


class Segments(torch.autograd.Function):
    """Training in segments, each of which the backward pass runs again from its stored start."""

    @staticmethod
    def forward(ctx, train: Callable, size: int, *content: Tensor) -> tuple[Tensor, ...]:
        """Turns images, labels and step sizes of a distilled set into the trained weights."""
        ctx.save_for_backward(*content)
        ctx.train, ctx.size, ctx.starts = train, size, []
        trained, moments = train([], differentiable=False)
        for segment in split_schedule(size, *content):
            ctx.starts.append(detach(trained, moments))
            trained, moments = train(segment, ctx.starts[-1], differentiable=False)
        return tuple(weight.detach() for weight in trained.parameters())

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        content = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        slopes = [torch.zeros_like(tensor) for tensor in content]
        segments = split_schedule(ctx.size, *content)
        for start, segment in reversed([*zip(ctx.starts, segments, strict=True)]):
            moments = [moment.requires_grad_() for moment in tensors_of(start["moments"])]
            trained, final = ctx.train(segment, start)
            begin = [*trained.parameters(time=0), *moments]
            # No gradient reaches the moments after the last segment.
            end = [*trained.parameters(), *tensors_of(final)][: len(gradients)]
            found = torch.autograd.grad(end, [*begin, *content], gradients, materialize_grads=True)
            gradients = found[: len(begin)]
            slopes = [sum(pair) for pair in zip(slopes, found[len(begin) :], strict=True)]
        return None, None, *slopes


@torch.enable_grad()
def split_schedule(size: int, images: Tensor, labels: Tensor, step_sizes: Tensor) -> list:
    """Segments of `size` updates, the last of which may be shorter; the order is that of `distilled.schedule()`."""
    updates = [*zip(itertools.cycle(images), itertools.cycle(labels), step_sizes, strict=False)]
    return [updates[first : first + size] for first in range(0, len(updates), size)]


def tensors_of(moments: Moments) -> list[Tensor]:
    """All but the optimizer's own counts of updates."""
    return [x for values in moments.values() for x in values.values() if torch.is_tensor(x)]
