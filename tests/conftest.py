"""Small data, smooth networks, and the devices on which the tests run, one of them emulated."""

import contextlib
import os
import time
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import distill_utils as du

mpl.use("Agg")  # no windows


@pytest.fixture(autouse=True)
def _restore_defaults():
    """A failing test must not pass its random state or number type on to the next."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------- toys
def make_toy(device: torch.device | str = "cpu") -> du.Dataset:
    """Three well-separated classes of 4×4 images, float32: 60 for training, 30 each for validation and test."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    pixels = 0.2 * torch.rand(90, 1, 4, 4, generator=generator)
    pixels[torch.arange(90), 0, labels] += 0.7  # class k has row k bright
    return du.make_dataset(
        "toy", (pixels, labels), (pixels[:30], labels[:30]), validation=30, device=device
    )


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


# What a notebook is run with: an MNIST of a few thousand images, or a download that fails as without a network.
FEWER_IMAGES = """
import dataclasses
whole = du.load_mnist
def load_mnist(*arguments, **options):
    mnist = whole(*arguments, **options)
    parts = {name: getattr(mnist, name) for name in ("train", "validation", "test")}
    parts = {name: du.Split(part.images[:2000], part.labels[:2000]) for name, part in parts.items()}
    return dataclasses.replace(mnist, **parts)
du.load_mnist = load_mnist
"""
NO_NETWORK = """
import torchvision
def fail(self): raise RuntimeError("no network")
torchvision.datasets.MNIST.download = fail
"""


def make_decoder() -> du.CodeDecoder:
    """Turns codes of 5 numbers into images [1, 4, 4]."""
    decoder = du.CodeDecoder(5, [4, 3], [1, 4, 4])
    for weight in decoder.parameters():
        weight.data = 0.3 * torch.randn_like(weight)
    return decoder


# ----------------------------------------------------------------------------------------- faults
@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Times and weighs each test marked `fault(kind)`, for the summary; a refusal must be quick and small."""
    marker = item.get_closest_marker("fault")
    if marker is None:
        return (yield)
    status, before, begin = Path("/proc/self/status"), 0.0, time.perf_counter()

    def read_gigabytes(name: str) -> float:
        return (
            int(status.read_text().split(f"{name}:")[1].split()[0]) / 1e6
            if status.exists()
            else 0.0
        )

    if status.exists():  # on Linux
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = read_gigabytes("VmRSS")
    measured = {}
    try:
        result = yield
    finally:
        measured |= {"seconds": time.perf_counter() - begin, "gigabytes": read_gigabytes("VmHWM")}
        item.user_properties.append((marker.args[0], measured))
    if marker.args[0] in ("bad calls named", "damaged files refused"):
        assert measured["seconds"] < 5, measured
        assert measured["gigabytes"] - before < 1, measured
    return result


def pytest_terminal_summary(terminalreporter):
    """Prints how many faults of each kind were met as they should be."""
    found = defaultdict(list)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for kind, measured in getattr(report, "user_properties", []):
                if report.when == "call":
                    found[kind].append(
                        (outcome == "passed", measured["seconds"], measured["gigabytes"])
                    )
    for kind, tests in sorted(found.items()):
        passed, seconds, gigabytes = zip(*tests, strict=True)
        limits = f"slowest {max(seconds):.1f} s, peak memory {max(gigabytes):.2f} GB"
        terminalreporter.write_line(f"{kind}: {sum(passed)} of {len(tests)}; {limits}")


# ---------------------------------------------------------------------------------------- devices
class Remote(Tensor):
    """A tensor on an emulated accelerator, which PyTorch calls `meta`. Its values lie in main memory, but it refuses
    what an accelerator refuses: operations with CPU tensors, conversion to NumPy and, as on Apple GPUs, float64."""

    @staticmethod
    def __new__(cls, local: Tensor) -> "Remote":
        if local.dtype == torch.float64:
            raise TypeError("float64 on a device that has none")
        layout = {
            "strides": local.stride(),
            "storage_offset": local.storage_offset(),
            "dtype": local.dtype,
        }
        return Tensor._make_wrapper_subclass(cls, local.shape, device="meta", **layout)

    def __init__(self, local: Tensor) -> None:
        self.local = local

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run_remotely(function, args, kwargs or {})


def run_remotely(function, args, kwargs):
    """Runs an operation on the values of remote tensors; raises RuntimeError where it mixes devices."""
    copies = function._schema.name in ("aten::_to_copy", "aten::copy_")
    # the indices may be on the CPU
    indexes = function._schema.name in ("aten::index", "aten::index_put_")
    tensors = [
        leaf
        for leaf in tree_leaves(args[:1] if indexes else (args, kwargs))
        if isinstance(leaf, Tensor)
    ]
    if indexes:
        tensors += [index for index in args[1] if isinstance(index, Remote)]
    remote = [tensor for tensor in tensors if isinstance(tensor, Remote)]
    if (
        remote
        and not copies
        and any(tensor.dim() > 0 for tensor in tensors if not isinstance(tensor, Remote))
    ):
        raise RuntimeError(f"{function}: expected all tensors to be on the same device")

    device = kwargs.get("device")
    goes_there = bool(remote) if device is None else torch.device(device).type == "meta"
    kwargs = kwargs if device is None else {**kwargs, "device": "cpu"}
    local_args, local_kwargs = tree_map(
        lambda leaf: leaf.local if isinstance(leaf, Remote) else leaf, (args, kwargs)
    )
    result = function(*local_args, **local_kwargs)
    if function._schema.is_mutable and function._schema.name.endswith("_"):
        return args[0] if function._schema.returns else None
    return tree_map(
        lambda leaf: Remote(leaf) if goes_there and isinstance(leaf, Tensor) else leaf, result
    )


class EmulatedAccelerator(TorchDispatchMode):
    """Makes `device="meta"` an accelerator with values, also where tensors are created on it or moved to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run_remotely(function, args, kwargs or {})


def devices() -> list[str]:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["cpu", *(name for name in there if there[name]), "emulated"]


@pytest.fixture(params=devices())
def device(request):
    """Every device of this machine, and an emulated accelerator."""
    emulated = request.param == "emulated"
    with EmulatedAccelerator() if emulated else contextlib.nullcontext():
        yield torch.device("meta" if emulated else request.param)


@pytest.fixture
def toy_on_device(device) -> du.Dataset:
    return make_toy(device)
