"""What saves time and memory, and changes no result but its last digits.

Networks side by side in a stack, images in parts that fit a processor's cache, updates that run again in the
backward pass. `distill_utils` is built on this; `benchmarks/results.md` tells what each is worth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn


class Stack(nn.Module):
    """Several networks of one architecture as one module: images [n, c, h, w] give scores [networks, n, classes].

    Images [networks, n, c, h, w] give each network its own. Training a stack costs less than training its networks
    one after the other: each operation is called once for all of them, on more numbers at a time. They may differ in
    their parameters and buffers, and in nothing else.
    """

    ONE_BY_ONE = ("cpu",)  # devices that are faster at many images of one network than at some images of each

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        parameters, buffers = torch.func.stack_module_state(networks)
        self.names = [*parameters, *buffers]
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(parameter))
        for name, buffer in buffers.items():
            self.register_buffer(name.replace(".", "/"), buffer)
        self.architecture = (networks[0],)  # a tuple, so that its weights do not count among our parameters

    def forward(self, images: Tensor) -> Tensor:
        def scores(images: Tensor, *state: Tensor) -> Tensor:
            named = dict(zip(self.names, state, strict=True))
            return torch.func.functional_call(self.architecture[0], named, (images,))

        state = [*self.parameters(), *self.buffers()]  # [networks, ...] each
        if images.dim() == 4:
            return torch.vmap(scores, (None, *[0] * len(state)))(images, *state)
        if images.device.type in self.ONE_BY_ONE:
            return torch.stack([scores(*row) for row in zip(images, *state, strict=True)])
        return torch.vmap(scores)(images, *state)


def side_by_side(networks: Sequence[nn.Module]) -> nn.Module:
    """The networks as one module; a single one stays as it is, as a stack of one would only be slower."""
    return Stack(networks) if len(networks) > 1 else networks[0]


def in_parts(network: nn.Module, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [..., n, c, h, w] and labels [..., n] in parts of the size that `network` goes through fastest.

    Larger ones fall out of a CPU's cache.
    """
    shared = isinstance(network, Stack) and images.dim() == 4
    networks = next(network.parameters()).shape[0] if shared else 1
    size = max(1, (800 if images.device.type == "cpu" else 20_000) // networks)
    return zip(images.split(size, dim=-4), labels.split(size, dim=-1), strict=True)


def stack_size(device: torch.device) -> int:
    """How many networks to train at once: on a CPU, more would gain nothing (see benchmarks/results.md)."""
    return 8 if device.type == "cpu" else 64


class Segment(torch.autograd.Function):
    """Some updates of the inner loop, of which only the start is kept: they run again when their gradient is due."""

    @classmethod
    def train(cls, train: Callable, start: list[Tensor], updates: list[tuple[Tensor, ...]]) -> list[Tensor]:
        """Where `train`, an inner loop, ends."""

        def run(inputs: Sequence[Tensor], track_higher_grads: bool) -> list[Tensor]:
            state, rest = inputs[: len(start)], inputs[len(start) :]
            updates = zip(rest[::3], rest[1::3], rest[2::3], strict=True)
            return train(state, updates, track_higher_grads=track_higher_grads)[1]

        return list(cls.apply(run, *start, *itertools.chain(*updates)))

    @staticmethod
    def forward(ctx, run: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(*inputs)
        with torch.enable_grad():  # training takes gradients, even where none are kept
            ends = run([tensor.detach().requires_grad_() for tensor in inputs], False)
        return tuple(end.detach() for end in ends)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            ends = ctx.run(inputs, True)
        return None, *torch.autograd.grad(ends, inputs, gradients, allow_unused=True)
