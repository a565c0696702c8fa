"""The efficiency benchmark: right counts, right stages, fair baselines."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import CLIPVisionConfig

from llava.eval.efficiency import program as efficiency
from llava.eval.efficiency.measure import (
    STAGES,
    Workload,
    build_variants,
    llava_facts,
    make_pruner,
    measure,
    time_llava,
)
from llava.eval.efficiency.memory import peak_bytes
from llava.eval.efficiency.oracle import Oracle, imitation
from llava.eval.efficiency.random_model import CONFIGS, DECODERS, build_random_model, shapes
from llava.eval.efficiency.report import spread, summarize
from llava.eval.efficiency.stock import stock_decoder
from llava.eval.efficiency.stopwatch import Stopwatch
from llava.model import LlavaConfig
from llava.model.language_model.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from llava.pruning import METHODS, Pruner, build_pruner
from llava.pruning.testing.tiny import make_own_grids_model
from tests.conftest import PATCH, SIDE, TINY, TOWER
from tests.paths import GOLDEN

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size")
LAYERS, WIDTH, INNER = (TINY[name] for name in SIZES)
PATCHES, TEXT = (SIDE // PATCH) ** 2, 8
BUDGETS = {"pyramiddrop": 20}


@pytest.fixture(scope="module")
def model():
    return build_random_model(LlavaConfig(**TINY), CLIPVisionConfig(**TOWER))


@pytest.fixture(scope="module")
def own_grids_model():
    return make_own_grids_model()


@pytest.fixture(scope="module")
def workload(model):
    return Workload.random(model, batch_size=2, prompt_length=TEXT, num_tokens=3)


@pytest.fixture(scope="module")
def rows(model, workload):
    names = ("vispruner", "random", "fastv", "pyramiddrop")
    pruners = {name: make_pruner(name, BUDGETS.get(name, 9), model) for name in names}
    variants = build_variants(model, workload, pruners, 9, stock=True)
    measure(variants, repeats=2, warmup=1)
    return {row["variant"]: row for row in summarize(variants)}


def test_every_variant_has_a_row_with_its_stages(rows):
    methods = ["vispruner", "random", "oracle of fastv", "fastv"]
    methods += ["oracle of pyramiddrop", "pyramiddrop"]
    assert list(rows) == ["dense", "oracle", *methods, "stock"]
    assert set(rows["vispruner"]["ms"]) == set(STAGES)
    assert set(rows["stock"]["ms"]) == {"prefill", "decode"}


def test_ratios_are_1_for_the_baselines_themselves(rows):
    assert set(rows["oracle"]["times_oracle"].values()) == {1.0}
    assert set(rows["dense"]["times_dense"].values()) == {1.0}


def test_stages_fill_the_whole_run(rows):
    for name in ("dense", "vispruner"):
        ms = {stage: row["median"] for stage, row in rows[name]["ms"].items()}
        parts = ms["vision"] + ms["select"] + ms["prefill"]
        assert parts <= ms["first_token"] * 1.5 and ms["first_token"] < ms["end_to_end"]
    assert rows["vispruner"]["ms"]["select"]["median"] > 0
    assert rows["dense"]["ms"]["select"]["median"] == 0


@pytest.mark.parametrize("name, tokens", [("dense", PATCHES), ("oracle", 9), ("vispruner", 9)])
def test_operations_and_bytes_are_those_of_the_formulas(rows, name, tokens):
    n, d, m = tokens + TEXT, WIDTH, INNER
    row = rows[name]
    exact = 2 * n * (4 * d * d + 3 * d * m) + 4 * n * n * d
    fastv = 4 * n * d * d + 2 * n * n * d + 2 * n * d * m
    assert row["visual_tokens_mean"] == tokens
    assert row["flops_exact"] == 2 * LAYERS * exact  # two prompts
    assert row["flops_fastv"] == 2 * LAYERS * fastv
    assert row["kv_bytes"] == 2 * LAYERS * n * 2 * d * 4  # keys and values of 4 bytes


def test_the_oracle_keeps_the_first_patches(model, workload):
    vision = model.get_vision_tower().tokens(workload.images)
    kept = Oracle.constant(5, crops=2).after_encoder(vision)
    assert torch.equal(kept.features, vision.features[:, :5])
    assert kept.positions.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_methods_share_an_oracle_exactly_where_their_token_counts_are_equal(rows):
    own = {name: row["oracle"] for name, row in rows.items() if row["oracle"]}
    assert own["vispruner"] == own["random"] == "oracle"
    assert own["fastv"] == "oracle of fastv" and own["pyramiddrop"] == "oracle of pyramiddrop"
    for name, oracle in own.items():
        tokens = "visual_tokens_per_layer"
        assert rows[name][tokens] == rows[oracle][tokens]
        assert rows[name]["kv_bytes"] == rows[oracle]["kv_bytes"]
        assert rows[name]["times_own_oracle"]["prefill"] > 0


@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
@pytest.mark.parametrize("kind", ["model", "anyres_model", "own_grids_model"])
def test_every_method_has_an_oracle_with_its_token_counts(kind, name, request):
    """In every layer and cache, on one crop per image and on several, and with the same
    positions."""
    model = request.getfixturevalue(kind)
    size = (40, 36) if kind == "own_grids_model" else None  # of tiny patches: 90 tokens
    workload = Workload.random(model, 2, prompt_length=TEXT, num_tokens=2, image_size=size)
    crops = model.crops_in_budget(Pruner())
    try:
        pruner = make_pruner(name, 64 if name == "mustdrop" else 15 * crops, model)
        efficiency.check_image(pruner, model, size)
    except ValueError as error:
        reasons = ("one crop per image", "out of reach", "does not provide")
        if any(reason in str(error) for reason in reasons):
            pytest.skip(str(error))
        raise
    found = llava_facts(model, pruner, workload)
    oracle = llava_facts(model, imitation(found["schedule"], like=pruner), workload)
    for fact in ("visual_tokens_per_layer", "kv_bytes"):
        assert oracle["facts"][fact] == found["facts"][fact]
    assert oracle["schedule"].layers == found["schedule"].layers
    assert oracle["schedule"].renumber == found["schedule"].renumber
    model.pruner = build_pruner("none")


def test_a_budget_above_what_an_image_has_is_watched_in_the_copy_that_runs(own_grids_model):
    """The host runs a copy of the method for every grid; an oracle must see what that does."""
    workload = Workload.random(own_grids_model, 1, TEXT, 2, image_size=(12, 8))  # 3 x 2 tokens
    pruner = make_pruner("vispruner", 9, own_grids_model)
    found = llava_facts(own_grids_model, pruner, workload)["facts"]
    assert found["visual_tokens_first_layer"] == 6
    share = build_pruner("vispruner", visual_token_ratio=0.5)
    found = llava_facts(own_grids_model, share, workload)
    assert found["facts"]["visual_tokens_first_layer"] == 3
    assert found["schedule"].encoder == (3,)
    assert time_llava(own_grids_model, share, workload)["select"] > 0


def test_images_have_the_size_that_was_asked_for(own_grids_model, model):
    workload = Workload.random(own_grids_model, 2, TEXT, 1, image_size=(41, 23))
    assert workload.images.shape[:3] == (2, 6, 10)  # in whole blocks of 4 pixels
    assert workload.image_sizes == [(40, 24)] * 2
    with pytest.raises(ValueError, match="--image-size has no place here"):
        Workload.random(model, 1, TEXT, 1, image_size=(41, 23))


@pytest.mark.parametrize(
    "name, layers, billions", [("qwen2.5-vl-3b", 36, 3.75), ("qwen2.5-vl-7b", 28, 8.29)]
)
def test_shapes_of_qwen_have_the_parameters_of_the_release(name, layers, billions):
    config, tower = shapes(name)
    assert tower is None and config.num_hidden_layers == layers
    with torch.device("meta"):
        whole = Qwen2_5_VLForConditionalGeneration(config)
    assert sum(p.numel() for p in whole.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert shapes(name, layers=8)[0].num_hidden_layers == 8


def test_qwen_is_measured_beside_dense_oracle_and_the_decoder_of_transformers(capsys):
    argv = f"--config {GOLDEN / 'tiny-qwen2.5-vl-cut'} --layers 3 --image-size 168x140 --stock"
    argv += " --method vispruner,fastv --visual-token-num 9 --dtype fp32 --repeats 1 --warmup 0"
    result = efficiency.main([*argv.split(), "--output-tokens", "2"])
    rows = {row["variant"]: row for row in result["runs"][0]["variants"]}
    assert list(rows) == ["dense", "oracle", "vispruner", "oracle of fastv", "fastv", "stock"]
    assert result["about"]["image_size"] == "168x140" and result["about"]["layers"] == 3
    assert rows["dense"]["visual_tokens_mean"] == 30
    assert rows["fastv"]["visual_tokens_per_layer"] == [30, 9, 9]
    assert rows["vispruner"]["ms"]["vision"]["median"] > 0
    with pytest.raises(SystemExit, match="cdpruner needs 'text_tower'"):
        efficiency.main([*argv.replace("vispruner,fastv", "cdpruner").split()])


def test_stock_computes_what_ours_does_on_qwens_weights(own_grids_model):
    """On text, where all axes of a position are equal."""
    stock = stock_decoder(own_grids_model)
    embeds = torch.randn(1, 5, own_grids_model.config.hidden_size)
    positions = torch.arange(5).view(1, 5, 1).expand(1, 5, 3)
    ours = own_grids_model.model(embeds, position_ids=positions).hidden_states
    assert torch.allclose(stock.model(inputs_embeds=embeds).last_hidden_state, ours, atol=1e-5)


def test_the_oracle_watches_the_run_and_not_the_name(model, workload):
    one, other = (
        build_pruner("fastv", visual_token_num=9, layer=1),
        build_pruner("fastv", visual_token_num=9, layer=3),
    )
    schedules = [llava_facts(model, pruner, workload)["schedule"] for pruner in (one, other)]
    assert [schedule.layers for schedule in schedules] == [{1: (9, 9)}, {3: (9, 9)}]
    assert not Oracle(schedules[0]).does_the_same_as(Oracle(schedules[1]), tiled=False)


def test_peak_memory_counts_what_is_held_at_once():
    def work():
        for _ in range(3):
            torch.zeros(16, 2**20).add_(1)

    found = peak_bytes(work, torch.device("cpu"))
    if found is None:
        pytest.skip("no /proc here")
    assert 60e6 < found < 150e6


def test_a_random_model_answers_with_as_many_tokens_as_asked_for(model, workload):
    model.pruner = build_pruner("none")
    output = model.generate(
        workload.input_ids, images=workload.images, max_new_tokens=7, do_sample=False
    )
    assert output.shape == (2, 7)


def test_the_stock_decoder_computes_what_ours_does(model, workload):
    model.pruner = build_pruner("none")
    embeds = model.build_prompt(workload.input_ids, images=workload.images).inputs_embeds
    stock = stock_decoder(model)
    ours = model.model(embeds).hidden_states
    assert torch.allclose(stock.model(inputs_embeds=embeds).last_hidden_state, ours, atol=1e-5)
    assert stock.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_nested_stages_are_not_counted_twice():
    watch = Stopwatch(torch.device("cpu"))
    with watch.span("outer") as outer, watch.span("inner") as inner:
        pass
    outer.start, inner.start, inner.stop, outer.stop = 0.0, 1.0, 4.0, 10.0
    assert watch.read() == {"outer": [7.0], "inner": [3.0]}


def test_a_stage_is_seen_from_its_beginning_on():
    watch = Stopwatch(torch.device("cpu"))
    assert not watch.seen("prefill")
    with watch.span("prefill"):
        assert watch.seen("prefill")
    assert watch.seen("prefill") and not watch.seen("decode")


def test_watched_methods_are_restored(model):
    watch, plain = Stopwatch(torch.device("cpu")), model.forward
    with watch.watch([(model, "forward", "prefill")]):
        assert model.forward != plain
    assert model.forward == plain


def test_percentiles_of_a_single_value_are_that_value():
    assert spread([2.0]) == {"median": 2.0, "p10": 2.0, "p90": 2.0}
    assert spread([float(n) for n in range(11)]) == {"median": 5.0, "p10": 1.0, "p90": 9.0}


@pytest.mark.parametrize("name, billions", [("1b", 1.24), ("7b", 6.74), ("13b", 13.0)])
def test_named_sizes_have_the_parameters_they_promise(name, billions):
    width, inner, layers, *_ = DECODERS[name]
    numbers = layers * (4 * width**2 + 3 * width * inner) + 2 * 32000 * width
    assert round(numbers / 1e9, 2) == pytest.approx(billions, abs=0.02)
    config, tower = shapes(name)
    assert (config.hidden_size, (tower.image_size // tower.patch_size) ** 2) == (width, 576)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("next-")])
def test_next_shapes_cut_an_image_into_five_crops(name):
    config, _ = shapes(name)
    assert config.image_aspect_ratio == "anyres" and [672, 672] in config.image_grid_pinpoints
    assert config.num_attention_heads % config.num_key_value_heads == 0


def test_the_last_line_is_the_result_as_json(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    argv = f"--config {GOLDEN / 'tiny-llava-v1.5'} --method random,fastv --visual_token_num 64"
    argv += " --dtype fp32 --repeats 1 --warmup 0 --output-tokens 1,2 --batch-size 2"
    argv += f" --json {tmp_path / 'r.json'} --markdown {tmp_path / 'r.md'}"
    efficiency.main([*argv.split(), "--plot", str(tmp_path / "r.png")])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert [(run["batch_size"], run["output_tokens"]) for run in result["runs"]] == [(2, 1), (2, 2)]
    names = ["dense", "oracle", "random", "oracle of fastv", "fastv"]
    assert [row["variant"] for row in result["runs"][0]["variants"]] == names
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert sum(line.split()[:2] == ["random", "64"] for line in lines) == 2
    page = (tmp_path / "r.md").read_text()
    assert page.count("| `fastv` | 576 / ") == 2 and page.startswith("<!-- efficiency: begin -->")
    said = page.splitlines()[4]
    assert ", float32, sdpa attention, " in said and f"(`{GOLDEN / 'tiny-llava-v1.5'}`), " in said
    assert " layers, 64 text tokens and one image (336x336) per prompt, wall time, torch " in said
    assert re.search(r", transformers 4\.\S+, copies at \d+ GB/s\.$", said)
    assert (tmp_path / "r.png").stat().st_size > 5000


def test_all_methods_are_measured_or_named_with_the_reason(model):
    pruners, refused = efficiency.methods_to_measure(["all"], 9, model)
    assert pruners.keys() | refused.keys() | {"none"} == METHODS.keys()
    assert not pruners.keys() & refused.keys()
    assert "published settings" in refused["mustdrop"]
    with pytest.raises(ValueError, match="published settings"):
        efficiency.methods_to_measure(["random", "mustdrop"], 9, model)


def test_without_a_named_method_all_are_measured():
    assert efficiency.parse_args([]).methods == [efficiency.ALL]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config", "70b"], "unknown size '70b'"),
        (["--config", str(GOLDEN / "tiny-llava-v1.5"), "--method", "magic"], "unknown pruning"),
        (["--repeats", "0"], "--repeats must be at least 1"),
    ],
)
def test_bad_settings_end_with_a_message(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        efficiency.main(argv)
    assert message in f"{ended.value}\n{capsys.readouterr().err}"
