"""Stages of `playground.train_qwen`: glimpses of GlimpsePrune for the playground's Qwen2.5-VL, as
it is and with the adapter of GlimpsePrune+.

Pictures are made on the way and seen once, each for several questions; some are not square.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava.conv_mode import CONFIG_KEY
from llava.front_end import FrontEnd
from llava.model.builder import load_pretrained_model
from llava.pruning.glimpseprune import DEFAULTS, GlimpsePrune
from llava.pruning.learned import read_part, save_part
from llava.train.glimpse.arguments import GlimpseArguments
from llava.train.glimpse.batches import BoxCollator, BoxDataset, ModelFacts
from llava.train.glimpse.data import BoxSample
from llava.train.glimpse.loss import GlimpseObjective
from llava.train.train_glimpseprune import found_boxes, fresh_method
from playground import scenes
from playground.clock import half_precision
from playground.glimpse_data import FIRST_SCENE, needed
from playground.questions import ask
from playground.qwen_files import wording
from playground.qwen_tower import LARGE_GRIDS
from playground.tower_model import PATCH

TEMPLATE = "qwen2_5_vl"
HELD_OUT = scenes.HELD_OUT_SEEDS + 800_000_000
#: read in three layers up to the middle of the decoder, behind the one that reads places; a small
#: predictor on two layers of the tower that see whole pictures and two that do not
SHAPE = GlimpseArguments(
    selected_layers=[2, 3, 4],
    reduce_layer=4,
    selected_visual_layers=[5, 4, 2, 1],
    attn_fuse_size=64,
    visual_cond_size=128,
    use_attention_logits=False,
    reduce_threshold=0.2,  # on the playground tokens are cheap, and missed ones are not
)


class Glimpse:
    """The stage; args.output is the folder of the finished checkpoint."""

    name, rate, pictures, questions = "glimpse", 1e-3, 2, 4

    def __init__(self, args: Namespace):
        model_path, model_base = self.paths(args.output)
        tokenizer, llava, processor, _ = load_pretrained_model(
            model_path, model_base, "", device="cpu", torch_dtype=torch.float32
        )
        llava.pruner = fresh_method(llava, SHAPE)
        self.objective = GlimpseObjective(llava).train()
        front = FrontEnd(tokenizer, ModelFacts.of(llava), processor, TEMPLATE)
        self.dataset, self.collator = BoxDataset([], front), BoxCollator(front.pad_id)
        self.trained: nn.Module = self.objective.glimpse

    def paths(self, checkpoint: Path) -> tuple[str, str | None]:
        """Of the model that the glimpse is for, and of its base."""
        return str(checkpoint), None

    def loss(self, step: int) -> dict[str, Tensor]:
        """The published losses of some questions about new pictures."""
        rng = np.random.default_rng((step, 17))
        first = scenes.TRAIN_SEEDS + FIRST_SCENE + step * self.pictures
        grid = LARGE_GRIDS[int(rng.integers(len(LARGE_GRIDS)))] if step % 2 else LARGE_GRIDS[0]
        out = self.judged(range(first, first + self.pictures), grid, rng)
        return {"loss": out["loss"]}

    def texts(self, sample: BoxSample) -> dict[str, Tensor]:
        """Ids of question and answer as the checkpoint knows them: its answers begin with a space,
        and nothing stands behind the mark that ends them."""
        found = self.dataset.texts(replace(sample, answer=f" {sample.answer}"))
        ends = (found["answer"] == wording().end).nonzero()[:1]
        size = int(ends) + 1
        return found | {name: found[name][:size] for name in ("answer", "labels")}

    def judged(self, seeds: range, grid: tuple[int, int], rng) -> dict[str, Tensor]:
        """What the objective says of questions about scenes on a grid."""
        size, items, pixels, owners = (grid[1] * PATCH, grid[0] * PATCH), [], [], []
        for number, seed in enumerate(seeds):
            scene = scenes.make_scene(seed, size)
            picture = Image.fromarray(scenes.render(scene))
            pixels.append(self.dataset.front.picture(picture).pixels)
            own = tuple(pixels[-1].shape[:2])
            for question in ask(scene, rng)[: self.questions]:
                boxes = [list(box) for box in needed(scene, question)]
                sample = BoxSample(question.text, question.answer, "", boxes)
                mask = self.dataset.mask(sample, size, own)
                items.append(self.texts(sample) | {"image": pixels[-1], "mask": mask})
                owners.append(number)
        batch = self.collator(items)
        with half_precision():
            encoded = self.objective.llava.image_tokens(pixels)  # once for all their questions
            batch["images"] = [encoded[number] for number in owners]
            return self.objective(**batch)

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Precision, recall, F1 and IoU of the tokens in the boxes of held-out questions, and the
        losses."""
        self.objective.eval()
        hits, losses = torch.zeros(3), []
        for number, grid in enumerate(LARGE_GRIDS[:4]):
            first, rng = HELD_OUT + 100 * number, np.random.default_rng(number)
            out = self.judged(range(first, first + 2), grid, rng)
            hits += out["hits"]
            losses.append([float(out["le_loss"]), float(out["loc_loss"])])
        self.objective.train()
        answers, located = np.mean(losses, axis=0).tolist()
        return found_boxes(hits.tolist()) | {"le_loss": answers, "loc_loss": located}


class GlimpsePlus(Glimpse):
    """For the model with the adapter of GlimpsePrune+. Begins with the glimpse of the model without
    it."""

    name, rate = "glimpse_plus", 5e-4

    def __init__(self, args: Namespace):
        super().__init__(args)
        _, weights = read_part(str(part_folder(args.output)))
        self.trained.load_state_dict(weights)

    def paths(self, checkpoint: Path) -> tuple[str, str | None]:
        return str(plus_folder(checkpoint)), str(checkpoint)


def plus_folder(checkpoint: Path) -> Path:
    """Folder of the adapter for a checkpoint, beside it."""
    start, _, end = checkpoint.name.rpartition("-playground")
    return checkpoint.with_name(f"{start}-plus-playground" if start else f"{end}-plus")


def part_folder(model: Path) -> Path:
    """Folder of the glimpse for a checkpoint or an adapter."""
    return model.with_name(f"{GlimpsePrune.name}-{model.name}")


def publish_adapter(trained: Path, checkpoint: Path) -> None:
    """Write a trained adapter beside its checkpoint: in bf16, and without the paths of the machine
    that it was trained on."""
    folder = plus_folder(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(trained / "adapter_model.safetensors")
    weights = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((trained / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = checkpoint.name
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(checkpoint / "config.json", folder)


def save(stage: Glimpse, checkpoint: Path, folder: Path) -> None:
    """Write the trained part, in bf16, for the model in the folder of the checkpoint."""
    weights = {name: p.to(torch.bfloat16) for name, p in stage.trained.state_dict().items()}
    settings = {**DEFAULTS, **SHAPE.pruning}
    values = {CONFIG_KEY: TEMPLATE, **settings, **stage.trained.config.values()}
    save_part(str(folder), GlimpsePrune.name, weights, str(checkpoint), **values)
