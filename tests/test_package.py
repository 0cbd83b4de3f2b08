"""`pip install .` gives the module and its distilled sets, and nothing else."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import distill_utils as du

ROOT = Path(du.__file__).parent


def run(*words: object, **options) -> str:
    return subprocess.run(
        [*map(str, words)], capture_output=True, text=True, check=True, **options
    ).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, ROOT)
    return next(folder.glob("*.whl"))


def test_the_package_needs_what_the_module_imports(wheel):
    file = zipfile.ZipFile(wheel)
    metadata = next(
        file.read(name).decode() for name in file.namelist() if name.endswith(".dist-info/METADATA")
    )
    needed = set(re.findall(r"^Requires-Dist: (.*)", metadata, re.MULTILINE))
    assert needed <= set((ROOT / "requirements.txt").read_text().splitlines())
    names = {re.match(r"[\w-]+", line)[0] for line in needed}
    assert names == {
        "torch",
        "torchvision",
        "higher",
        "numpy",
        "scikit-learn",
        "safetensors",
        "tqdm",
    }


def test_the_wheel_holds_one_module_and_the_sets(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert folders == {"distill_utils.py", "distilled"}
    packed = {Path(name).name for name in names if name.startswith("distilled/")}
    assert packed == {path.name for path in (ROOT / "distilled").iterdir()}


def test_an_installed_module_loads_the_sets_away_from_the_repository(wheel, tmp_path):
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--prefix",
        tmp_path / "there",
        wheel,
    )
    folder = next((tmp_path / "there").rglob("distill_utils.py")).parent
    code = "import distill_utils as du; print(du.__file__, tuple(du.load('mnist-ipc10-compressed').decode().shape))"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    found = run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert found.strip() == f"{folder / 'distill_utils.py'} (1, 2400, 1, 28, 28)"
