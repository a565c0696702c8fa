"""`python -m llava.pruning`: what a setting means."""

from dataclasses import replace

import pytest

from llava.pruning import METHODS, DecoderStage, Pruner, build_pruner
from llava.pruning.about import GROUPS, group_name, is_trained, where_it_acts
from llava.pruning.program import SIZES, Plan, main, sentence_about
from llava.serve.web import menu
from llava.serve.web.methods import Method


def lines(capsys, *arguments) -> list[str]:
    main(list(arguments))
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_described_for_every_model(capsys, name):
    out = lines(capsys, name)
    assert sum(line.startswith("LLaVA-") for line in out) == 4
    assert sum(line.startswith(("tokens entering", "does not run here")) for line in out) == 4


def test_neighbouring_layers_with_the_same_count_share_an_entry(capsys):
    out = lines(capsys, "fastv", "--visual-token-num", "64", "--layers", "32")
    assert out[4] == "tokens entering layer 0-1: 576, 2-31: 64"
    assert out[5] == "average over layers: 96.0 of 576 (16.7%)"


def test_depth_is_that_of_the_model_or_the_one_given(capsys):
    assert "LLaVA-1.5 13B, 40 layers" in lines(capsys, "none")
    of_10 = lines(capsys, "none", "--layers", "10")
    assert "LLaVA-1.5 as wide as 13B (5120), 10 layers" in of_10
    assert not any("13B, 10 layers" in line for line in of_10)


def test_a_number_of_layers_shows_the_model_that_has_it_and_no_other(capsys):
    for layers, own, other in (("32", "7B", "13B"), ("40", "13B", "7B")):
        titles = [line for line in lines(capsys, "none", "--layers", layers) if "LLaVA-" in line]
        assert titles == [f"{name} {own}, {layers} layers" for name in ("LLaVA-1.5", "LLaVA-NeXT")]
        assert not any(f" {other}" in title for title in titles)


@pytest.mark.parametrize("name", METHODS.own)
def test_what_a_method_does_comes_first_in_one_sentence(capsys, name):
    parts = [*build_pruner(name).named]  # a wrapper, and the method in it
    (first, *others), (listed,) = lines(capsys, name), lines_about(capsys, name)
    sentences = [sentence_about(METHODS[part]) for part in parts]
    assert [first, *others[: len(parts) - 1]] == sentences
    if METHODS[name] is not Pruner:
        assert others[len(parts) - 1].startswith(METHODS[name].__name__)
        assert "(" not in others[len(parts) - 1].partition(": ")[0]
    assert first.endswith(".") and ". " not in first and ": " in first
    assert listed.endswith(first.partition(": ")[2])


def lines_about(capsys, name) -> list[str]:
    """What the list of all methods says of one."""
    return [line for line in lines(capsys) if line.split()[:1] == [name]]


def test_the_list_has_the_groups_of_the_web_page(capsys):
    out, groups, here = lines(capsys), {}, None
    for line in out:
        if line.lower() in (names := [group_name(*group) for group in GROUPS]):
            here = line.lower()
        elif here and line.split()[:1] and line.split()[0] in METHODS:
            groups[line.split()[0]] = here
    assert list(groups) != sorted(groups) and set(groups) == set(METHODS)
    for name, group in groups.items():
        about = Method(name, acts=where_it_acts(METHODS[name]), trained=is_trained(METHODS[name]))
        assert menu.group_of(about) == group
    assert [g for g in names if g in groups.values()] == list(dict.fromkeys(groups.values()))


def test_several_methods_are_explained_one_after_the_other(capsys):
    for words in (["vispruner", "fastv"], ["vispruner,fastv"], ["--methods", "vispruner", "fastv"]):
        out = lines(capsys, *words, "--layers", "32")
        titles = [
            line.partition(":")[0] for line in out if line.startswith(("VisPruner:", "FastV:"))
        ]
        assert titles == ["VisPruner"] * 2 + ["FastV"] * 2


def test_a_wrapper_is_told_in_words(capsys):
    out = lines(capsys, "restore")
    assert any(
        line.startswith("Restore around FasterVLM: visual_token_num 64, gamma") for line in out
    )
    assert not any("FasterVLM(" in line or "visual_token_num 144" in line for line in out)


def test_an_image_of_several_crops_gets_the_same_share(capsys):
    for budget, shown in (("64", 320), ("640", 640)):  # five times 640 are more than there are
        out = lines(capsys, "vispruner", "--visual-token-num", budget, "--layers", "32")
        title = next(line for line in out if line.startswith("LLaVA-NeXT"))
        assert f"tokens entering layer 0-31: {shown}" in out
        assert ("5 times the budget" in title) == (shown == 320)


def test_both_methods_of_a_pair_are_told(capsys):
    out = lines(capsys, "vispruner+fastv", "--pruning-arg", "fastv_layer=3")
    assert [line.partition(":")[0] for line in out[:2]] == ["VisPruner", "FastV"]


def test_numbers_of_the_dense_7b_model():
    shape = SIZES["7B"]
    plan = Plan.of(Pruner(), shape, crops=1)
    assert plan.kv_bytes(shape, text=0) == 2 * 2 * 4096 * 576 * 32
    n, d, m = 576 + 40, 4096, 11008
    fastv = 32 * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
    assert plan.flops(shape, 40, "fastv") == pytest.approx(fastv)


def test_a_budget_that_does_not_fit_one_model_is_told_for_that_model(capsys):
    with pytest.raises(SystemExit) as stop:  # on no model at all
        lines(capsys, "vispruner", "--visual-token-num", "9999")
    assert stop.value.code == 1
    capsys.readouterr()
    out = lines(capsys, "vispruner", "--visual-token-num", "640")
    assert sum("does not run here: visual_token_num (640) exceeds" in line for line in out) == 2
    assert "tokens entering layer 0-31: 640" in out


def test_what_depends_on_the_image_is_told_as_a_bound(capsys):
    adaptive = [name for name in METHODS if build_pruner(name).adaptive]
    for name in adaptive:
        assert any("at most" in line for line in lines(capsys, name))


def test_entries_dropped_from_earlier_caches_are_not_counted():
    class Late(DecoderStage, Pruner):
        def token_schedule(self, num_patches, num_layers, crops=1):
            return [10, 10, 4]

        def pruned_caches(self, index, num_layers):
            return range(1, 2) if index == 2 else range(0)

    assert Plan.of(Late(), replace(SIZES["7B"], num_layers=3), 1).entries == 10 + 4 + 4


def test_mistakes_end_with_one_line():
    with pytest.raises(SystemExit, match="error: unknown pruning method 'nope'"):
        main(["nope"])
    with pytest.raises(SystemExit, match="must start with vispruner_ or fastv_"):
        main(["vispruner+fastv", "--visual-token-num", "64"])
