"""The study's notebooks run from any folder, with MNIST or without; what is stored in them comes from one clean run."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

import distill_utils as du
from tests.conftest import FEWER_IMAGES, NO_NETWORK

ROOT = Path(du.__file__).parent
NOTEBOOKS = [ROOT / "study" / f"{name}.ipynb" for name in ("paper", "beyond")]
TINY = {"NETWORKS": 1, "ITERATIONS": 2, "EPOCHS": 1}  # by the last word of a parameter's name
MACHINE = re.compile(r"(?<![\w.])/(?:work|root|home|tmp|opt|usr|Users)/\w")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def output_text(book) -> str:
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "\n".join(
        output.get("text", "") + output.get("data", {}).get("text/markdown", "")
        for output in outputs
    )


def run_tiny(path: Path, out: Path, data_root: str, *, extra: str = "", folder: Path = ROOT) -> str:
    """Runs a notebook with tiny parameters from a folder; returns what it prints."""
    book = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    names = re.findall(r"^([A-Z_]+) = ", parameters.source, re.MULTILINE)
    values = {name: TINY[name.split("_")[-1]] for name in names if name.split("_")[-1] in TINY}
    assert values
    values |= {"OUT": str(out), "DATA_ROOT": data_root, "DEVICE": "cpu"}
    parameters.source += (
        "\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items()) + "\n" + extra
    )
    nbclient.NotebookClient(
        book, timeout=300, resources={"metadata": {"path": str(folder)}}
    ).execute()
    text = output_text(book)
    assert "Warning" not in text
    return text


def files(folder: Path) -> set[tuple[Path, int]]:
    found = (
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    return {(path, path.stat().st_mtime_ns) for path in found}


@each_notebook
def test_the_stored_run_is_whole_and_clean(path):
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(book.cells) < 45
    assert path.stat().st_size < 1_000_000
    assert book.metadata.kernelspec.display_name == "Python 3 (ipykernel)"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = output_text(book)
    assert not re.search("Warning|Traceback|Without MNIST", text)
    assert not MACHINE.search(text)


@each_notebook
def test_it_runs_on_mnist_and_changes_no_results(path, tmp_path, mnist_root):
    before = files(ROOT / "study" / "results")
    text = run_tiny(path, tmp_path / "out", mnist_root, extra=FEWER_IMAGES)
    assert "MNIST: 2,000 test images" in text
    assert list((tmp_path / "out").rglob("*.png"))
    assert files(ROOT / "study" / "results") == before


@each_notebook
def test_without_mnist_it_says_so_and_shows_the_stored_results(path, tmp_path, monkeypatch):
    """In the folder where Jupyter starts it, which is not the repository's."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    text = run_tiny(
        path, tmp_path / "out", str(tmp_path / "none"), extra=NO_NETWORK, folder=path.parent
    )
    assert "Without MNIST" in text
    assert "100 images" in text or "mnist-ipc10-scratch" in text
