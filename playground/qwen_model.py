"""The playground's Qwen2.5-VL as it is trained: the decoder of its LLaVA behind one new layer.

That decoder reads what patches show and where they are from their features; the tower of Qwen2.5-VL
has no absolute places, tokens have them only as positions on three axes. The new layer 0 puts the
places back: its heads look at two marks in front of the picture, and how much at each depends on
row or column, so that their mix is a code of the place (see `read_places`). Its MLP makes of it,
and of edges told from the middle of the token, what the old decoder reads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from playground.decoder_model import (
    HEADS,
    LAYERS,
    ROPE_BASE,
    WIDTH,
    Layer,
    Norm,
    code_directions,
    rope_tables,
)
from playground.qwen_files import SECTIONS, mark_id, wording

#: where each head of layer 0 is undecided between its two marks: (axis, plane, row or column)
READERS = (
    (1, 3, 5),
    (1, 4, 6),
    (1, 4, 12),
    (1, 4, 20),
    (2, 5, 5),
    (2, 5, 11),
    (2, 5, 18),
    (2, 5, 25),
)
LEFT_MARK, RIGHT_MARK = "user\n", "<|vision_start|>"  # ids -2 and -1 as seen from the picture


class Inner(nn.Module):
    """Everything below the language-model head."""

    def __init__(self, vocabulary: int, layers: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(Layer(bias=True) for _ in range(layers))
        self.norm = Norm()


class QwenDecoder(nn.Module):
    """The language model of the playground's Qwen2.5-VL; names as released."""

    def __init__(self, layers: int = LAYERS + 1):
        super().__init__()
        self.model = Inner(wording().vocabulary, layers)
        self.lm_head = nn.Linear(WIDTH, wording().vocabulary, bias=False)

    def forward(self, seen: Tensor, places: Tensor, extent: int, ids: list[Tensor]):
        """Normed states of the turns (batch, turn ids, width), those half way up, and those of the
        picture's tokens behind layer 0 (batch, kept, width).

        seen:   (batch, kept, width) tokens of the tower
        places: (batch, kept, 2) their rows and columns
        extent: the longer side of the grid: the text goes on behind that
        ids:    per bucket (batch, turns, length)
        """
        inner, (x, rope, prefix, buckets) = self.model, self._inputs(seen, places, extent, ids)
        for number, layer in enumerate(inner.layers):
            x = layer(x, rope, prefix, buckets)
            if number == 0:
                placed = x[:, prefix - seen.shape[1] : prefix]
            if number == len(inner.layers) // 2:
                middle = x[:, prefix:]
        return inner.norm(x[:, prefix:]), F.rms_norm(middle, (WIDTH,)), placed

    def place(self, seen: Tensor, places: Tensor, extent: int, ids: list[Tensor]):
        """Arguments as of `forward`. The picture's tokens behind layer 0 (batch, kept, width), and
        what that layer adds to the turns (batch, turn ids, width)."""
        x, rope, prefix, buckets = self._inputs(seen, places, extent, ids)
        after = self.model.layers[0](x, rope, prefix, buckets)
        return after[:, prefix - seen.shape[1] : prefix], (after - x)[:, prefix:]

    def _inputs(self, seen: Tensor, places: Tensor, extent: int, ids: list[Tensor]):
        """What the layers take."""
        embed, buckets = self.model.embed_tokens, tuple(x.shape[1:] for x in ids)
        head = embed(torch.tensor(wording().prefix)).expand(len(seen), -1, -1)
        turns = torch.cat([x.flatten(1) for x in ids], 1)
        x = torch.cat([head, seen.float(), embed(turns)], 1)
        rope = rope_tables(positions(places, extent, buckets))
        return x, rope, head.shape[1] + seen.shape[1], buckets


def positions(places: Tensor, extent: int, buckets) -> Tensor:
    """(batch, tokens, d / 2) position that turns each frequency: of the text in front, the tokens
    of the picture at `places` (batch, kept, 2), and turns that all begin behind it."""
    first, batch = len(wording().prefix), len(places)
    steps = torch.cat([torch.arange(length).repeat(turns) for turns, length in buckets])

    def text(values: Tensor) -> Tensor:
        return values[None, :, None].expand(batch, -1, 3)

    picture = first + torch.cat([torch.zeros_like(places[..., :1]), places], -1)
    front, behind = text(torch.arange(first)), text(first + extent + steps)
    axes = torch.cat([front, picture, behind], 1).float()
    return axes.repeat_interleave(torch.tensor(SECTIONS), -1)


def start_from_llava(decoder: QwenDecoder, weights: dict[str, Tensor]) -> None:
    """Fill the decoder from the weights of the playground's LLaVA: its layers behind a new one, its
    words, and words for the marks of the new template made from those of the old."""
    own = decoder.state_dict()
    weights = {name: value.float() for name, value in weights.items()}
    moved = {}
    for name, value in weights.items():
        if name.startswith("model.layers."):
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            moved[f"model.layers.{int(number) + 1}.{rest}"] = value
    moved["model.norm.weight"] = weights["model.norm.weight"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = weights[name]
        moved[name] = torch.cat([old, torch.zeros(len(own[name]) - len(old), WIDTH)])
    decoder.load_state_dict(own | moved)
    _new_words(decoder)
    read_places(decoder)


def _new_words(decoder: QwenDecoder) -> None:
    words, head = decoder.model.embed_tokens.weight.data, decoder.lm_head.weight.data
    alike = {"<|im_start|>": "<s>", "<|im_end|>": "</s>", "<|endoftext|>": "</s>"}
    alike |= {"<|vision_end|>": "<0x0A>", "assistant\n": "\u2581ASSISTANT:", "system\n": "<0x0A>"}
    for mark, word in alike.items():
        words[mark_id(mark)], head[mark_id(mark)] = words[mark_id(word)], head[mark_id(word)]
    for mark in ("</s>", "<|endoftext|>"):
        head[mark_id(mark)] = 0.0  # answers end with <|im_end|>


def mark_directions() -> Tensor:
    """(3, width) orthonormal directions that words and codes of places hardly use: what both marks
    have, what the left one has, what the right one has."""
    random = torch.randn(WIDTH, 3 + len(READERS), generator=torch.Generator().manual_seed(1))
    code = code_directions()
    random -= code @ (code.T @ random)
    return torch.linalg.qr(random)[0].T


@torch.no_grad()
def read_places(decoder: QwenDecoder, gain: float = 3.0, base: float = 14.0) -> None:
    """Start layer 0 with heads that code the row or the column of a token.

    A head of `READERS` asks every token the same (a bias). Both marks answer far louder than all
    other tokens, by `base` on the slowest plane; on the plane of the head they answer with opposite
    signs, so that by how much the right one wins is `gain` times about the sine of the way to the
    row or column of the head. It hands on which mark won, in a direction of its own.
    """
    width = WIDTH // HEADS
    both, left, right, *codes = mark_directions()
    words, size = decoder.model.embed_tokens.weight.data, WIDTH**0.5 * 0.1
    words[mark_id(LEFT_MARK)] = size * (both + left) / 2**0.5
    words[mark_id(RIGHT_MARK)] = size * (both + right) / 2**0.5
    loud = (WIDTH / 2) ** 0.5  # of a normed mark along each of its directions
    layer = decoder.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        projection.weight.mul_(0.05)
    mlp.down_proj.weight.mul_(0.2)
    q_bias, k, v = attention.q_proj.bias, attention.k_proj.weight, attention.v_proj.weight
    for head, (axis, plane, middle) in enumerate(READERS):
        rate = ROPE_BASE ** (-2 * plane / width)
        assert sum(SECTIONS[:axis]) <= plane < sum(SECTIONS[: axis + 1])
        own, slow = head * width + plane, head * width + width // 2 - 1
        q_bias[own] = q_bias[slow] = width**0.5  # cancels the scale of the logits
        k[slow] += base / loud * both
        for mark, sign, ahead in ((right, 1.0, 1), (left, -1.0, 2)):
            turned = torch.tensor(rate * (middle + ahead) + sign * torch.pi / 2)
            k[own] += gain / 2 / loud * turned.cos() * mark
            k[own + width // 2] += gain / 2 / loud * turned.sin() * mark
        v[head * width] += (right - left) / loud
        attention.o_proj.weight[:, head * width] += 1.5 * codes[head]
