"""Recorded features of the multi-scale vision tower."""

import re
from types import SimpleNamespace

import torch

from llava.mm_utils import process_images
from llava.model.multimodal_encoder.builder import build_vision_tower
from tests.golden_cases import load_arrays, locate
from tests.golden_checks.e2e import image_names
from tests.golden_checks.models import open_images

IMAGE_NAME = re.compile(r"\w+\.png")
FEATURES_ATOL = 1e-4


def check_vision(case, folder, report):
    """Features for every recorded list of scales, of one padded image."""
    recorded = load_arrays(case, folder)
    images = image_names(case) or IMAGE_NAME.findall(case.get("notes") or "")
    names = [key.removeprefix("features_") for key in recorded if key.startswith("features_")]
    for name in names:
        report.prefix = f"scales {name}: "
        config = SimpleNamespace(
            mm_vision_tower=str(locate(case["checkpoint"], folder)),
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            image_aspect_ratio="pad",
            s2=True,
            s2_scales=name.replace("_", ","),
        )
        tower = build_vision_tower(config)
        pixels = process_images(open_images(images, folder), tower.image_processor, config)
        report.equal("pixels", list(pixels.shape), recorded[f"pixel_shape_{name}"].tolist())
        features = tower(pixels)
        report.equal("features", list(features.shape), recorded[f"shape_{name}"].tolist())
        rows = features[0, torch.tensor(recorded[f"rows_{name}"])]
        report.close("features", rows, recorded[f"features_{name}"], FEATURES_ATOL)
        report.close("row sums", features[0].sum(-1), recorded[f"row_sums_{name}"], 2e-3)
    report.prefix = ""
