"""Small data and smooth networks on which the tests run."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import distill_utils as du


@pytest.fixture(autouse=True)
def _restore_defaults():
    """A failing test must not pass its random state or number type on to the next."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make_toy() -> du.Dataset:
    """Three well-separated classes of 4×4 images, float32."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    pixels = 0.2 * torch.rand(90, 1, 4, 4, generator=generator)
    pixels[torch.arange(90), 0, labels] += 0.7  # class k has row k bright
    return du.make_dataset("toy", (pixels, labels), (pixels[:30], labels[:30]), validation=30, device="cpu")


@pytest.fixture
def toy() -> du.Dataset:
    return make_toy()


class Smooth(nn.Sequential):
    """A network without the kinks of ReLU and max-pooling, where finite differences hold."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def smooth() -> type[nn.Module]:
    return Smooth


@pytest.fixture(scope="session")
def mnist_root() -> str:
    """The folder that holds MNIST; without it, MNIST tests are skipped, but never in CI."""
    root = os.environ.get("DATA_ROOT", "data")
    if not (Path(root) / "MNIST" / "raw").is_dir():
        message = f"no MNIST in DATA_ROOT={root}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return str(Path(root).resolve())
