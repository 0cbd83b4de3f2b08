"""The module stands alone, is small, loads fast, and the whole repository uses the field's words."""

import ast
import functools
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import distill_utils as du

ROOT = Path(du.__file__).parent
LISTS_OF_OLD_WORDS = {"tests/test_repository.py", "study/tests/test_report.py"}
OUTSIDE = {"out", "data", "build", "node_modules"}  # what a run leaves in the working tree

# Each is the old word for what the field calls otherwise, and has no other meaning in this repository.
OLD_WORDS = {
    r"(un)?known initiali[sz]ation": "fixed or random initialization",
    r"(real|noise|k_means)_start|(k-means|noise|real) start\b": "init_from_real, init_from_noise, init_from_kmeans",
    r"\btil(e|es|ed|ing)\b": "multi-formation",
    r"\blearned (soft )?labels?\b|\blearn_labels\b|label learning": "soft labels",
    r"\bas distilled\b": "with the learned schedule",
    r"\bfree(ly)? retrain|\bretrained freely|\bretrain(s|ed|ing)?\b": "training from scratch",
    r"\bin company\b|\b(together|without|alone)-[a-z]+-\d": "add-one and leave-one-out ablation",
    r"\bone_of\(": "sample_network",
    r"\brelabel(s|led|ling)?\b": "poison_labels",
    r"\bshake(n)?\b": "DSA-style augmentation",
    r"share_step_sizes|\bdraw_window\b|DatasetUnavailable|\boneshot\b": "nothing: it is gone",
    r"never met": "unseen initializations",
    r"what came after the paper|held against|hangs? on\b|have not to\b|turn this round": "plain English",
}


@functools.cache
def texts() -> dict[str, str]:
    """Path and text of every Python file, Markdown file and notebook; of notebooks, sources and text outputs."""
    found = {}
    for folder, inside, names in os.walk(ROOT):
        inside[:] = [name for name in inside if not name.startswith(".") and name not in OUTSIDE]
        for path in (Path(folder, name) for name in names):
            if path.suffix in (".py", ".md"):
                found[path.relative_to(ROOT).as_posix()] = path.read_text()
            elif path.suffix == ".ipynb":
                cells = json.loads(path.read_text())["cells"]
                text = ["".join(cell["source"]) for cell in cells]
                for output in (output for cell in cells for output in cell.get("outputs", [])):
                    text += [
                        "".join(output.get("text", "")),
                        "".join(output.get("data", {}).get("text/markdown", "")),
                    ]
                found[path.relative_to(ROOT).as_posix()] = "\n".join(text)
    return {name: text for name, text in sorted(found.items()) if name not in LISTS_OF_OLD_WORDS}


@pytest.mark.parametrize("old", OLD_WORDS)
def test_old_words_are_gone(old):
    found = [
        f"{name}:{text[: match.start()].count(chr(10)) + 1}: {match.group()}"
        for name, text in texts().items()
        for match in re.finditer(old, text, re.IGNORECASE)
    ]
    assert not found, f"say {OLD_WORDS[old]}: " + ", ".join(found)


def test_old_words_are_gone_from_file_names():
    old = re.compile(r"known|tile|retrain|beyond_report|relabel|shaken|coarse", re.IGNORECASE)
    names = [*texts()] + [path.name for path in (ROOT / "distilled").iterdir()]
    assert not [name for name in names if old.search(name)]


def imported(path: Path) -> set[str]:
    """The first words of the modules that a Python file imports, at any depth."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level], (
        "relative import"
    )
    return {name.split(".")[0] for name in names}


def count_tokens(text: str) -> int:
    """Tokens of Python code; comments, line ends and indentation do not count, a string is one."""
    layout = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(tokenize.tok_name[token.type] not in layout for token in tokens)


def test_the_module_is_small_and_imports_nothing_of_the_repository():
    ours = {path.stem for path in ROOT.glob("*.py")} | {
        path.name for path in ROOT.iterdir() if path.is_dir()
    }
    assert not imported(ROOT / "distill_utils.py") & ours
    text = (ROOT / "distill_utils.py").read_text()
    assert max(map(len, text.splitlines())) <= 100
    assert count_tokens(text) <= 7_210
    assert [path.name for path in ROOT.glob("*.py")] == ["distill_utils.py"]


def test_the_core_method_stays_short():
    for piece, limit in (
        (du.unroll, 22),
        (du.outer_loss, 7),
        (du.Distillation.compute_gradient, 12),
    ):
        assert len(inspect.getsource(piece).splitlines()) <= limit, piece.__name__
    options = inspect.signature(du.Distillation).parameters.values()
    assert sum(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options) <= 12


def test_importing_the_module_does_not_import_scikit_learn():
    """It would take as long as everything else, for two functions that few calls reach."""
    code = "import sys, distill_utils; print(*(name for name in ('sklearn', 'pandas', 'tyro') if name in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == ""
    assert "Warning" not in run.stderr


def test_every_public_function_and_class_is_explained():
    for name, thing in vars(du).items():
        ours = getattr(thing, "__module__", "") == du.__name__ and not name.startswith("_")
        if ours and (inspect.isfunction(thing) or inspect.isclass(thing)):
            assert thing.__doc__, name
