"""Methods that installed packages bring."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from llava.eval import run_llava
from llava.eval.answering import script_args
from llava.pruning import METHODS, Pruner, build_pruner, guess_method, pruner_from_keywords
from llava.pruning.__main__ import main
from llava.pruning.cli import pairs_in, pruner_from_args
from llava.pruning.random import Random
from llava.pruning.registry import Methods, Unusable
from llava.serve import model_worker
from llava.serve.methods import MethodShelf, defaults, file_options, offer
from tests.paths import ROOT
from tests.pruning.packages import FIRST, install


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages; the table looks for what is in it when it is asked."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(METHODS, "_loaded", {})
    vars(METHODS).pop("offers", None)
    modules = set(sys.modules)
    yield tmp_path
    vars(METHODS).pop("offers", None)
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "").is_relative_to(tmp_path):
            del sys.modules[name]


def test_a_method_of_a_package_is_one_like_ours(site, capsys):
    install(site, "acme-pruning", {"first": "acme:First"}, acme=FIRST)
    assert list(METHODS) == [*METHODS.own, "first"] and len(METHODS) == len(METHODS.own) + 1
    pruner = build_pruner("first", visual_token_num=7)
    assert repr(pruner) == "First(visual_token_num=7, step=1, list_file=None, folder=None)"
    assert METHODS["first"] is type(pruner)
    assert build_pruner("first+fastv", first_step=2).first.step == 2
    with pytest.raises(ValueError, match="choose from none, .*, first"):
        build_pruner("second")
    with pytest.raises(ValueError, match="unknown option 'stride'.*choose from .*step"):
        build_pruner("first", stride=2)
    main([])
    assert "first          acme.First." in [
        line.strip() for line in capsys.readouterr().out.splitlines()
    ]
    main(["first", "--visual-token-num", "64"])
    assert "average over layers: 64.0 of 576" in capsys.readouterr().out


def test_its_options_are_flags_and_its_name_a_word_for_the_shell_scripts(site):
    install(site, "acme-pruning", {"first": "acme:First"}, acme=FIRST)
    parser = run_llava.build_parser()
    assert "first" in parser.format_help()
    args = parser.parse_args(["--pruning-method", "first", "--step", "3"])
    assert pruner_from_args(args) == build_pruner("first", step=3)
    assert pruner_from_args(parser.parse_args(["--step", "3"])).name == "first"
    words = script_args.read(["64", "step=2", "--limit", "3"], "first", {})
    assert words == ("first", 64, ["step=2"], ["--limit", "3"])


def test_an_option_called_like_a_program_s_own_flag_leaves_that_alone(site, capsys):
    names = "query temperature trained_part generation_strategy layers text_tokens limit port"
    fields = "".join(f"    {name}: int = 0\n" for name in names.split())
    source = FIRST.replace("    step: int = 1\n", f"    step: int = 1\n{fields}")
    install(site, "acme-pruning", {"first": "acme:First"}, acme=source)
    words = ["--query", "Q", "--temperature", "0", "--generation-strategy", "autoregressive"]
    args = run_llava.build_parser().parse_args([*words, "--step", "3"])
    assert (args.query, args.temperature, args.pruning_arg) == ("Q", 0, ["step=3"])
    args = model_worker.build_parser().parse_args("--port 1 --trained-part a=b".split())
    assert (args.port, args.trained_part, args.pruning_arg) == (1, ["a=b"], [])
    main("first --layers 8 --text-tokens 3 --step 2".split())
    assert "8 layers" in capsys.readouterr().out
    assert pairs_in(run_llava.build_parser().parse_args(["--temperature", "1"])) == []


def test_nothing_is_imported_before_a_method_is_used(site):
    install(site, "acme-pruning", {"first": "acme:First"}, acme="raise SystemExit('imported')")
    code = (
        "import sys, llava.pruning as p; p.build_pruner('vispruner'); assert 'first' in p.METHODS"
        "; p.pruner_from_keywords(None, {'important_ratio': 0.5}); sys.exit('acme' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{site}"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


def test_installing_a_package_changes_no_command_that_ours_understand(site):
    same = FIRST.replace("step: int", "important_ratio: float")
    install(site, "acme-pruning", {"first": "acme:First"}, acme=same)
    assert guess_method({"important_ratio": 0.5})[0] == "vispruner"
    assert guess_method({"visual_token_num": 64})[0] == "vispruner"
    keywords = {"list_file": "x"}
    assert pruner_from_keywords(None, keywords).name == "none"
    assert keywords == {"list_file": "x"}, "a loader's keyword is taken for a method nobody named"
    assert "acme" not in sys.modules
    assert pruner_from_keywords("first", keywords).list_file == "x" and not keywords


BROKEN = {
    "cannot be loaded: ImportError: no such wheel": "raise ImportError('no such wheel')",
    "cannot be loaded: SystemExit: 3": "raise SystemExit(3)",
    "cannot be loaded: AttributeError: module 'acme' has no attribute 'First'": "",
    "is no subclass of llava.pruning.Pruner": "First = print",
    "calls itself 'late': name both alike": FIRST.replace('"first"', '"late"'),
    "has published = {'options': {}}, which must be a llava.pruning.Published": FIRST.replace(
        'name = "first"', 'name, published = "first", {"options": {}}'
    ),
    "has no default for its option seed": f"{FIRST}\n\n"
    "@dataclass(kw_only=True)\nclass First(First):\n    seed: int\n",
    "cannot be loaded: TypeError: options of Published must be a dict, not None": (
        "from llava.pruning import Published\nPublished(options=None)"
    ),
    "cannot be loaded: RuntimeError: no wheel for this machine": (
        "raise RuntimeError('no wheel\\nfor this\\n machine')"
    ),
}


@pytest.mark.parametrize("said, source", BROKEN.items(), ids=BROKEN)
def test_a_package_that_cannot_be_used_is_listed_and_says_why(site, said, source, capsys):
    install(site, "acme-pruning", {"first": "acme:First"}, acme=source)
    whole = f"pruning method 'first' of acme-pruning 1.0 (acme:First) {said}"
    assert issubclass(METHODS["first"], Unusable)
    for options in ({}, {"visual_token_num": 64}):
        with pytest.raises(ValueError) as refused:
            build_pruner("first", **options)
        assert str(refused.value) == whole
    with pytest.raises(ValueError, match="cannot be loaded|is no subclass|calls itself|has "):
        METHODS["first"]()
    parser = run_llava.build_parser()  # other methods are used as if it were not there
    assert pruner_from_args(parser.parse_args(["--important-ratio", "1"])).name == "vispruner"
    main([])
    assert f"first          {whole}" in [
        line.strip() for line in capsys.readouterr().out.splitlines()
    ]


def test_of_two_methods_with_one_name_ours_wins_and_of_two_packages_neither(site):
    points = {"random": "acme:First", "first": "acme:First", "A+b": "acme:First"}
    install(site, "acme-pruning", points, acme=FIRST)
    install(site, "other-pruning", {"first": "other:First"}, other=FIRST)
    with pytest.warns(UserWarning) as said:
        assert METHODS["random"] is Random and "A+b" not in METHODS
        list(METHODS), len(METHODS)
    texts = sorted(str(one.message) for one in said)
    assert len(texts) == 2
    assert "'A+b' of acme-pruning 1.0" in texts[0] and "small letters" in texts[0]
    assert "'random' of acme-pruning 1.0" in texts[1] and "llava's own" in texts[1]
    with pytest.raises(ValueError, match="of acme-pruning 1.0 .*of other-pruning 1.0 .*uninstall"):
        build_pruner("first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        list(METHODS)


def test_the_table_is_a_mapping_that_methods_can_be_added_to():
    table = Methods(Pruner, Random)
    assert {**table} == {"none": Pruner, "random": Random}
    table["other"] = Random
    assert list(table.own) == ["none", "random", "other"] and "other" in table
    del table["other"]
    with pytest.raises(KeyError):
        table["other"]


def test_a_worker_offers_it_and_tells_why_it_does_not(site, model):
    install(site, "acme-pruning", {"first": "acme:First", "broken": "nowhere:X"}, acme=FIRST)
    found = {one["name"]: one for one in offer(model, MethodShelf(model.pruner))}
    assert found["first"]["available"] and found["first"]["place"] == "first"
    assert found["first"]["options"] == {
        "visual_token_num": 16,
        "visual_token_ratio": None,
        "step": 1,
    }
    assert not found["broken"]["available"] and found["broken"]["options"] == {}
    assert "'broken' of acme-pruning 1.0" in found["broken"]["reason"]
    assert "No module named 'nowhere'" in found["broken"]["reason"]


def test_a_worker_offers_methods_whose_options_have_types_that_mean_nothing(site, model):
    future = "from __future__ import annotations\n"
    source = future + FIRST.replace("step: int", "step: torch.nothing")
    install(site, "acme-pruning", {"first": "acme:First"}, acme=source)
    found = {one["name"]: one for one in offer(model, MethodShelf(model.pruner))}
    assert found["first"]["available"] and found.keys() == METHODS.keys()


def test_requests_cannot_name_files_for_it(site):
    from llava.serve.errors import ServeError
    from llava.serve.protocol import PruningRequest

    install(site, "acme-pruning", {"first": "acme:First"}, acme=FIRST)
    shelf = MethodShelf(build_pruner("none"))
    assert file_options("first") == ["list_file", "folder"]
    assert defaults("first").keys() == {"visual_token_num", "visual_token_ratio", "step"}
    for option in ("list_file", "folder"):
        with pytest.raises(ServeError, match="is the server's to set"):
            shelf.get(PruningRequest(method="first", options={option: "/etc/passwd"}))
    with pytest.raises(ServeError, match="step takes a whole number"):
        shelf.get(PruningRequest(method="first", options={"step": "/etc/passwd"}))
    assert shelf.get(PruningRequest(method="first", options={"step": 2})).step == 2
