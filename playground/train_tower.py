"""Train the playground's CLIP-type tower from nothing and save it in the Hugging Face CLIP layout.

    python -m playground.train_tower --minutes 30 --output playground/checkpoints/clip-...

LLaVA reads hidden_states[-2], so the dense patch targets (kind, colour, box, character) hang there;
the class token carries image-level targets there and in the last layer, and a small text tower is
aligned with pictures and patches. Most of the time the tower sees all foreground patches and a few
background patches at their true positions, the last part all 576.
"""

import argparse
import multiprocessing as mp
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llava.model.placement import cpu_multiplies_bfloat16
from playground import scenes
from playground.clip_files import phrase_ids, save_clip
from playground.clock import descend, resume, save_state, write_line
from playground.tower_model import (
    BACKGROUND,
    CHARACTERS,
    COLORS,
    IGNORE,
    KINDS,
    PATCH,
    PATCHES,
    PHRASES,
    SIDE,
    Playground,
)

# Targets -------------------------------------------------------------------------------------


def patch_targets(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """Dense targets of one scene, each (patches, ...), row by row: kind, color, phrase, box,
    digits, char, slot."""
    grid = scene.size[1] // PATCH, scene.size[0] // PATCH
    kind = np.full(grid, BACKGROUND, np.int64)
    color, phrase, char, slot = (np.full(grid, IGNORE, np.int64) for _ in range(4))
    box = np.zeros((*grid, 4), np.float32)
    best = np.zeros(grid)
    for item in (*scene.things, *scene.signs):
        share = _covered(item.box, grid)
        mine = (share > 0) & (share > best)
        best[mine] = share[mine]
        name = item.kind if isinstance(item, scenes.Thing) else "sign"
        kind[mine] = KINDS.index(name) if name in KINDS else len(KINDS)
        color[mine] = COLORS.index(item.color)
        phrase[mine] = PHRASES.index((item.color, name))
        box[mine] = item.box
    weak = (best > 0) & (best < 0.12)
    kind[weak] = color[weak] = phrase[weak] = IGNORE
    for sign in scene.signs:
        _mark_characters(sign, char, slot)
    strong = best >= 0.12
    hundredths = np.round(box / scenes.IMAGE_SIZE * 100).clip(0, 99).astype(np.int64)
    hundredths[~strong] = IGNORE
    return {
        "kind": kind.ravel(),
        "color": color.ravel(),
        "phrase": phrase.ravel(),
        "box": box.reshape(-1, 4),
        "hundredths": hundredths.reshape(-1, 4),
        "char": char.ravel(),
        "slot": slot.ravel(),
        "foreground": (best > 0).ravel(),
    }


def _covered(box, grid: tuple[int, int]) -> np.ndarray:
    """Share of every patch of a grid (rows, columns) that a box covers."""

    def span(low, high, count):
        edges = np.arange(count) * PATCH
        return np.clip(np.minimum(edges + PATCH, high) - np.maximum(edges, low), 0, PATCH) / PATCH

    return np.outer(span(box[1], box[3], grid[0]), span(box[0], box[2], grid[1]))


def _mark_characters(sign: scenes.Sign, char: np.ndarray, slot: np.ndarray) -> None:
    """Give the two rows of patches at a sign's text the character nearest to their centre."""
    for index, letter in enumerate(sign.text):
        x, y = sign.character_center(index)
        for row in range(char.shape[0]):
            for column in (int(x) // PATCH - 1, int(x) // PATCH, int(x) // PATCH + 1):
                if not 0 <= column < char.shape[1]:
                    continue
                dx, dy = column * PATCH + 7 - x, row * PATCH + 7 - y
                if abs(dx) <= 7 and abs(dy) <= 9:
                    char[row, column] = CHARACTERS.index(letter)
                    slot[row, column] = index


def image_targets(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """Targets of a whole picture: pairs (80,), characters (25,) and the number of things ()."""
    pairs = np.zeros(len(COLORS) * len(KINDS), np.float32)
    for thing in scene.things:
        pairs[COLORS.index(thing.color) * len(KINDS) + KINDS.index(thing.kind)] = 1
    letters = np.zeros(len(CHARACTERS), np.float32)
    for sign in scene.signs:
        letters[[CHARACTERS.index(letter) for letter in sign.text]] = 1
    return {"pairs": pairs, "letters": letters, "count": np.int64(len(scene.things))}


def caption(scene: scenes.Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two (colour, kind) names of things in the picture, for the contrastive objective."""
    chosen = rng.permutation(len(scene.things))[:2]
    return [(scene.things[i].color, scene.things[i].kind) for i in chosen]


def sample(seed: int, keep: int) -> dict[str, np.ndarray]:
    """One training example with keep of its 576 patches: foreground first, then random ones."""
    scene = scenes.make_scene(seed)
    rng = np.random.default_rng((seed, 2))
    targets = patch_targets(scene)
    order = np.argsort(rng.random(PATCHES) - 2 * targets.pop("foreground"))
    kept = np.sort(order[:keep])
    pixels = scenes.render(scene).reshape(SIDE, PATCH, SIDE, PATCH, 3).transpose(0, 2, 4, 1, 3)
    example = {name: value[kept] for name, value in targets.items()}
    example |= image_targets(scene)
    example["patches"] = pixels.reshape(PATCHES, -1)[kept]
    example["kept"] = kept
    example["caption"] = phrase_ids(caption(scene, rng))
    return example


def batch(first_seed: int, size: int, keep: int) -> dict[str, torch.Tensor]:
    """Examples first_seed .. first_seed + size - 1, stacked."""
    examples = [sample(first_seed + i, keep) for i in range(size)]
    return {n: torch.from_numpy(np.stack([e[n] for e in examples])) for n in examples[0]}


# Losses --------------------------------------------------------------------------------------


def losses(model: Playground, out, data: dict, phrases: torch.Tensor) -> dict[str, torch.Tensor]:
    """All training losses by name, already weighted."""
    dense, classes, projected = out
    parts = dict(
        zip(model.head_sizes, dense.float().split(list(model.head_sizes.values()), -1), strict=True)
    )
    found = {
        name: F.cross_entropy(parts[name].flatten(0, 1), data[name].flatten())
        for name in ("kind", "color", "char", "slot")
    }
    mask = data["hundredths"][..., 0] != IGNORE
    error = F.smooth_l1_loss(parts["offset"][mask], box_offsets(data)[mask], beta=0.05)
    found["offset"] = 4 * error
    digits = data["hundredths"][mask]
    for name, target in (("tens", digits // 10), ("ones", digits % 10)):
        logits = parts[name][mask].view(-1, 10)
        found[name] = 0.3 * F.cross_entropy(logits, target.flatten())
    for depth, logits in enumerate(classes):
        pairs, letters, count = logits.float().split(list(model.class_sizes.values()), -1)
        found[f"pairs{depth}"] = 8 * F.binary_cross_entropy_with_logits(pairs, data["pairs"])
        found[f"letters{depth}"] = F.binary_cross_entropy_with_logits(letters, data["letters"])
        found[f"count{depth}"] = 0.2 * F.cross_entropy(count, data["count"])
    found |= text_losses(model, projected.float(), data, phrases)
    return found


def text_losses(model, projected, data, phrases) -> dict[str, torch.Tensor]:
    """Contrast pictures with captions, and foreground patches with the phrases that name them."""
    texts = model.text_projection(model.text(torch.cat([phrases, data["caption"]])))
    texts = F.normalize(texts.float(), dim=-1)
    names, captions = texts[: len(phrases)], texts[len(phrases) :]
    scale = model.logit_scale.exp().clamp(max=100)
    logits = scale * F.normalize(projected[:, 0], dim=-1) @ captions.T
    labels = torch.arange(len(logits))
    both = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
    mask = data["phrase"] != IGNORE
    patches = F.normalize(projected[:, 1:][mask], dim=-1)
    aligned = F.cross_entropy(scale * patches @ names.T, data["phrase"][mask])
    return {"contrast": 0.15 * both, "phrase": 0.3 * aligned}


def box_offsets(data: dict) -> torch.Tensor:
    """Box edges (batch, kept, 4) relative to the patch centre, in units of 56 px."""
    x = data["kept"] % SIDE * PATCH + PATCH / 2
    y = data["kept"] // SIDE * PATCH + PATCH / 2
    return (data["box"] - torch.stack([x, y, x, y], -1)) / 56


@torch.no_grad()
def evaluate(model: Playground, data: dict, phrases: torch.Tensor) -> dict[str, float]:
    """Accuracies on held-out scenes; box is the mean error of an edge in px."""
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bfloat16()):
        dense, classes, projected = model(data["patches"], data["kept"])
        texts = model.text_projection(model.text(phrases))
    parts = dict(
        zip(model.head_sizes, dense.float().split(list(model.head_sizes.values()), -1), strict=True)
    )
    scores = {}
    for name in ("kind", "color", "char", "slot"):
        target = data[name]
        mask = target != IGNORE
        if name == "kind":
            scores["background"] = _share((parts[name].argmax(-1) == target)[mask])
            mask &= target < BACKGROUND
        scores[name] = _share((parts[name].argmax(-1) == target)[mask])
    mask = data["hundredths"][..., 0] != IGNORE
    scores["box_px"] = 56 * float((parts["offset"] - box_offsets(data))[mask].abs().mean())
    for name, target in (("tens", data["hundredths"] // 10), ("ones", data["hundredths"] % 10)):
        logits = parts[name].unflatten(-1, (4, 10))
        scores[name] = _share((logits.argmax(-1) == target)[mask])
    for depth, logits in enumerate(classes):
        pairs, letters, count = logits.float().split(list(model.class_sizes.values()), -1)
        scores[f"pairs{depth}"] = _f1(pairs > 0, data["pairs"] > 0)
        scores[f"letters{depth}"] = _f1(letters > 0, data["letters"] > 0)
        scores[f"count{depth}"] = _share(count.argmax(-1) == data["count"])
    mask = data["phrase"] != IGNORE
    scores["phrase"] = _share(
        (projected[:, 1:] @ F.normalize(texts, dim=-1).T).argmax(-1)[mask] == data["phrase"][mask]
    )
    return scores


def _share(hits: torch.Tensor) -> float:
    return float(hits.float().mean())


def _f1(guess: torch.Tensor, truth: torch.Tensor) -> float:
    return float(2 * (guess & truth).sum() / (guess.sum() + truth.sum()).clamp(min=1))


# Training ------------------------------------------------------------------------------------


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = ".layers." in name and parameter.ndim == 2
        (matrices if inside else others).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw", ns_steps=4
    )
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.97), weight_decay=0.01, fused=True)
    return [muon, adam]


def feed(queue: mp.Queue, first_seed: int, size: int, keeps) -> None:
    """Worker: put batches into the queue for ever; keeps.value is the number of patches."""
    torch.set_num_threads(1)
    seed = first_seed
    while True:
        data = batch(seed, size, keeps.value)
        queue.put({name: value.numpy() for name, value in data.items()})
        seed += size


def schedule(progress: float) -> float:
    """Learning-rate factor: short warm-up, flat, then linear to 2 %."""
    return min(progress / 0.02 + 0.02, 1.0, 0.02 + (1 - progress) / 0.5)


def main() -> None:
    """Train by a time budget, checkpoint, resume, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the CLIP files")
    parser.add_argument("--minutes", type=float, default=30, help="time budget of this run")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--keep", type=int, default=144, help="patches seen in the first part")
    parser.add_argument("--dense-share", type=float, default=0.25, help="last part on all patches")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    Trainer(args).run()


class Trainer:
    """The training loop and its state."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        phrases = [phrase_ids([pair]) for pair in PHRASES]
        self.phrases = torch.from_numpy(np.stack(phrases))
        self.model = Playground(int(self.phrases.max()) + 1)
        self.optimizers = make_optimizers(self.model, args.lr)
        self.held_out = batch(scenes.HELD_OUT_SEEDS + 500_000_000, 96, PATCHES)
        self.state_file = args.output / "training_state.pt"
        self.step, self.spent = resume(self.state_file, self._modules(), self.optimizers)

    def run(self) -> None:
        """Train until the time budget is spent, then save the CLIP folder."""
        args = self.args
        step_function = torch.compile(self._loss, dynamic=False) if args.compile else self._loss
        keeps = mp.Value("i", args.keep)
        queue = mp.Queue(4)
        first = scenes.TRAIN_SEEDS + self.step * args.batch
        mp.Process(target=feed, args=(queue, first, args.batch, keeps), daemon=True).start()
        began, earlier, saved = time.monotonic(), self.spent, time.monotonic()
        while True:
            self.spent = earlier + time.monotonic() - began
            progress = self.spent / (60 * args.minutes)
            if progress >= 1:
                break
            keeps.value = PATCHES if progress > 1 - args.dense_share else args.keep
            data = {name: torch.from_numpy(value) for name, value in queue.get().items()}
            found = self._update(step_function, data, schedule(progress))
            if self.step % args.log_every == 0:
                self._log(found)
            if time.monotonic() - saved > 180:
                self._save()
                saved = time.monotonic()
        self._log(found)
        self._save()

    def _loss(self, data: dict) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bfloat16()):
            out = self.model(data["patches"], data["kept"])
            return losses(self.model, out, data, self.phrases)

    def _update(self, step_function, data: dict, factor: float) -> dict[str, torch.Tensor]:
        found = step_function(data)
        descend(sum(found.values()), self.model, self.optimizers, self.args.lr * factor)
        self.step += 1
        return found

    def _log(self, found: dict[str, torch.Tensor]) -> None:
        scores = evaluate(self.model, self.held_out, self.phrases)
        line = {"step": self.step, "seconds": round(self.spent)}
        line["images"] = self.step * self.args.batch
        line["loss"] = {name: round(float(value.detach()), 3) for name, value in found.items()}
        line["held_out"] = {name: round(value, 3) for name, value in scores.items()}
        write_line(line, self.args.output / "training_log.jsonl")

    def _save(self) -> None:
        save_clip(self.model, self.args.output)
        save_state(self.state_file, self._modules(), self.optimizers, self.step, self.spent)

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}


if __name__ == "__main__":
    main()
