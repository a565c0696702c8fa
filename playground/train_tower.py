"""Train the playground's CLIP-type tower from nothing and save it in the Hugging Face CLIP layout.

    python -m playground.train_tower --minutes 30 --output playground/checkpoints/clip-...

LLaVA reads hidden_states[-2], so the dense patch targets (kind, colour, box, character) hang there;
the class token carries image-level targets there and in the last layer, and a small text tower is
aligned with pictures and patches. Most of the time the tower sees all foreground patches and a few
background patches at their true positions, the last part all 576.
"""

import argparse
import json
import math
import multiprocessing as mp
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llava.model.placement import cpu_multiplies_bfloat16
from playground import scenes
from playground.clip_files import CONTEXT, phrase_ids, save_clip

PATCH, SIDE, WIDTH, LAYERS, HEADS = 14, 24, 192, 6, 4
PATCHES = SIDE * SIDE
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, PROJECTION = 128, 2, 2, 128
COLORS, KINDS, CHARACTERS = list(scenes.COLORS), list(scenes.KINDS), scenes.CHARACTERS
PHRASES = [(color, kind) for color in COLORS for kind in KINDS]
PHRASES += [(color, "sign") for color in scenes.SIGN_COLORS]
BACKGROUND = len(KINDS) + 1  # patch kinds: the ten things, the sign, the background
IGNORE = -100
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


# Targets -------------------------------------------------------------------------------------


def patch_targets(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """Dense targets of one scene, each (576, ...): kind, color, phrase, box, digits, char, slot."""
    kind = np.full((SIDE, SIDE), BACKGROUND, np.int64)
    color, phrase, char, slot = (np.full((SIDE, SIDE), IGNORE, np.int64) for _ in range(4))
    box = np.zeros((SIDE, SIDE, 4), np.float32)
    best = np.zeros((SIDE, SIDE))
    for item in (*scene.things, *scene.signs):
        share = _covered(item.box)
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
        "box": box.reshape(PATCHES, 4),
        "hundredths": hundredths.reshape(PATCHES, 4),
        "char": char.ravel(),
        "slot": slot.ravel(),
        "foreground": (best > 0).ravel(),
    }


def _covered(box) -> np.ndarray:
    """Share of every patch (24, 24) that a box covers."""
    edges = np.arange(SIDE) * PATCH

    def span(low, high):
        return np.clip(np.minimum(edges + PATCH, high) - np.maximum(edges, low), 0, PATCH) / PATCH

    return np.outer(span(box[1], box[3]), span(box[0], box[2]))


def _mark_characters(sign: scenes.Sign, char: np.ndarray, slot: np.ndarray) -> None:
    """Give the two rows of patches at a sign's text the character nearest to their centre."""
    for index, letter in enumerate(sign.text):
        x, y = sign.character_center(index)
        for row in range(SIDE):
            for column in (int(x) // PATCH - 1, int(x) // PATCH, int(x) // PATCH + 1):
                if not 0 <= column < SIDE:
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


# Model ---------------------------------------------------------------------------------------


def attend(q, k, v, causal: bool) -> torch.Tensor:
    """Attention; plain for short rows, whose backward pass is far faster than SDPA's on a CPU."""
    if q.shape[-2] > 256:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(hidden, float("-inf"))
    return logits.softmax(-1) @ v


class Block(nn.Module):
    """Pre-norm transformer layer with quick GELU, fused for training."""

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, tokens, width) -> the same shape."""
        y = self.layer_norm1(x)
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (
            f(y).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attend(q, k, v, self.causal)
        x = x + self.out_proj(mixed.transpose(1, 2).flatten(2))
        y = self.fc1(self.layer_norm2(x))
        return x + self.fc2(y * torch.sigmoid(1.702 * y))


class Tower(nn.Module):
    """The vision transformer: patches in, hidden_states[-2] and the last hidden state out."""

    def __init__(self):
        super().__init__()
        self.patch_embedding = nn.Linear(3 * PATCH * PATCH, WIDTH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH) * 0.02)
        self.position_embedding = nn.Parameter(sine_positions())
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(LAYERS))

    def forward(self, patches: torch.Tensor, kept: torch.Tensor):
        """patches (batch, kept, 588) normalised, kept (batch, kept) grid indices."""
        x = self.second_last(patches, kept)
        return x, self.layers[-1](x)

    def second_last(self, patches: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """hidden_states[-2] (batch, 1 + kept, 192), class token first; kept None: all patches."""
        places = self.position_embedding[1:] if kept is None else self.position_embedding[1 + kept]
        x = self.patch_embedding(patches) + places
        first = (self.class_embedding + self.position_embedding[0]).expand(len(x), 1, -1)
        x = self.pre_layrnorm(torch.cat([first, x], 1))
        for layer in self.layers[:-1]:
            x = layer(x)
        return x


class TextTower(nn.Module):
    """The small causal text transformer of CLIP."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, TEXT_WIDTH)
        self.position_embedding = nn.Parameter(torch.randn(CONTEXT, TEXT_WIDTH) * 0.01)
        self.layers = nn.ModuleList(
            Block(TEXT_WIDTH, TEXT_HEADS, causal=True) for _ in range(TEXT_LAYERS)
        )
        self.final_layer_norm = nn.LayerNorm(TEXT_WIDTH)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (texts, length) padded with the end mark -> (texts, width) at the first end mark."""
        x = self.token_embedding(ids) + self.position_embedding[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        end = (ids == ids.max()).int().argmax(-1)  # the end mark has the highest id
        return self.final_layer_norm(x)[torch.arange(len(ids)), end]


class Playground(nn.Module):
    """Tower, text tower, projections and the heads that exist only for training."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.tower, self.text = Tower(), TextTower(vocabulary)
        self.visual_projection = nn.Linear(WIDTH, PROJECTION, bias=False)
        self.text_projection = nn.Linear(TEXT_WIDTH, PROJECTION, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.patch_norm = nn.LayerNorm(WIDTH)
        self.head_sizes = {"kind": BACKGROUND + 1, "color": len(COLORS), "char": len(CHARACTERS)}
        self.head_sizes |= {"slot": 4, "offset": 4, "tens": 40, "ones": 40}
        self.patch_head = nn.Linear(WIDTH, sum(self.head_sizes.values()))
        self.class_sizes = {"pairs": len(COLORS) * len(KINDS), "letters": len(CHARACTERS)}
        self.class_sizes |= {"count": 8}
        self.class_norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.class_heads = nn.ModuleList(
            nn.Linear(WIDTH, sum(self.class_sizes.values())) for _ in range(2)
        )
        self.apply(_initialise)

    def forward(self, patches: torch.Tensor, kept: torch.Tensor):
        """uint8 patches (batch, kept, 588) -> dense logits, class logits of two depths, states."""
        scale = (1 / (255 * STD)).repeat_interleave(PATCH * PATCH)
        shift = (MEAN / STD).repeat_interleave(PATCH * PATCH)
        deep, last = self.tower(patches.float() * scale - shift, kept)
        dense = self.patch_head(self.patch_norm(deep[:, 1:]))
        classes = [
            head(norm(x[:, 0]))
            for head, norm, x in zip(self.class_heads, self.class_norms, (deep, last), strict=True)
        ]
        return dense, classes, self.visual_projection(self.tower.post_layernorm(last))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sine_positions() -> torch.Tensor:
    """(577, 192) two-dimensional sine-cosine positions; row 0, the class token's, is zero."""
    quarter = WIDTH // 4
    rates = 1 / 200 ** (torch.arange(quarter) / quarter)
    angles = torch.arange(SIDE)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (24, 96)
    rows = waves[:, None].expand(SIDE, SIDE, -1)
    columns = waves[None].expand(SIDE, SIDE, -1)
    grid = torch.cat([rows, columns], -1).reshape(PATCHES, WIDTH)
    return torch.cat([torch.zeros(1, WIDTH), grid * 0.5])


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
        self.step, self.spent = 0, 0.0
        self.state_file = args.output / "training_state.pt"
        if self.state_file.exists():
            self._resume()

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
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.lr * factor
        found = step_function(data)
        sum(found.values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return found

    def _log(self, found: dict[str, torch.Tensor]) -> None:
        scores = evaluate(self.model, self.held_out, self.phrases)
        line = {"step": self.step, "seconds": round(self.spent)}
        line["images"] = self.step * self.args.batch
        line["loss"] = {name: round(float(value.detach()), 3) for name, value in found.items()}
        line["held_out"] = {name: round(value, 3) for name, value in scores.items()}
        text = json.dumps(line)
        print(text, flush=True)
        with open(self.args.output / "training_log.jsonl", "a") as log:
            log.write(text + "\n")

    def _save(self) -> None:
        save_clip(self.model, self.args.output)
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "step": self.step,
                "spent": self.spent,
            },
            self.state_file,
        )

    def _resume(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.spent = state["step"], state["spent"]


if __name__ == "__main__":
    main()
