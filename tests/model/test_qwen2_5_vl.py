"""Qwen2.5-VL without pruning: tower, positions, prompts and answers of a small random model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import KeywordsStoppingCriteria
from llava.model.inputs import Picture, generate_inputs
from llava.model.language_model.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from llava.model.multimodal_encoder.qwen2_5_vl_encoder import plan_images
from llava.model.reuse import PrefixCache
from llava.pruning import build_pruner, trace_pruning
from llava.segments import window_order
from tests.conftest import pad_batch
from tests.second_device import SECOND, THIRD, devices, place

IMAGE, VIDEO = 88, 89
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=90,
    max_position_embeddings=512,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    rope_theta=1e4,
    rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]},
    image_token_id=IMAGE,
    video_token_id=VIDEO,
)
VISION = dict(
    depth=4,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    out_hidden_size=32,
    patch_size=2,
    window_size=16,
    fullatt_block_indexes=[1, 3],
)
VALUES = 3 * 2 * 2 * 2


def build(**config) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(**{"vision_config": VISION, **TEXT, **config})
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.lm_head.weight.data[IMAGE:] = 0  # answers hold no marks
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def picture(h: int, w: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * h + 10 * w + seed)
    return torch.randn(h, w, 4, VALUES, generator=generator)


def prompt(*pieces, seed: int = 0) -> torch.Tensor:
    """(1, L) ids; a piece is a number of random text tokens, or "image"."""
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.tensor([IMAGE_TOKEN_INDEX])
        if piece == "image"
        else torch.randint(3, 80, (piece,), generator=generator)
        for piece in pieces
    ]
    return torch.cat(ids)[None]


def greedy(model, ids, images=None, **options):
    return model.generate(
        ids, images=images, do_sample=False, max_new_tokens=6, eos_token_id=-1, **options
    )


# The tower, against one that walks patch by patch and masks a whole map of attention.


def slow_tower(tower, image: torch.Tensor) -> torch.Tensor:
    """Tokens (h * w, D) of one image."""
    h, w = image.shape[:2]
    config, side = tower.config, 4
    x = F.linear(image.reshape(-1, VALUES), tower.patch_embed.proj.weight.flatten(1))
    places = [
        (2 * row + inner // 2, 2 * column + inner % 2)
        for row in range(h)
        for column in range(w)
        for inner in range(4)
    ]
    window = torch.tensor(
        [(row // (2 * side)) * 100 + column // (2 * side) for row, column in places]
    )
    heads, width = config.num_heads, config.hidden_size // config.num_heads
    speeds = [10000.0 ** (-2 * i / (width / 2)) for i in range(width // 4)]
    angles = torch.tensor([[p * s for p in place for s in speeds] for place in places])
    angles = torch.cat([angles, angles], dim=1)

    def turned(t):
        half = torch.cat([-t[..., width // 2 :], t[..., : width // 2]], dim=-1)
        return t * angles.cos() + half * angles.sin()

    for number, block in enumerate(tower.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).view(-1, 3, heads, width).permute(1, 2, 0, 3)
        scores = turned(q) @ turned(k).transpose(1, 2) / width**0.5
        if number not in config.fullatt_block_indexes:
            scores = scores.masked_fill(window[:, None] != window, float("-inf"))
        x = x + block.attn.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        y = block.norm2(x)
        x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(y)) * block.mlp.up_proj(y))
    merged = tower.merger.ln_q(x).reshape(h * w, -1)
    first, _, second = tower.merger.mlp
    return second(F.gelu(first(merged)))


@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (5, 9), (3, 2), (8, 4), (1, 7)], ids=str)
def test_the_tower_attends_inside_windows_and_images(model, grid):
    image = picture(*grid)
    with torch.no_grad():
        ours, expected = model.visual([image])[0], slow_tower(model.visual, image)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_images_of_any_grids_do_not_see_one_another(model):
    images = [picture(5, 3), picture(2, 9), picture(5, 3, seed=1), picture(3, 5), picture(6, 3)]
    with torch.no_grad():
        together = model.visual(images)
        for image, tokens in zip(images, together, strict=True):
            torch.testing.assert_close(tokens, model.visual([image])[0], atol=2e-5, rtol=1e-4)


def test_features_come_in_blocks_one_group_for_each_grid(model):
    images = [picture(5, 3), picture(2, 9), picture(5, 3, seed=1)]
    with torch.no_grad():
        groups, tokens = model.visual.features(images), model.visual(images)
        assert [(g.images, g.grid) for g in groups] == [([0, 2], (5, 3)), ([1], (2, 9))]
        assert groups[0].features.shape == (2, 15, 4, 16)
        kept = torch.tensor([0, 7, 14])
        early = model.visual.merger(groups[0].features[:, kept])
    torch.testing.assert_close(early[1], tokens[2][kept])


def test_windows_are_batches_and_no_map_of_all_patches_is_built(model):
    plan = plan_images([(9, 9), (2, 3), (9, 9)], model.visual.config, "cpu")
    assert plan.windows.runs == [(2, 4), (8, 16), (1, 24), (8, 64)]
    assert plan.wholes.runs == [(1, 24), (2, 324)]
    assert plan_images([(4, 4)], model.visual.config, "cpu").wholes.order is None


def test_windows_start_at_the_top_left_and_are_read_row_by_row():
    order, sizes = window_order(5, 6, 4)
    assert sizes.tolist() == [16, 8, 4, 2]
    assert order[:5].tolist() == [0, 1, 2, 3, 6] and order[16:20].tolist() == [4, 5, 10, 11]
    assert order[-6:].tolist() == [24, 25, 26, 27, 28, 29]


def test_pixels_of_another_shape_are_refused(model):
    for wrong in (
        torch.randn(3, 8, 8),
        torch.randn(2, 2, 4, VALUES + 1),
        torch.randn(0, 2, 4, VALUES),
    ):
        with pytest.raises(ValueError, match="expected \\(rows, columns, 4, 24\\)"):
            model.visual([wrong])


# Prompts and positions.


def test_text_goes_on_behind_the_longer_side_of_an_image(model):
    ids = prompt(2, "image", 1, "image", 2)
    made = model.build_prompt(ids, images=[picture(2, 3), picture(3, 1)])
    expected = [(0, 0, 0), (1, 1, 1)]
    expected += [(2, 2, 2), (2, 2, 3), (2, 2, 4), (2, 3, 2), (2, 3, 3), (2, 3, 4), (5, 5, 5)]
    expected += [(6, 6, 6), (6, 7, 6), (6, 8, 6), (9, 9, 9), (10, 10, 10)]
    assert [tuple(row) for row in made.position_ids[0].tolist()] == expected
    assert made.num_positions == 11


def test_the_prompt_brings_the_ids_that_rules_look_at(model):
    ids, mask = pad_batch([prompt(3, "image", 2), prompt(1, seed=1)])
    made = model.build_prompt(ids, mask, None, [picture(1, 2)], padding_side="left")
    text = ids[0, mask[0].bool()].tolist()
    assert made.token_ids[0].tolist() == [*text[:3], IMAGE, IMAGE, *text[4:]]
    assert made.token_ids[1].tolist() == [ids[1, -1].item()] * 7


def with_runs(ids: torch.Tensor, *sizes: int) -> torch.Tensor:
    """A prompt in the form of transformers."""
    runs, out = iter(sizes), []
    for token in ids[0].tolist():
        out += [IMAGE] * next(runs) if token == IMAGE_TOKEN_INDEX else [token]
    return torch.tensor([out])


def test_prompts_of_transformers_give_the_same_answers(model):
    images = [picture(2, 3), picture(1, 4), picture(3, 3)]
    rows = [prompt(4, "image", 1, "image", 3), prompt(2, "image", 6, seed=1)]
    ids, mask = pad_batch(rows)
    runs, runs_mask = pad_batch([with_runs(rows[0], 6, 4), with_runs(rows[1], 9)])
    expected = greedy(model, ids, images, attention_mask=mask)
    values = torch.cat([image.flatten(0, 2) for image in images])
    grids = torch.tensor([[1, 4, 6], [1, 2, 8], [1, 6, 6]])
    named = {"pixel_values": values, "image_grid_thw": grids}
    assert torch.equal(greedy(model, runs, attention_mask=runs_mask, **named), expected)
    labels = runs.masked_fill(runs == IMAGE, IGNORE_INDEX)
    marked = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, IGNORE_INDEX)
    with torch.no_grad():
        theirs = model(runs, attention_mask=runs_mask, labels=labels, **named).loss
        ours = model(ids, attention_mask=mask, labels=marked, images=images).loss
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize(
    "ids, images, says",
    [
        (
            with_runs(prompt(2, "image", 2), 5),
            [(2, 3)],
            "1 images and videos, which need 6 <.image",
        ),
        (
            with_runs(prompt(2, "image", 2), 7),
            [(2, 3)],
            "1 images and videos, which need 6 <.image",
        ),
        (with_runs(prompt(2, "image", 1, "image"), 3, 3), [(2, 3)], "which need 6 <.image_pad.>"),
        (with_runs(prompt(2, "image"), 2), None, "0 images and videos, which need none"),
        (torch.cat([prompt("image"), with_runs(prompt("image"), 1)], 1), [(1, 1)] * 2, "use one"),
        (prompt(2, "image"), [(1, 1)] * 2, "2 images for 1 <image> marks"),
        (torch.tensor([[3, VIDEO, 4]]), [(1, 1)], "which need 1 <.image_pad.>, in this order"),
    ],
    ids=["short", "long", "torn", "no-image", "both", "too-many", "video"],
)
def test_prompts_that_do_not_fit_their_images_are_refused(model, ids, images, says):
    images = images and [picture(*grid) for grid in images]
    with pytest.raises(ValueError, match=says):
        greedy(model, ids, images)


def test_a_forward_pass_without_its_images_is_refused(model):
    with pytest.raises(ValueError, match="no images were given"):
        model(with_runs(prompt(2, "image"), 3))
    with pytest.raises(ValueError, match="either images, or pixel_values"):
        model(prompt(2, "image"), images=[picture(1, 1)], pixel_values=torch.ones(4, VALUES))


def test_images_behind_a_filled_cache_are_refused(model):
    cache = model(prompt(2, "image", 3), images=[picture(2, 3)]).past_key_values
    values, grids = picture(2, 3).flatten(0, 2), torch.tensor([[1, 4, 6]])
    named = {"pixel_values": values, "image_grid_thw": grids}
    with pytest.raises(ValueError, match=r"<.image_pad.> tokens behind a filled past_key_values"):
        model(with_runs(prompt(1, "image", 2), 6), past_key_values=cache, **named)
    with pytest.raises(ValueError, match=r"<.video_pad.> tokens behind a filled past_key_values"):
        model(torch.tensor([[3, VIDEO]]), past_key_values=cache)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_prompts_stand_where_transformers_has_them(model, side):
    images, rows = [picture(2, 3), picture(3, 4)], [prompt(4, "image", 5), prompt(2, "image", 9)]
    runs, mask = pad_batch([with_runs(rows[0], 6), with_runs(rows[1], 12)], side)
    named = {
        "pixel_values": torch.cat([image.flatten(0, 2) for image in images]),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 6, 8]]),
    }
    with torch.no_grad():
        logits = model(runs, attention_mask=mask, **named).logits
        alone = [model(row, images=[own]).logits[0] for row, own in zip(rows, images, strict=True)]
    assert logits.shape[:2] == runs.shape
    for own, there, expected in zip(logits, mask.bool(), alone, strict=True):
        torch.testing.assert_close(own[there], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_that_no_prompt_uses_stay_in_the_logits(model, side):
    """Tokenizers pad to multiples of 8 where that is asked for."""
    row, named = with_runs(prompt(4, "image", 5), 6), {"images": [picture(2, 3)]}
    none = torch.zeros(1, 3, dtype=torch.long)
    parts, there = (row, none), (torch.ones_like(row), none)
    flip = slice(None, None, -1) if side == "left" else slice(None)
    padded, mask = torch.cat(parts[flip], dim=1), torch.cat(there[flip], dim=1)
    labels = padded.masked_fill((mask == 0) | (padded == IMAGE), IGNORE_INDEX)
    with torch.no_grad():
        expected = model(row, **named)
        out = model(padded, attention_mask=mask, **named)
        assert out.logits.shape[:2] == padded.shape
        assert model(padded, attention_mask=mask, labels=labels, **named).logits.shape[1] == 18
    torch.testing.assert_close(out.logits[mask.bool()], expected.logits[0], atol=1e-4, rtol=1e-4)
    with model.using(build_pruner("random", visual_token_num=2)):
        assert model(padded, attention_mask=mask, **named).logits.shape[1] == 11


def test_a_mask_of_another_shape_is_refused(model):
    ids = with_runs(prompt(2, "image", 3), 6)
    with pytest.raises(ValueError, match=r"attention_mask \(1, 4\) must have the shape"):
        greedy(model, ids, [picture(2, 3)], attention_mask=torch.ones(1, 4, dtype=torch.long))


# Answers.


def test_a_batch_gives_what_its_prompts_give_alone(model):
    cases = [
        (prompt(5, "image", 4), [picture(3, 5)]),
        (prompt(3, seed=1), []),
        (prompt(1, "image", 2, "image", 9, seed=2), [picture(2, 2), picture(4, 1)]),
    ]
    ids, mask = pad_batch([ids for ids, _ in cases])
    images = [image for _, own in cases for image in own]
    options = {"output_scores": True, "return_dict_in_generate": True}
    together = greedy(model, ids, images, attention_mask=mask, **options)
    for row, (own_ids, own) in enumerate(cases):
        alone = greedy(model, own_ids, own or None, **options)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        torch.testing.assert_close(
            together.scores[0][row], alone.scores[0][0], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_questions_about_one_image_share_its_beginning(model, penalty):
    first, second = (Picture(picture(*grid), (9, 9)) for grid in ((3, 5), (4, 2)))
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": -1, "pad_token_id": 0}
    options |= {"repetition_penalty": penalty}
    cache = PrefixCache(model)
    for seed in range(3):
        rows = [torch.cat([prompt(4, "image")[0], prompt(n, seed=seed)[0]]) for n in (2, 7, 3)]
        pictures = [[first], [second], [first]]
        batch = generate_inputs(model, rows, pictures, [""] * 3)
        assert torch.equal(
            cache.generate(rows, pictures, [""] * 3, **options), model.generate(**batch, **options)
        )
    assert any(beginning is not None for beginning in cache._beginnings.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half(model, dtype):
    half = build().to(dtype)
    with torch.no_grad():
        ours, exact = half.visual([picture(3, 5)])[0], model.visual([picture(3, 5)])[0]
    assert ours.dtype == dtype
    assert (ours.float() - exact).norm() < 0.1 * exact.norm()
    assert greedy(half, prompt(3, "image", 2), [picture(2, 3)]).shape == (1, 6)


def test_an_answer_goes_on_from_positions_behind_the_image(model):
    """The cache, no cache, and the whole sequence in one pass agree."""
    ids, images = prompt(3, "image", 2), [picture(2, 6)]
    answer = greedy(model, ids, images)
    assert torch.equal(greedy(model, ids, images, use_cache=False), answer)
    with torch.no_grad():
        logits = model(torch.cat([ids, answer], dim=1), images=images).logits[0]
    assert torch.equal(logits[-len(answer[0]) - 1 : -1].argmax(-1), answer[0])


def test_beams_and_sampling_run(model):
    ids, images = prompt(3, "image", 2), [picture(2, 2)]
    beams = greedy(model, ids, images, num_beams=3, num_return_sequences=2)
    assert beams.shape == (2, 6)
    torch.manual_seed(0)
    sampled = model.generate(ids, images=images, do_sample=True, max_new_tokens=4, eos_token_id=-1)
    assert sampled.shape == (1, 4)


def test_keywords_stop_answers_and_not_for_what_the_prompt_says(model):
    class Letters:
        """One letter for each id; no BOS, as with Qwen's tokenizer."""

        bos_token_id = None

        def __call__(self, text):
            return SimpleNamespace(input_ids=[ord(letter) - 32 for letter in text])

        def decode(self, ids, skip_special_tokens=True):
            return "".join(chr(32 + token) for token in ids)

    rows = [prompt(3, "image", 2), prompt(4, seed=1)]
    ids, mask = pad_batch(rows)
    images = [picture(2, 3)]
    plain = greedy(model, ids, images, attention_mask=mask)
    word = Letters().decode(plain[0, 1:3].tolist())
    said = Letters().decode(rows[0][0, -2:].tolist())  # the last two tokens of a prompt
    for row, keywords, length in (
        (rows[0], [word], 3),
        (rows[0], [said], 6),
        (ids, [word, Letters().decode(plain[1, :3].tolist())], 3),
    ):
        stop = KeywordsStoppingCriteria(keywords, Letters(), row)
        own = {"attention_mask": mask} if len(row) > 1 else {}
        answer = greedy(model, row, images, stopping_criteria=[stop], **own)
        assert answer.shape[1] == length


def test_a_penalty_of_repetition_sees_the_prompt(model):
    """As in plain transformers: a token of the prompt is penalised as one of the answer is."""
    ids, images, penalty = prompt(12, "image", 12), [picture(2, 2)], 5.0
    seen, answer = {IMAGE, *ids[ids >= 0].tolist()}, []
    for _ in range(6):
        tail = torch.tensor([answer], dtype=torch.long)
        with torch.no_grad():
            logits = model(torch.cat([ids, tail], dim=1), images=images).logits[0, -1]
        for token in seen:
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        answer.append(int(logits.argmax()))
        seen.add(answer[-1])
    rule = {"repetition_penalty": penalty}
    assert greedy(model, ids, images, **rule)[0].tolist() == answer
    assert greedy(model, ids, images)[0].tolist() != answer
    batch, mask = pad_batch([ids, prompt(40, seed=1)])
    assert greedy(model, batch, images, attention_mask=mask, **rule)[0].tolist() == answer


def test_queries_keys_and_values_have_biases_and_the_output_none(model):
    attention = model.model.layers[0].self_attn
    assert all(getattr(attention, f"{name}_proj").bias is not None for name in "qkv")
    assert attention.o_proj.bias is None


def test_a_trace_counts_tokens_not_positions(model):
    with trace_pruning(model, embeds=True, attention=[0]) as trace:
        greedy(model, prompt(3, "image", 2), [picture(2, 6)])
    assert [len(image) for image in trace.visual_embeds] == trace.unpruned_lengths == [12]
    assert trace.visual_positions[0].tolist() == list(range(12))
    assert trace.position_ids.shape == (1, 17, 3)
    assert [int(n) for n in trace.kv_lengths] == [17] * 3
    torch.testing.assert_close(trace.attention[0].sum(-1), torch.ones(1, 4))


def test_a_model_survives_saving(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    ids, images = prompt(3, "image", 2), [picture(2, 3)]
    assert again.config.rope_scaling == TEXT["rope_scaling"]
    assert torch.equal(greedy(again, ids, images), greedy(model, ids, images))


def test_sections_that_are_not_the_width_of_a_head_are_refused():
    with pytest.raises(ValueError, match="is about 5 frequencies.*have 4"):
        build(rope_scaling={"type": "mrope", "mrope_section": [1, 2, 2]})


@pytest.mark.parametrize("where", ["one", "several"])
def test_it_answers_on_other_devices_as_on_this_one(model, where):
    """On one device, and shared out: the tower apart from the decoder, layers and head apart."""
    away = build()
    parts = [away] if where == "one" else [away.visual, away.model.layers[1], away.lm_head]
    for part, device in zip(parts, (SECOND, THIRD, SECOND), strict=False):
        place(part, device)
    images = [picture(3, 5), picture(2, 2)]
    ids, mask = pad_batch([prompt(3, "image", 2), prompt(1, "image", 6, seed=1)])
    runs, runs_mask = pad_batch(
        [with_runs(prompt(3, "image", 2), 15), with_runs(prompt(1, "image", 6, seed=1), 4)]
    )
    options = {"pad_token_id": 0, "repetition_penalty": 2.0}
    expected = greedy(model, ids, images, attention_mask=mask, **options)
    with torch.no_grad(), devices() as log:
        home = away.get_input_embeddings().weight.device
        for own_ids, own_mask in ((ids, mask), (runs, runs_mask)):
            own_ids, own_mask = own_ids.to(home), own_mask.to(home)
            answer = greedy(away, own_ids, images, attention_mask=own_mask, **options)
            assert answer.tolist() == expected.tolist()
    assert log.copies
