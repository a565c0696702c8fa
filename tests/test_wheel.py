"""The package as it is installed: built, unpacked, and used from a folder that is no clone."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from llava.command import COMMANDS
from tests.paths import ROOT

pytestmark = pytest.mark.slow
BUILD = "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])"
#: what no build reads
LARGE = ("tests/golden/", "playground/checkpoints/")
#: prints the buttons of the examples, of a page whose service does not answer
PAGE = """
from llava.serve.web.client import Service
from llava.serve.web.log import ConversationLog
from llava.serve.web.page import Page, PageOptions

page = Page(Service("http://127.0.0.1:9"), ConversationLog("log"), PageOptions())
print(page.controls.examples.value)
"""


def run(*command, folder: Path, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A source archive of what git knows, and a wheel that was built from it."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git, and a clone: what belongs to the archive is what git knows")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if not name.startswith(LARGE) and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    made = run("-c", BUILD.replace("wheel", "sdist"), out, folder=clone)
    assert made.returncode == 0, made.stderr
    (source,) = out.iterdir()
    with tarfile.open(source) as archive:
        archive.extractall(out, filter="data")
    unpacked = out / source.name.removesuffix(".tar.gz")
    made = run("-c", BUILD, out, folder=unpacked)
    assert made.returncode == 0, made.stderr
    (wheel,) = out.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def user(built, tmp_path_factory):
    """Runs Python as somebody who installed the wheel, in an empty folder."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(site)

    def python(*command):
        folder = tmp_path_factory.mktemp("empty")
        return run(*command, folder=folder, PYTHONPATH=str(site), HF_HUB_OFFLINE="1")

    found = python("-c", "import llava; print(llava.__file__)")
    assert found.stdout.strip() == str(site / "llava" / "__init__.py"), found.stderr
    return python


def test_the_wheel_holds_the_package_and_what_it_reads(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "llava").rglob("*.py")}
    assert modules <= names and "nuwa.py" in names
    assert {"llava/py.typed", "llava/eval/table/rule.json"} <= names
    assert "llava/clone/docs/published_numbers.csv" in names
    assert not [name for name in names if name.startswith(("tests/", "playground/", "docs/"))]


def test_the_source_archive_holds_no_half_of_the_tests(built):
    with tarfile.open(built[0]) as archive:
        folders = {name.split("/")[1] for name in archive.getnames() if name.count("/") > 1}
    assert "llava" in folders and "tests" not in folders


def test_the_page_has_its_pictures_style_and_script_without_a_clone(user):
    pytest.importorskip("gradio")
    page = user("-c", PAGE)
    assert page.returncode == 0, page.stderr
    assert page.stdout.count("<button type='button'") == 4 == page.stdout.count("<img src='data:")


def test_published_numbers_are_there_without_a_clone(user):
    code = "from llava.eval.compare.published import read_published as r; print(len(r()) > 100)"
    assert user("-c", code).stdout.strip() == "True"


@pytest.mark.parametrize("name", ["run", "demo", "compare", "eval", "chat"])
def test_a_command_that_needs_the_clone_says_so_in_one_sentence(user, name):
    assert name in COMMANDS
    words = [name, "pope", "64"] if name == "eval" else [name]
    ended = user("-m", "llava.command", *words)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode not in (0, None) and "Traceback" not in ended.stderr
    assert last.startswith("error: ") and "with a clone of the repository" in last
    assert "--model-path" in last or "llava compare" in last


@pytest.mark.parametrize(
    "words, said", [(["--help"], "compares methods"), (["methods"], "vispruner")]
)
def test_commands_that_need_nothing_run_anywhere(user, words, said):
    ended = user("-m", "llava.command", *words)
    assert ended.returncode == 0 and said in ended.stdout
