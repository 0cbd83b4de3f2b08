"""The notebook runs whole and writes into its own folder; what is stored in it comes from one clean run; the README's
Python runs as it stands."""

import ast
import inspect
import json
import math
import re
from pathlib import Path

import higher
import nbclient
import nbformat
import pandas as pd
import pytest
import torch

import distill_utils as du
from tests.conftest import FEWER_IMAGES, NO_NETWORK

ROOT = Path(du.__file__).parent
NOTEBOOK = ROOT / "distill.ipynb"


def parameters_cell(book) -> nbformat.NotebookNode:
    (tagged,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    return tagged


def small_parameters(source: str) -> dict:
    """Tiny values for the parameters that say how long something takes."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name.endswith(("ITERATIONS", "NETWORKS")):
                found[name] = 2
            elif name.endswith("EPOCHS"):
                found[name] = 1
    return found


def execute(out: Path, *, extra: str = "", **parameters) -> nbformat.NotebookNode:
    """Runs the notebook with other parameters."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    tagged = parameters_cell(book)
    parameters = {"OUT": str(out), "DEVICE": "cpu", **small_parameters(tagged.source), **parameters}
    for name in parameters:
        assert re.search(rf"^{name} = ", tagged.source, re.MULTILINE), (
            f"no parameter is called {name}"
        )
    # In place of the assignments, so that what follows from a parameter follows from the new value.
    for name, value in parameters.items():
        line = re.compile(rf"^{name} = .*$", re.MULTILINE)
        new = (
            f"{name} = Path({value!r})"
            if "Path(" in line.search(tagged.source).group()
            else f"{name} = {value!r}"
        )
        tagged.source = line.sub(lambda _, new=new: new, tagged.source)
    tagged.source += f"\n{extra}"
    nbclient.NotebookClient(
        book, timeout=600, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    return book


def output_of(book) -> str:
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "\n".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs
    )


def tracked_files() -> dict[Path, tuple[int, int]]:
    """Sizes and times of the files that a run must not touch."""
    folders = [
        path
        for path in ROOT.iterdir()
        if path.is_dir() and path.name in ("distilled", "figures", "study")
    ]
    files = [
        path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts
    ]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()
    }


def test_the_whole_notebook_runs_on_mnist_and_writes_only_into_its_folder(tmp_path, mnist_root):
    before = tracked_files()
    book = execute(tmp_path / "out", extra=FEWER_IMAGES, DATA_ROOT=mnist_root)
    text = output_of(book)
    assert "MNIST" in text
    assert "Warning" not in text
    assert (tmp_path / "out" / "evolution.gif").exists()
    for path in (sets := list((tmp_path / "out").rglob("*.safetensors"))):
        du.load(path)
    assert sets
    after = tracked_files()
    assert sorted(map(str, after)) == sorted(map(str, before))
    assert [str(path) for path in before if after[path] != before[path]] == []


def test_without_mnist_the_notebook_uses_digits_and_says_so(tmp_path):
    run = execute(tmp_path / "out", extra=NO_NETWORK, DATA_ROOT=str(tmp_path / "nothing"))
    text = output_of(run)
    assert "MNIST is missing or damaged" in text
    assert "Continuing on scikit-learn digits" in text
    after = text.partition("Continuing on scikit-learn digits")[2]
    assert after.count("scikit-learn digits") > 5
    assert "MNIST" not in after
    assert "reports" not in after, "the paper's numbers are MNIST's"


def test_algorithm_1_as_the_notebook_writes_it_is_that_of_the_module(toy, smooth):
    """Runs the notebook's own cells, and the module without the clipping that it adds."""
    names = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "higher": higher, "du": du}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if re.match(r"def (inner_loop|algorithm_1)\(", cell.source):
            exec(cell.source, names)
    images, labels = du.initialize(toy, "noise", steps=2)
    theirs = du.DistilledSet(images, labels, epochs=2, step_size=0.1)
    x_tilde, rho = (
        images.clone().requires_grad_(),
        theirs.raw_step_sizes.detach().clone().requires_grad_(),
    )
    losses, options = [], {"alpha": 0.03, "n": 16, "seed": 3, "clip": math.inf}
    names["algorithm_1"](
        x_tilde,
        labels,
        rho,
        toy.train,
        smooth,
        T=5,
        callback=lambda t, trained, loss: losses.append(loss.item()),
        **options,
    )
    options = {"iterations": 5, "batch_size": 16, "clip": math.inf, "seed": 3, "progress": False}
    history = du.distill(theirs, toy, smooth, **options)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(history.loss), rtol=1e-5, atol=0)
    torch.testing.assert_close(x_tilde, theirs.images, rtol=0, atol=1e-5)
    torch.testing.assert_close(rho, theirs.raw_step_sizes, rtol=0, atol=1e-5)
    assert (x_tilde - images).abs().max() > 0.05


def test_what_the_text_claims_held_for_five_seeds():
    """`make tutorial-seeds` runs the notebook from each of five seeds and stores its verdicts."""
    rows = pd.read_csv(ROOT / "tests" / "tutorial_seeds.csv")
    found = {name: group for name, group in rows.groupby("MNIST")}
    for group in found.values():
        assert sorted(group.seed) == [0, 1, 2, 3, 4]
    fixed = found["one initialization, 10 images, 3 updates"]
    assert fixed.accuracy.min() > 84
    assert fixed.accuracy.mean() > 87
    assert (fixed["its accuracy"] < 50).all(), "no control comes near"
    hundred = found["any initialization, 100 images, 30 updates"]
    assert hundred.accuracy.mean() > 79.5
    assert (hundred.lead > 3 * hundred["standard error"]).all()
    ten = found["any initialization, 10 images, 50 updates"]
    assert (ten.lead > 2 * ten["standard error"]).all()
    assert set(hundred["strongest other"]) | set(ten["strongest other"]) <= {
        "k-means, borrowed",
        "k-means, constant",
    }


@pytest.fixture(scope="module")
def stored() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_stored_outputs_come_from_one_run_top_to_bottom(stored):
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {output.output_type for cell in stored.cells for output in cell.get("outputs", [])}
    assert "error" not in kinds
    text = json.dumps([cell.get("outputs", []) for cell in stored.cells])
    assert "Warning" not in text
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


def test_the_notebook_is_short_and_light(stored):
    assert len(stored.cells) <= 50
    code = [cell.source.splitlines() for cell in stored.cells if cell.cell_type == "code"]
    assert max(map(len, code)) <= 25
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_the_stored_parameters_are_the_defaults_of_a_full_run(stored):
    source = parameters_cell(stored).source
    assert re.search(r'^DEVICE = "auto"', source, re.MULTILINE)
    assert re.search(r"^OUT = ", source, re.MULTILINE)
    assert "/" not in re.search(r"^OUT = (.*?)(#|$)", source, re.MULTILINE).group(1), (
        "a folder beside the notebook"
    )


def test_source_shown_in_the_notebook_is_the_modules(stored):
    """Every output that shows a function or class of the module shows its present source."""
    shown = re.findall(r"^(?:@[^\n]*\n)*(?:def|class) (\w+)[(:]", output_of(stored), re.MULTILINE)
    for name in shown:
        if hasattr(du, name):
            source = inspect.getsource(getattr(du, name)).strip()
            assert source in output_of(stored), f"{name} has changed since the notebook was run"


def readme_snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readmes_python_runs_as_it_stands(mnist_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(mnist_root)
    names = {}
    for snippet in readme_snippets():
        exec(compile(snippet, "README.md", "exec"), names)
    printed = re.search(r"(\d+\.\d)%", capsys.readouterr().out)
    assert float(printed.group(1)) > 90


def test_the_readme_links_to_files_that_are_there():
    for name in ("README.md", "distilled/README.md", "study/README.md"):
        text = (ROOT / name).read_text()
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not link.startswith(("http", "mailto")):
                assert ((ROOT / name).parent / link).exists(), f"{name}: {link}"
