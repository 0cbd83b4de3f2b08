"""Inner loops for long training: each is called like `du.unroll`, and differentiates a part of it or saves memory.

    du.distill(distilled, dataset, du.LeNet, iterations=300, unroll=RandomWindow(25))

An object belongs to one run: it counts its calls, and `state_dict` makes it part of a checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import higher
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import distill_utils as du

Update = tuple[Tensor, Tensor, Tensor]  # images [n, c, h, w], labels [n, classes], step size []
# "done", "parameter/0", "buffer/scale", "moment/0/exp_avg", "moment/0/step", ...
State = dict[str, Tensor | int]


class InnerRun:
    """A network part-way through training on a distilled set.

    Parameters, buffers and the optimizer's moments belong to the run; `network` itself stays as it is.

    Args:
        network: a network or an ensemble; with a state, its values do not matter.
        distilled: the set, which makes the inner optimizer.
        state: where to continue, from `state_dict`; without one, the run starts at the network's own values.
    """

    def __init__(
        self, network: nn.Module, distilled: du.DistilledSet, state: State | None = None
    ) -> None:
        self.network, self.distilled = du.as_ensemble(network), distilled
        network = self.network
        if state is None:
            values = {f"parameter/{i}": value for i, value in enumerate(network.parameters())}
            values |= {f"buffer/{name}": value for name, value in network.named_buffers()}
            state = {"done": 0, **{name: value.detach().clone() for name, value in values.items()}}
        self.state: State = dict(state)
        for i, parameter in enumerate(network.parameters()):
            found, wanted = (
                list(getattr(state.get(f"parameter/{i}"), "shape", [])),
                list(parameter.shape),
            )
            du.require(
                found == wanted,
                f"state: parameter {i} has shape {found}; give a state of this network, {wanted}",
            )

    @property
    def done(self) -> int:
        """Updates made so far."""
        return self.state["done"]

    @torch.enable_grad()  # training takes gradients, even where the caller wants none
    def advance(self, updates: Sequence[Update], *, differentiable: bool = True) -> nn.Module:
        """Makes the given updates and returns the trained network, a differentiable function of them and of the state
        that they start from. With `differentiable` off, no graph is kept."""
        du.require(len(updates) > 0, "updates: none; give at least one, from distilled.schedule()")
        trained, inner = self._patch(differentiable)
        for images, labels, step_size in updates:
            inner.step(du.cross_entropy(trained(images), labels), override={"lr": [step_size]})
        self.state = {"done": self.done + len(updates), **read_state(trained, inner)}
        if not differentiable:
            self.state = self.state_dict()  # a buffer would keep its graph
        return trained

    def trained(self) -> nn.Module:
        """The network as it is now, a differentiable function of the updates made so far."""
        return self._patch(True)[0]

    def state_dict(self) -> State:
        """Detached tensors and the numbers of updates made; `torch.load` reads them with `weights_only`."""
        return {
            name: value.detach() if torch.is_tensor(value) else value
            for name, value in self.state.items()
        }

    def _patch(
        self, differentiable: bool
    ) -> tuple[nn.Module, higher.optim.DifferentiableOptimizer]:
        """A functional copy of the network, and of its optimizer, in the state of the run."""
        optimizer = self.distilled.make_optimizer(self.network.parameters())
        with higher.innerloop_ctx(self.network, optimizer, track_higher_grads=differentiable) as (
            patched,
            inner,
        ):
            parameters = [self.state[f"parameter/{i}"] for i in range(len(patched.fast_params))]
            patched.update_params(
                [value if value.requires_grad else leaf(value) for value in parameters]
            )
        for name, value in self.state.items():
            kind, _, rest = name.partition("/")
            if kind == "buffer":
                module, _, buffer = rest.rpartition(".")
                # as a forward may change it in place
                setattr(patched.get_submodule(module), buffer, value.clone())
            elif kind == "moment":
                parameter, moment = rest.split("/")
                inner.state[0][int(parameter)][moment] = value
        return patched, inner


def leaf(value: Tensor) -> Tensor:
    """The same values outside any graph, ready to be differentiated with respect to."""
    return value.detach().requires_grad_()


def read_state(trained: nn.Module, inner: higher.optim.DifferentiableOptimizer) -> State:
    """Parameters, buffers and moments, as `InnerRun` names them."""
    moments = {
        f"moment/{i}/{name}": value for i, values in inner.state[0].items() for name, value in values.items()
    }  # fmt: skip
    return {
        **{f"parameter/{i}": value for i, value in enumerate(trained.fast_params)},
        # Copies, as later calls of the trained network, on real images, may change its own in place.
        **{f"buffer/{name}": value.clone() for name, value in trained.named_buffers()},
        **moments,
    }


@dataclass(eq=False)
class RandomWindow:
    """Differentiates a few consecutive updates at a random place: RaT-BPTT (Feng et al. 2024).

    The updates before the window run without gradient, those after it not at all.

    Args:
        length: updates in the window, at most those of the set.
        seed: of the places, at least 0; call number k draws its own from the seed and k.

    Raises ValueError for a window that is no whole number, trains nothing, or is longer than training.
    """

    length: int
    seed: int = field(default=0, kw_only=True)
    calls: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        du.require_counts(length=self.length)
        du.require(self.seed >= 0, f"seed={self.seed}: give at least 0")

    def __call__(self, network: nn.Module, distilled: du.DistilledSet) -> nn.Module:
        first = self.place(distilled.updates)
        updates, run = list(distilled.schedule()), InnerRun(network, distilled)
        if first > 0:
            run.advance(updates[:first], differentiable=False)
        trained = run.advance(updates[first : first + self.length])
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

    Raises ValueError for a size or a window that is no whole number of at least 1, or does not divide the updates.
    """

    size: int
    window: int = field(kw_only=True)
    calls: int = field(default=0, init=False, repr=False)
    states: list[State | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        du.require_counts(size=self.size, window=self.window)
        self.states = [None] * self.size

    def __call__(self, network: nn.Module, distilled: du.DistilledSet) -> nn.Module:
        slot, first = self.turn(distilled.updates)
        updates = list(distilled.schedule())
        run = InnerRun(network, distilled, self.states[slot] if first > 0 else None)
        if run.done < first:  # the first turn of this slot, whose network starts part-way
            run.advance(updates[:first], differentiable=False)
        trained = run.advance(updates[first : first + self.window])
        self.states[slot] = run.state_dict()
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
        du.require(
            count == self.size,
            f"state: it has {count} networks; give that of a pool of size={self.size}",
        )
        self.calls, self.states = state["calls"], list(state["states"])


@dataclass(eq=False)
class Checkpointed:
    """Gradient checkpointing: the gradient of `du.unroll` in less memory, for about half as much time again.

    Only the state before every `segment` updates is stored; the backward pass runs a segment's updates again. About
    the square root of the number of updates takes the least memory. The gradient differs in its last digits at most.

    `torch.utils.checkpoint` does not replace it: each inner gradient would run the whole segment again.

    Raises ValueError for a segment that is no whole number of at least 1.
    """

    segment: int

    def __post_init__(self) -> None:
        du.require_counts(segment=self.segment)

    def __call__(self, network: nn.Module, distilled: du.DistilledSet) -> nn.Module:
        network, updates = du.as_ensemble(network), list(distilled.schedule())
        state = InnerRun(network, distilled).state
        for first in range(0, len(updates), self.segment):
            state = run_segment(network, distilled, state, updates[first : first + self.segment])
        return InnerRun(network, distilled, state).trained()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def run_segment(
    network: nn.Module, distilled: du.DistilledSet, state: State, updates: Sequence[Update]
) -> State:  # fmt: skip
    """The state after `updates`, of which nothing is stored but their start."""
    names = [name for name, value in state.items() if torch.is_tensor(value)]
    ends: State = {}  # set by each run: the names and numbers at its end, where moments are that the start has not

    def run(inputs: Sequence[Tensor], differentiable: bool) -> list[Tensor]:
        tensors = iter(inputs)
        start = {**state, **dict(zip(names, tensors, strict=False))}
        segment = InnerRun(network, distilled, start)
        segment.advance(
            list(zip(tensors, tensors, tensors, strict=True)), differentiable=differentiable
        )
        ends.update(segment.state_dict())
        return [value for value in segment.state.values() if torch.is_tensor(value)]

    found = iter(Segment.apply(run, *(state[name] for name in names), *itertools.chain(*updates)))
    return {name: next(found) if torch.is_tensor(value) else value for name, value in ends.items()}


class Segment(torch.autograd.Function):
    """Some updates of the inner loop, of which only the inputs are stored; the backward pass runs them again."""

    @staticmethod
    def forward(
        ctx, run: Callable[[Sequence[Tensor], bool], list[Tensor]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(*inputs)
        ends = run([tensor.detach() for tensor in inputs], False)
        ctx.mark_non_differentiable(*(end for end in ends if not end.is_floating_point()))
        return tuple(ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        ends = ctx.run(inputs, True)
        reached = [
            (end, gradient)
            for end, gradient in zip(ends, gradients, strict=True)
            if end.requires_grad
        ]
        sources = [tensor for tensor in inputs if tensor.requires_grad]
        outputs, gradients = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(outputs, sources, gradients, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)
