"""What is reported about decoding: rates from arrivals, the cost model, whole runs."""

import json

import pytest
import torch

from llava.eval.efficiency import decode_speed, random_model
from llava.eval.efficiency.chance import ChanceChoice
from llava.eval.efficiency.decode_report import cost_model, rows_of, table
from llava.eval.efficiency.decode_run import Clock, Variant, measure, variants_of
from llava.model.language_model import compiled_step
from llava.model.self_speculative import SpeculationLog
from llava.model.token_tree import TokenTree
from llava.pruning import build_pruner
from llava.pruning.cli import options_by_method
from llava.pruning.drafter import Drafter
from tests.pruning.test_twigvlm import grown


def clock(*arrivals):
    made = Clock()
    made.arrivals = list(arrivals)
    return made


def test_rates_count_what_comes_after_the_first_arrival():
    seen = clock((0.5, 2), (1.0, 3), (1.5, 1))
    assert (seen.tokens, seen.first_seconds, seen.decode_rate) == (6, 0.5, 4.0)
    assert clock((0.5, 4)).decode_rate is None
    seen = Clock()
    for value in (torch.ones(1, 1), torch.ones(3)):  # the first shows the prompt
        seen.put(value)
    assert seen.tokens == 3


def test_the_cost_model_is_that_of_the_paper(make_model):
    model = make_model(num_hidden_layers=32)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.numel() / layer
    drafter = Drafter(2, model.model.layers[:3], None, None)
    expected = (32 + head) * (1 + 1.2) / (2 * (5 + head) + 32 + head)
    assert cost_model(drafter, model, 1.2, 2.0) == pytest.approx(expected)
    assert cost_model(drafter, model, 0.0, 0.0) == 1


def test_answers_of_one_step_say_that_more_tokens_are_needed(model):
    variant = Variant("dense", build_pruner(), "autoregressive")
    variant.clocks, variant.answers = [clock((0.1, 4))], [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match="dense: every answer came in one step.*max-new-tokens"):
        rows_of([variant], model)


def test_every_line_is_compared_with_the_dense_model_and_with_not_guessing(model):
    pruner = grown(model)
    variants = [
        Variant("dense", build_pruner(), "autoregressive"),
        Variant("twigvlm", pruner, "autoregressive"),
        Variant("twigvlm, no guesses", pruner, "self_speculative", {"num_speculations": 0}),
        Variant("twigvlm, guessing", pruner, "self_speculative"),
    ]
    for variant, gap in zip(variants, (1.0, 0.8, 0.5, 0.25), strict=True):
        variant.clocks = [clock((0.1, 1), (0.1 + 4 * gap, 4))]
        variant.answers = [[1, 2, 3, 4, 5]]
    variants[3].logs = [SpeculationLog(drafts=[[1, 2], [3, 9]], accepted=[2, 1])]
    dense, plain, still, fast = rows_of(variants, model)
    assert (dense.speed_up, plain.speed_up, fast.speed_up) == pytest.approx((1, 1.25, 4))
    assert fast.step_speed_up == pytest.approx(2) and still.predicted is None
    assert (fast.accepted, fast.drafted, fast.acceptance) == (1.5, 2, 0.75)
    assert fast.same_answers == 100 and plain.same_answers is None
    lines = table([dense, fast])
    assert lines.count("\n") == 3 and "| dense |" in lines and "| – |" in lines


def test_the_number_of_guesses_is_that_of_the_guessing_way_alone(model):
    ways = variants_of({"twigvlm": grown(model)}, 3)
    assert [way.guesses for way in ways] == [False, False, False, True]
    assert [way.options.get("num_speculations") for way in ways] == [None, None, 0, 3]


def test_trees_are_a_way_of_their_own_where_they_are_asked_for(model):
    ways = variants_of({"twigvlm": grown(model)}, tree={"tree_nodes": 30, "tree_depth": None})
    assert ways[4].name == "twigvlm, guessing trees" and ways[4].options == {"tree_nodes": 30}
    assert [way.options.get("tree_nodes") for way in ways] == [None, None, 0, 0, 30]
    assert ways[4].guesses and len(variants_of({"twigvlm": grown(model)})) == 4
    own = variants_of({"twigvlm": grown(model, tree_nodes=60)})
    assert own[4].options == {} and own[3].options == {"tree_nodes": 0}


def test_levels_of_trees_agree_as_often_as_asked():
    torch.manual_seed(0)
    tree = TokenTree(
        tokens=torch.tensor([3, 2, 3, 3]),
        parents=torch.tensor([0, 0, 1, 3]),
        depths=torch.tensor([1, 1, 2, 3]),
        scores=torch.zeros(4),
        deepest=3,
    )
    choice = ChanceChoice([], None, torch.zeros(1, 1).long(), [], acceptance=0.5)
    runs = [len(choice.walk(torch.zeros(5, 5), tree).accepted) for _ in range(3000)]
    share = torch.bincount(torch.tensor(runs)) / len(runs)
    assert share.tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.04)


def test_every_way_is_also_compiled_where_that_is_asked_for(model, monkeypatch):
    monkeypatch.setattr(compiled_step, "compiled", lambda function: function)
    ways = variants_of({"twigvlm": grown(model)}, 3, compile=True)
    assert [way.compiled for way in ways] == [False] * 4 + [True] * 4
    kept = {way.name: way for way in ways if way.name.startswith("dense")}
    prompt = dict(input_ids=torch.tensor([[1, 5, 9]]), eos_token_id=-1)
    measure(model, list(kept.values()), [lambda: dict(prompt)] * 2, 4)
    assert kept["dense"].answers == kept["dense, compiled"].answers
    assert all(len(way.clocks) == 2 and way.first_call > 0 for way in kept.values())
    kept["dense"].clocks.clear()
    measure(model, [kept["dense"]], [lambda: dict(prompt)], 4, lambda: 0.0, warmup=3)
    assert [clock.arrivals[-1][0] for clock in kept["dense"].clocks] == [0.0]
    measure(model, list(kept.values()), [lambda: dict(prompt)] * 2, 4)
    dense, fast = rows_of(list(kept.values()), model)
    assert dense.compiled_speed_up is None and fast.compiled_speed_up > 0
    assert fast.same_answers == 100 and fast.start_up is not None
    model.compile_decoding = False


def test_chance_agrees_as_often_as_asked():
    torch.manual_seed(0)
    scores, guessed = torch.eye(4), torch.tensor([3, 3, 3])
    choice = ChanceChoice([], None, guessed[None], [], acceptance=0.5)
    runs = []
    for _ in range(4000):
        tokens, agreed = choice._best(scores, guessed, None)
        runs.append(int(agreed))
        assert tokens.tolist() == [3] * runs[-1] + [0, 1, 2, 3][runs[-1] :]
    share = torch.bincount(torch.tensor(runs)) / len(runs)
    assert share.tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.03)
    assert choice.stops(3, 0.01, 0.6) == (False, False)


@pytest.mark.slow
def test_random_weights_guess_as_many_as_asked_and_are_right_as_often_as_asked(monkeypatch, capsys):
    monkeypatch.setitem(random_model.CLIP_LARGE, "num_hidden_layers", 2)  # the tower is not asked
    words = ["--config", "small", "--visual-token-num", "96", "--num-speculations", "2"]
    words += ["--acceptance", "1", "--limit", "1", "--max-new-tokens", "13", "--device", "cpu"]
    words += ["--warmup", "1"]
    result = decode_speed.main(words)
    assert result["about"]["acceptance"] == 1 and result["about"]["model"] == "small"
    row = result["rows"][3]
    # 13 tokens: three a step, and one in the last step, where no guess has a place
    assert (row["accepted"], row["drafted"]) == (1.6, 1.6) and row["same_answers"] is None
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


def test_made_up_and_trained_models_are_not_mixed(capsys):
    for words, message in (
        (["--config", "7b", "--model-path", "a"], "--model-path has no place there"),
        (["--config", "7b", "--load-4bit"], "--load-4bit has no place there"),
        (["--config", "7b", "--acceptance", "1.5"], "must lie between 0 and 1"),
        (["--prompt-length", "9"], "--prompt-length is for random weights: choose --config from"),
        (["--acceptance", "0"], "--acceptance is for random weights"),
    ):
        with pytest.raises(SystemExit):
            decode_speed.parse_args(words)
        assert message in capsys.readouterr().err


def test_options_belong_to_a_method_that_is_run():
    assert options_by_method(["twigvlm.twig=a/b", "fastv.layer=3"], ["fastv", "twigvlm"]) == {
        "twigvlm": {"twig": "a/b"},
        "fastv": {"layer": 3},
    }
    for pair in ("layer=3", "pool.layer=3"):
        with pytest.raises(ValueError, match=r"one of the methods that are run \(fastv\)"):
            options_by_method([pair], ["fastv"])


def test_a_whole_run_reports_every_way(monkeypatch, tmp_path, model, capsys):
    """The real loop on the playground's questions, with a small random model behind it."""
    from llava.eval.answering.program import load_loop
    from llava.playground import default_model_path
    from llava.pruning.twigvlm import grow_twig, save_twig

    if not _has_playground():
        pytest.skip("the playground is not here")
    args = decode_speed.parse_args(["--device", "cpu"])
    base = load_loop(args).model
    save_twig(str(tmp_path / "twig"), grow_twig(base, 0, 2).state_dict(), 0, default_model_path())
    words = ["--limit", "1", "--max-new-tokens", "8", "--device", "cpu", "--dtype", "float32"]
    words += ["--pruning-arg", f"twigvlm.twig={tmp_path / 'twig'}", "--json", str(tmp_path / "out")]
    words += ["--methods", "twigvlm"]
    page = tmp_path / "page.md"
    words += ["--markdown", str(page), "--warmup", "0", "--processor-time"]
    result = decode_speed.main(words)
    names = ["dense", "twigvlm", "twigvlm, no guesses", "twigvlm, guessing"]
    assert [row["name"] for row in result["rows"]] == names
    assert result["rows"][3]["same_answers"] == 100
    assert json.loads((tmp_path / "out").read_text()) == result
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!-- decoding: begin -->") and "clock processor" in text
    assert all(f"\n| {name} |" in text for name in names)


def _has_playground():
    from llava.playground import default_model_path

    try:
        return bool(default_model_path())
    except FileNotFoundError:
        return False


def test_the_efficiency_program_hands_over(monkeypatch):
    from llava.eval.efficiency import program as efficiency

    seen = []
    monkeypatch.setattr(decode_speed, "main", lambda words: seen.append(words) or {"rows": []})
    words = ["--decode", "--method", "twigvlm,fastv", "--dtype", "fp32", "--visual-token-num", "96"]
    assert efficiency.main(words) == {"rows": []}
    args = decode_speed.parse_args(seen[0])
    assert args.methods == ["twigvlm", "fastv"] and args.dtype == "fp32"
    assert args.visual_token_num == 96 and args.config is None
    efficiency.main([*words, "--config", "7b"])
    assert decode_speed.parse_args(seen[1]).config == "7b"
    efficiency.main([*words, "--config", "some/folder"])
    assert "--model-path some/folder" in " ".join(seen[2])
    more = ["--config", "qwen2.5-vl-3b", "--image-size", "84x56", "--prompt-length", "9"]
    more += ["--warmup", "0", "--processor-time", "--compile", "--layers", "2", "--json", "a.json"]
    efficiency.main(["--decode", *more, "--methods", "all"])
    args = decode_speed.parse_args(seen[3])
    assert (args.image_size, args.prompt_length, args.warmup, args.layers) == ((84, 56), 9, 0, 2)
    assert args.processor_time and args.compile and args.json == "a.json"
    assert args.methods == decode_speed.parse_args([]).methods  # all that guess


@pytest.mark.parametrize(
    "words",
    [
        ["--repeats", "20"],  # the default, but it was asked for
        ["--output-tokens", "5"],
        ["--batch-size", "1"],
        ["--time-limit", "9"],
        ["--plot", "a.png"],
        ["--stock"],
        ["--count-kernels"],
    ],
)
def test_the_efficiency_program_hands_over_all_or_says_what_it_cannot(words, capsys):
    from llava.eval.efficiency import program as efficiency

    with pytest.raises(SystemExit):
        efficiency.main(["--decode", *words])
    assert f"--decode has no use for {words[0]}: leave it out" in capsys.readouterr().err
