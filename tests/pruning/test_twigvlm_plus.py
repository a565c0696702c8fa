"""TwigVLM++: scores of the pruning head, files, and whose a twig is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.eval import run_llava
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.model.language_model.layers import DecoderLayer
from llava.playground import default_model_path, trained_part
from llava.pruning import build_pruner, pruner_from_keywords
from llava.pruning.cli import pruner_from_args
from llava.pruning.twig_files import read_twig
from llava.pruning.twigvlm import TwigVLM, grow_twig, load_twig, save_twig
from llava.pruning.twigvlm_plus import GatedTwig, TwigVLMPlus
from tests.conftest import pad_batch
from tests.pruning.test_twigvlm import GREEDY, grown, traced


def grown_plus(model, **options):
    torch.manual_seed(1)
    return grown(model, method=TwigVLMPlus, **options)


def scores_of(model, prompts, side="left"):
    """Scores (B, S) of the pruning head in a prefill of these prompts."""
    seen, pruner = [], model.pruner
    score = type(pruner).score
    pruner.score = lambda prefill: seen.append((prefill, score(pruner, prefill))) or seen[-1][1]
    ids, mask = pad_batch([prompt.ids for prompt in prompts], side)
    shown = [prompt.images for prompt in prompts if prompt.images is not None]
    images = torch.cat(shown) if shown else None
    model.generate(ids, images=images, attention_mask=mask, **GREEDY)
    del pruner.score
    return seen[-1]


def by_definition(model, prefill, row):
    """Scores of one row, head by head and token by token."""
    twig, layer = model.pruner.module, model.pruner.module.layers[-1]
    x = model.model.through(prefill, twig.layers[:-1])[row]
    normed, attention = layer.input_layernorm(x)[None], layer.self_attn
    rope = model.model.rotary(prefill.position_ids[row : row + 1], x.dtype)
    q, k = attention.queries(normed, rope), attention.keys(normed, rope)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[0]
    gates = twig.pruning_head
    asking, visual = int(prefill.last[row]), prefill.is_visual[row].nonzero()[:, 0]

    def opened(gate, token):
        value = gate(normed[0, token])
        return (value.clamp(min=0) * value.sigmoid()).view(q.shape[1], -1)

    total = torch.zeros(len(visual))
    for head in range(q.shape[1]):
        asks = q[0, head, asking] * opened(gates.q_gate, asking)[head]
        keys = [k[head, token] * opened(gates.k_gate, token)[head] for token in visual]
        total += (torch.stack(keys) @ asks / q.shape[-1] ** 0.5).softmax(0)
    return visual, total / q.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("mistral", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_scores_are_those_of_the_definition(make_model, sample, mistral, layers):
    model = make_model(mistral)
    grown_plus(model, layers=layers)
    prompts = [sample(4, "image", 5), sample(2, "image", 9, seed=2), sample(12, seed=3)]
    prefill, scores = scores_of(model, prompts)
    for row in range(2):
        visual, wanted = by_definition(model, prefill, row)
        torch.testing.assert_close(scores[row, visual], wanted, atol=1e-6, rtol=1e-5)
        assert float(scores[row].sum()) == pytest.approx(1, abs=1e-5)
    assert not scores[2].any()


def test_a_batch_keeps_what_its_rows_keep_alone(model, sample):
    grown_plus(model, visual_token_num=12)
    asking = [sample(4, "image", 5), sample(2, "image", "image", 9, seed=2)]
    asking.append(sample(3, "image", seed=4))  # its last token, which pads its places, is visual
    prompts = [*asking, sample(7, seed=3)]
    for side in ("left", "right"):
        _, together = scores_of(model, prompts, side)
        for row, prompt in enumerate(asking):
            _, alone = scores_of(model, [prompt])
            own = together[row][together[row] > 0]
            torch.testing.assert_close(own, alone[0][alone[0] > 0], atol=1e-6, rtol=1e-4)


def test_the_last_layer_only_gives_query_and_keys(model, sample, monkeypatch):
    """Token by token nobody wants its output: no values, no MLP."""
    pruner = grown_plus(model, layers=2)
    ran, forward = [], DecoderLayer.forward
    watched = lambda layer, *args: ran.append(layer) or forward(layer, *args)  # noqa: E731
    monkeypatch.setattr(DecoderLayer, "forward", watched)
    monkeypatch.setattr(pruner.module.layers[-1].mlp, "forward", None)
    monkeypatch.setattr(pruner.module.layers[-1].self_attn, "values", None)
    traced(model, sample(4, "image", 5))
    first, last = pruner.module.layers
    assert sum(layer is first for layer in ran) == 1 and not any(layer is last for layer in ran)


@pytest.mark.parametrize("nodes", [0, 12])
def test_guessing_and_choosing_share_the_twig_s_layers(model, sample, monkeypatch, nodes):
    pruner = grown_plus(model, layers=2, tree_nodes=nodes)
    prompt = sample(4, "image", 5)
    alone, kept = traced(model, prompt)
    runs, through = [], type(model.model).through
    monkeypatch.setattr(
        type(model.model), "through", lambda *args: runs.append(1) or through(*args)
    )
    guessed, trace = traced(model, prompt, generation_strategy="self_speculative")
    assert torch.equal(guessed, alone) and not runs
    assert trace.decoder_keep[1][0].tolist() == kept.decoder_keep[1][0].tolist()
    assert pruner.drafter(6).tree_nodes == nodes


def sizes(pruner) -> tuple[int, int, int]:
    """Nodes, width and depth of the trees that are guessed in 6 layers."""
    drafter = pruner.drafter(6)
    return drafter.nodes, drafter.width, drafter.tree_depth


def test_trees_are_as_large_as_suits_the_device_unless_a_size_is_asked_for(model):
    assert sizes(grown_plus(model)) == (8, 2, 4)
    assert sizes(grown_plus(model, tree_nodes=60)) == (60, 10, 4)
    assert sizes(grown_plus(model, tree_width=3)) == (8, 3, 4)
    assert sizes(grown_plus(model, tree_nodes=9, tree_depth=3)) == (9, 3, 3)
    there = grown_plus(model)
    there.module.to("meta")  # not a CPU, whatever it is
    assert sizes(there) == (60, 10, 4)
    for pruner in (grown_plus(model, tree_nodes=0), grown(model)):
        assert not pruner.drafter(6).guesses_trees


def test_a_call_may_ask_for_the_published_trees_on_a_cpu(model, sample):
    grown_plus(model, layers=2)
    prompt, found = sample(4, "image", 5), []
    options = dict(images=prompt.images, max_new_tokens=4, return_dict_in_generate=True)
    for tree in ({}, {"tree_nodes": 60}, {"tree_nodes": 0}):
        out = model.generate(
            prompt.ids, **options, **tree, generation_strategy="self_speculative", do_sample=False
        )
        found.append({len(tree) for tree in out.logs[0].trees})
    assert found == [{8}, {60}, set()]


# --- files ------------------------------------------------------------------------------------


@pytest.fixture
def folders(model, tmp_path):
    """Folders with a twig of each kind, as published: without a config.json of ours."""
    plain, plus = tmp_path / "plain", tmp_path / "plus"
    save_twig(str(plain), grow_twig(model, 2, 1).state_dict(), 2, "some/base")
    twig = grow_twig(model, 2, 1, GatedTwig)
    save_twig(str(plus), twig.state_dict(), 2, "some/base", "twigvlm_plus")
    for folder in (plain, plus):
        (folder / "config.json").unlink()
    return plain, plus


def test_a_saved_twig_has_the_published_names_and_comes_back(model, folders):
    tensors = load_file(folders[1] / "model.safetensors")
    gates = {f"leaf_attention_module.{name}_gate.weight" for name in "qk"}
    assert gates <= set(tensors) and len(tensors) == 9 + 4
    model.pruner = TwigVLMPlus(twig=str(folders[1]), visual_token_num=12, twig_K=2)
    for name, value in model.pruner.module.state_dict().items():
        ours = name.replace("pruning_head", "leaf_attention_module")
        assert any(torch.equal(value, own) for key, own in tensors.items() if key.endswith(ours))


def test_the_files_of_the_published_training_are_read_as_they_are(model, folders):
    """With "model." in front of the gates, in two files, beside copies of the base model."""
    tensors = load_file(folders[1] / "model.safetensors")
    wanted = load_twig(str(folders[1]), model, kind=GatedTwig).state_dict()
    renamed = {f"model.{n}" if n.startswith("leaf") else n: t for n, t in tensors.items()}
    copies = ["model.bkb_layers.0.mlp.up_proj.weight", "model.bkb_norm.weight"]
    renamed |= dict.fromkeys([*copies, "bkb_lm_head.weight"], torch.ones(2))
    names = sorted(renamed)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    (folders[1] / "model.safetensors").unlink()
    for file, own in parts.items():
        save_file({name: renamed[name].clone() for name in own}, folders[1] / file)
    table = {name: file for file, own in parts.items() for name in own}
    index = folders[1] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    twig = load_twig(str(folders[1]), model, kind=GatedTwig).state_dict()
    assert twig.keys() == wanted.keys()
    assert all(torch.equal(twig[name], value) for name, value in wanted.items())
    (folders[1] / next(iter(parts))).unlink()
    with pytest.raises(FileNotFoundError, match="names a file that is missing: .*00001-of"):
        load_twig(str(folders[1]), model, kind=GatedTwig)


def test_other_names_missing_ones_and_wrong_shapes_are_errors(model, folders):
    path = folders[1] / "model.safetensors"
    tensors, gate = load_file(path), "leaf_attention_module.q_gate.weight"
    changes = {
        "lacks 1 weights, pruning_head.q_gate.weight": {gate: None},
        "holds 1 weights that have no place, pruning_head.v_gate": {
            "leaf_attention_module.v_gate.weight": torch.ones(2)
        },
        "pruning_head.q_gate.weight has shape .4, 4.": {gate: torch.ones(4, 4)},
    }
    for message, change in changes.items():
        changed = {n: t for n, t in (tensors | change).items() if t is not None}
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            model.pruner = TwigVLMPlus(twig=str(folders[1]), visual_token_num=12, twig_K=2)


def test_a_twig_of_the_other_method_is_refused(model, folders):
    plain, plus = map(str, folders)
    with pytest.raises(ValueError, match="a twig of TwigVLM, without .*use the method twigvlm$"):
        model.pruner = TwigVLMPlus(twig=plain, visual_token_num=12, twig_K=2)
    with pytest.raises(ValueError, match=r"a twig of TwigVLM\+\+, .*use the method twigvlm_plus$"):
        model.pruner = TwigVLM(twig=plus, visual_token_num=12, twig_K=2)


def test_without_a_name_the_gates_say_whose_a_twig_is(folders):
    plain, plus = map(str, folders)
    for folder, method in ((plain, TwigVLM), (plus, TwigVLMPlus)):
        for keywords in (
            {"twig": folder, "visual_token_num": 96},
            {"twig": folder, "twigvlm_config": {"avg_retain_rank": 96}},
            {"twigvlm_config": {"twig_block": folder, "attention_rank": 96}},
        ):
            pruner = pruner_from_keywords(None, dict(keywords))
            assert type(pruner) is method and pruner.visual_token_num == 96
        args = run_llava.build_parser().parse_args(["--twig", folder, "--retained_tokens", "64"])
        assert type(pruner_from_args(args)) is method


def test_the_published_dict_goes_with_either_method_that_is_named(model, sample):
    config = {"avg_retain_rank": 96, "generation_strategy": "self_speculative"}
    for name in ("twigvlm", "twigvlm_plus"):
        keywords = {"twigvlm_config": config}
        assert pruner_from_keywords(name, keywords).name == name
    with pytest.raises(ValueError, match="twigvlm_config belongs to the method 'twigvlm'"):
        pruner_from_keywords("fastv", {"twigvlm_config": config})
    grown_plus(model, visual_token_num=20)
    prompt = sample(4, "image", 5)
    options = {"enable_pruning": True, "avg_retain_rank": 10}
    output = model.generate(prompt.ids, images=prompt.images, **GREEDY, twigvlm_config=options)
    assert output.num_tokens_generated == 4


def test_the_playground_s_is_found_by_itself():
    path = default_model_path()
    name = get_model_name_from_path(path)
    _, model, _, _ = load_pretrained_model(path, None, name, pruner="twigvlm_plus", device="cpu")
    config = model.pruner._config
    assert (config["stage"], config["twig_K"], config["base_model"]) == (2, 0, name)
    assert model.pruner.token_schedule(576, 6) == [96] * 4 + [0] * 2
    _, plain = read_twig(trained_part("twigvlm", path))
    assert model.pruner.module.state_dict().keys() - plain.keys() == {
        "pruning_head.q_gate.weight",
        "pruning_head.k_gate.weight",
    }


def test_without_a_twig_the_message_says_how_to_get_one(model):
    with pytest.raises(FileNotFoundError, match="twig=FOLDER.*llava.train.train_twigvlm_plus"):
        model.pruner = build_pruner("twigvlm_plus", visual_token_num=12)
