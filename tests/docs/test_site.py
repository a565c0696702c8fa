"""mkdocs.yml: every page is in the navigation once, and the site builds without a warning."""

import importlib
import importlib.util
import re
import subprocess
import sys

import pytest

from tests.paths import ROOT

CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
HOOKS = ROOT / "scripts/site_pages.py"


def table_of(text: str) -> dict[str, str]:
    """The table PAGES, read without importing mkdocs."""
    block = re.search(r"^PAGES = \{\n(.*?)^\}", text, re.S | re.M)[1]
    return dict(re.findall(r'"([^"]+)": "([^"]+)"', block))


def test_every_page_is_in_the_navigation_once():
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    moved = table_of(HOOKS.read_text())
    assert all((ROOT / name).is_file() for name in moved)
    listed = re.findall(r": (\S+\.md)$", CONFIG.split("\nnav:\n")[1], re.M)
    assert sorted(listed) == sorted([*pages, *moved.values()])


def test_the_python_page_names_what_is_there():
    text = (ROOT / "docs/API.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: (\S+)$", text, re.M)
    assert len(names) > 8
    for name in names:
        module, _, member = name.rpartition(".")
        if importlib.util.find_spec(name) if member.islower() and _is_package(module) else None:
            continue
        assert hasattr(importlib.import_module(module), member), name


def _is_package(module: str) -> bool:
    return importlib.util.find_spec(module).submodule_search_locations is not None


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "llava/py.typed").is_file()
    assert '"llava": ["py.typed"]' in (ROOT / "setup.py").read_text()


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
