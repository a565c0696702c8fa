"""The efficiency benchmark: right counts, right stages, fair baselines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig

from llava.eval import efficiency
from llava.eval.efficiency import Oracle, Workload, build_variants, measure, spread, summarize
from llava.eval.random_model import DECODERS, build_random_model, shapes
from llava.eval.stock import stock_decoder
from llava.eval.stopwatch import Stopwatch
from llava.model import LlavaConfig
from llava.pruning import build_pruner

LAYERS, WIDTH, INNER, PATCHES, TEXT = 3, 16, 24, 36, 8
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def model():
    config = LlavaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        vocab_size=50,
        mm_hidden_size=24,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
    )
    tower = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=84,
        patch_size=14,
    )
    return build_random_model(config, tower)


@pytest.fixture(scope="module")
def workload(model):
    return Workload.random(model, batch_size=2, prompt_length=TEXT, num_tokens=3)


@pytest.fixture(scope="module")
def rows(model, workload):
    variants = build_variants(model, workload, ["vispruner", "random"], 9, stock=True)
    measure(variants, repeats=2, warmup=1)
    return {row["variant"]: row for row in summarize(variants)}


def test_every_variant_has_a_row_with_its_stages(rows):
    assert list(rows) == ["dense", "oracle", "vispruner", "random", "stock"]
    assert set(rows["vispruner"]["ms"]) == set(efficiency.STAGES)
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
    kept = Oracle(visual_token_num=5).after_encoder(vision)
    assert torch.equal(kept.features, vision.features[:, :5])
    assert kept.positions.tolist() == [[0, 1, 2, 3, 4]] * 2


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
    width, inner, layers, _ = DECODERS[name]
    numbers = layers * (4 * width**2 + 3 * width * inner) + 2 * 32000 * width
    assert round(numbers / 1e9, 2) == pytest.approx(billions, abs=0.02)
    config, tower = shapes(name)
    assert (config.hidden_size, (tower.image_size // tower.patch_size) ** 2) == (width, 576)


def test_the_last_line_is_the_result_as_json(monkeypatch, capsys, tmp_path):
    argv = f"program --config {GOLDEN / 'tiny-llava-v1.5'} --method random --visual_token_num 64"
    argv += f" --dtype fp32 --repeats 1 --warmup 0 --decode-tokens 1 --json {tmp_path / 'r.json'}"
    monkeypatch.setattr(sys, "argv", argv.split())
    efficiency.main()
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert [row["variant"] for row in result["variants"]] == ["dense", "oracle", "random"]
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert any(line.split()[:2] == ["random", "64"] for line in lines)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config", "70b"], "unknown --config '70b'"),
        (["--config", str(GOLDEN / "tiny-llava-v1.5"), "--method", "magic"], "unknown pruning"),
        (["--repeats", "0"], "--repeats must be at least 1"),
    ],
)
def test_bad_settings_end_with_a_message(monkeypatch, argv, message):
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    with pytest.raises(SystemExit, match=message):
        efficiency.main()
