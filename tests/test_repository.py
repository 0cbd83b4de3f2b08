"""The core stands alone, is small and loads fast."""

import ast
import inspect
import io
import subprocess
import sys
import tokenize

import distill_utils as du
from tests.conftest import ROOT

TEXT = (ROOT / "distill_utils.py").read_text()


def test_the_core_imports_nothing_of_the_repository():
    nodes = [*ast.walk(ast.parse(TEXT))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {path.stem for path in ROOT.iterdir()}
    assert [path.name for path in ROOT.glob("*.py")] == ["distill_utils.py"]


def test_the_core_is_small():
    """Comments, line ends and indentation are no tokens here, and a string is one."""
    layout = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
    tokens = tokenize.generate_tokens(io.StringIO(TEXT).readline)
    assert sum(tokenize.tok_name[token.type] not in layout for token in tokens) <= 7_210
    assert max(map(len, TEXT.splitlines())) <= 100
    limits = {du.unroll: 22, du.outer_loss: 7, du.Distillation.compute_gradient: 12}
    for function, limit in limits.items():
        assert len(inspect.getsource(function).splitlines()) <= limit, function.__name__


def test_importing_the_core_is_light():
    """Scikit-learn would take as long as everything else, for two functions that few calls reach."""
    code = "import sys, distill_utils; print({'sklearn', 'pandas', 'matplotlib'} & {*sys.modules})"
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    run = subprocess.run([sys.executable, "-c", code], **options)
    assert run.stdout == "set()\n"
    assert "Warning" not in run.stderr
