"""Train the tower of the playground's Qwen2.5-VL from nothing, on small pictures full of things.

    python -m playground.qwen_tower --output playground/data/qwen --minutes 35

A token stands for 28 x 28 pixels of an enlarged picture, 14 x 14 of the scene, so what the merger
gives can be what the decoder of the playground's LLaVA reads: the sum of the words for what is
seen, how much of its thing it is, which character of its sign, and where the edges of its box lie.
The tower has no absolute places, so edges are told from the middle of the token; the first layer of
the decoder adds the place (see `qwen_model`). Classes are asked of the same tokens by heads that
exist only for training. Grids change from batch to batch, and most are small, so that hardly a
token shows nothing.
"""

import argparse
import math
import multiprocessing as mp
import time
from pathlib import Path
from queue import Full

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from llava.blocks import rope_of, rotate
from llava.model.multimodal_encoder.qwen2_5_vl_encoder import (
    Qwen2_5_VLVisionConfig,
    Qwen2_5_VLVisionTower,
    Segments,
    plan_images,
)
from llava.model.placement import cpu_multiplies_bfloat16
from playground import scenes
from playground.clock import descend, resume, save_state, write_line
from playground.decoder_model import CODE_SCALE, PLACE_PERIODS, WIDTH, code_directions, place_code
from playground.decoder_text import pieces
from playground.tower_model import BACKGROUND, CHARACTERS, COLORS, IGNORE, MEAN, PATCH, STD, attend
from playground.train_tower import patch_targets, schedule

EDGES = slice(0, 4 * (1 + 2 * len(PLACE_PERIODS)), 1 + 2 * len(PLACE_PERIODS))  # of a place's code
ZOOM = 2  # pixels of the picture that the tower sees per pixel of a scene
NEAR = 22.0  # px of the scene; edges lie within about twice that of the middle of a token
CLASSES = {"kind": BACKGROUND + 1, "color": len(COLORS), "char": len(CHARACTERS), "slot": 4}
SMALL_GRIDS = ((8, 12), (12, 8), (10, 10), (9, 11), (11, 9), (7, 14), (14, 7))
LARGE_GRIDS = ((24, 24), (21, 28), (28, 21), (18, 32), (32, 18))
DECODER = Path(__file__).parent / "checkpoints" / "llava-v1.5-playground"


def vision_config(**other) -> Qwen2_5_VLVisionConfig:
    """Sizes of the tower."""
    sizes = {"depth": 6, "hidden_size": 128, "intermediate_size": 352, "num_heads": 4}
    sizes |= {"out_hidden_size": WIDTH, "fullatt_block_indexes": (2, 5)}
    return Qwen2_5_VLVisionConfig(**sizes | other)


# Examples ------------------------------------------------------------------------------------


def blocks(pixels: np.ndarray) -> np.ndarray:
    """(h * w, 4, 588) uint8 patches of a scene's picture, enlarged as the processor does."""
    high, wide = (side * ZOOM for side in pixels.shape[:2])
    large = Image.fromarray(pixels).resize((wide, high), Image.Resampling.BICUBIC)
    side, shape = 2 * PATCH, (2, PATCH)
    cut = np.asarray(large).reshape(high // side, *shape, wide // side, *shape, 3)
    return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 4, 3 * PATCH**2)


def describe(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """Patches of a scene, and what each token shows."""
    return targets(scene) | {"patches": blocks(scenes.render(scene))}


def targets(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """What each token of a scene shows: `CLASSES`, and the code of the place (tokens, code width),
    nothing where nothing is shown."""
    found = patch_targets(scene)
    code = np.zeros((len(found["color"]), code_directions().shape[1]), np.float32)
    where = np.flatnonzero(found["color"] != IGNORE)
    columns = scene.size[0] // PATCH
    code[where] = near_code(found["box"][where], where, found["slot"][where], columns)
    return {name: found[name] for name in CLASSES} | {"code": code}


def near_code(boxes: np.ndarray, tokens: np.ndarray, slots: np.ndarray, columns: int) -> np.ndarray:
    """`place_code` with edges told from the middle of the tokens (n,) instead of from the corner of
    the picture; what is no wave is told in units of NEAR px."""
    rows, columns = tokens // columns, tokens % columns
    middle = np.stack([columns, rows, columns, rows], 1) * PATCH + PATCH / 2
    # in a picture that begins where the token does
    own = boxes - np.stack([columns, rows, columns, rows], 1) * PATCH
    code = place_code(own.astype(np.float32), np.zeros_like(tokens), slots)
    shares = torch.from_numpy((boxes - middle).astype(np.float32))[..., None] / scenes.IMAGE_SIZE
    angles = 2 * math.pi * shares / torch.tensor(PLACE_PERIODS)
    line = shares * scenes.IMAGE_SIZE / NEAR
    waves = torch.cat([line, angles.sin(), angles.cos()], -1).flatten(1)
    code[:, : waves.shape[1]] = CODE_SCALE * waves
    return code.numpy()


def batch(first_seed: int, size: int, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """Examples first_seed .. first_seed + size - 1 on one grid, stacked."""
    shape = grid[1] * PATCH, grid[0] * PATCH
    examples = [describe(scenes.make_scene(first_seed + i, shape)) for i in range(size)]
    return {n: np.stack([e[n] for e in examples]) for n in examples[0]}


def feed(queue: mp.Queue, step: int, size: int, large) -> None:
    """Worker: batches of step, step + 1, ... as long as they are taken; large.value: how often, in
    percent, a quarter of a batch of whole pictures stands for a batch of small ones."""
    torch.set_num_threads(1)
    while True:
        rng = np.random.default_rng((step, 7))
        whole = rng.random() * 100 < large.value
        grids = LARGE_GRIDS if whole else SMALL_GRIDS
        grid = grids[int(rng.integers(len(grids)))]
        count = max(size // 4, 1) if whole else size
        made = grid, batch(scenes.TRAIN_SEEDS + step * size, count, grid)
        while True:
            try:
                queue.put(made, timeout=10)
                break
            except Full:
                if not mp.parent_process().is_alive():
                    return
        step += 1


# Model ---------------------------------------------------------------------------------------


class TrainedTower(nn.Module):
    """The tower with heads for training."""

    def __init__(self, config: Qwen2_5_VLVisionConfig | None = None):
        super().__init__()
        self.visual = Qwen2_5_VLVisionTower(config or vision_config())
        self.heads = nn.Linear(WIDTH, sum(CLASSES.values()))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.visual.patch_embed.proj.weight, std=0.02)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """uint8 patches (batch, h * w, 4, 588) -> tokens (batch, h * w, width), class logits."""
        tokens = encode(self.visual, patches, grid)
        return tokens, self.heads(F.rms_norm(tokens, (WIDTH,)))


def encode(visual: Qwen2_5_VLVisionTower, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (batch, h * w, width) of pictures with one grid: what `visual` gives, but from bytes,
    and with attention whose backward pass is fast on a CPU."""
    config = visual.config
    plan = plan_images([grid] * len(patches), config, patches.device)
    scale = (1 / (255 * STD)).repeat_interleave(PATCH**2)
    shift = (MEAN / STD).repeat_interleave(PATCH**2)
    pixels = (patches.float() * scale - shift).flatten(0, 1)
    weight = visual.patch_embed.proj.weight.sum(2).flatten(1)  # a picture stands for two frames
    x = F.linear(pixels, weight)[plan.blocks].flatten(0, 1).float()
    half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    rope = rope_of(plan.angles[:, None], half)
    for number, block in enumerate(visual.blocks):
        whole = number in config.fullatt_block_indexes
        mixed = mix(block.attn, norm(block.norm1, x), rope, plan.wholes if whole else plan.windows)
        x = x + block.attn.proj(mixed)
        x = x + block.mlp(norm(block.norm2, x))
    x = norm(visual.merger.ln_q, x).unflatten(0, (-1, 4))
    x = torch.empty_like(x).index_copy(0, plan.blocks, x).flatten(1)
    return visual.merger.mlp(x).unflatten(0, (len(patches), -1))


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """Root-mean-square norm with the weight of `module`, as one operation."""
    return F.rms_norm(x, x.shape[-1:], module.weight, module.eps)


def mix(attention: nn.Module, x: Tensor, rope, segments: Segments) -> Tensor:
    """What an attention layer of the tower hands to its output projection, (n, C)."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))
    qkv = torch.stack([rotate(qkv[:, 0], rope), rotate(qkv[:, 1], rope), qkv[:, 2]])
    if segments.order is not None:
        qkv = qkv[:, segments.order]
    mixed = []
    for part, (count, size) in zip(
        qkv.split([count * size for count, size in segments.runs], 1), segments.runs, strict=True
    ):
        q, k, v = part.unflatten(1, (count, size)).transpose(2, 3)
        mixed.append(attend(q, k, v, causal=False).transpose(1, 2).flatten(0, 1))
    out = torch.cat(mixed).flatten(1)
    return out if segments.back is None else out[segments.back]


def words(embedding: Tensor) -> dict[str, Tensor]:
    """The rows of the decoder's words (ids, width) for every class that is named by one."""
    kinds = [pieces().encode(name)[0] for name in (*scenes.KINDS, "sign")]
    colors = [pieces().encode(name)[0] for name in scenes.COLORS]
    letters = [pieces().piece_to_id(letter) for letter in CHARACTERS]
    found = {"kind": embedding[kinds], "color": embedding[colors], "char": embedding[letters]}
    nothing = embedding.new_zeros(1, embedding.shape[1])
    return {name: torch.cat([rows, nothing]).float() for name, rows in found.items()}


def wanted_tokens(data: dict[str, Tensor], named: dict[str, Tensor]) -> Tensor:
    """(batch, h * w, width) what the merger is to give; nothing for the background."""
    total = data["code"] @ code_directions().T
    seen = data["color"] != IGNORE
    for name, rows in named.items():
        total = total + rows[data[name].where(data[name] >= 0, len(rows) - 1)] * seen[..., None]
    return total


def losses(out, data: dict[str, Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """All training losses by name, weighted. Tokens that hardly show a thing teach nothing."""
    tokens, logits = out
    clear = data["kind"] != IGNORE
    want = wanted_tokens(data, named)
    found = {"tokens": 2 * F.mse_loss(tokens[clear].float(), want[clear]) / want[clear].var()}
    shown = data["color"] != IGNORE
    # Words reach into the directions of the code, so what is wanted there is not the code alone.
    edges = ((tokens[shown].float() - want[shown]) @ code_directions())[:, EDGES]
    # in units of 56 px, as for the tower of the playground's LLaVA
    edges = edges * (NEAR / CODE_SCALE / 56)
    found["edges"] = 4 * F.smooth_l1_loss(edges, torch.zeros_like(edges), beta=0.05)
    parts = logits.float().split(list(CLASSES.values()), -1)
    for name, part in zip(CLASSES, parts, strict=True):
        found[name] = F.cross_entropy(part.flatten(0, -2), data[name].flatten())
    return found


@torch.no_grad()
def evaluate(model: TrainedTower, checks: list, named: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy of classes; share of the tokens' variance that is missed; error of an edge, px."""
    hits: dict[str, list[Tensor]] = {}
    for grid, data in checks:
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bfloat16()):
            tokens, logits = model(data["patches"], grid)
        for name, part in zip(CLASSES, logits.split(list(CLASSES.values()), -1), strict=True):
            mask = data[name] != IGNORE
            if name == "kind":
                hit = (part.argmax(-1) == BACKGROUND) == (data[name] == BACKGROUND)
                hits.setdefault("background", []).append(hit[mask].float())
                mask &= data[name] < BACKGROUND
            hits.setdefault(name, []).append((part.argmax(-1) == data[name])[mask].float())
        want, seen = wanted_tokens(data, named), data["color"] != IGNORE
        miss = (tokens.float() - want)[seen].square() / want[seen].var()
        hits.setdefault("missed", []).append(miss.flatten())
        error = ((tokens.float() - want)[seen] @ code_directions())[:, EDGES]
        hits.setdefault("edge_px", []).append(error.abs().flatten() * NEAR / CODE_SCALE)
    return {name: float(torch.cat(values).mean()) for name, values in hits.items()}


# Training ------------------------------------------------------------------------------------


def tensors(data: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The arrays of a batch as tensors."""
    return {name: torch.from_numpy(value) for name, value in data.items()}


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and (".blocks." in name or ".mlp.0." in name)
        (matrices if inside else others).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw", ns_steps=4
    )
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.97), weight_decay=0.01, fused=True)
    return [muon, adam]


class Trainer:
    """The training loop and its state."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        weights = load_file(DECODER / "model.safetensors")
        self.words = words(weights["model.embed_tokens.weight"])
        self.model = TrainedTower()
        self.optimizers = make_optimizers(self.model, args.lr)
        first = scenes.HELD_OUT_SEEDS + 600_000_000
        grids = (SMALL_GRIDS[0], SMALL_GRIDS[2], LARGE_GRIDS[0], LARGE_GRIDS[3])
        self.checks = [
            (grid, tensors(batch(first + 100 * i, 400 // math.prod(grid) * 4 or 2, grid)))
            for i, grid in enumerate(grids)
        ]
        self.state_file = args.output / "tower_state.pt"
        self.step, self.spent = resume(self.state_file, self._modules(), self.optimizers)

    def run(self) -> None:
        """Train until the time budget is spent, saving on the way."""
        args = self.args
        large = mp.Value("i", 0)
        queue = mp.Queue(4)
        work = (queue, self.step, args.batch, large)
        mp.Process(target=feed, args=work, daemon=True).start()
        began = saved = time.monotonic()
        earlier, recent = self.spent, []
        while True:
            self.spent = earlier + time.monotonic() - began
            progress = self.spent / (60 * args.minutes)
            if progress >= 1:
                break
            large.value = 3 if progress < 1 - args.large_share else 50
            recent.append(self._update(*queue.get(), schedule(progress)))
            if self.step % args.log_every == 0:
                self._log(recent)
                recent = []
            if time.monotonic() - saved > 120:
                self._save()
                saved = time.monotonic()
        self._log(recent)
        self._save()

    def _update(self, grid, data: dict[str, np.ndarray], factor: float) -> dict[str, float]:
        data = tensors(data)
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bfloat16()):
            found = losses(self.model(data["patches"], grid), data, self.words)
        descend(sum(found.values()), self.model, self.optimizers, self.args.lr * factor)
        self.step += 1
        return {name: float(value.detach()) for name, value in found.items()}

    def _log(self, recent: list[dict[str, float]]) -> None:
        line = {"step": self.step, "seconds": round(self.spent)}
        if recent:
            names = recent[0]
            line["loss"] = {n: round(float(np.mean([r[n] for r in recent])), 3) for n in names}
        scores = evaluate(self.model, self.checks, self.words)
        line["held_out"] = {name: round(value, 3) for name, value in scores.items()}
        write_line(line, self.args.output / "tower_log.jsonl")

    def _save(self) -> None:
        save_state(self.state_file, self._modules(), self.optimizers, self.step, self.spent)

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}


def main() -> None:
    """Train by a time budget, checkpoint, resume."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--minutes", type=float, default=35, help="time budget, earlier runs count")
    parser.add_argument("--batch", type=int, default=16, help="small pictures of a step")
    parser.add_argument("--large-share", type=float, default=0.15, help="last part, half whole")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
