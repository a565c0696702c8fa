"""docs/Getting_started.md: its tables are what its commands print, and its commands run."""

import re
import shutil
import subprocess

import pytest

from llava.eval.benchmarks import all_benchmarks
from llava.eval.compare import expected, method_table
from llava.eval.efficiency import needs
from llava.pruning import METHODS
from tests.docs.test_readme import blocks, commands, run
from tests.paths import ROOT

PAGE = (ROOT / "docs/Getting_started.md").read_text(encoding="utf-8")
DATA_PAGE = (ROOT / "playground/data/eval/README.md").read_text(encoding="utf-8")
#: what fetches things from a network, changes the environment, or is the first line of a new clone
ELSEWHERE = ("python3 -m venv", "pip install", "huggingface-cli", "export ")
ELSEWHERE += ("bash scripts/quickstart.sh",)


def between_marks(page: str, name: str) -> str:
    return re.search(rf"<!-- {name}: begin -->\n\n(.*?)\n<!-- {name}: end -->", page, re.S)[1]


def test_memory_and_times_are_those_that_the_command_computes():
    computed = needs.report(list(needs.PUBLISHED), needs.parse_args([]))
    assert between_marks(PAGE, needs.MARK) == computed


def test_the_time_of_the_example_follows_from_the_table():
    model = needs.Needs.of("7b")
    first = model.first_token(576, 64, 312e12, 2039e9)
    seconds = 8910 * (first + 2 * model.next_token(576, 64, 2039e9))
    assert f"at least {seconds / 60:.0f} minutes unpruned" in PAGE


def test_expected_scores_are_those_of_the_literature():
    assert between_marks(PAGE, expected.MARK) == expected.report()


def test_the_table_of_methods_is_what_their_classes_say():
    page = (ROOT / "docs/Choosing_a_Method.md").read_text(encoding="utf-8")
    assert between_marks(page, method_table.MARK) == method_table.report()
    advice = page.split("## All methods")[0]
    named = {part for word in re.findall(r"`([\w+]+)`", advice) for part in word.split("+")}
    assert {name for name in named if name in METHODS} >= {"vispruner", "random"}
    assert not {name for name in named if "_" not in name} - set(METHODS.own)


def test_the_table_of_launches_has_every_method():
    launches = between_marks((ROOT / "docs/Efficiency.md").read_text(encoding="utf-8"), "launches")
    assert re.findall(r"^\| `(\w+)` \|", launches, re.M) == list(METHODS.own)[1:]
    page = (ROOT / "docs/Choosing_a_Method.md").read_text(encoding="utf-8")
    assert "not counted" not in between_marks(page, method_table.MARK)


def test_the_page_on_data_names_the_sources_that_messages_name():
    for benchmark in all_benchmarks().values():
        for source in benchmark.sources.values():
            for address in re.findall(r"https?://[^\s(),]+", source):
                assert address in DATA_PAGE or "haotian-liu" in address, address


def test_the_page_on_data_shows_every_file_that_is_looked_for():
    tree = re.search(r"^eval/\n(.*?)^```", DATA_PAGE, re.S | re.M)[1]
    for benchmark in all_benchmarks().values():
        folder, _, name = benchmark.questions.partition("/")
        assert f"{folder}/" in tree, benchmark.name
        if folder not in ("refcoco", "viscot", "qbench"):  # one line there for many files
            assert name in tree, benchmark.questions


@pytest.mark.parametrize("page", [PAGE, DATA_PAGE], ids=["the guide", "the page on data"])
def test_what_does_not_run_here_is_at_least_a_shell_program(page):
    for block in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}{block}"


def test_the_glossary_is_sorted_and_its_words_stand_there_once():
    text = (ROOT / "docs/Glossary.md").read_text(encoding="utf-8")
    words = [word.lower() for word in re.findall(r"^\*\*([^*]+)\.\*\*", text, re.M)]
    assert words == sorted(set(words)) and len(words) > 30
    for word in ("raster order", "newline token", "probe", "average over layers"):
        assert word in words
    for word in re.findall(r"See \*([^*]+)\*", text):
        assert word.lower() in words


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A folder with what the downloads of the page would bring: the playground's stand in."""
    folder = tmp_path_factory.mktemp("machine")
    (folder / "checkpoints").mkdir()
    source = ROOT / "playground/checkpoints"
    for name, ours in (
        ("llava-v1.5-7b", "llava-v1.5-playground"),
        ("clip-vit-large-patch14-336", "clip-playground-patch14-336"),
    ):
        (folder / "checkpoints" / name).symlink_to(source / ours)
    shutil.copytree(ROOT / "playground/benchmark", folder / "data")
    image = next((ROOT / "playground/benchmark/images").iterdir())
    from PIL import Image

    Image.open(image).convert("RGB").save(folder / "photo.jpg")
    return folder


def in_folder(command: str, folder) -> str:
    """A command of the page as it reads where data, checkpoints and results lie in `folder`."""
    command = command.replace("checkpoints/", f"{folder}/checkpoints/")
    command = command.replace("playground/data/eval", f"{folder}/data")
    command = command.replace("photo.jpg", f"{folder}/photo.jpg")
    command = command.replace("kept.png", f"{folder}/kept.png")
    command = command.replace("runs/first", f"{folder}/first").replace("--limit 500", "--limit 6")
    command = command.replace("LIMIT=100", "LIMIT=6")
    return command.replace("--markdown docs/Getting_started.md", "")


#: `all.sh` is run by tests/eval/test_scripts.py, several machines by tests/eval/answering
RUN = [
    line
    for line in commands(PAGE)
    if not line.startswith((*ELSEWHERE, "sbatch", "NPROC")) and "all.sh" not in line
]


def test_most_of_the_page_runs():
    assert len(RUN) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_every_command_of_the_page_runs(command, machine):
    settings = {"HF_HUB_OFFLINE": "1", "LIMIT": "6", "CUDA_VISIBLE_DEVICES": ""}
    if command.startswith("CUDA_VISIBLE_DEVICES="):
        command = command.replace("0,1,2,3,4,5,6,7", "0,1")
    for name, value in re.findall(r'^export (\w+)=("[^"]*"|\S+)$', "\n".join(exports()), re.M):
        settings[name] = in_folder(value.strip('"'), machine)
    settings["CKPT_DIR"] = str(machine / "checkpoints")
    out = run(in_folder(command, machine), **settings)
    assert out.strip()


def exports() -> list[str]:
    """The settings of the page, one per line."""
    text = "\n".join(blocks(PAGE, "bash"))
    pairs = re.findall(
        r'(\w+)=("[^"]*"|[^\s"]+)', " ".join(re.findall(r"^export (.*)$", text, re.M))
    )
    return [f"export {name}={value}" for name, value in pairs if name != "HOST0"]
