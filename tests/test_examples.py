"""The examples run as they stand, from a folder that has the data."""

import os
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from tests.conftest import ROOT


def run_example(name: str, folder, *arguments: str) -> float:
    """The last percentage that a program prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return float(re.findall(r"(\d+\.\d)[^\n]*%", run.stdout)[-1])


def test_a_network_of_torchvision_learns_from_a_stored_set(mnist_root, tmp_path):
    (tmp_path / "data").symlink_to(mnist_root)
    assert run_example("torchvision_model.py", tmp_path) > 80


def test_a_folder_of_color_images_is_distilled(tmp_path):
    """Five classes of noisy squares, which differ in color and size."""
    generator = np.random.default_rng(0)
    for label in range(5):
        folder = tmp_path / "pictures" / f"class {label}"
        folder.mkdir(parents=True)
        for number in range(60):
            pixels = generator.integers(0, 100, (40, 36, 3), np.uint8)
            left, size = generator.integers(0, 16), 8 + 2 * label
            pixels[left : left + size, left : left + size, label % 3] += 120
            PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    assert run_example("image_folder.py", tmp_path, "pictures") == pytest.approx(100, abs=35)
    assert (tmp_path / "mine.safetensors").exists()
