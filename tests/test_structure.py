"""How the package hangs together: which rooms use which, no circles, files of a readable size."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.paths import ROOT

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "llava").rglob("*.py"))
}
#: promises of a method as tests, which need a model; nothing in the package imports them
TESTING = "llava.pruning.testing"
#: rooms and what nothing in them imports, at the top of a file or inside a function
PROGRAMS = ("llava.eval", "llava.serve", "llava.train")
APART = {
    "llava.pruning": ("llava.model", "llava.engine", *PROGRAMS, TESTING),
    "llava.model": ("llava.engine", *PROGRAMS),
    "llava.engine": PROGRAMS,
    "llava.vllm_plugin": ("llava.model", "llava.engine", *PROGRAMS),
    "llava.serve": ("llava.eval", "llava.train"),
    "llava.eval": ("llava.serve", "llava.train"),
    "llava.train": ("llava.engine", "llava.eval", "llava.serve"),
}
MOST_LINES = 500


def room_of(module: str, path: Path) -> str:
    """The package that a module lies in; of a package, the package."""
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


def imported(module: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The `modules` that a file names in its imports, wherever in the file they stand."""
    package = room_of(module, path)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            outer = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*outer, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:  # the longest beginning that is a module; the rest is a name in it
            while name and name not in modules:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {"", module}


def imports_of(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the `modules` it imports."""
    return {name: imported(name, path, modules) for name, path in modules.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """What imports one another round about; empty where nothing does."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def test_no_module_imports_itself_round_about():
    assert circle(imports_of(MODULES)) == []


def test_rooms_of_evaluation_do_not_import_one_another_round_about():
    own = {name: path for name, path in MODULES.items() if within(name, "llava.eval")}
    rooms: dict[str, set[str]] = {}
    for name, others in imports_of(own).items():
        room, found = room_of(name, own[name]), {room_of(other, own[other]) for other in others}
        rooms[room] = rooms.get(room, set()) | found - {room}
    assert len(rooms) > 5 and circle(rooms) == []


@pytest.mark.parametrize("room", APART)
def test_dependencies_point_one_way(room):
    own = {name: path for name, path in MODULES.items() if within(name, room)}
    own = {name: path for name, path in own.items() if not within(name, TESTING)}
    assert own
    wrong = [
        f"{name} imports {other}"
        for name, path in own.items()
        for other in imported(name, path, MODULES)
        if any(within(other, away) for away in APART[room])
    ]
    assert wrong == []


def test_no_file_has_more_lines_than_a_reader_takes_in():
    folders = ("llava", "tests", "scripts", "playground")
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    lengths = {path: len(path.read_text().splitlines()) for path in (*found, *ROOT.glob("*.py"))}
    assert len(lengths) > 500
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_the_checks_see_what_they_are_there_for(tmp_path):
    files = {
        "a": "import a.b",
        "a.b": "from . import c",
        "a.c": "def late():\n    from .d import name",
        "a.d": "from . import b as other",
    }
    modules = {}
    for name, text in files.items():
        modules[name] = tmp_path / ("__init__.py" if name == "a" else f"{name[2:]}.py")
        modules[name].write_text(text)
    assert imported("a", modules["a"], modules) == {"a.b"}
    assert set(circle(imports_of(modules))) == {"a.b", "a.c", "a.d"}
    modules["a.d"].write_text("")
    assert circle(imports_of(modules)) == []
