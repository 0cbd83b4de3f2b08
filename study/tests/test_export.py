"""The exported sets are those of `distilled/`, and can be read and trained on without this project's code."""

import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import distill_utils as du
from study.export import DISTILLED, export

NAMES = ("fashion-ipc1-mf2-50updates", "mnist-ipc10-compressed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    export(folder, NAMES)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_hubs_library_reads_the_table_offline(folder, name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    options = {"data_files": str(folder / f"{name}.parquet"), "cache_dir": str(tmp_path)}
    table = datasets.load_dataset("parquet", split="train", **options)
    distilled = du.load(name)
    shown, labels = distilled.decode().detach().flatten(0, 1), distilled.labels.flatten(0, 1)
    numbers = table.with_format("numpy")
    np.testing.assert_array_equal(np.stack(numbers["image"][:]), shown.numpy())
    np.testing.assert_array_equal(np.stack(numbers["soft_label"][:]), labels.numpy())
    assert table["label"][:] == labels.argmax(-1).tolist()
    place = np.array(table["step"][:]) * distilled.labels.shape[1] + table["position"][:]
    assert place.tolist() == list(range(len(table)))
    preview = np.array(table[3]["preview"])
    assert (preview.shape, preview.dtype) == ((28, 28), np.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_for_dd_ranking_have_one_row_per_image(folder, name):
    images, labels, lr = (
        torch.load(folder / name / f"{kind}.pt", weights_only=True)
        for kind in ("images", "labels", "lr")
    )
    distilled = du.load(name)
    assert torch.equal(images, distilled.decode().detach().flatten(0, 1))
    assert torch.equal(labels, distilled.labels.flatten(0, 1))
    assert torch.equal(lr, distilled.step_sizes.detach())


def test_the_readme_has_a_config_for_each_set(folder):
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    assert re.findall(r"config_name: (\S+)", header) == list(NAMES)
    for name in NAMES:
        assert f"path: {name}.parquet" in header
        assert (folder / f"{name}.parquet").exists()
        assert (folder / f"{name}.md").read_text() == (DISTILLED / f"{name}.md").read_text()
    assert text.strip() == (DISTILLED / "README.md").read_text().strip()


@pytest.mark.parametrize("library", ["PyTorch", "scikit-learn", "JAX"])
def test_the_documented_program_reaches_its_cards_accuracy(folder, library, mnist_root):
    """It runs outside the repository, where this project cannot be imported."""
    text = (DISTILLED / "README.md").read_text()
    program = re.search(rf"{library}:\n\n```python\n(.*?)```", text, re.DOTALL)[1]
    mnist = du.load_mnist(mnist_root, device="cpu")
    pixels = ((mnist.test.images[:, 0] * mnist.std + mnist.mean) * 255).round().byte()
    np.savez(folder / "mnist.npz", x_test=pixels.numpy(), y_test=mnist.test.labels.numpy())
    run = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=folder, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    card = (DISTILLED / "mnist-ipc10-compressed.md").read_text()
    labels = r"[^|]* \| " if library == "scikit-learn" else ""  # soft ones, then true ones
    row = rf"\| MLP \| plain \| {labels}(\d+\.\d)"
    stated = float(re.search(row, card)[1])
    assert float(run.stdout.strip().rstrip("%")) > stated - 1.5
