"""`pip install .` gives the module and its distilled sets, and nothing else."""

import re
import subprocess
import sys
import zipfile

from tests.conftest import ROOT


def test_the_wheel_holds_the_module_and_the_sets_and_needs_what_the_module_imports(tmp_path):
    options = "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    file = zipfile.ZipFile(wheel)
    names = {name for name in file.namelist() if ".dist-info/" not in name}
    sets = {f"distilled/{path.name}" for path in (ROOT / "distilled").iterdir()}
    assert names == {"distill_utils.py", *sets}
    (metadata,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
    needed = re.findall(r"^Requires-Dist: (.*)", file.read(metadata).decode(), re.MULTILINE)
    assert set(needed) <= set((ROOT / "requirements.txt").read_text().splitlines())
    module = (ROOT / "distill_utils.py").read_text()
    imported = set(
        re.findall(r"^ *(?:import|from) (\w+)[\w.]*(?: import| as|$)", module, re.MULTILINE)
    )
    packages = {re.match(r"[\w-]+", line)[0] for line in needed}
    modules = {"sklearn" if name == "scikit-learn" else name for name in packages}
    assert modules == imported - sys.stdlib_module_names
