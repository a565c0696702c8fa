"""Every recorded reference case matches: the part in tests/golden, and all of it when present."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava.model.language_model import modeling_llama, prompt_layer
from llava.model.language_model.compiled_step import CompiledStep
from llava.pruning import METHODS
from tests.golden_cases import SHARED, SHIPPED, check_of, load_cases, locate, main, run_case
from tests.golden_checks import e2e, methods
from tests.golden_checks.models import compiling

#: what a check says about a recorded program that does not exist yet
NOT_YET = "is not part of the project"
#: cases whose parts are tests of their own, in tests/eval/answering/test_inference.py
TESTED_APART = {"inference-cli"}
#: kinds of cases in which a whole model runs on a prompt -> what is then recorded of it
WHOLE = {
    "e2e": "output_ids",
    "e2e-batch": "logits_last_valid",
    "qwen": "output_ids",
    "qwen-plain": "output_ids",
}


def recorded_cases():
    """(folder, case) of every index; a case that ships is not run again from the full data."""
    seen = set()
    for root in (SHIPPED, SHARED):
        for index in sorted(root.glob("*/index.json")):
            for case in load_cases(index.parent):
                key = index.parent.name, case["id"]
                if key in seen or not supported(case):
                    continue
                seen.add(key)
                marks = [pytest.mark.slow] if case["id"] in TESTED_APART else []
                yield pytest.param(index.parent, case, id="/".join(key), marks=marks)


def supported(case) -> bool:
    # "METHOD-train" is about its training, "METHOD+" a variant.
    method = case.get("method", "none").split("-")[0].rstrip("+")
    return method in METHODS and check_of(case) is not None


def answering_cases():
    """Those of whole models that generate more than one token."""
    for param in recorded_cases():
        folder, case = param.values
        if case["file"].endswith(".npz") and case["args"].get("mode") != "train":
            with np.load(folder / case["file"]) as arrays:
                if "output_ids" in arrays.files and arrays["output_ids"].shape[-1] > 1:
                    yield param


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("folder", "case"), list(recorded_cases()))
def test_the_recorded_case_is_reproduced(folder, case):
    assert [problem for problem in run_case(case, folder) if NOT_YET not in problem] == []


@pytest.fixture(scope="module")
def graphs_of():
    """The folder whose checkpoints steps are compiled for."""
    return []


@pytest.fixture
def fresh_graphs(folder, graphs_of):
    """No more graphs than one model needs: those for the checkpoints of other folders are given
    up."""
    if graphs_of != [folder]:
        torch.compiler.reset()
        graphs_of[:] = [folder]


def one_of_each(cases):
    """The first one of every folder: a case compiles for a quarter of a minute. All of them:
    python -m tests.golden_cases --compile FOLDER"""
    taken = set()
    for param in cases:
        if (folder := param.values[0]) not in taken:
            taken.add(folder)
            yield param


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "case"), list(one_of_each(answering_cases())))
def test_it_is_reproduced_with_compiled_steps_of_decoding(fresh_graphs, folder, case, monkeypatch):
    run, taken = CompiledStep.run, []
    monkeypatch.setattr(CompiledStep, "run", lambda *args: taken.append(1) or run(*args))
    with compiling(decoding=True):
        assert [problem for problem in run_case(case, folder) if NOT_YET not in problem] == []
    assert taken


def prompting_cases():
    """Those of whole models, the first of every kind in every folder. All of them:
    python -m tests.golden_cases --compile-prompts FOLDER"""
    taken = set()
    for param in recorded_cases():
        folder, case = param.values
        if case["kind"] not in WHOLE or (folder, case["kind"]) in taken:
            continue
        with np.load(folder / case["file"]) as arrays:
            answers = WHOLE[case["kind"]] in arrays.files
        if answers:
            taken.add((folder, case["kind"]))
            yield param


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "case"), list(prompting_cases()))
def test_it_is_reproduced_with_compiled_prompts_and_towers(folder, case, monkeypatch):
    run, taken = prompt_layer.run_compiled, []
    monkeypatch.setattr(modeling_llama, "run_compiled", lambda *args: taken.append(1) or run(*args))
    with compiling(prefill=True):
        assert [problem for problem in run_case(case, folder) if NOT_YET not in problem] == []
    assert taken


def test_the_runner_counts_what_matches_and_says_what_differs(tmp_path, capsys):
    text = (SHIPPED / "llava-base" / "text_utils.json").read_text(encoding="utf-8")
    (tmp_path / "text_utils.json").write_text(text.replace('"stop": true', '"stop": false'))
    (tmp_path / "index.json").write_text(
        '[{"id": "changed", "file": "text_utils.json", "kind": "text",'
        ' "checkpoint": "tiny-llava-v1.5"},'
        ' {"id": "new", "file": "x.npz", "kind": "hologram"}]'
    )
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "changed: stop of" in printed and "kind 'hologram' are not supported" in printed
    assert printed.endswith("total: 0/2\n")


def test_the_runner_succeeds_when_all_match(tmp_path, capsys):
    case = '[{"id": "a", "file": "prompts.json", "kind": "prompts"}]'
    (tmp_path / "index.json").write_text(case)
    source = Path(SHIPPED / "llava-base" / "prompts.json")
    (tmp_path / "prompts.json").write_text(source.read_text(encoding="utf-8"))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("total: 1/1\n")


def test_other_folders_of_the_same_kinds_are_understood(tmp_path):
    """Trained parts may stay where the shipped cases have them; a kind may be left out or short."""
    folder = tmp_path / "twigvlm"
    folder.mkdir()
    twig = SHIPPED / "twigvlm" / "twig_c_k2t3_near"
    assert locate("twig_c_k2t3_near", folder) == twig
    assert locate("twig_c_k2t3_near", tmp_path / "fastv") == twig
    (folder / "index.json").write_text(
        '[{"id": "a"}, {"id": "b", "kind": "fn", "args": null},'
        ' {"id": "c", "args": {"model": "qwen2.5-vl"}}]'
    )
    cases = load_cases(folder)
    assert [(c["id"], c["kind"], c["args"]) for c in cases] == [
        ("a", "e2e", {}),
        ("b", "function", {}),
    ]


def test_recorded_budgets_above_the_patches_are_all_patches():
    args = {"visual_token_num": 600, "theta": None, "prune_layer_K": 0}
    case = {"kind": "e2e", "args": args}
    assert methods.budget(case) == 576 and methods.budget(case, crops=5) == 2880
    assert methods.budget({**case, "kind": "function"}) == 600
    assert methods.given(args, "theta", prune_layer_K="layer") == {"layer": 0}


def test_a_layer_without_a_cut_has_the_tokens_of_the_one_before():
    kept = torch.tensor([0, 2])
    trace = SimpleNamespace(decoder_keep={3: [kept]}, position_ids=torch.zeros(1, 4))
    assert e2e.entering(trace, 2).tolist() == [0, 1, 2, 3]
    assert e2e.entering(trace, 3) is kept and e2e.entering(trace, 7) is kept


def test_a_folder_without_an_index_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "no index.json" in capsys.readouterr().err
