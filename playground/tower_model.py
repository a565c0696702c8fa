"""The playground's CLIP-type model as it is trained: two towers, projections, training heads."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from playground import scenes
from playground.clip_files import CONTEXT

PATCH, SIDE, WIDTH, LAYERS, HEADS = 14, 24, 192, 6, 4
PATCHES = SIDE * SIDE
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, PROJECTION = 128, 2, 2, 128
COLORS, KINDS, CHARACTERS = list(scenes.COLORS), list(scenes.KINDS), scenes.CHARACTERS
PHRASES = [(color, kind) for color in COLORS for kind in KINDS]
PHRASES += [(color, "sign") for color in scenes.SIGN_COLORS]
BACKGROUND = len(KINDS) + 1  # patch kinds: the ten things, the sign, the background
IGNORE = -100
LONG_ROW = 400  # tokens
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def attend(q, k, v, causal: bool) -> torch.Tensor:
    """Attention; plain for short rows, whose backward pass is far faster than SDPA's on a CPU."""
    if q.shape[-2] > LONG_ROW:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(hidden, float("-inf"))
    return logits.softmax(-1).to(v.dtype) @ v


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
