"""docs/Adding_a_Method.md, done step by step on a copy of the package."""

import os
import re
import shlex
import shutil
import subprocess
import sys

from tests.paths import ROOT

BUILT = shutil.ignore_patterns("__pycache__")


def test_the_page_adds_two_methods_that_pass_the_contract(tmp_path):
    page = (ROOT / "docs" / "Adding_a_Method.md").read_text()
    shutil.copytree(ROOT / "llava", tmp_path / "llava", ignore=BUILT)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=BUILT)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    files = re.findall(r"^`(llava/\S+\.py)`:\n\n```python\n(.*?)^```", page, re.S | re.M)
    assert len(files) == 2
    for name, code in files:
        (tmp_path / name).write_text(code)
        assert len(code.splitlines()) < 30

    diff = re.search(r"^```diff\n(.*?)^```", page, re.S | re.M)[1].splitlines()
    table = tmp_path / "llava" / "pruning" / "__init__.py"
    source = table.read_text()
    imports = [line[1:] for line in diff if line.startswith("+from")]
    added = [line[1:] for line in diff if line.startswith("+") and not line.startswith("+from")]
    (after,) = [line[1:] for line in diff if line.startswith(" ")]
    assert source.count(after + "\n") == 1, "the page shows a table that is no longer there"
    last_import = "from .vispruner import VisPruner\n"
    source = source.replace(last_import, last_import + "\n".join(imports) + "\n")
    table.write_text(source.replace(after + "\n", "\n".join([after, *added]) + "\n"))

    command = re.search(r"^```bash\npython (.*?)$", page, re.M)[1]
    run = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 26
