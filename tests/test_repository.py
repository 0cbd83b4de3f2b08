"""The core stands alone, is small, loads fast, and is installed with its distilled sets alone."""

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
import zipfile

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
    assert sum(tokenize.tok_name[token.type] not in layout for token in tokens) <= 7_800
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


def test_the_wheel_holds_the_module_and_the_sets_and_needs_what_the_module_imports(tmp_path):
    options = "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    file = zipfile.ZipFile(wheel)
    names = {name for name in file.namelist() if ".dist-info/" not in name}
    sets = {f"distilled/{path.name}" for path in (ROOT / "distilled").iterdir()}
    assert names == {"distill_utils.py", *sets}
    (metadata,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
    needed = re.findall(r"^Requires-Dist: ([^;\n]*)$", file.read(metadata).decode(), re.MULTILINE)
    assert set(needed) <= set((ROOT / "requirements.txt").read_text().splitlines())
    imports = r"^ *(?:import|from) (\w+)[\w.]*(?: import| as|$)"
    imported = {*re.findall(imports, TEXT, re.MULTILINE)}
    packages = {re.match(r"[\w-]+", line)[0] for line in needed}
    modules = {"sklearn" if name == "scikit-learn" else name for name in packages}
    assert modules == imported - sys.stdlib_module_names
