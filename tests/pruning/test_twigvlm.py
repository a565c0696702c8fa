"""TwigVLM's pruning: budget, choice, files."""

import json

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.testing import tiny
from llava.pruning.twigvlm import TwigVLM, grow_twig, load_twig, save_twig

SIDE_TOKENS = 36
GREEDY = dict(do_sample=False, max_new_tokens=4, eos_token_id=-1)


def grown(model, shared=1, layers=2, method=TwigVLM, **options):
    """TwigVLM on `model` with a twig that is a copy of its layers."""
    pruner = method(twig_K=shared, **{"visual_token_num": 10, **options})
    pruner.module = grow_twig(model, shared, layers, method.twig_class).requires_grad_(False)
    model.pruner = pruner
    return pruner


def traced(model, prompt, **kwargs):
    with trace_pruning(model) as trace:
        output = model.generate(prompt.ids, images=prompt.images, **{**GREEDY, **kwargs})
    return output, trace


@pytest.mark.parametrize(
    ("layers", "tokens", "first", "budget", "kept"),
    [
        (32, 576, 2, 64, 41),
        (32, 576, 2, 96, 88),
        (32, 576, 2, 100, 94),
        (32, 576, 2, 128, 134),
        (32, 576, 2, 192, 227),
        (32, 576, 2, 432, 576),
        (32, 576, 2, 440, 576),
        (32, 576, 2, 36, 0),
        (32, 576, 4, 73, 2),
        (32, 576, 1, 64, 64),
        (32, 2880, 2, 640, 670),
        (40, 576, 2, 128, 181),
    ],
)
def test_the_published_budgets_give_the_published_counts(layers, tokens, first, budget, kept):
    pruner = TwigVLM(visual_token_num=budget, twig_K=first)
    schedule = pruner.token_schedule(tokens, layers)
    assert schedule == [tokens] * first + [kept] * (24 - first) + [0] * (layers - 24)


def test_the_average_over_layers_is_the_budget(model, sample):
    grown(model, visual_token_num=10)
    _, trace = traced(model, sample(4, "image", 5))
    assert sum(int(n) for n in trace.visual_tokens) / 6 == 10


def test_layers_follow_the_depth_but_the_wipe_of_40_layers_is_the_published_one():
    pruner = TwigVLM()
    assert (pruner.shared_layers(32), pruner.wipe_layer(32)) == (2, 24)
    assert (pruner.shared_layers(40), pruner.wipe_layer(40)) == (2, 24)
    assert (pruner.shared_layers(16), pruner.wipe_layer(16)) == (1, 12)
    assert (pruner.shared_layers(2), pruner.wipe_layer(2)) == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"visual_token_num": 5}, "visual_token_num .5. is out of reach: all 36 tokens enter"),
        ({"visual_token_num": 37}, "exceeds the 36 patches"),
        ({"final_wipe_layer": 1}, "below final_wipe_layer .1."),
        ({"final_wipe_layer": 7}, "must not exceed the 6 decoder layers"),
        ({"num_speculations": -1}, "num_speculations .-1."),
        ({"draft_stop_prob": 1.5}, "draft_stop_prob .1.5."),
        ({"shared": 5, "layers": 1, "final_wipe_layer": 5}, "twig_K .5. must be at least 0"),
    ],
)
def test_settings_that_cannot_run_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        grown(model, **options)


def test_a_budget_that_only_large_tiled_images_exceed_is_a_warning():
    """All 2880 tokens in 2 of 32 layers are 180 on average; most images have fewer tokens."""
    pruner = TwigVLM(visual_token_num=160)
    with pytest.warns(UserWarning, match="all 2880 tokens .* are 180 on average"):
        pruner.check(576, 32, crops=5)
    assert pruner.token_schedule(576, 32, crops=5) == [2880] * 2 + [0] * 30
    count, budget = torch.tensor(1526), torch.tensor(160)
    assert pruner.kept_tokens(count, budget, 32) == 94  # ceil((32 * 160 - 2 * 1526) / 22)
    with pytest.raises(ValueError, match="out of reach"):
        TwigVLM(visual_token_num=35).check(576, 32, crops=5)


def test_a_twig_longer_than_the_rest_of_the_decoder_is_refused(model):
    with pytest.raises(ValueError, match="twig_K .5. and twig_T .2. need 7 decoder layers"):
        grow_twig(model, 5, 2)
    pruner = TwigVLM(twig_K=5, visual_token_num=30)
    pruner.module = grow_twig(model, 1, 2)
    with pytest.raises(ValueError, match="the twig's 2 layers exceed the 6 layers"):
        model.pruner = pruner


def test_the_last_row_of_the_last_twig_layer_decides(model, sample):
    """A twig that copies layers 1 and 2 scores like the decoder's own layer 2."""
    grown(model, shared=1, layers=2, visual_token_num=10)
    prompt = sample(4, "image", 5)
    _, trace = traced(model, prompt)
    kept = trace.decoder_keep[1][0]
    model.pruner = build_pruner("fastv", visual_token_num=8, layer=3)
    _, dense = traced(model, prompt)
    assert kept.tolist() == dense.decoder_keep[3][0].tolist()


def test_nothing_of_the_last_twig_layer_runs_that_its_attention_does_not_need(model, sample):
    pruner, ran = grown(model, shared=1, layers=2), []
    last = pruner.module.layers[-1]
    for name, part in last.named_modules():
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    traced(model, sample(4, "image", 5))
    assert sorted(ran) == ["input_layernorm", "self_attn.k_proj", "self_attn.q_proj"]


def test_several_images_share_one_pool(model, sample):
    pruner = grown(model, visual_token_num=10)
    prompt = sample(3, "image", 4, "image", 5)
    _, trace = traced(model, prompt)
    kept = trace.decoder_keep[1][0]
    per_image = [((kept >= 4) & (kept < 40)).sum(), ((kept >= 44) & (kept < 80)).sum()]
    assert sum(per_image) == 2 * pruner.token_schedule(SIDE_TOKENS, 6)[1]
    assert per_image[0] != per_image[1]


def test_what_a_small_image_has_no_tokens_for_is_not_given_to_the_others(own_grids_model):
    grown(own_grids_model, visual_token_num=10)
    prompt = tiny.sample(3, "image", 4, "image", 5)
    prompt.images = [tiny.picture(4, 9), tiny.picture(1, 2)]
    _, trace = traced(own_grids_model, prompt)
    assert round(sum(int(n) for n in trace.visual_tokens) / 6) == 10 + 2


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_number_of_shared_layers_and_any_backend(make_model, sample, shared, attention):
    model = make_model(attn_implementation=attention)
    pruner = grown(model, shared=shared, layers=2, visual_token_num=20)
    output, trace = traced(model, sample(4, "image", 5))
    assert [int(n) for n in trace.visual_tokens] == pruner.token_schedule(SIDE_TOKENS, 6)
    assert output.shape == (1, 4)


def test_pruning_off_keeps_everything(model, sample):
    prompt = sample(4, "image", 5)
    dense, _ = traced(model, prompt)
    grown(model, enable_pruning=False)
    output, trace = traced(model, prompt)
    assert torch.equal(output, dense) and not trace.decoder_keep


# --- files ------------------------------------------------------------------------------------


def test_a_saved_twig_has_the_published_names_and_comes_back(model, tmp_path):
    from safetensors.torch import load_file

    twig = grow_twig(model, 2, 1)
    save_twig(str(tmp_path), twig.state_dict(), 2, "some/base")
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"} <= names
    assert len(names) == 9 + 2
    pruner = TwigVLM(twig=str(tmp_path), visual_token_num=12)
    model.pruner = pruner
    assert pruner.shared_layers(6) == 2
    for name, value in twig.state_dict().items():
        assert torch.equal(pruner.module.state_dict()[name], value)
    assert [layer.self_attn.layer_idx for layer in pruner.module.layers] == [6]


def test_what_the_user_says_wins_over_the_file_and_that_over_the_environment(
    model, tmp_path, monkeypatch
):
    save_twig(str(tmp_path), grow_twig(model, 2, 1).state_dict(), 2, "some/base")
    monkeypatch.setenv("twig_K", "3")
    assert TwigVLM().shared_layers(6) == 3
    assert TwigVLM(twig=str(tmp_path)).shared_layers(6) == 2
    assert TwigVLM(twig=str(tmp_path), twig_K=1).shared_layers(6) == 1
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "final_wipe_layer": 5}))
    assert TwigVLM(twig=str(tmp_path)).wipe_layer(6) == 5
    assert TwigVLM(twig=str(tmp_path), final_wipe_layer=6).wipe_layer(6) == 6
    monkeypatch.setenv("twig_K", "two")
    with pytest.raises(ValueError, match="environment variable twig_K .'two'."):
        TwigVLM().shared_layers(6)


def test_twigs_that_do_not_fit_are_refused(model, make_model, tmp_path):
    save_twig(str(tmp_path), grow_twig(model, 1, 2).state_dict(), 1, "some/base")
    with pytest.raises(ValueError, match="twig_T is 3, but the twig .* has 2 layers"):
        load_twig(str(tmp_path), model, 3)
    with pytest.raises(ValueError, match="does not fit this model: head.weight has shape"):
        make_model(vocab_size=95).pruner = TwigVLM(twig=str(tmp_path))
    with pytest.raises(ValueError, match="more than the decoder it belongs to"):
        make_model(num_hidden_layers=1).pruner = TwigVLM(twig=str(tmp_path))


def test_without_a_twig_the_message_says_how_to_get_one(model):
    with pytest.raises(FileNotFoundError, match="twig=FOLDER.*llava.train.train_twigvlm"):
        model.pruner = TwigVLM()


def test_the_published_keyword_of_loading_chooses_the_method(tmp_path):
    from llava.pruning import pruner_from_keywords

    keywords = {"twig": str(tmp_path), "visual_token_num": 128}
    pruner = pruner_from_keywords(None, keywords)
    assert isinstance(pruner, TwigVLM) and pruner.visual_token_num == 128 and not keywords
    assert pruner_from_keywords(None, {"twig": None}).name == "none"


def test_the_twig_travels_with_the_model_and_stays_out_of_its_checkpoint(model, tmp_path):
    grown(model)
    assert any(name.startswith("pruner_module.") for name in model.state_dict())
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert not [n for n in load_file(tmp_path / "model.safetensors") if "pruner_module" in n]


def test_a_method_before_the_decoder_can_come_first(model, sample):
    from llava.pruning import Chain

    second = TwigVLM(visual_token_num=10, twig_K=1)
    second.module = grow_twig(model, 1, 2).requires_grad_(False)
    model.pruner = Chain(build_pruner("pool", visual_token_num=16), second)
    output, trace = traced(model, sample(4, "image", 5))
    assert int(trace.visual_tokens[0]) == 16
    assert sum(int(n) for n in trace.visual_tokens) >= 60
    guessed, _ = traced(model, sample(4, "image", 5), generation_strategy="self_speculative")
    assert torch.equal(guessed, output)
