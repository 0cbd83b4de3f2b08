"""Small data, a smooth network, a small set, plain training, notebooks, and the devices on which
tests run, one of them emulated."""

import contextlib
import os
import re
from pathlib import Path

import matplotlib as mpl
import nbclient
import nbformat
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import distill_utils as du

ROOT = Path(du.__file__).parent
mpl.use("Agg")  # no windows


@pytest.fixture(autouse=True)
def _restore_defaults():
    """A test must not pass its random state or number type on to the next."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------- data and networks
def make_toy(device: torch.device | str = "cpu") -> du.Dataset:
    """Three well-separated classes of 4×4 images: 60 for training, 30 each for validation and test."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    pixels = 0.2 * torch.rand(90, 1, 4, 4, generator=generator)
    pixels[torch.arange(90), 0, labels] += 0.7  # class k has row k bright
    pairs = (pixels, labels), (pixels[:30], labels[:30])
    return du.make_dataset("toy", *pairs, validation=30, device=device)


@pytest.fixture
def toy() -> du.Dataset:
    return make_toy()


@pytest.fixture(scope="session")
def mnist_root() -> str:
    """The folder that holds MNIST; without it, MNIST tests are skipped, but never in CI."""
    root = Path(os.environ.get("DATA_ROOT", "data"))
    if not (root / "MNIST" / "raw").is_dir():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no MNIST in DATA_ROOT={root}")
    return str(root.resolve())


class Smooth(nn.Sequential):
    """A network for the toy data without the kinks of ReLU, so that finite differences hold."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def train_plainly(network: nn.Module, distilled: du.DistilledSet) -> nn.Module:
    """Trains a network in place with a set's schedule, by torch's own SGD, and returns it."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1.0, momentum=distilled.inner["momentum"])
    for images, labels, step_size in distilled.schedule():
        optimizer.param_groups[0]["lr"] = step_size.item()
        optimizer.zero_grad()
        F.cross_entropy(network(images.detach()), labels.detach()).backward()
        optimizer.step()
    return network


# ------------------------------------------------------------------------------------------- sets
def make_decoder(*, classes: int = 0) -> du.CodeDecoder:
    """Turns codes of 5 numbers into images [1, 4, 4]."""
    decoder = du.CodeDecoder(5, [4, 3], [1, 4, 4], classes)
    for weight in decoder.parameters():
        weight.data = 0.3 * torch.randn_like(weight)
    return decoder


def make_set(dataset, kind="real", *, seed=0, codes=None, **options) -> du.DistilledSet:
    """A set of 2 steps and 2 epochs that starts from `kind`. One of `codes` holds random ones of toy
    images instead, or zeros for a generator, where they are "generated"."""
    images, labels = du.initialize(dataset, kind, steps=2, seed=seed)
    options = {"epochs": 2, "step_size": 0.1, **options}
    if codes:
        with du.seeded(0):
            generated = codes == "generated"
            images = (torch.randn(2, 3, 5, 1, 1) * (not generated)).to(labels.device)
            options["decoder"] = make_decoder(classes=3 * generated).to(labels.device)
    return du.DistilledSet(images, labels, **options)


def assert_same(first: object, second: object) -> None:
    """Two sets, networks, or lists and dictionaries of tensors and numbers, are equal bit by bit."""
    states = [x.state_dict() if isinstance(x, nn.Module) else x for x in (first, second)]
    (ours, form), (theirs, other) = map(tree_flatten, states)
    assert form == other
    pairs = zip(ours, theirs, strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


# -------------------------------------------------------------------------------------- notebooks
TINY = {"ITERATIONS": 2, "NETWORKS": 2, "EPOCHS": 1}  # by the last word of a parameter's name
QUICK = """
choose = du.best_constant_step_size
du.best_constant_step_size = lambda *given, **_: choose(*given, networks=1, step_sizes=[0.02])
"""
FEWER_IMAGES = """
import dataclasses
def fewer(mnist):
    names = "train", "validation", "test"
    splits = {name: du.Split(*(part[:500] for part in getattr(mnist, name))) for name in names}
    return dataclasses.replace(mnist, **splits)
load, du.load_mnist = du.load_mnist, lambda *given, **options: fewer(load(*given, **options))
"""
NO_NETWORK = """
import torchvision
def fail(self): raise RuntimeError("no network")
torchvision.datasets.MNIST.download = fail
"""


def run_notebook(path: Path, out: Path, mnist_root: str = "", *, folder: Path = ROOT) -> str:
    """Runs a notebook in `folder` with tiny parameters, on 500 images of each split of MNIST, or
    where that can be neither read nor downloaded; returns what it prints, without any warning."""
    book = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    names = re.findall(r"^([A-Z_]+) = ", cell.source, re.MULTILINE)
    tiny = {name: TINY[word] for name in names if (word := name.split("_")[-1]) in TINY}
    values = {**tiny, "DEVICE": "cpu", "OUT": str(out), "DATA_ROOT": mnist_root or f"{out}/none"}
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    cell.source += QUICK + (FEWER_IMAGES if mnist_root else NO_NETWORK)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(book, timeout=600, resources=resources).execute()
    text = read_outputs(book)
    assert "Warning" not in text
    return text


def read_outputs(book: nbformat.NotebookNode) -> str:
    """All text that a notebook's cells have printed or shown."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    shown = [value for output in outputs for value in output.get("data", {}).items()]
    texts = [text for kind, text in shown if kind.startswith("text/")]
    return "\n".join([output.get("text", "") for output in outputs] + texts)


def stamp_files() -> set[tuple[Path, int]]:
    """The repository's files and when they were written, to tell whether a run leaves them alone."""
    patterns = "*", "distilled/**/*", "figures/**/*", "study/**/*"
    paths = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return {(path, path.stat().st_mtime_ns) for path in paths if "__pycache__" not in path.parts}


# ---------------------------------------------------------------------------------------- devices
def run_remotely(_, function, types, args=(), kwargs=None):
    """Runs an operation on the values of remote tensors; RuntimeError where it mixes devices."""
    name, kwargs = function._schema.name, kwargs or {}
    operands, device = (args, kwargs), kwargs.get("device")
    if name in ("aten::index", "aten::index_put_"):  # whose indices may be on the CPU
        operands = args[0], [index for index in args[1] if isinstance(index, Remote)]
    tensors = [leaf for leaf in tree_leaves(operands) if isinstance(leaf, Tensor)]
    remote = any(isinstance(tensor, Remote) for tensor in tensors)
    local = any(tensor.dim() > 0 and not isinstance(tensor, Remote) for tensor in tensors)
    if remote and local and name not in ("aten::_to_copy", "aten::copy_"):
        raise RuntimeError(f"{function}: expected all tensors to be on the same device")
    goes_there = remote if device is None else torch.device(device).type == "meta"
    options = kwargs if device is None else {**kwargs, "device": "cpu"}
    values, options = tree_map(lambda x: x.local if isinstance(x, Remote) else x, (args, options))
    result = function(*values, **options)
    if function._schema.is_mutable and name.endswith("_"):
        return args[0] if function._schema.returns else None
    return tree_map(lambda x: Remote(x) if goes_there and isinstance(x, Tensor) else x, result)


class Remote(Tensor):
    """A tensor on an emulated accelerator, which PyTorch calls `meta`. Its values lie in main
    memory, but it refuses what an accelerator refuses: operations with CPU tensors, conversion to
    NumPy and, as on Apple GPUs, float64."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = classmethod(run_remotely)

    @staticmethod
    def __new__(cls, local: Tensor) -> "Remote":
        if local.dtype == torch.float64:
            raise TypeError("float64 on a device that has none")
        layout = {"strides": local.stride(), "storage_offset": local.storage_offset()}
        options = {"device": "meta", "dtype": local.dtype, **layout}
        return Tensor._make_wrapper_subclass(cls, local.shape, **options)

    def __init__(self, local: Tensor) -> None:
        self.local = local


class EmulatedAccelerator(TorchDispatchMode):
    """Makes `device="meta"` an accelerator with values, also where tensors are created on it."""

    __torch_dispatch__ = run_remotely


HARDWARE = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


@pytest.fixture(params=["cpu", *HARDWARE, "emulated"])
def device(request):
    """Every device of this machine, and an emulated accelerator."""
    emulated = request.param == "emulated"
    with EmulatedAccelerator() if emulated else contextlib.nullcontext():
        yield torch.device("meta" if emulated else request.param)


@pytest.fixture
def toy_on_device(device) -> du.Dataset:
    return make_toy(device)
