"""Recorded image preparation: pixels, geometry, tiles and the type of the result."""

import hashlib
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from llava.conversation import conv_templates
from llava.mm_utils import (
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
)
from llava.model.llava_arch import unpad_image
from tests.golden_cases import load_arrays, load_json, locate
from tests.golden_checks.models import open_images

TOWER = "tiny-clip-vit-l14-336"
PIXELS_ATOL = 1e-5
#: sampled pixels: every 24th, beginning with the 12th
SAMPLED = slice(12, None, 24)


class Preparation:
    """Images of the recording, prepared in a named mode."""

    def __init__(self, folder):
        self.folder = folder
        self.processor = CLIPImageProcessor.from_pretrained(locate(TOWER, folder))
        pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        self.config = SimpleNamespace(image_grid_pinpoints=pinpoints)

    def __call__(self, names, mode):
        self.config.image_aspect_ratio = None if mode == "None" else mode
        return process_images(open_images(names, self.folder), self.processor, self.config)


def check_preprocess(case, folder, report):
    """One of the three recorded files."""
    prepare = Preparation(folder)
    if case["file"].endswith(".npz"):
        for key, recorded in load_arrays(case, folder).items():
            pixels = prepare([key.split("|")[0]], key.split("|")[1])
            sampled = pixels.reshape(-1, *pixels.shape[-3:])[..., SAMPLED, SAMPLED]
            report.close(key, sampled, recorded, PIXELS_ATOL)
        return
    content = load_json(case, folder)
    if isinstance(content, list):
        check_conversation_images(content, report)
        return
    for row in content["process_images"]:
        report.prefix = f"{row['image']}, {row['mode']}: "
        check_pixels(prepare([row["image"]], row["mode"]), row, prepare.processor, report)
    report.prefix = ""
    for row in content["result_types"]:
        name = f"type of {row['images']}, {row['mode']}"
        report.equal(name, describe(prepare(row["images"], row["mode"])), row["result"])
    check_pictures(content, folder, report)
    check_geometry(content, report)


def check_pixels(pixels, row, processor, report):
    report.equal("shape", list(pixels.shape), row["shape"])
    report.equal("dtype", str(pixels.dtype), row["dtype"])
    tiles = pixels.reshape(-1, *pixels.shape[-3:])
    report.close("mean", tiles.mean(dim=(0, 2, 3)), row["mean_per_channel"], 1e-5)
    flat = tiles.transpose(0, 1).flatten(1).double()
    report.close("deviation", flat.std(dim=1, correction=0), row["std_per_channel"], 1e-4)
    report.close("range", [pixels.min(), pixels.max()], [row["min"], row["max"]], PIXELS_ATOL)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (processor.image_mean, processor.image_std)
    )
    bytes_ = ((tiles * std + mean) * 255).round().to(torch.uint8).numpy()
    report.equal("tiles", [digest(tile) for tile in bytes_], row["uint8_tile_sha256"])


def digest(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def describe(result) -> str:
    if isinstance(result, list):
        return f"list {[list(pixels.shape) for pixels in result]}"
    return f"tensor {list(result.shape)}"


def check_pictures(content, folder, report):
    """Whole pictures after padding to a square, and after fitting them into a canvas."""
    for row in content["expand2square"]:
        square = expand2square(open_images([row["image"]], folder)[0], (122, 116, 104))
        report.equal(f"square of {row['image']}", digest(np.asarray(square)), row["rgb_sha256"])
    for row in content["resize_and_pad"]:
        canvas = resize_and_pad_image(open_images([row["image"]], folder)[0], row["target"])
        report.equal(f"canvas of {row['image']}", digest(np.asarray(canvas)), row["rgb_sha256"])
    for row in content["resize_and_pad_geometry"]:
        canvas = resize_and_pad_image(Image.new("RGB", row["size"], "white"), row["target"])
        left, top, right, bottom = canvas.getbbox()
        box = [left, top, right - left, bottom - top]
        report.equal(f"place of {row['size']}", box, [row[key] for key in ("x0", "y0", "w", "h")])
    for row in content["divide_to_patches"]:
        width, height = row["image_size"]
        ramp = np.stack(np.broadcast_arrays(np.arange(width)[None], np.arange(height)[:, None]), 2)
        image = Image.fromarray(ramp.astype(np.uint32)[..., 0].astype(np.int32), mode="I")
        tiles = divide_to_patches(image, row["patch"])
        report.equal(f"tiles of {row['image_size']}", [list(t.size) for t in tiles], row["sizes"])
        lefts = [tile.getpixel((0, 0)) for tile in tiles]
        report.equal("left edges", lefts, [corner[0] for corner in row["top_left_origin"]])


def check_geometry(content, report):
    """Best resolutions, grids, and what is left of a padded map."""
    for name, table in content["best_resolution"].items():
        for row in table["cases"]:
            best = select_best_resolution(row["size"], table["pinpoints"])
            report.equal(f"{name}: best of {row['size']}", best, row["best"])
            if row["grid_wh"] is not None:
                grid = get_anyres_image_grid_shape(row["size"], table["pinpoints"], 336)
                report.equal(f"{name}: grid of {row['size']}", grid, row["grid_wh"])
    for row in content["unpad_image"]:
        height, width = row["grid_hw"]
        places = torch.arange(height * width).view(1, height, width)
        inside = unpad_image(places, row["original_size"])
        name = f"unpadded {row['original_size']}"
        report.equal(name, list(inside.shape[1:]), row["out_hw"])
        if inside.numel():
            first = int(inside[0, 0, 0])
            corner = [first // width, first % width]
            report.equal(name, corner, [row["row_start"], row["col_start"]])


def check_conversation_images(content, report):
    """Uploaded images as the demo prepares them."""
    conv = conv_templates["vicuna_v1"].copy()
    for row in content:
        image = Image.new("RGB", row["size"], (10, 20, 30))
        out = conv.process_image(image, row["mode"], return_pil=True)
        name = f"{row['mode']} of {row['size']}"
        report.equal(name, list(out.size), row["out"])
        report.equal(f"{name}: corner", list(out.getpixel((0, 0))), row["corner"])
