"""The playground's decoder as it is trained: a small LLaVA in which turns do not see each other.

The state dict has the published names. Its start is not random: some heads look for alike tokens,
and the projector maps patches to the words of what they show and to a code of the place.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from playground import scenes
from playground.decoder_text import BUCKETS, pieces, prefix_ids
from playground.tower_model import IGNORE, PATCH, SIDE
from playground.tower_model import WIDTH as TOWER_WIDTH
from playground.train_tower import patch_targets

WIDTH, LAYERS, HEADS, INNER = 256, 6, 8, 704
ROPE_BASE, EPS = 10000.0, 1e-5
PLACE_PERIODS = (0.7, 0.3)  # wave lengths of the code of a place, in sides of the picture
CODE_SCALE = 0.4
SLOTS = 4  # characters of the longest sign
CODE_WIDTH = 4 * (1 + 2 * len(PLACE_PERIODS)) + 2 + SLOTS


class Norm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (WIDTH,), self.weight, EPS)


class Attention(nn.Module):
    """Causal attention of a prefix, and of turns that see the prefix and themselves."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.q_proj, self.k_proj = _linear(WIDTH, WIDTH, bias), _linear(WIDTH, WIDTH, bias)
        self.v_proj, self.o_proj = _linear(WIDTH, WIDTH, bias), _linear(WIDTH, WIDTH)

    def forward(self, x, rope, prefix: int, buckets=BUCKETS) -> torch.Tensor:
        """x (batch, prefix + turns, width)."""
        shape = (*x.shape[:2], HEADS, -1)
        q, k, v = (
            f(x).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope) * q.shape[-1] ** -0.5, rotate(k, *rope)
        sizes = [prefix, *(turns * length for turns, length in buckets)]
        parts = list(zip(*(t.split(sizes, 2) for t in (q, k, v)), strict=True))
        head_q, head_k, head_v = parts[0]
        logits = head_q @ head_k.transpose(-1, -2) + causal(prefix, q.dtype)
        mixed = [logits.softmax(-1).to(v.dtype) @ head_v]
        for part, bucket in zip(parts[1:], buckets, strict=True):
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

    def __init__(self, bias: bool = False):
        super().__init__()
        self.self_attn, self.mlp = Attention(bias), Mlp()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()

    def forward(self, x, rope, prefix: int, buckets=BUCKETS) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, prefix, buckets)
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
    """Cosines and sines (batch, 1, tokens, d) in bf16 of positions (batch, tokens), or (batch,
    tokens, d / 2) where they differ from frequency to frequency."""
    d = WIDTH // HEADS
    rates = ROPE_BASE ** (-torch.arange(0, d, 2) / d)
    positions = positions if positions.ndim == 3 else positions[..., None]
    angles = (positions * rates).repeat(1, 1, 2)[:, None]
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def _linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.5 / math.sqrt(inputs))
    if bias:
        nn.init.zeros_(layer.bias)
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
