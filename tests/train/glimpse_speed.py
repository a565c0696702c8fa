"""What a step of a glimpse's training costs: prompts without gradients, and all in one pass.

    OMP_NUM_THREADS=1 python -m tests.train.glimpse_speed            # a Markdown table

Random models of both families, of the same sizes; the ways take turns, and each number is a median
over the rounds. In one pass, as published, all tokens are recorded for the gradients.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.language_model.attention import padded_causal_mask
from llava.model.language_model.modeling_llama import Step
from llava.pruning import build_pruner
from llava.pruning.glimpseprune_modules import Glimpse, GlimpseConfig
from llava.pruning.testing import tiny
from llava.train.glimpse.loss import GlimpseObjective

#: of the language model: about a tenth of a second for a prompt on one core
SIZES = dict(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=12,
    num_attention_heads=8,
    initializer_range=0.02,
)
QUESTION, ANSWER = 24, 6  # tokens


class OnePass(GlimpseObjective):
    """The same losses from one pass over prompt, glimpse and answer."""

    def _run(self, prompt, answer_ids: Tensor, answer_mask: Tensor):
        decoder, config = self.llava.model, self.glimpse.config
        vectors, count = self.glimpse.vectors(), config.le_length
        batch, size = prompt.attention_mask.shape
        answer = decoder.embed_tokens(answer_ids)
        x = torch.cat([prompt.inputs_embeds, vectors[0].expand(batch, -1, -1), answer], dim=1)
        last = prompt.position_ids.flatten(1).amax(dim=1, keepdim=True)
        behind = last + 1 + torch.arange(x.shape[1] - size)
        if prompt.position_ids.ndim == 3:
            behind = behind[..., None].expand(-1, -1, prompt.position_ids.shape[2])
        positions = torch.cat([prompt.position_ids, behind], dim=1)
        ones = answer_mask.new_ones(batch, count).bool()
        valid = torch.cat([prompt.attention_mask, ones, answer_mask.bool()], dim=1)
        mask = padded_causal_mask(valid, x.shape[1])
        step = Step(decoder.rotary(positions, x.dtype), mask, valid)
        place, found = size + count - 1, {}
        form = self.llava.pruner.probe(len(decoder.layers)).form
        probing = Step(step.rope, mask, valid, torch.full((batch, 1), place), form)
        for number, layer in enumerate(decoder.layers):
            if number and number in vectors:
                glimpse = x[:, size : size + count] + vectors[number]
                x = torch.cat([x[:, :size], glimpse, x[:, size + count :]], dim=1)
            x, row = layer(x, probing if number in config.selected_layers else step, None)
            if row is not None:
                found[number] = row[:, :, 0, :size]
        x = decoder.norm(x)
        return x[:, place:-1], [found[layer] for layer in config.selected_layers]


def models(folder: Path, **sizes) -> dict[str, tuple[torch.nn.Module, Tensor, tuple[int, int]]]:
    """Family -> (model, pixels of an image, its grid): 576 tokens of LLaVA, 24 x 24 of Qwen."""
    sizes = {**SIZES, **sizes}
    tower = tiny.TOWER | {"image_size": 336}
    saved, tiny.TOWER = tiny.TOWER, tower
    try:
        path = tiny.write_tower(folder / "tower")
    finally:
        tiny.TOWER = saved
    llava = tiny.make_model(path, **sizes)
    width = sizes["hidden_size"] // sizes["num_attention_heads"]
    sections = [width // 2 - 2 * (width // 6), width // 6, width // 6]
    vision = tiny.OWN_GRIDS_TOWER | {"out_hidden_size": sizes["hidden_size"]}
    own = {"rope_scaling": {"type": "mrope", "mrope_section": sections}, "vision_config": vision}
    config = {**tiny.TINY, **tiny.OWN_GRIDS, **sizes, **own}
    qwen = tiny.Qwen2_5_VLForConditionalGeneration(tiny.Qwen2_5_VLConfig(**config)).eval()
    return {
        "LLaVA": (llava, torch.randn(3, 336, 336), (24, 24)),
        "Qwen2.5-VL": (qwen, tiny.picture(24, 24), (24, 24)),
    }


def give_glimpse(model, **shape) -> None:
    """A method with a new part for the model."""
    pruner = build_pruner("glimpseprune")
    pruner.module = Glimpse(GlimpseConfig.for_model(model, **shape))
    pruner.module.initialize()
    model.pruner = pruner


def batch_of(pixels: Tensor, grid: tuple[int, int], size: int) -> dict:
    """Random questions about one image, as `GlimpseObjective` takes them."""
    ids = torch.randint(3, 80, (size, QUESTION + 1))
    ids[:, 4] = IMAGE_TOKEN_INDEX
    answers = torch.randint(3, 80, (size, ANSWER))
    labels = answers.clone()
    assert (labels != IGNORE_INDEX).all()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "answer_ids": answers,
        "answer_mask": torch.ones_like(answers),
        "labels": labels,
        "images": torch.stack([pixels] * size),
        "masks": [torch.rand(grid) < 0.3 for _ in range(size)],
    }


def step_time(objective: GlimpseObjective, batch: dict) -> float:
    """Seconds of this process that a step takes, optimizer left out."""
    start = time.process_time()
    objective(**batch)["loss"].backward()
    spent = time.process_time() - start
    objective.glimpse.zero_grad()
    return spent


def recorded_bytes(objective: GlimpseObjective, batch: dict) -> int:
    """Bytes of all tensors that a step keeps for its gradients, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(**batch)["loss"].backward()
    objective.glimpse.zero_grad()
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    torch.manual_seed(0)
    print("| model | batch | way | questions per second | times one pass | MB kept for gradients |")
    print("|---|---:|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for family, (model, pixels, grid) in models(Path(folder)).items():
            give_glimpse(model, attn_fuse_size=64, visual_cond_size=128)
            ways = {"one pass": OnePass(model), "prompt apart": GlimpseObjective(model)}
            for size in args.batches:
                batch = batch_of(pixels, grid, size)
                times: dict[str, list[float]] = {way: [] for way in ways}
                for _ in range(args.rounds + 1):
                    for way, objective in ways.items():
                        times[way].append(step_time(objective.train(), batch))
                medians = {way: statistics.median(own[1:]) for way, own in times.items()}
                for way, objective in ways.items():
                    kept = recorded_bytes(objective, batch) / 1e6
                    gain = medians["one pass"] / medians[way]
                    speed = size / medians[way]
                    print(f"| {family} | {size} | {way} | {speed:.2f} | {gain:.2f} | {kept:.0f} |")


if __name__ == "__main__":
    main()
