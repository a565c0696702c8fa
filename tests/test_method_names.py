"""Shared files never learn a method's name: a method is one file, and its word in the table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from llava.pruning import METHODS
from tests.paths import ROOT

#: words that mean other things as well
COMMON = {"none", "random", "pool", "downsample", "scope"}
NAMES = sorted(METHODS.own.keys() - COMMON)
WORD = re.compile(rf"(?<![a-z])({'|'.join(NAMES)})(?![a-z])", re.IGNORECASE)
#: the methods themselves, the training of their parts, and a module that a release calls so
THEIR_OWN = re.compile(
    r"llava/pruning/.*|llava/train/train_(twigvlm|glimpseprune)\w*\.py"
    r"|llava/train/(glimpse|twig_plus)/.*"
    r"|playground/(train|train_plus|train_qwen|qwen_glimpse)\.py|nuwa\.py"
    r"|scripts/(v1_5|qwen2_5_vl)/(train/)?train_(twig|glimpse)[\w+]*\.(sh|yaml)"
)
FOLDERS = ("llava", "scripts", "playground", ".ci")


def files(*suffixes: str) -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    found = [path.relative_to(ROOT) for path in [*found, *ROOT.glob("*.py")]]
    kept = [path for path in found if path.suffix in suffixes and "checkpoints" not in path.parts]
    return [path for path in kept if not THEIR_OWN.fullmatch(path.as_posix())]


def words_of_python(source: str) -> list[str]:
    """Names and texts of a program, without comments and docstrings."""
    tree, words = ast.parse(source), []
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words += [] if id(node) in docs else [node.value]
        else:
            fields = ("id", "attr", "name", "module", "arg", "asname")
            found = [getattr(node, field, None) for field in fields]
            words += [word for word in found if isinstance(word, str)]
    return words


def words_of_shell(source: str) -> list[str]:
    return [re.sub(r"(^|\s)#.*", "", line) for line in source.splitlines()]


READERS = {".py": words_of_python, ".sh": words_of_shell, ".yaml": words_of_shell}


def test_no_shared_file_holds_a_method_s_name():
    found = {}
    for path in files(*READERS):
        words = READERS[path.suffix]((ROOT / path).read_text())
        if names := {match[0] for word in words for match in WORD.finditer(word)}:
            found[path.as_posix()] = sorted(names)
    assert len(files(".py")) > 100 and len(files(".sh")) > 20
    assert not found


def test_the_search_finds_names_in_code_and_skips_what_is_said_about_it():
    source = '"""VisPruner."""\nimport llava.pruning.fastv  # nuwa\nx = ["--method vscan"]\n'
    words = " ".join(words_of_python(source))
    assert WORD.findall(words) == ["fastv", "vscan"]
    assert WORD.findall(" ".join(words_of_shell("a --m nuwa # fastv\n# vscan"))) == ["nuwa"]
    assert not WORD.findall("twig vispruners")
