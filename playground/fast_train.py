"""First part of the playground's multimodal training: the decoder on precomputed tower features.

    python -m playground.fast_train --tower playground/checkpoints/clip-playground-patch14-336 \
        --output playground/checkpoints/llava-v1.5-playground --minutes 20

Why a loop of its own: on two CPU cores it gets through several times more questions than a general
trainer. Every question is its own turn right behind the picture (turns do not see each other), and
the decoder sees the foreground patches plus a few others. The last part of the training runs
through llava.train.train on all patches and real conversations (see playground.train).
"""

import argparse
import json
import multiprocessing as mp
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from llava.model.placement import cpu_multiplies_bfloat16
from playground import scenes, tokenizer
from playground.clock import descend, resume, save_state, write_line
from playground.decoder_model import (
    EPS,
    HEADS,
    INNER,
    LAYERS,
    ROPE_BASE,
    WIDTH,
    Decoder,
    align_projector,
)
from playground.decoder_text import BUCKETS, LLAVA, Wording, fill_buckets, pieces, prefix_ids
from playground.tower_model import IGNORE, MEAN, PATCH, PATCHES, SIDE, STD, Tower
from playground.tower_model import WIDTH as TOWER_WIDTH
from playground.train_tower import patch_targets, schedule

CHUNK = 500  # pictures per file of kept features
FINDER_WEIGHT = 3.0
PROJECTOR_RATE = 0.05  # its learning rate against the decoder's: the features are large


# Pictures ------------------------------------------------------------------------------------


def render_patches(seed: int) -> np.ndarray:
    """(576, 588) uint8 patches of a scene."""
    pixels = scenes.render(scenes.make_scene(seed)).reshape(SIDE, PATCH, SIDE, PATCH, 3)
    return pixels.transpose(0, 2, 4, 1, 3).reshape(PATCHES, -1)


def load_tower(folder: Path) -> Tower:
    """The trained tower in the fused training layout."""
    state, tower = load_file(folder / "model.safetensors"), Tower()
    own = {}
    for name in tower.state_dict():
        other = "vision_model." + name.replace("layers.", "encoder.layers.")
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            other = other.replace(f".{part}", f".self_attn.{part}")
        for part in ("fc1", "fc2"):
            other = other.replace(f".{part}", f".mlp.{part}")
        if name in ("class_embedding", "position_embedding", "patch_embedding.weight"):
            other = "vision_model.embeddings." + name
        if name == "position_embedding":
            other += ".weight"
        own[name] = state[other].float().view_as(tower.state_dict()[name])
    tower.load_state_dict(own)
    return tower.eval()


@torch.no_grad()
def tower_features(tower: Tower, seeds: range) -> torch.Tensor:
    """hidden_states[-2] of the patches, (pictures, 576, 192) bf16."""
    scale = (1 / (255 * STD)).repeat_interleave(PATCH * PATCH)
    shift = (MEAN / STD).repeat_interleave(PATCH * PATCH)
    found = torch.empty(len(seeds), PATCHES, TOWER_WIDTH, dtype=torch.bfloat16)
    for first in range(0, len(seeds), 16):
        some = seeds[first : first + 16]
        patches = torch.from_numpy(np.stack([render_patches(seed) for seed in some]))
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bfloat16()):
            found[first : first + 16] = tower.second_last(patches.float() * scale - shift)[:, 1:]
    return found


def kept_features(tower: Tower, seeds: range, folder: Path | None) -> torch.Tensor:
    """`tower_features`, kept in files of CHUNK pictures in a folder (None: nowhere)."""
    if folder is None:
        return tower_features(tower, seeds)
    folder.mkdir(parents=True, exist_ok=True)
    found = torch.empty(len(seeds), PATCHES, TOWER_WIDTH, dtype=torch.bfloat16)
    for first in range(0, len(seeds), CHUNK):
        some = seeds[first : first + CHUNK]
        file = folder / f"{some[0]}-{some[-1]}.pt"
        if not file.exists():
            torch.save(tower_features(tower, some), file)
        found[first : first + CHUNK] = torch.load(file, weights_only=True)
    return found


# Training ------------------------------------------------------------------------------------


def make_batch(indices, first_seed: int, epoch: int, keep: int) -> dict:
    """Kept patches, positions and turns of some pictures."""
    rng = np.random.default_rng((first_seed, epoch, int(indices[0])))
    rows = {"kept": []} | {name: [[] for _ in BUCKETS] for name in ("ids", "labels", "boxes")}
    asked = []
    for index in indices:
        scene = scenes.make_scene(first_seed + int(index))
        seen = patch_targets(scene)["foreground"]
        order = np.argsort(rng.random(PATCHES) - 2 * seen)
        rows["kept"].append(np.sort(order[:keep]))
        filled, found = fill_buckets(scene, rng)
        asked.append(found)
        for bucket, parts in enumerate(filled):
            for name, part in zip(("ids", "labels", "boxes"), parts, strict=True):
                rows[name][bucket].append(part)
    batch = {"indices": np.asarray(indices), "kept": np.stack(rows["kept"]), "asked": asked}
    batch |= {name: [np.stack(x) for x in rows[name]] for name in ("ids", "labels", "boxes")}
    batch["grid"] = bool(rng.random() < 0.5)
    return batch


def feed(queue: mp.Queue, first_seed: int, pictures: int, size: int, keeps, seed: int) -> None:
    """Worker: batches of ever new questions for ever."""
    epoch = seed
    while True:
        order = np.random.default_rng(epoch).permutation(pictures)
        for first in range(0, pictures - size + 1, size):
            chosen = order[first : first + size]
            queue.put(make_batch(chosen, first_seed, epoch, keeps.value))
        epoch += 1


def states_and_labels(model: Decoder, features: torch.Tensor, batch: dict):
    """Logits at the supervised places (n, vocabulary), their labels (n,), and for the last ids of
    names states half way up (m, width) and the named boxes (m, 4)."""
    kept = torch.from_numpy(batch["kept"])
    some = features[torch.from_numpy(batch["indices"])]
    some = some.gather(1, kept[..., None].expand(-1, -1, some.shape[-1]))
    first = len(prefix_ids())
    grid = batch["grid"]
    positions = first + (kept if grid else torch.arange(kept.shape[1]).expand_as(kept))
    start = first + (PATCHES if grid else kept.shape[1])
    ids = [torch.from_numpy(x) for x in batch["ids"]]
    labels = torch.cat([torch.from_numpy(x).flatten(1) for x in batch["labels"]], 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bfloat16()):
        states, middle = model(some, positions, ids, start)
        mask = labels != IGNORE
        logits = model.lm_head(states[mask]).float()
    boxes = torch.cat([torch.from_numpy(x).flatten(1, 2) for x in batch["boxes"]], 1)
    names = ~boxes[..., 0].isnan()
    return logits, labels[mask], middle[names].float(), boxes[names]


def answer_weights(batch: dict, end: int = LLAVA.end) -> torch.Tensor:
    """Weight of every supervised id (n,): long answers (boxes, descriptions) must not drown the one
    word of a short answer, and end marks are easy."""
    found = []
    for labels in batch["labels"]:
        labels = torch.from_numpy(labels)
        count = (labels != IGNORE).sum(dim=-1, keepdim=True).clamp(min=1)
        weights = (count**-0.5).expand(labels.shape) * (1 - 0.7 * (labels == end).float())
        found.append(weights.flatten(1))
    mask = torch.cat([torch.from_numpy(x).flatten(1) for x in batch["labels"]], 1) != IGNORE
    return torch.cat(found, 1)[mask]


@torch.no_grad()
def evaluate(model: Decoder, features: torch.Tensor, batches: list[dict]) -> dict[str, float]:
    """Share of answers that are right to the last id (as in greedy decoding); boxes by IoU."""
    hits: dict[str, list[float]] = {}
    for batch in batches:
        logits, labels, _, _ = states_and_labels(model, features, batch)
        judge(logits, labels, batch["asked"], hits)
    return {task: float(np.mean(values)) for task, values in sorted(hits.items())}


def judge(
    logits: torch.Tensor,
    labels: torch.Tensor,
    asked: list[list],
    hits: dict[str, list[float]],
    wording: Wording = LLAVA,
) -> None:
    """Add to the hits of every task whether the answers are right.

    logits (n, vocabulary), labels (n,): at the supervised places, picture by picture
    """
    guesses, wanted, position = logits.argmax(-1).tolist(), labels.tolist(), 0
    for question in (question for found in asked for question in found):
        ids, start = wording.turn(question)
        size = len(ids) - start
        guess, truth = (x[position : position + size] for x in (guesses, wanted))
        position += size
        right = guess == truth
        if question.box:
            right = iou(parse_box(guess), question.box) >= 0.5
        hits.setdefault(question.task, []).append(float(right))


def parse_box(ids: list[int]) -> list[float]:
    """Four numbers of an answer's ids; an empty box if there are not four."""
    known = range(LLAVA.end + 1, pieces().vocab_size())  # without marks
    text = pieces().decode([i for i in ids if i in known]).strip(" []")
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        return [0, 0, 0, 0]
    return values if len(values) == 4 else [0, 0, 0, 0]


def iou(one, other) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0) * max(height, 0)
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other))
    return common / (areas - common) if areas > common else 0.0


def optimizers(model: Decoder, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    projector = list(model.model.mm_projector.parameters())
    inside = {id(p) for p in matrices + projector}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(
        matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw", ns_steps=4
    )
    groups = [{"params": others}, {"params": projector, "rate": PROJECTOR_RATE}]
    return [muon, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.97), weight_decay=0.0, fused=True)]


def config() -> dict:
    """config.json of the playground's LLaVA."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": pieces().vocab_size(),
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rope_theta": ROPE_BASE,
        "rms_norm_eps": EPS,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "conv_mode": "vicuna_v1",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": TOWER_WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "../clip-playground-patch14-336",
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }


def save_checkpoint(model: Decoder, folder: Path) -> None:
    """Write weights (bf16), configuration and tokenizer in the published layout."""
    tokenizer.save(folder)
    state = {n: t.to(torch.bfloat16).contiguous() for n, t in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(), indent=2) + "\n", encoding="utf-8")
    generation = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "_from_model_config": True,
    }
    text = json.dumps(generation, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


class Trainer:
    """The training loop and its state."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        tower = load_tower(args.tower)
        self.model = Decoder(pieces().vocab_size())
        # Reads the box of what a name stands for half way up; training only. It makes the decoder
        # find things by name early, which answers about places build on.
        self.finder = nn.Linear(WIDTH, 4)
        self.optimizers = optimizers(self.model, args.lr)
        self.optimizers.append(torch.optim.AdamW(self.finder.parameters(), lr=args.lr))
        if args.compile:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
        first = scenes.HELD_OUT_SEEDS + 400_000_000
        self.held_out = tower_features(tower, range(first, first + 48))
        chunks = np.arange(48).reshape(6, 8)
        self.checks = [make_batch(chunk, first, 0, PATCHES) | {"grid": True} for chunk in chunks]
        start = scenes.TRAIN_SEEDS + args.first
        seeds = range(start, start + args.pictures)
        began = time.monotonic()
        self.features = kept_features(tower, seeds, args.features)
        print(f"features of {len(seeds)} pictures: {time.monotonic() - began:.0f} s", flush=True)
        self.state_file = args.output / "training_state.pt"
        if not self.state_file.exists():
            left = align_projector(self.model, self.features, seeds[:3000])
            print(f"projector aligned, variance left {left:.3f}", flush=True)
        self.step, self.spent = resume(self.state_file, self._modules(), self.optimizers)

    def run(self) -> None:
        """Train until the time budget is spent."""
        args = self.args
        keeps = mp.Value("i", args.keep)
        queue = mp.Queue(4)
        first = scenes.TRAIN_SEEDS + args.first
        work = (queue, first, args.pictures, args.batch, keeps, self.step)
        mp.Process(target=feed, args=work, daemon=True).start()
        began = saved = time.monotonic()
        earlier, recent = self.spent, []
        while True:
            self.spent = earlier + time.monotonic() - began
            progress = self.spent / (60 * args.minutes)
            if progress >= 1:
                break
            keeps.value = PATCHES if progress > 1 - args.dense_share else args.keep
            recent.append(self._update(queue.get(), schedule(progress)))
            if self.step % args.log_every == 0:
                self._log(recent)
                recent = []
            if time.monotonic() - saved > 180:
                self._save()
                saved = time.monotonic()
        self._log(recent)
        self._save()

    def _update(self, batch: dict, factor: float) -> tuple[float, float]:
        logits, labels, middle, boxes = states_and_labels(self.model, self.features, batch)
        loss = F.cross_entropy(logits, labels, reduction="none")
        weights = answer_weights(batch)
        loss = (loss * weights).sum() / weights.sum()
        miss = F.smooth_l1_loss(self.finder(middle), boxes, beta=0.02)
        total = loss + FINDER_WEIGHT * miss
        descend(total, self.model, self.optimizers, self.args.lr * factor)
        self.step += 1
        return float(loss.detach()), float(miss.detach())

    def _log(self, recent: list[tuple[float, float]]) -> None:
        with torch.compiler.set_stance("force_eager"):
            scores = evaluate(self.model, self.held_out, self.checks)
        line = {"step": self.step, "seconds": round(self.spent)}
        if recent:
            line["loss"], line["miss"] = np.mean(recent, axis=0).round(4).tolist()
        line["held_out"] = {name: round(value, 3) for name, value in scores.items()}
        write_line(line, self.args.output / "training_log.jsonl")

    def _save(self) -> None:
        save_checkpoint(self.model, self.args.output)
        save_state(self.state_file, self._modules(), self.optimizers, self.step, self.spent)

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "finder": self.finder}


def main() -> None:
    """Train by a time budget, checkpoint, resume, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20, help="time budget after preparation")
    parser.add_argument("--first", type=int, default=0, help="first training scene")
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--features", type=Path, help="folder that keeps the tower's features")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--keep", type=int, default=96)
    parser.add_argument("--dense-share", type=float, default=0.0, help="last part on all patches")
    parser.add_argument("--compile", action="store_true", help="compile the decoder's layers")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=150)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
