"""FasterVLM: the most attended patches, and its choice of the canvas."""

import torch
from PIL import Image

from llava.mm_utils import process_images
from llava.pruning import VisionTokens, build_pruner, trace_pruning
from llava.pruning.fastervlm import FasterVLM
from tests.conftest import SIDE


def vision(attention, **options):
    """attention: (B, H, N)"""
    attention = torch.tensor(attention)
    batch, _, count = attention.shape
    return VisionTokens(
        features=torch.zeros(batch, count, 1),
        positions=torch.arange(count).expand(batch, -1),
        grid=(1, count),
        salience=attention.mean(dim=1),
        **options,
    )


def test_the_most_attended_patches_stay_best_first():
    tokens = vision([[[0.9, 0.0, 0.3, 0.5], [0.0, 0.7, 0.4, 0.5]]])
    assert FasterVLM(visual_token_num=2).select(tokens).tolist() == [[3, 0]]


def test_equal_attention_goes_to_the_lower_patch():
    assert FasterVLM(visual_token_num=2).select(vision([[[0.5] * 4]])).tolist() == [[0, 1]]


def test_a_tiled_image_has_a_fifth_of_the_budget_per_crop():
    tokens = vision([[[0.1, 0.2, 0.3, 0.4]]] * 3, crops_in_budget=5)
    assert FasterVLM(visual_token_num=10).after_encoder(tokens).positions.tolist() == [[2, 3]] * 3


def test_the_canvas_is_the_one_the_image_fills_best(anyres_model, sample):
    model = anyres_model
    image = Image.new("RGB", (SIDE, SIDE))  # one crop large: enlarging it shows nothing new
    from transformers import CLIPImageProcessor

    side = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessor(crop_size=side, size={"shortest_edge": SIDE})
    assert process_images([image], processor, model.image_settings).shape[1] == 3
    model.pruner = build_pruner("fastervlm", visual_token_num=50)
    pixels = process_images([image], processor, model.image_settings)
    assert pixels.shape[1] == 5  # 2 x 2 tiles, filled without a margin
    prompt = sample(4, "image", 5)
    with trace_pruning(model) as trace:
        model(prompt.ids, images=list(pixels), image_sizes=[image.size])
    assert len(trace.visual_positions[0]) == 50
    assert (trace.visual_positions[0] >= 0).all()  # no newlines
