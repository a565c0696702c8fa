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
import math
import multiprocessing as mp
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from playground import questions, scenes, tokenizer
from playground.train_tower import (
    IGNORE,
    MEAN,
    PATCH,
    PATCHES,
    SIDE,
    STD,
    Tower,
    patch_targets,
    schedule,
)
from playground.train_tower import WIDTH as TOWER_WIDTH

WIDTH, LAYERS, HEADS, INNER = 256, 6, 8, 704
ROPE_BASE, EPS = 10000.0, 1e-5
PLACE_PERIODS = (0.7, 0.3)  # wave lengths of the code of a place, in sides of the picture
CODE_SCALE = 0.4
SLOTS = 4  # characters of the longest sign
CODE_WIDTH = 4 * (1 + 2 * len(PLACE_PERIODS)) + 2 + SLOTS
FINDER_WEIGHT = 3.0
CHUNK = 500  # pictures per file of kept features
PROJECTOR_RATE = 0.05  # its learning rate against the decoder's: the features are large
# (turns per picture, ids per turn): short answers, boxes and long questions, options, description
BUCKETS = ((14, 20), (8, 25), (2, 36), (1, 70))
SYSTEM = tokenizer.SYSTEM.removesuffix("ASSISTANT:")  # ends with "USER: "


# Text ----------------------------------------------------------------------------------------


@lru_cache
def pieces() -> sentencepiece.SentencePieceProcessor:
    """The tokenizer, built in memory."""
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.build())


@lru_cache
def prefix_ids() -> list[int]:
    """Ids in front of the picture."""
    return [1, *pieces().encode(SYSTEM)]


def turn_ids(question: questions.Question) -> tuple[list[int], int]:
    """Ids behind the picture, end mark included, and how many of them are the question."""
    asked = f"\n{question.text} ASSISTANT:"
    head = pieces().encode(asked)
    ids = pieces().encode(f"{asked} {question.answer}")
    if ids[: len(head)] != head:
        raise ValueError(f"the answer changes the pieces of its question: {question}")
    return [*ids, 2], len(head)


def named_places(scene: scenes.Scene, question: questions.Question) -> list[tuple[int, tuple]]:
    """Where a question's text names an item of the scene: index of the name's last id in
    `turn_ids`, and the item's box in px."""
    if question.task == "counting" or (question.task == "existence" and question.answer == "No"):
        return []
    found, asked = [], f"\n{question.bare}"
    for item in (*scene.things, *scene.signs):
        for name in (item.name, questions.short_name(scene, item)):
            end = asked.find(f" {name}") + len(name) + 1
            if end > len(name):
                found.append((len(pieces().encode(asked[:end])) - 1, item.box))
                break
    return found


def fill_buckets(scene: scenes.Scene, rng: np.random.Generator):
    """Turns of one picture: per bucket ids (turns, length), labels likewise and boxes (turns,
    length, 4) of what the text names (shares of the side, nan elsewhere); and the questions."""
    rows = [[] for _ in BUCKETS]
    for question in questions.ask(scene, rng):
        ids, asked = turn_ids(question)
        for row, (turns, length) in zip(rows, BUCKETS, strict=True):
            if len(ids) <= length and len(row) < turns:
                row.append((ids, asked, question))
                break
    filled = []
    for row, (turns, length) in zip(rows, BUCKETS, strict=True):
        ids = np.zeros((turns, length), np.int64)
        labels = np.full((turns, length), IGNORE, np.int64)
        boxes = np.full((turns, length, 4), np.nan, np.float32)
        for i, (turn, asked, question) in enumerate(row):
            ids[i, : len(turn)] = turn
            labels[i, asked - 1 : len(turn) - 1] = turn[asked:]
            for place, box in named_places(scene, question):
                boxes[i, place] = np.array(box) / scenes.IMAGE_SIZE
        filled.append((ids, labels, boxes))
    return filled, [question for row in rows for _, _, question in row]


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
        with torch.autocast("cpu", torch.bfloat16):
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


# Decoder -------------------------------------------------------------------------------------


class Norm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (WIDTH,), self.weight, EPS)


class Attention(nn.Module):
    """Causal attention of a prefix, and of turns that see the prefix and themselves."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = _linear(WIDTH, WIDTH), _linear(WIDTH, WIDTH)
        self.v_proj, self.o_proj = _linear(WIDTH, WIDTH), _linear(WIDTH, WIDTH)

    def forward(self, x, rope, prefix: int) -> torch.Tensor:
        """x (batch, prefix + turns, width)."""
        shape = (*x.shape[:2], HEADS, -1)
        q, k, v = (
            f(x).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope) * q.shape[-1] ** -0.5, rotate(k, *rope)
        sizes = [prefix, *(turns * length for turns, length in BUCKETS)]
        parts = list(zip(*(t.split(sizes, 2) for t in (q, k, v)), strict=True))
        head_q, head_k, head_v = parts[0]
        logits = head_q @ head_k.transpose(-1, -2) + causal(prefix, q.dtype)
        mixed = [logits.softmax(-1).to(v.dtype) @ head_v]
        for part, bucket in zip(parts[1:], BUCKETS, strict=True):
            mixed.append(_attend_turns(*part, head_k, head_v, bucket))
        return self.o_proj(torch.cat(mixed, 2).transpose(1, 2).flatten(2))


def _attend_turns(q, k, v, head_k, head_v, bucket) -> torch.Tensor:
    """q, k, v (batch, heads, turns * length, d): each turn sees the prefix and its own past."""
    own_q, own_k, own_v = (x.unflatten(2, bucket) for x in (q, k, v))
    far = (q @ head_k.transpose(-1, -2)).unflatten(2, bucket)
    near = own_q @ own_k.transpose(-1, -2) + causal(bucket[1], q.dtype)
    weights = torch.cat([far, near], -1).softmax(-1).to(v.dtype)
    far, near = weights.split([far.shape[-1], near.shape[-1]], -1)
    return far.flatten(2, 3) @ head_v + (near @ own_v).flatten(2, 3)


def causal(length: int, dtype: torch.dtype) -> torch.Tensor:
    """(length, length) with minus infinity above the diagonal."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions in Llama's half-split layout."""
    half = x.shape[-1] // 2
    swapped = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + swapped * sin


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = _linear(WIDTH, INNER), _linear(WIDTH, INNER)
        self.down_proj = _linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One Llama layer; names as in the published checkpoints."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()

    def forward(self, x, rope, prefix: int) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, prefix)
        return x + self.mlp(self.post_attention_layernorm(x))


class Inner(nn.Module):
    """Everything below the language-model head."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = Norm()
        self.mm_projector = nn.Sequential(
            nn.Linear(TOWER_WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )


class Decoder(nn.Module):
    """A small LLaVA whose state dict has the published names."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.model = Inner(vocabulary)
        self.lm_head = _linear(WIDTH, vocabulary)
        words = torch.randn(vocabulary, WIDTH) * 0.1
        code = code_directions()
        words -= (words @ code) @ code.T  # words and the code of a place do not overlap
        self.model.embed_tokens.weight.data = words
        self.lm_head.weight.data = words * 0.5  # eases copying
        for layer in self.model.layers:
            look_alike(layer.self_attn)

    def forward(self, features, positions, ids: list[torch.Tensor], start: int):
        """Normed states of the turns (batch, turn ids, width), and those half way up.

        features (batch, kept, 192), positions (batch, kept) of the patches, ids per bucket
        (batch, turns, length), start: position of the first id of every turn.
        """
        inner, batch = self.model, len(features)
        head = inner.embed_tokens(torch.tensor(prefix_ids())).expand(batch, -1, -1)
        turns = torch.cat([x.flatten(1) for x in ids], 1)
        seen = inner.mm_projector(features)
        x = torch.cat([head, seen.float(), inner.embed_tokens(turns)], 1)
        prefix = head.shape[1] + features.shape[1]
        steps = [torch.arange(length).repeat(turns) for turns, length in BUCKETS]
        steps = (start + torch.cat(steps)).expand(batch, -1)
        steps = torch.cat([torch.arange(head.shape[1]).expand(batch, -1), positions, steps], 1)
        rope = rope_tables(steps)
        half = LAYERS // 2
        for layer in inner.layers[:half]:
            x = layer(x, rope, prefix)
        middle = x[:, prefix:]
        for layer in inner.layers[half:]:
            x = layer(x, rope, prefix)
        return inner.norm(x[:, prefix:]), F.rms_norm(middle, (WIDTH,))


def rope_tables(positions: torch.Tensor):
    """Cosines and sines (batch, 1, tokens, d) in bf16 of positions (batch, tokens)."""
    d = WIDTH // HEADS
    rates = ROPE_BASE ** (-torch.arange(0, d, 2) / d)
    angles = (positions[..., None] * rates).repeat(1, 1, 2)[:, None]
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.trunc_normal_(layer.weight, std=0.5 / math.sqrt(inputs))
    return layer


# Warm start ----------------------------------------------------------------------------------


def look_alike(attention: Attention, strength: float = 0.07, copied: float = 0.12) -> None:
    """Start with half the heads attending to what resembles the asking token, and all of them
    adding what they attend to: looking up a named thing is then there from the first step.

    Only the slow half of RoPE's planes can compare tokens that lie far from each other.
    """
    d = WIDTH // HEADS
    slow = (torch.arange(d) % (d // 2)) >= d // 4
    rows = (torch.arange(HEADS)[:, None] < HEADS // 2) & slow
    same = torch.randn(int(rows.sum()), WIDTH) * strength
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.data[rows.flatten()] = same
    nn.init.orthogonal_(attention.v_proj.weight)
    attention.o_proj.weight.data = copied * attention.v_proj.weight.data.T.contiguous()


def align_projector(
    model: Decoder, features: torch.Tensor, seeds: range, steps: int = 1500
) -> float:
    """Fit the projector so that a patch looks like the words for what it shows and where it lies,
    and the background like nothing.

    Without the code of the place the decoder first learns to answer what needs no place, and the
    projector loses it. Returns the share of the targets' variance that is left.
    """
    words = model.model.embed_tokens.weight.detach()
    generator = np.random.default_rng(0)
    sources, targets = [], []
    for index, seed in enumerate(seeds):
        found = patch_targets(scenes.make_scene(seed))
        where = np.flatnonzero(found["color"] != IGNORE)
        empty = generator.permutation(np.flatnonzero(~found["foreground"]))[: len(where) // 3]
        sources += [features[index, where], features[index, empty]]
        code = place_code(found["box"][where], where, found["slot"][where]) @ code_directions().T
        targets += [_word_sums(found, where, words) + code, torch.zeros(len(empty), WIDTH)]
    sources, targets = torch.cat(sources).float(), torch.cat(targets)
    projector = model.model.mm_projector
    projector[0].weight.data /= float(sources.std())
    optimizer = torch.optim.AdamW(projector.parameters(), lr=3e-3, betas=(0.9, 0.98))
    for step in range(steps):
        chosen = torch.randint(len(sources), (2048,))
        error = F.mse_loss(projector(sources[chosen]), targets[chosen]) / targets.var()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return float(error.detach())


@lru_cache
def code_directions() -> torch.Tensor:
    """(width, code width) orthonormal directions of the code of a place."""
    random = torch.randn(WIDTH, CODE_WIDTH, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(random)[0]


def place_code(boxes: np.ndarray, patches: np.ndarray, slots: np.ndarray) -> torch.Tensor:
    """(n, code width): the edges of boxes (n, 4) px, waves of them; how much of its thing each of
    the patches (n,) shows, plain and as a logarithm, so that things can be counted; and which
    character of its sign (n,), so that reading finds the first one."""
    shares = torch.from_numpy(boxes) / scenes.IMAGE_SIZE
    angles = 2 * math.pi * shares[..., None] / torch.tensor(PLACE_PERIODS)
    waves = torch.cat([2 * shares[..., None] - 1, angles.sin(), angles.cos()], -1).flatten(1)
    left, top = patches % SIDE * PATCH, patches // SIDE * PATCH
    wide = np.minimum(boxes[:, 2], left + PATCH) - np.maximum(boxes[:, 0], left)
    high = np.minimum(boxes[:, 3], top + PATCH) - np.maximum(boxes[:, 1], top)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    part = torch.from_numpy(wide * high / area).float()
    parts = torch.stack([8 * part, part.clamp(min=2**-7).log2() / 2 + 1.5], 1)
    slot = torch.from_numpy(slots)[:, None] == torch.arange(SLOTS)
    return CODE_SCALE * torch.cat([waves, parts, 2.0 * slot], 1)


def _word_sums(found: dict, where: np.ndarray, words: torch.Tensor) -> torch.Tensor:
    names = [*(f" {kind}" for kind in scenes.KINDS), " sign"]
    kinds = torch.tensor([pieces().encode(name[1:])[0] for name in names])
    colors = torch.tensor([pieces().encode(name)[0] for name in scenes.COLORS])
    letters = torch.tensor([pieces().piece_to_id(letter) for letter in scenes.CHARACTERS])
    total = words[kinds[found["kind"][where]]] + words[colors[found["color"][where]]]
    char = torch.from_numpy(found["char"][where])
    return total + words[letters[char.clamp(min=0)]] * (char >= 0)[:, None]


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
    with torch.autocast("cpu", torch.bfloat16):
        states, middle = model(some, positions, ids, start)
        mask = labels != IGNORE
        logits = model.lm_head(states[mask]).float()
    boxes = torch.cat([torch.from_numpy(x).flatten(1, 2) for x in batch["boxes"]], 1)
    names = ~boxes[..., 0].isnan()
    return logits, labels[mask], middle[names].float(), boxes[names]


def answer_weights(batch: dict) -> torch.Tensor:
    """Weight of every supervised id (n,): long answers (boxes, descriptions) must not drown the one
    word of a short answer, and end marks are easy."""
    found = []
    for labels in batch["labels"]:
        labels = torch.from_numpy(labels)
        count = (labels != IGNORE).sum(dim=-1, keepdim=True).clamp(min=1)
        weights = (count**-0.5).expand(labels.shape) * (1 - 0.7 * (labels == 2).float())
        found.append(weights.flatten(1))
    mask = torch.cat([torch.from_numpy(x).flatten(1) for x in batch["labels"]], 1) != IGNORE
    return torch.cat(found, 1)[mask]


@torch.no_grad()
def evaluate(model: Decoder, features: torch.Tensor, batches: list[dict]) -> dict[str, float]:
    """Share of answers that are right to the last id (as in greedy decoding); boxes by IoU."""
    hits: dict[str, list[float]] = {}
    for batch in batches:
        logits, labels, _, _ = states_and_labels(model, features, batch)
        guesses, position = logits.argmax(-1).tolist(), 0
        wanted = labels.tolist()
        for found in batch["asked"]:
            for question in found:
                ids, asked = turn_ids(question)
                size = len(ids) - asked
                guess, truth = (x[position : position + size] for x in (guesses, wanted))
                position += size
                right = guess == truth
                if question.box:
                    right = iou(parse_box(guess), question.box) >= 0.5
                hits.setdefault(question.task, []).append(float(right))
    return {task: float(np.mean(values)) for task, values in sorted(hits.items())}


def parse_box(ids: list[int]) -> list[float]:
    """Four numbers of an answer's ids; an empty box if there are not four."""
    text = pieces().decode([i for i in ids if i != 2]).strip(" []")
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
        self.step, self.spent = 0, 0.0
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
        if self.state_file.exists():
            self._resume()
        else:
            left = align_projector(self.model, self.features, seeds[:3000])
            print(f"projector aligned, variance left {left:.3f}", flush=True)

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
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.lr * factor * group.get("rate", 1.0)
        logits, labels, middle, boxes = states_and_labels(self.model, self.features, batch)
        loss = F.cross_entropy(logits, labels, reduction="none")
        weights = answer_weights(batch)
        loss = (loss * weights).sum() / weights.sum()
        miss = F.smooth_l1_loss(self.finder(middle), boxes, beta=0.02)
        (loss + FINDER_WEIGHT * miss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return float(loss.detach()), float(miss.detach())

    def _log(self, recent: list[tuple[float, float]]) -> None:
        with torch.compiler.set_stance("force_eager"):
            scores = evaluate(self.model, self.held_out, self.checks)
        line = {"step": self.step, "seconds": round(self.spent)}
        if recent:
            line["loss"], line["miss"] = np.mean(recent, axis=0).round(4).tolist()
        line["held_out"] = {name: round(value, 3) for name, value in scores.items()}
        text = json.dumps(line)
        print(text, flush=True)
        with open(self.args.output / "training_log.jsonl", "a") as log:
            log.write(text + "\n")

    def _save(self) -> None:
        save_checkpoint(self.model, self.args.output)
        state = {"model": self.model.state_dict(), "step": self.step, "spent": self.spent}
        state["finder"] = self.finder.state_dict()
        state["optimizers"] = [o.state_dict() for o in self.optimizers]
        torch.save(state, self.state_file)

    def _resume(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.finder.load_state_dict(state["finder"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.spent = state["step"], state["spent"]


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
