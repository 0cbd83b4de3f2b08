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
from study import export
from study.experiments.experiment import ROOT
from tests.conftest import assert_same

NAMES = sorted(path.stem for path in (ROOT / "distilled").glob("*.safetensors"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    export.main(folder)
    return folder


@pytest.mark.parametrize("name", ["mnist-8kB", "mnist-4kB-50updates"])
def test_the_exported_images_are_those_that_networks_see(folder, name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    options = {"data_files": str(folder / f"{name}.parquet"), "cache_dir": str(tmp_path)}
    table = datasets.load_dataset("parquet", split="train", **options)
    distilled = du.load(name)
    images, labels = distilled.decode().detach().flatten(0, 1), distilled.labels.flatten(0, 1)
    numbers = table.with_format("numpy")
    np.testing.assert_array_equal(np.stack(numbers["image"][:]), images.numpy())
    np.testing.assert_array_equal(np.stack(numbers["soft_label"][:]), labels.numpy())
    assert table["label"][:] == labels.argmax(-1).tolist()
    place = np.array(table["step"][:]) * distilled.labels.shape[1] + table["position"][:]
    assert place.tolist() == list(range(len(table)))
    preview = np.array(table[3]["preview"])
    assert (preview.shape, preview.dtype) == ((28, 28), np.uint8)
    tensors = {
        path.stem: torch.load(path, weights_only=True) for path in sorted((folder / name).iterdir())
    }
    assert_same(tensors, {"images": images, "labels": labels, "lr": distilled.step_sizes})


def test_the_readme_has_a_config_for_each_set(folder):
    _, header, _ = (folder / "README.md").read_text().split("---\n", 2)
    assert re.findall(r"config_name: (\S+)", header) == NAMES
    for name in NAMES:
        assert f"path: {name}.parquet" in header
        assert (folder / f"{name}.parquet").exists()
        assert (folder / f"{name}.md").exists()


@pytest.mark.parametrize("name", ["plain_pytorch", "scikit_learn", "plain_jax"])
def test_an_example_trains_on_an_exported_set(folder, name, mnist_root):
    """In fewer epochs, and outside the repository, where this project cannot be imported."""
    program = (ROOT / "examples" / f"{name}.py").read_text()
    mnist = du.load_mnist(mnist_root, device="cpu")
    pixels = ((mnist.test.images[:, 0] * mnist.std + mnist.mean) * 255).round().byte()
    np.savez(folder / "mnist.npz", x_test=pixels.numpy(), y_test=mnist.test.labels.numpy())
    command = [sys.executable, "-I", "-c", re.sub(r"\b40\b", "5", program)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.strip().rstrip("%")) > 86
