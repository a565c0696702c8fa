"""Videos for Qwen2.5-VL: frames to patches, places in time, prompts, and what methods keep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.inputs import Picture, generate_inputs, stack_pixels
from llava.model.multimodal_encoder.qwen2_5_vl_images import Qwen2_5_VLImageProcessor
from llava.model.multimodal_encoder.qwen2_5_vl_videos import Video, split_videos
from llava.model.reuse import PrefixCache
from llava.pruning import DecoderStage, Pruner, VisionStage, build_pruner, trace_pruning
from llava.pruning.testing.tiny import (
    OWN_GRIDS,
    VALUES,
    make_own_grids_model,
    make_pruner,
    pad_batch,
    picture,
    sample,
    still,
    video,
)
from tests.golden_checks.models import load_checkpoint
from tests.paths import GOLDEN
from tests.second_device import SECOND, Elsewhere, devices, place

IMAGE_PAD, VIDEO_PAD = OWN_GRIDS["image_token_id"], OWN_GRIDS["video_token_id"]
GREEDY = dict(do_sample=False, max_new_tokens=5, eos_token_id=-1)


@pytest.fixture
def model(own_grids_model):
    return own_grids_model


# Frames to patches.


def frames(count: int, size=(84, 56)) -> list[Image.Image]:
    """Frames whose colour tells their number."""
    return [Image.new("RGB", size, (20 * n, 100, 200 - 10 * n)) for n in range(count)]


def small_processor(**settings) -> Qwen2_5_VLImageProcessor:
    return Qwen2_5_VLImageProcessor(**{"video_min_pixels": 56 * 56, **settings})


def test_two_equal_frames_are_an_image():
    noise = torch.randint(0, 255, (90, 61, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    shown, processor = Image.fromarray(noise.numpy()), small_processor()
    clip = processor.process_video([shown, shown])
    assert torch.equal(clip.pixels[0], processor.process_images([shown])[0])
    assert len(clip) == 1 and clip.seconds == 1.0


def test_frames_go_into_patches_in_pairs_and_the_last_fills_its_own():
    clip = small_processor(image_mean=(0, 0, 0), image_std=(1, 1, 1)).process_video(frames(5), 4)
    assert clip.pixels.shape == (3, 2, 3, 4, 1176) and clip.seconds == 0.5
    values = (clip.pixels.unflatten(-1, (3, 2, 14, 14)) * 255).round()
    assert (values.flatten(-2).flatten(1, 3).std(dim=(1, 4)) == 0).all()
    red = values[:, 0, 0, 0, 0, :, 0, 0]
    assert red.tolist() == [[0, 20], [40, 60], [80, 80]]


def test_frames_have_bounds_of_their_own_that_many_frames_share():
    default = Qwen2_5_VLImageProcessor()
    assert default.process_video(frames(2)).shape[1:3] == (10, 14)  # 128 tokens at least
    large = frames(2, (2000, 1000))
    assert default.process_video(large).shape[1:3] == (19, 39)  # 768 at most
    tight = small_processor(video_max_pixels=40 * 784, video_total_pixels=60 * 784)
    assert tight.process_video(large).shape[1:3] == (4, 8)
    assert tight.process_video(large * 3).shape[1:3] == (3, 6)  # 20 for each of 6 frames
    assert tight.process_video(large * 30).shape[1:3] == (1, 2)  # never below the minimum


BAD_VIDEOS = {
    "none": (lambda p: p.process_video([]), "at least one frame"),
    "files": (lambda p: p.process_video(["a.png"]), "a list of PIL images.*not of str"),
    "sizes": (lambda p: p.process_video([*frames(1), *frames(1, (56, 56))]), "56 x 56 and 84 x 56"),
    "fps": (lambda p: p.process_video(frames(2), 0), r"fps \(0\) must be above 0"),
    "bounds": (
        lambda p: p.process_video(frames(2)),
        "video_min_pixels 3136 and video_max_pixels 3",
    ),
}


@pytest.mark.parametrize("call, says", BAD_VIDEOS.values(), ids=BAD_VIDEOS)
def test_what_is_no_video_is_refused(call, says):
    bounds = {"video_max_pixels": 3} if "video_max_pixels" in says else {}
    with pytest.raises(ValueError, match=says):
        call(small_processor(**bounds))


def test_the_form_of_transformers_and_back():
    processor, clips = small_processor(), [frames(4), frames(3, (56, 84))]
    batch = processor(videos=clips, images=frames(1), fps=[2, 1])
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert batch["video_grid_thw"].tolist() == [[2, 4, 6], [2, 6, 4]]
    assert batch["pixel_values_videos"].shape == (2 * 24 + 2 * 24, 1176)
    assert list(batch["second_per_grid_ts"]) == [1.0, 2.0]
    named = (batch[k] for k in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"))
    back = split_videos(*named)
    for own, clip, fps in zip(back, clips, (2, 1), strict=True):
        assert torch.equal(own.pixels, processor.process_video(clip, fps).pixels)
    assert processor(videos=clips[0], images=None)["video_grid_thw"].tolist() == [[2, 4, 6]]
    with pytest.raises(ValueError, match="is about 48 patches"):
        split_videos(batch["pixel_values_videos"], batch["video_grid_thw"][:1], None)
    with pytest.raises(ValueError, match="1 numbers for 2 videos"):
        split_videos(batch["pixel_values_videos"], batch["video_grid_thw"], [1.0])


# The tower, and places in time.


@torch.no_grad()
def test_pairs_of_frames_do_not_see_one_another(model):
    clip = video(3, 5, 9)
    whole = model.image_tokens([clip, picture(5, 9)])[0]
    assert whole.embeds.shape == (3 * 45, 32) and whole.frame_pairs == 3
    for number, pair in enumerate(clip.pixels):
        own = whole.embeds[45 * number : 45 * (number + 1)]
        torch.testing.assert_close(own, model.visual([pair])[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "seconds, times, behind",
    [(1.0, [0, 2, 4], 7), (0.25, [0, 0, 1], 5), (2.0, [0, 4, 8], 11), (2 / 3, [0, 1, 2], 5)],
)
def test_time_goes_on_with_the_seconds_and_the_text_behind_the_largest(
    model, seconds, times, behind
):
    """Two tokens of text, a video of 3 x 1 x 3, two more; the widest side counts as well."""
    made = model.build_prompt(sample("image", 2).ids, images=[video(3, 1, 3, seconds)])
    start = 1
    expected = [(0, 0, 0)]
    expected += [(start + time, start, start + column) for time in times for column in range(3)]
    expected += [(behind - 1,) * 3, (behind,) * 3]
    assert [tuple(row) for row in made.position_ids[0].tolist()] == expected
    assert made.num_positions == behind + 1
    assert model.image_extent(video(3, 1, 3, seconds)) == behind - 2


def test_many_pairs_of_frames_in_no_time_take_the_positions_of_the_widest_side(model):
    clip = video(5, 1, 3, 0.1)
    made = model.build_prompt(sample("image", 2).ids, images=[clip])
    assert made.num_positions == 1 + 3 + 2
    assert model.image_extent(clip) == 3


def test_tokens_per_second_are_those_of_the_config(model, monkeypatch):
    monkeypatch.setattr(model.visual.config, "tokens_per_second", 4)
    made = model.build_prompt(sample("image").ids, images=[video(3, 1, 1, 1.0)])
    assert made.position_ids[0, 1:, 0].tolist() == [1, 5, 9]


def test_a_pair_of_frames_lasts_some_time():
    with pytest.raises(ValueError, match="cannot last 0 seconds"):
        video(2, 1, 1, 0)


# Prompts.


def with_runs(ids: torch.Tensor, *runs: tuple[int, int]) -> torch.Tensor:
    """A prompt in the form of transformers; runs: (token, how often)."""
    left, out = iter(runs), []
    for token in ids[0].tolist():
        if token == IMAGE_TOKEN_INDEX:
            pad, count = next(left)
            out += [pad] * count
        else:
            out.append(token)
    return torch.tensor([out])


def mixed_batch():
    """Prompts (ids, mask), images and videos in their order, and the form of transformers."""
    rows = [sample(3, "image", 1, "image", 2), sample(6, seed=2), sample("image", 4, seed=1)]
    clips, image = [video(2, 2, 3, 0.5), video(3, 1, 2, 2.0, seed=1)], picture(3, 3)
    runs = [
        with_runs(rows[0].ids, (VIDEO_PAD, 12), (IMAGE_PAD, 9)),
        rows[1].ids,
        with_runs(rows[2].ids, (VIDEO_PAD, 6)),
    ]
    named = {
        "pixel_values": image.flatten(0, 2),
        "image_grid_thw": torch.tensor([[1, 6, 6]]),
        "pixel_values_videos": torch.cat([clip.pixels.flatten(0, 3) for clip in clips]),
        "video_grid_thw": torch.tensor([[2, 4, 6], [3, 2, 4]]),
        "second_per_grid_ts": [0.5, 2.0],
    }
    return rows, [clips[0], image, clips[1]], pad_batch(runs), named


def test_two_videos_and_an_image_are_what_transformers_makes_of_them():
    """Recorded with transformers 4.51.3 on the small checkpoint; 4.57 takes whole seconds alone."""
    _, model, _ = load_checkpoint("tiny-qwen2.5-vl-cut", GOLDEN)
    recorded = np.load(GOLDEN / "qwen2_5_vl" / "videos.npz")

    def wave(count: int, speed: float) -> torch.Tensor:
        return (torch.arange(count * 1176).double() * speed).sin().float().view(count, 1176)

    named = {
        "pixel_values": wave(16, 0.53),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": wave(72 + 32, 0.37),
        "video_grid_thw": torch.tensor([[3, 4, 6], [2, 4, 4]]),
        "second_per_grid_ts": [0.5, 4 / 3],
    }
    with torch.no_grad(), trace_pruning(model, embeds=True) as trace:
        logits = model(torch.from_numpy(recorded["ids"])[None], **named).logits[0, -1]
    assert trace.position_ids[0].T.tolist() == recorded["position_ids"].tolist()
    first, _, second = trace.visual_embeds
    expected = torch.from_numpy(recorded["video_embeds"])
    torch.testing.assert_close(torch.cat([first, second]), expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(logits, torch.from_numpy(recorded["last_logits"]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_prompts_of_transformers_give_the_same_answers(model, penalty):
    rows, images, (runs, runs_mask), named = mixed_batch()
    ids, mask = pad_batch([row.ids for row in rows])
    options = {**GREEDY, "repetition_penalty": penalty, "pad_token_id": 0}
    expected = model.generate(ids, images=images, attention_mask=mask, **options)
    found = model.generate(runs, attention_mask=runs_mask, **named, **options)
    assert torch.equal(found, expected)
    pads = (runs == IMAGE_PAD) | (runs == VIDEO_PAD)
    labels = runs.masked_fill(pads, IGNORE_INDEX)
    marked = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, IGNORE_INDEX)
    with torch.no_grad():
        theirs = model(runs, attention_mask=runs_mask, labels=labels, **named).loss
        ours = model(ids, attention_mask=mask, labels=marked, images=images).loss
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("filler", [IMAGE_PAD, VIDEO_PAD])
def test_padding_may_be_a_token_that_stands_for_images(model, filler):
    _, _, (runs, mask), named = mixed_batch()
    filled = runs.masked_fill(mask == 0, filler)
    expected = model.generate(runs, attention_mask=mask, **named, **GREEDY)
    assert torch.equal(model.generate(filled, attention_mask=mask, **named, **GREEDY), expected)
    text, its_mask = pad_batch([sample(6).ids, sample(3).ids])
    filled = text.masked_fill(its_mask == 0, filler)
    with torch.no_grad():
        assert torch.isfinite(model(filled, its_mask).logits[its_mask.bool()]).all()


def test_rules_see_the_pads_of_videos(model):
    rows, images, (runs, runs_mask), _ = mixed_batch()
    ids, mask = pad_batch([row.ids for row in rows])
    made = model.build_prompt(ids, mask, None, images, padding_side="left")
    assert torch.equal(made.token_ids[runs_mask.bool()], runs[runs_mask.bool()])


def test_a_pair_of_frames_lasts_a_second_where_transformers_does_not_say(model):
    ids = with_runs(sample(2, "image", 3).ids, (VIDEO_PAD, 6))
    named = {"pixel_values_videos": video(3, 1, 2).pixels.flatten(0, 3)}
    named["video_grid_thw"] = torch.tensor([[3, 2, 4]])
    with trace_pruning(model) as trace:
        model.generate(ids, **named, **GREEDY)
    assert trace.position_ids[0, 3:9, 0].tolist() == [3, 3, 5, 5, 7, 7]


BAD_PROMPTS = {
    "a run too short": ((VIDEO_PAD, 5), "which need 6 <.video_pad.>, in this order"),
    "a run of an image": ((IMAGE_PAD, 6), "which need 6 <.video_pad.>, in this order"),
}


@pytest.mark.parametrize("run, says", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_prompts_that_do_not_fit_their_videos_are_refused(model, run, says):
    with pytest.raises(ValueError, match=says):
        model.generate(with_runs(sample("image").ids, run), images=[video(3, 1, 2)])


def test_half_of_what_a_video_needs_is_refused(model):
    with pytest.raises(ValueError, match="pixel_values_videos together with video_grid_thw"):
        model.generate(sample(3).ids, pixel_values_videos=torch.ones(24, VALUES))
    with pytest.raises(ValueError, match="<.video_pad.> tokens, but no images were given"):
        model(torch.tensor([[3, VIDEO_PAD, 4]]))


def test_questions_about_one_video_share_its_beginning(model):
    clip, image = Picture(video(2, 2, 3), (6, 4)), Picture(picture(2, 3), (6, 4))
    options = {**GREEDY, "pad_token_id": 0, "repetition_penalty": 2.0}
    cache = PrefixCache(model)
    for seed in range(3):
        rows = [
            torch.cat([sample(4, "image").ids[0], sample(n, seed=seed).ids[0]]) for n in (2, 7, 3)
        ]
        pictures = [[clip], [image], [clip]]
        batch = generate_inputs(model, rows, pictures, [""] * 3)
        expected = model.generate(**batch, **options)
        assert torch.equal(cache.generate(rows, pictures, [""] * 3, **options), expected)
    assert any(beginning is not None for beginning in cache._beginnings.values())


# What methods keep.


@pytest.mark.parametrize("name", ["random", "vispruner", "visionzip", "divprune", "pool", "vscan"])
@torch.no_grad()
def test_a_number_of_tokens_is_shared_out_equally(model, name):
    clip = video(3, 4, 9)
    model.pruner = build_pruner(name, visual_token_num=20)
    (kept,) = model.image_tokens([clip])
    pairs = (kept.positions[:, 0] // 2).bincount().tolist()
    assert len(set(pairs)) == 1 and sum(pairs) <= (20 if name != "vscan" else 30)
    model.pruner = build_pruner(name, visual_token_num=6)
    alone = [model.image_tokens([pair])[0] for pair in clip.pixels]
    if name != "random":  # each pair as an image with its share of the budget
        torch.testing.assert_close(kept.embeds, torch.cat([own.embeds for own in alone]))
        places = torch.cat([own.positions[:, 1:] for own in alone])
        assert torch.equal(kept.positions[:, 1:], places)


@pytest.mark.parametrize("number", [8, 20])
@pytest.mark.parametrize("name", ["nuwa", "vscan", "twigvlm", "sparsevlm"])
def test_later_cuts_leave_a_video_what_they_leave_as_many_images(model, name, number):
    """Of methods in both places, and of those that follow a plan of several cuts."""
    counts = []
    for image, budget in ((picture(4, 9), number), (video(3, 4, 9), 3 * number)):
        model.pruner = make_pruner(name, budget)
        with trace_pruning(model) as trace:
            model.generate(sample(3, "image", 2).ids, images=[image], **GREEDY)
        counts.append([int(n) for n in trace.visual_tokens])
    alone, together = counts
    assert all(abs(n - 3 * m) <= 3 for m, n in zip(alone, together, strict=True))


def test_methods_in_the_decoder_choose_from_the_whole_video(model):
    model.pruner = build_pruner("fastv", visual_token_num=7, layer=2)
    with trace_pruning(model) as trace:
        model.generate(sample(3, "image", 2).ids, images=[video(3, 4, 5)], **GREEDY)
    assert [int(n) for n in trace.visual_tokens] == [60, 60, 7, 7, 7, 7]


def test_a_share_leaves_every_pair_of_frames_a_token(model):
    model.pruner = build_pruner("random", visual_token_ratio=0.01)
    (kept,) = model.image_tokens([video(5, 2, 3)])
    assert kept.positions[:, 0].tolist() == [0, 2, 4, 6, 8]
    model.pruner = build_pruner("random", visual_token_ratio=0.5)
    assert len(model.image_tokens([video(5, 2, 3)])[0].patches) == 15


def test_a_budget_below_the_pairs_of_frames_names_the_video(model):
    model.pruner = build_pruner("vispruner", visual_token_num=4)
    says = r"video 1, of 5 x 2 x 3 tokens: visual_token_num \(4\) leaves less than one token"
    with pytest.raises(ValueError, match=says):
        model.image_tokens([picture(2, 3), video(5, 2, 3)])


@pytest.mark.parametrize(
    "name", ["fastv", "dart", "adaptprune", "sparsevlm", "pyramiddrop", "v2drop", "twigvlm"]
)
def test_methods_in_the_decoder_may_leave_less_than_a_token_for_a_pair(model, name):
    model.pruner = make_pruner(name, 12)
    with trace_pruning(model) as trace:
        model.generate(sample(3, "image", 2).ids, images=[video(20, 1, 2)], **GREEDY)
    counts = [int(n) for n in trace.visual_tokens]
    assert counts[0] == 40 and counts[-1] <= 12


def test_downsampling_makes_all_frames_smaller(model):
    clip = video(3, 4, 9)
    model.pruner = build_pruner("downsample", visual_token_num=36)
    (kept,) = model.image_tokens([clip])
    assert kept.grid == (2, 5) and len(kept.patches) == 30 and kept.length == 108
    assert kept.positions[::10, 0].tolist() == [0, 2, 4]
    equal = Video(still(4, 9)[None].expand(2, -1, -1, -1, -1), 1.0)
    model.pruner = build_pruner("downsample", visual_token_num=12)
    (image,) = model.image_tokens([still(4, 9)])
    model.pruner = build_pruner("downsample", visual_token_num=24)
    (both,) = model.image_tokens([equal])
    torch.testing.assert_close(both.embeds, image.embeds.repeat(2, 1))


class Notes(VisionStage, DecoderStage, Pruner):
    """Leaves numbers for images, and writes down what the decoder is told of them."""

    name = "notes"

    def __init__(self, numbers):
        self.numbers, self.layouts, self.seen = numbers, [], []

    def after_encoder(self, vision):
        own = self.numbers[: len(vision.features)]
        return replace(vision, image_extras={"note": own})

    def after_layout(self, image):
        self.layouts.append(image)
        return image

    def before_layer(self, index, prefill):
        self.seen.append((prefill.grids, prefill.frame_pairs, prefill.image_numbers("note")))
        return prefill


def test_methods_know_videos_from_images(model):
    model.pruner = notes = Notes([5, 5, 5])
    ids, mask = pad_batch([sample(2, "image", 1, "image", 2).ids, sample(3).ids])
    model.generate(ids, images=[picture(1, 2), video(3, 2, 3)], attention_mask=mask, **GREEDY)
    grids, pairs, numbers = notes.seen[0]
    assert grids == [[(1, 2), (2, 3)], [(0, 0), (0, 0)]]
    assert pairs == [[0, 3], [0, 0]] and numbers == [[5, 5], [0, 0]]
    image, clip = notes.layouts
    assert (image.frame_pairs, clip.frame_pairs, clip.crops) == (0, 3, 3)
    assert clip.blocks == ((2, 3),) * 3 and clip.patches.tolist() == list(range(18))


def test_videos_of_one_size_stay_videos(model):
    clips = [Picture(video(3, 2, 3), (84, 56)) for _ in range(2)]
    made = stack_pixels(model, clips)
    assert [type(own) for own in made] == [Video, Video]
    assert torch.equal(made[1].pixels, clips[1].pixels.pixels)


@pytest.mark.parametrize("numbers", [[1, 2, 3], [1, 1, 2]])
def test_numbers_that_differ_between_pairs_of_frames_are_refused(model, numbers):
    model.pruner = Notes(numbers)
    with pytest.raises(ValueError, match=r"\['note'\] differs between the pairs of frames of vid"):
        model.image_tokens([video(3, 2, 3)])


@pytest.mark.parametrize("name", ["none", "vispruner", "fastv"])
def test_a_video_costs_no_more_waits_than_an_image(name):
    model = make_own_grids_model()
    model.pruner = make_pruner(name)
    place(model, SECOND)
    ids = sample(4, "image", 5).ids
    mask, ids = (Elsewhere(x, SECOND) for x in (torch.ones_like(ids), ids))
    clip = Video(Elsewhere(video(3, 4, 9).pixels, SECOND), 1.0)
    with torch.no_grad(), devices() as log:
        model.generate(
            ids,
            attention_mask=mask,
            images=[clip],
            **{**GREEDY, "max_new_tokens": 1},
            pad_token_id=0,
        )
    assert 0 < len(log.waits) <= (2 if name == "none" else 4), "\n".join(log.waits)
