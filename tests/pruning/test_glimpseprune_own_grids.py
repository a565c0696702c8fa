"""GlimpsePrune where images have grids of their own: several in a prompt, windows, calls, files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from llava.eval import run_llava
from llava.pruning import build_pruner, trace_pruning
from llava.pruning.cost import DecoderShape, prefill_flops
from llava.pruning.glimpseprune import GlimpsePrune, say_videos_stay
from llava.pruning.glimpseprune_modules import Glimpse, GlimpseConfig
from llava.pruning.learned import save_part
from llava.pruning.testing.tiny import make_own_grids_model, pad_batch, picture, sample, video
from llava.segments import attend_within, segments_of
from tests.model.checkpoint_tools import load, same
from tests.paths import GOLDEN
from tests.second_device import SECOND, THIRD, Elsewhere, devices, place

#: parts of the published file beside the embeddings
MODULES = ("le_proj", "le_norm", "attn_fuser")
#: a small predictor
PREDICTOR = dict(attn_fuse_size=16, visual_cond_size=24, attn_fuse_num_heads=2)
WIDE, TALL, SMALL = (4, 9), (7, 5), (2, 3)
GREEDY = dict(max_new_tokens=3, do_sample=False, eos_token_id=-1)


@pytest.fixture
def model(own_grids_model):
    return own_grids_model


def random_method(model, options=(), **changes):
    """A method with random weights on `model`, and its config changed."""
    torch.manual_seed(0)
    pruner = GlimpsePrune(**dict(options))
    config = GlimpseConfig.for_model(model, **PREDICTOR, **changes)
    pruner.module = Glimpse(config).requires_grad_(False)
    pruner.module.initialize()
    model.pruner = pruner
    return pruner


def generate(model, ids, images, **options):
    mask = options.get("attention_mask")
    prompt = model.build_prompt(ids, mask, images=images, padding_side="left")
    with trace_pruning(model) as trace:
        answer = model.generate(ids, images=images, **{**GREEDY, **options})
    trace.visual = prompt.visual_index >= 0
    return answer, trace


def kept(trace) -> list[list[int]]:
    """Visual tokens of every row that leave the prefill, counted over its images."""
    found = []
    for visual, places in zip(
        trace.visual, trace.decoder_keep[max(trace.decoder_keep)], strict=True
    ):
        number = visual.long().cumsum(0) - 1
        places = places[places >= 0]
        found.append(number[places[visual[places]]].tolist())
    return found


# --- what stays ---------------------------------------------------------------------------------


def test_the_images_of_a_prompt_are_one_list(model):
    pruner = random_method(model)
    ids, images = sample(3, "image", 2, "image", 4).ids, [picture(*WIDE), picture(*SMALL)]
    _, trace = generate(model, ids, images)
    chance = torch.cat(trace.importance)
    assert len(chance) == 42
    for name, value, wanted in (
        ("reduce_threshold", 0.5, (chance > 0.5).nonzero()[:, 0]),
        ("max_remain_ratio", 0.2, chance.topk(int(0.2 * 42)).indices),
        ("min_remain_num", 40, chance.topk(40).indices),
        ("visual_token_num", 8, chance.topk(8 + 6).indices),
    ):
        model.pruner = pruner.with_options(**{"reduce_threshold": 0.0, name: value})
        if name == "min_remain_num":
            model.pruner = pruner.with_options(reduce_threshold=1.0, min_remain_num=value)
        (own,) = kept(generate(model, ids, images)[1])
        assert own == sorted(wanted.tolist()), name


def test_corners_are_those_of_the_grid_of_each_prompt(model):
    pruner = random_method(model, {"reduce_threshold": 1.0, "min_remain_num": 0})
    corners = ("tl", "tr", "bl", "br")
    prompts = [sample(3, "image", 9), sample(2, "image", 4, seed=1), sample(5, seed=2)]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    model.pruner = pruner.with_options(anchor_positions=corners)
    images = [picture(*WIDE), picture(*TALL)]
    _, trace = generate(model, ids, images, attention_mask=mask)
    assert kept(trace) == [[0, 8, 27, 35], [0, 4, 30, 34], []]
    with pytest.raises(ValueError, match="one image in a prompt, but one holds 2: leave them out"):
        generate(model, sample("image", 1, "image").ids, images)


@pytest.mark.parametrize("shape", [dict(), dict(reduce_layer=5)], ids=["between", "behind"])
def test_videos_stay_whole_unless_they_are_asked_for(model, shape, caplog):
    say_videos_stay.cache_clear()
    pruner = random_method(model, {"visual_token_num": 9}, **shape)
    prompts = [sample(3, "image", 1, "image", 9), sample(2, "image", 4, seed=1)]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    images = [video(2, *SMALL), picture(*WIDE), video(3, *TALL)]
    answer, trace = generate(model, ids, images, attention_mask=mask)
    assert caplog.text.count("leaves videos whole: prune_videos=True") == 1
    places = kept(trace)
    assert places[0][:12] == list(range(12)) and 0 < len(places[0]) - 12 <= 9
    assert places[1] == list(range(3 * 35))
    assert trace.importance[0].isnan().all() and not trace.importance[1].isnan().any()
    alone, trace = generate(model, prompts[1].ids, images[2:])
    assert torch.equal(alone[0], answer[1])
    assert set(trace.decoder_keep) <= {0} and trace.prompt_tokens[-1].tolist() == [2 + 105 + 5]
    plain, _ = generate(model, prompts[1].ids, images[2:], do_selection=False)
    assert torch.equal(alone, plain)

    model.pruner = pruner.with_options(prune_videos=True)
    _, trace = generate(model, ids, images, attention_mask=mask)
    assert all(0 < len(own) <= most for own, most in zip(kept(trace), (18, 9), strict=True))
    found = generate(model, ids, images, attention_mask=mask, prune_videos=False)[0]
    assert torch.equal(found, answer)


# --- the predictor --------------------------------------------------------------------------------


def slow_predictor(fuser, rows, conditions, grid, side):
    """Logits (n,) of one view, every patch by itself."""
    h, w = grid
    place = [(r, c) for r in range(h) for c in range(w)]
    same = torch.tensor(
        [
            [a[0] // side == b[0] // side and a[1] // side == b[1] // side for b in place]
            for a in place
        ]
    )
    x = fuser.attn_in_proj(rows)
    width = fuser.head_width
    frequency = 10000.0 ** (-torch.arange(0, width // 2, 2).float() / (width // 2))
    for layer, condition in zip(fuser.layers, conditions.chunk(len(fuser.layers), -1), strict=True):
        z, attention = layer.norm1(x), layer.attn
        seen = torch.cat([z, condition], dim=-1)
        q, k = attention.q_proj(seen), attention.k_proj(seen)
        v, heads = attention.v_proj(z), attention.num_heads
        out = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            turned = []
            for part in (q[:, own], k[:, own]):
                pairs = torch.complex(part[:, : width // 2], part[:, width // 2 :])
                angle = torch.stack([torch.cat([r * frequency, c * frequency]) for r, c in place])
                pairs = pairs * torch.polar(torch.ones_like(angle), angle)
                turned.append(torch.cat([pairs.real, pairs.imag], dim=1))
            scores = turned[0] @ turned[1].T * width**-0.5
            weights = scores.masked_fill(~same, float("-inf")).softmax(dim=-1)
            out.append(weights @ v.unflatten(-1, (heads, -1))[:, head])
        x = x + attention.o_proj(torch.cat(out, dim=-1))
        x = x + layer.mlp(layer.norm2(x))
    return fuser.attn_out_projs[-1](x)[:, 0]


@pytest.mark.parametrize("whole", [True, False])
def test_patches_see_their_own_image_or_window_and_no_other(model, whole):
    pruner = random_method(model, attn_fuse_global=whole)
    fuser, grids = pruner.module.attn_fuser, [WIDE, TALL, SMALL, WIDE]
    assert fuser.window_side == (None if whole else 4)
    sizes = [h * w for h, w in grids]
    rows, conditions = torch.randn(sum(sizes), 4), torch.randn(sum(sizes), 2 * 24)
    found = fuser(rows, conditions, grids)[-1].split(sizes)
    parts = zip(found, rows.split(sizes), conditions.split(sizes), grids, strict=True)
    for own, row, condition, grid in parts:
        wanted = slow_predictor(fuser, row, condition, grid, 100 if whole else 4)
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-4)


def test_segments_of_any_order_attend_among_themselves():
    owner = torch.tensor([2, 0, 1, 0, 2, 2, 1])
    segments = segments_of(owner.bincount()[owner], owner)
    assert segments.runs == [(2, 2), (1, 3)]
    q, k, v = torch.randn(3, 7, 2, 4)
    found = attend_within(q, k, v, segments)
    for token in range(7):
        own = owner == owner[token]
        scores = torch.einsum("hd,nhd->hn", q[token], k[own]) / 2
        wanted = torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), v[own])
        torch.testing.assert_close(found[token], wanted)


def test_the_setting_of_the_paper_follows_the_tower_and_the_depth(model):
    config = GlimpseConfig.for_model(model)
    assert config.selected_visual_layers == config.tower_layers == (3, 1)
    assert config.selected_layers == (4,) and config.reduce_layer == 4
    assert config.use_attention_logits and config.attn_fuse_global
    values = config.values()
    assert GlimpseConfig.from_values(values, model) == config
    del values["attn_fuse_global"]  # what the release takes then
    assert not GlimpseConfig.from_values(values, model).attn_fuse_global
    with pytest.raises(ValueError, match="selected_visual_layers .* must not exceed 3"):
        GlimpseConfig.for_model(model, selected_visual_layers=(4,))
    with pytest.raises(ValueError, match="must be 0 .output of the first layer. or above"):
        GlimpseConfig.for_model(model, selected_visual_layers=(1, -1))


@pytest.mark.parametrize(
    ("width", "heads", "layers", "inner", "key_heads", "row"),
    [(3584, 28, 28, 18944, 4, 18), (2048, 16, 36, 11008, 2, 23)],
    ids=["7b", "3b"],
)
@pytest.mark.parametrize(("grid", "most"), [((24, 24), 0.01), ((40, 50), 0.01), ((128, 128), 0.04)])
def test_what_the_method_adds_is_small_beside_the_decoder(
    width, heads, layers, inner, key_heads, row, grid, most
):
    config = GlimpseConfig(
        hidden_size=width,
        num_attention_heads=heads,
        mm_hidden_size=1280,
        le_layers=tuple(range(layers)),
        selected_layers=(row,),
        reduce_layer=row,
        selected_visual_layers=(31, 23, 15, 7),
        first_state=0,
        window_side=4,
    )
    count = grid[0] * grid[1]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        module = Glimpse(config)
        conditions = module.attn_fuser.conditions([torch.empty(1, count, 1280)] * 4)[0]
        module.attn_fuser(torch.empty(count, heads), conditions, [grid])
        module.vectors()
    shape = DecoderShape(width, inner, layers, heads, key_heads)
    kept = int(0.074 * count) + 64
    oracle = prefill_flops(shape, [count + 64] * (row + 1) + [kept] * (layers - row - 1))
    assert 0 < counter.get_total_flops() < most * oracle


# --- parts of other shapes ------------------------------------------------------------------------


SHAPES = [
    dict(le_length=3, le_layers=(0, 2), selected_layers=(3, 1), reduce_layer=4),
    dict(le_length=0),
    dict(le_layers=()),
    dict(le_norm_type="layernorm", deep_supervision=True, selected_visual_layers=(2, 0)),
    dict(reduce_layer=5, selected_layers=(0, 5), use_attention_logits=False),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_of_any_shape_prune_batches_as_single_prompts(model, shape, tmp_path):
    pruner = random_method(model, **shape)
    prompts = [sample(3, "image", 9), sample(2, "image", 1, "image", 4, seed=1), sample(6, seed=2)]
    images = [[picture(*WIDE)], [picture(*TALL), picture(*SMALL)], None]
    alone = [generate(model, p.ids, own)[0] for p, own in zip(prompts, images, strict=True)]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    together, trace = generate(model, ids, images[0] + images[1], attention_mask=mask)
    assert torch.equal(together, torch.cat(alone))
    places = kept(trace)
    assert 0 < len(places[0]) < 36 and 0 < len(places[1]) < 41
    text = [len(p.ids[0]) - n for p, n in zip(prompts, (1, 2, 0), strict=True)]
    for lengths in trace.kv_lengths:
        assert lengths.tolist() == [n + len(own) for n, own in zip(text, places, strict=True)]
    values, tensors = pruner.module.config.values(), pruner.module.state_dict()
    save_part(str(tmp_path), pruner.name, tensors, "base", **values)
    model.pruner = loaded = build_pruner("glimpseprune", new_modules=str(tmp_path))
    assert loaded.module.config == pruner.module.config
    assert torch.equal(generate(model, ids, sum(images[:2], []), attention_mask=mask)[0], together)


def test_without_a_glimpse_the_row_of_the_last_prompt_token_is_read(model):
    pruner = random_method(model, le_length=0)
    assert list(pruner.module._modules) == ["attn_fuser"]
    seen = []
    hook = pruner.module.attn_fuser.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids, images = sample(3, "image", 9).ids, [picture(*WIDE)]
    generate(model, ids, images)
    hook.remove()
    model.pruner = build_pruner("none")
    with trace_pruning(model, attention=[4]) as trace:
        model(ids, images=images)
    rows = trace.attention[4][0, :, 4 : 4 + 36].T
    torch.testing.assert_close(seen[0].softmax(dim=0), rows / rows.sum(dim=0), atol=1e-5, rtol=1e-4)


# --- one call -------------------------------------------------------------------------------------


def test_settings_of_a_call_are_gone_behind_it(model):
    pruner = random_method(model)
    ids, images = sample(3, "image", 9).ids, [picture(*WIDE)]
    before, _ = generate(model, ids, images)
    counts = []
    ratios = ({"max_remain_ratio": 0.1}, {"visual_token_ratio": 0.1})
    for settings in ({}, {"visual_token_num": 2}, *ratios):
        counts.append(len(kept(generate(model, ids, images, **settings)[1])[0]))
    assert counts[0] > 3 and counts[1:] == [2, 3, 3]
    assert build_pruner("glimpseprune", visual_token_ratio=0.1).max_remain_ratio == 0.1
    plain, trace = generate(model, ids, images, do_selection=False)
    assert not trace.decoder_keep
    assert model.pruner is pruner and pruner.max_remain_ratio is None
    assert torch.equal(generate(model, ids, images, do_selection=True)[0], before)
    model.pruner = build_pruner("none")
    assert torch.equal(generate(model, ids, images)[0], plain)
    model.pruner = pruner
    with pytest.raises(ValueError, match="max_remain_ratio .2. must be above 0"):
        generate(model, ids, images, max_remain_ratio=2)
    with pytest.raises(ValueError, match="ref_boxes is given twice"):
        generate(model, ids, images, ref_boxes=[], normed_bboxes=[[]])


def test_boxes_and_masks_of_each_image_take_the_place_of_the_glimpse(model):
    random_method(model)
    prompts = [sample(3, "image", 9), sample(5, seed=2), sample(2, "image", 1, "image", 4, seed=1)]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    images = [picture(*WIDE), picture(*TALL), picture(*SMALL)]
    boxes = [[[0, 0, 0.2, 0.2], [0.95, 0.9, 1, 1]], None, []]
    cells = [torch.zeros(grid, dtype=torch.bool) for grid in (WIDE, TALL, SMALL)]
    cells[0][0, :2] = cells[0][3, 8] = cells[1][:] = True
    light = [Image.fromarray(np.kron(own, np.full((9, 5), 200, "uint8"))) for own in cells]
    wanted = [[0, 1, 35], [], list(range(35))]
    answers = []
    for settings in (
        {"ref_boxes": boxes},
        {"normed_bboxes": boxes},
        {"ref_token_masks": cells},
        {"ref_image_masks": light},
    ):
        answer, trace = generate(model, ids, images, attention_mask=mask, **settings)
        answers.append(answer)
        assert kept(trace) == wanted, settings
        assert trace.importance[1].unique().tolist() == [1]
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    _, trace = generate(
        model, ids, images, attention_mask=mask, num_beams=2, max_new_tokens=1, ref_boxes=boxes
    )
    assert trace.visual_tokens[-1].tolist() == [3, 3, 0, 0, 35, 35]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ref_boxes": [[[0, 0, 1, 1]], []]},
            "for 2 images, the prompts hold 1",
        ),
        ({"ref_masks": [np.ones((9, 4), bool)]}, "a mask is .9, 4. .* its image has 4 x 9 tokens"),
        ({"ref_masks": [np.ones((4, 9))]}, "True or False for each, or a picture"),
        ({"ref_boxes": [[[10, 20, 110, 220]]]}, "as shares of the picture, from 0 to 1"),
        ({"ref_boxes": [3]}, "a list of boxes, or one for each image"),
        ({"ref_boxes": 3}, r"ref_boxes \(3\) must be a list of boxes, or one for each image"),
        ({"ref_masks": 3}, r"ref_masks \(3\) must be a list with a mask"),
        ({"ref_masks": [3]}, "ref_masks hold 3: give a list with a mask"),
        ({"ref_boxes": [], "ref_masks": []}, "give one of them"),
    ],
)
def test_references_that_do_not_fit_are_refused(model, settings, message):
    random_method(model)
    with pytest.raises(ValueError, match=message):
        generate(model, sample(3, "image", 9).ids, [picture(*WIDE)], **settings)


# --- files ----------------------------------------------------------------------------------------


def test_the_published_files_load_beside_a_model_and_an_adapter_of_it(tmp_path):
    """As for GlimpsePrune+: an adapter, and new modules that were trained on the merged model."""
    base, part = GOLDEN / "tiny-qwen2.5-vl-cut", tmp_path / "new_modules"
    _, model, _, _ = load(base, name="anything")
    random_method(model)
    module, values = model.pruner.module, model.pruner.module.config.values()
    part.mkdir()
    config = json.loads((base / "config.json").read_text()) | {"model_type": "qwen2_5_vl_gp"}
    values |= {"attn_fuse_type": "AttnFuserV1", "min_remain_num": 3, "max_remain_ratio": None}
    (part / "config.json").write_text(json.dumps(config | values))
    entries = {name: getattr(module, name).state_dict() for name in MODULES}
    entries["learnable_embeddings"] = module.learnable_embeddings.data
    torch.save(entries, part / "new_modules_gp.pt")

    adapter, name = tmp_path / "adapter", "model.layers.0.self_attn.q_proj"
    adapter.mkdir()
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    low = {"A": torch.randn(2, 64), "B": torch.randn(64, 2)}
    tensors = {f"base_model.model.{name}.lora_{k}.weight": own for k, own in low.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")

    model.get_submodule(name).weight.data += 2 * low["B"] @ low["A"]
    _, merged, _, _ = load(
        adapter, base, name="anything", new_modules_dir=str(part), max_remain_ratio=0.05
    )
    pruner = merged.pruner
    assert same(pruner.module, module.state_dict()) and pruner.max_remain_ratio == 0.05
    assert pruner.setting("min_remain_num") == 3
    assert pruner.module.config == module.config
    assert merged.config._name_or_path == str(adapter)  # the base's part would not be taken for it
    model.pruner = model.pruner.with_options(max_remain_ratio=0.05, min_remain_num=3)
    ids = torch.tensor([[5, 6, -200, 7, 8]])
    images = [torch.randn(6, 7, 4, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))]
    found = [generate(own, ids, images) for own in (model, merged)]
    assert torch.equal(found[0][0], found[1][0]) and len(kept(found[1][1])[0]) == 3

    words = ["--model-path", adapter, "--model-base", base, "--query", "What is it?"]
    words += ["--image-file", GOLDEN / "images" / "img1_640x360.png", "--temperature", 0]
    words += ["--new_modules_dir", part, "--max_remain_ratio", 0.05, "--max-new-tokens", 2]
    words += ["--show-pruning", tmp_path / "kept.png"]
    run_llava.answer(run_llava.build_parser().parse_args([str(word) for word in words]))
    assert (tmp_path / "kept.png").is_file()


# --- devices --------------------------------------------------------------------------------------


def test_layers_on_two_devices_answer_alike_and_one_wait_is_added():
    model = make_own_grids_model()
    random_method(model, selected_layers=(3, 1), reduce_layer=4)
    ids, images = sample(3, "image", 2, "image", 4).ids, [picture(*WIDE), picture(*TALL)]
    with torch.no_grad():
        alike = model.generate(ids, images=images, **GREEDY)
    place(model, SECOND)
    for layer in model.model.layers[3:]:
        place(layer, THIRD)
    options = {**GREEDY, "max_new_tokens": 1}
    there, waits = Elsewhere(ids, SECOND), []
    for settings in ({"do_selection": False}, {}, {"ref_boxes": [[[0, 0, 0.3, 0.3]], None]}):
        with torch.no_grad(), devices() as log:
            found = model.generate(there, images=images, **options, **settings)
        waits.append(len(log.waits))
        if not settings:
            assert found.cpu()[0, 0] == alike[0, 0]
    assert waits[1] <= waits[0] + 1 and waits[2] <= waits[0] + 1
