"""Vision tower of Qwen2.5-VL: images of any grid, attention inside windows, a merger behind it.

The layers see all patches of a call in one sequence. Most of them attend inside windows of 4 x 4
blocks, a few inside whole images; either way segments of equal size are rows of one batch, so no
mask is ever built and memory is linear in the number of patches. Shapes use `h, w` for the merged
grid of an image, in blocks of `M` = 4 patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from ...blocks import GatedMLP, RMSNorm, in_pieces, rope_of, rotate
from ...devices import device_of
from ...pruning.cues import OutputMean
from ...pruning.precision import full_precision
from ...segments import Segments, attend_within, segments_of, window_order
from ..language_model.compiling import compiled, may_compile

NORM_EPS = 1e-6
ROPE_THETA = 10000.0
#: cue of a layer -> what its attention says of the patches
KINDS = {"salience": "received", "attention_mean": "received", "keys": "keys"}
LAYER_CUES = frozenset(KINDS) | {"output", "output_mean"}
#: products of queries and keys that are there at a time, in fp32; those of a CPU stay in its caches
MAP_ENTRIES, MAP_ENTRIES_ON_CPU = 2**24, 2**20


class Qwen2_5_VLVisionConfig(PretrainedConfig):
    """Sizes of the tower; the defaults are those of the released models."""

    model_type = "qwen2_5_vl"

    def __init__(
        self,
        depth: int = 32,
        hidden_size: int = 1280,
        intermediate_size: int = 3420,
        num_heads: int = 16,
        out_hidden_size: int = 3584,
        patch_size: int = 14,
        spatial_merge_size: int = 2,
        temporal_patch_size: int = 2,
        window_size: int = 112,
        fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31),
        tokens_per_second: float = 2,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.depth, self.num_heads = depth, num_heads
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.out_hidden_size = out_hidden_size
        self.patch_size, self.temporal_patch_size = patch_size, temporal_patch_size
        self.spatial_merge_size, self.window_size = spatial_merge_size, window_size
        self.fullatt_block_indexes = list(fullatt_block_indexes)
        self.tokens_per_second = tokens_per_second  # positions in time that a second of video takes

    @property
    def patch_values(self) -> int:
        """Numbers that a patch of an image consists of."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def window_side(self) -> int:
        """Blocks along a side of a window."""
        return self.window_size // (self.patch_size * self.spatial_merge_size)


@dataclass
class BlockFeatures:
    """Features of images with equal grids, in front of the merger.

    images:   which images of the call, in order
    grid:     (h, w) blocks
    features: (B, h * w, M, C) patches of every block; blocks row by row
    cues:     layer -> the cues (B, h * w, ...) of its blocks that were asked for
    """

    images: list[int]
    grid: tuple[int, int]
    features: Tensor
    cues: dict[int, dict[str, Tensor]]


@dataclass
class Plan:
    """How the images of a call run through the tower.

    blocks:  (n / M,) the sequence of the layers: places of its blocks in the images, one image
             behind the other, row by row
    angles:  (n, d / 2) of the rotary positions, in that sequence
    windows, wholes: segments of a windowed and of a full layer
    """

    blocks: Tensor
    angles: Tensor
    windows: Segments
    wholes: Segments


class Qwen2_5_VLVisionTower(nn.Module):
    """Patches of images to tokens of the language model; parameter names as released.

    What it says of itself is that of `llava.pruning.interfaces.Tower`. Cues about attention come
    from layers that see whole images: one that does not stands for the next that does.
    """

    title = "the vision tower of Qwen2.5-VL"
    provides = LAYER_CUES | {"fingerprint"}
    provides_in_layers = LAYER_CUES
    select_feature = "patch"
    takes_smaller_images = True
    grid = None  # every image has its own
    #: whether layers are compiled, see `compile_prefill` of the model
    compile_layers = False
    _gradient_checkpointing_func: Callable  # transformers sets it with `gradient_checkpointing`

    def __init__(self, config: Qwen2_5_VLVisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config)
        self.gradient_checkpointing = False

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embed.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return device_of(self)

    @property
    def depth(self) -> tuple[int, int]:
        """(number of layers, 0-based layer whose output are the features)."""
        return self.config.depth, self.config.depth - 1

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def window_side(self) -> int:
        return self.config.window_side

    @property
    def whole_layers(self) -> list[int]:
        return sorted(self.config.fullatt_block_indexes)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        """Tokens (h * w, D) of every image, its blocks row by row; images as in `features`."""
        tokens: dict[int, Tensor] = {}
        for group in self.features(images):
            tokens.update(zip(group.images, self.merger(group.features), strict=True))
        return [tokens[number] for number in range(len(images))]

    def features(
        self,
        images: list[Tensor],
        wanted: Mapping[int, frozenset[str]] | None = None,
        kinds: Sequence[int] | None = None,
    ) -> list[BlockFeatures]:
        """What the layers make of the images, one entry for each grid there is.

        images: one tensor (h, w, M, values of a patch) each, as the image processor makes them
        wanted: layer -> its cues: "salience" or "attention_mean", which are the same here, and
                "keys", with their rotation, each the mean over the patches of a block; "output" and
                "output_mean", those patches side by side
        kinds:  of every image; those of different kinds are in different entries
        The merger works block by block: whoever drops blocks first saves its work and changes
        nothing else. Raises ValueError for tensors of another shape.
        """
        grids = [self._grid(image, number) for number, image in enumerate(images)]
        plan = plan_images(grids, self.config, self.device)
        pixels = torch.cat([image.to(self.device, self.dtype).flatten(0, 1) for image in images])
        x = self.patch_embed(pixels)[plan.blocks].flatten(0, 1)
        rope = rope_of(plan.angles[:, None], plan.angles.dtype)
        wanted = wanted or {}
        full, sources = set(self.config.fullatt_block_indexes), self._sources(wanted)
        found: dict[int, dict[str, Tensor]] = {number: {} for number in sources}
        means, outputs = OutputMean(wanted), {}
        blocks: Iterable[Any] = self.blocks
        for number, block in enumerate(blocks):
            segments = plan.wholes if number in full else plan.windows
            x = self._run(block, x, rope, segments, found.get(number))
            if "output" in wanted.get(number, ()):
                outputs[number, "output"] = x.detach()
            if (mean := means.add(number, x)) is not None:
                outputs[number, "output_mean"] = mean
        per_block, sizes = self.config.spatial_merge_size**2, [h * w for h, w in grids]

        def by_image(x: Tensor) -> tuple[Tensor, ...]:
            """Blocks (n / M, ...) in the sequence of the layers -> those of every image."""
            return torch.empty_like(x).index_copy_(0, plan.blocks, x).split(sizes)

        parts = by_image(x.unflatten(0, (-1, per_block)))
        cues = {
            (layer, name): by_image(
                found[source][KINDS[name]].unflatten(0, (-1, per_block)).mean(1)
            )
            for source, asked in sources.items()
            for layer, names in asked.items()
            for name in names
        }
        for key, output in outputs.items():
            cues[key] = by_image(output.unflatten(0, (-1, per_block)).flatten(1))
        groups = []
        for grid, numbers in same_grids(grids, kinds):
            group = BlockFeatures(numbers, grid, torch.stack([parts[n] for n in numbers]), {})
            for (layer, name), own in cues.items():
                group.cues.setdefault(layer, {})[name] = torch.stack([own[n] for n in numbers])
            groups.append(group)
        return groups

    def _run(self, block: Block, x: Tensor, *args) -> Tensor:
        """A layer, with a checkpoint for the gradients where training asks."""
        if self.gradient_checkpointing and self.training and x.requires_grad:
            return self._gradient_checkpointing_func(block.__call__, x, *args)
        return block(x, *args, compiles=self.compile_layers and may_compile(self))

    def _sources(self, wanted: Mapping[int, frozenset[str]]) -> dict[int, dict[int, frozenset]]:
        """Layer that gives cues -> the layers it gives them for, each with their names."""
        sources: dict[int, dict[int, frozenset]] = {}
        for layer, names in wanted.items():
            names = names & KINDS.keys()
            whole = [n for n in self.config.fullatt_block_indexes if n >= layer]
            if names and not whole:
                raise ValueError(
                    f"cues of layer {layer} are asked for, but the last layer of {self.title} that "
                    f"sees whole images is {max(self.config.fullatt_block_indexes)}"
                )
            if names:
                sources.setdefault(min(whole), {})[layer] = names
        return sources

    def _grid(self, image: Tensor, number: int) -> tuple[int, int]:
        wanted = self.config.spatial_merge_size**2, self.config.patch_values
        if image.ndim != 4 or image.shape[2:] != wanted or not image.numel():
            raise ValueError(
                f"image {number} is a tensor {tuple(image.shape)}: expected (rows, columns, "
                f"{wanted[0]}, {wanted[1]}), as the image processor of this model makes it"
            )
        return image.shape[0], image.shape[1]


class PatchEmbed(nn.Module):
    """A patch's numbers to its features: a convolution whose stride is its kernel."""

    def __init__(self, config: Qwen2_5_VLVisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = FlatConvolution(3, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels)


class FlatConvolution(nn.Conv3d):
    """A convolution over patches that come one by one, as rows of numbers: a product."""

    def forward(self, pixels: Tensor) -> Tensor:
        return F.linear(pixels, self.weight.flatten(1))


class Block(nn.Module):
    """A layer: attention inside segments, then a gated MLP."""

    def __init__(self, config: Qwen2_5_VLVisionConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, NORM_EPS)
        self.norm2 = RMSNorm(config.hidden_size, NORM_EPS)
        self.attn = Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        segments: Segments,
        cues: dict | None,
        compiles: bool = False,
    ) -> Tensor:
        """x (n, C) -> the same shape; a dict takes what `KINDS` names of the patches (n, ...).

        compiles: what comes before attention and what follows it are a graph each, for any n. Among
        segments of different sizes attention is several calls, of which every image needs another
        number: they stay outside.
        """
        before, behind = before_attention, behind_attention
        if compiles:
            before, behind = compiled(before), compiled(behind)
        q, k, v = before(self, x, rope)
        if cues is not None:
            with full_precision(q.device):
                cues["received"] = attention_received(q.detach(), k.detach(), segments)
            cues["keys"] = k.flatten(1)
        return behind(self, x, attend_within(q, k, v, segments))


def before_attention(
    block: Block, x: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (n, H, d) of a layer, the first two turned, from x (n, C)."""
    q, k, v = block.attn.heads(block.norm1(x))
    return rotate(q, rope), rotate(k, rope), v


def behind_attention(block: Block, x: Tensor, found: Tensor) -> Tensor:
    """What a layer gives on x (n, C), from what its attention found, (n, H, d)."""
    x = x + block.attn.proj(found.flatten(1))
    return in_pieces(lambda x: x + block.mlp(block.norm2(x)), x)


class Attention(nn.Module):
    """Projections of attention without a direction."""

    def __init__(self, config: Qwen2_5_VLVisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (n, H, d) of x (n, C)."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)


class Merger(nn.Module):
    """The patches of a block to one token of the language model."""

    def __init__(self, config: Qwen2_5_VLVisionConfig):
        super().__init__()
        width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.out_hidden_size)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(..., M, C) -> (..., D)"""
        return self.mlp(self.ln_q(features).flatten(-2))


def attention_received(q: Tensor, k: Tensor, segments: Segments) -> Tensor:
    """(n,) fp32 attention that every patch receives inside its segment, mean over heads and
    queries, from q and k (n, H, d). No more than `MAP_ENTRIES` products are there at a time, on a
    CPU `MAP_ENTRIES_ON_CPU`."""
    entries = MAP_ENTRIES_ON_CPU if q.device.type == "cpu" else MAP_ENTRIES
    if segments.order is not None:
        q, k = q[segments.order], k[segments.order]
    scale, heads = q.shape[-1] ** -0.5, q.shape[1]
    out, start = [], 0
    for count, size in segments.runs:
        run = slice(start, start := start + count * size)
        rows, keys = (x[run].unflatten(0, (count, size)).transpose(1, 2).float() for x in (q, k))
        keys = keys.transpose(2, 3) * scale
        queries = min(size, max(1, entries // (heads * size)))
        together = max(1, entries // (heads * size * queries))
        for few, theirs in zip(rows.split(together), keys.split(together), strict=True):
            parts = few.split(queries, dim=2)
            total = sum((part @ theirs).softmax(dim=-1).sum(dim=(1, 2)) for part in parts)
            out.append((total / (heads * size)).flatten())
    whole = torch.cat(out)
    return whole if segments.back is None else whole[segments.back]


def plan_images(grids: list[tuple[int, int]], config: Qwen2_5_VLVisionConfig, device) -> Plan:
    """The plan for images of these (h, w) grids of blocks.

    Windows stand in the sequence sorted by size, so that windowed layers need no reordering; the
    few full layers bring the patches of each image together. All of it follows from the grids and
    is made on the host.
    """
    per_block = config.spatial_merge_size**2
    # Those of a video have one grid.
    ordered = {grid: window_order(*grid, config.window_side) for grid in dict.fromkeys(grids)}
    angles_of = {grid: patch_angles(*grid, config) for grid in ordered}
    orders, sizes, image_of, start = [], [], [], 0
    for number, (h, w) in enumerate(grids):
        order, own = ordered[h, w]
        orders.append(order + start)
        sizes.append(own)
        image_of.append(torch.full((h * w,), number))
        start += h * w
    size, image = torch.cat(sizes), torch.cat(image_of)
    by_size = size.repeat_interleave(size).argsort(stable=True)
    blocks = torch.cat(orders)[by_size]

    areas = torch.tensor([h * w for h, w in grids])
    wholes = segments_of(areas[image[blocks]], image[blocks], per_block)
    angles = torch.cat([angles_of[grid] for grid in grids])[blocks].flatten(0, 1)
    own_sizes, counts = (found.tolist() for found in size.unique(return_counts=True))
    runs = [(count, own * per_block) for own, count in zip(own_sizes, counts, strict=True)]
    return Plan(
        blocks=blocks.to(device),
        angles=angles.to(device),
        windows=Segments(None, None, runs),
        wholes=wholes.to(device),
    )


def patch_angles(h: int, w: int, config: Qwen2_5_VLVisionConfig) -> Tensor:
    """(h * w, M, d / 2) rotary angles of the patches of every block, those of their row in front of
    those of their column."""
    merge, width = config.spatial_merge_size, config.hidden_size // config.num_heads
    frequency = 1.0 / ROPE_THETA ** (torch.arange(0, width // 2, 2).float() / (width // 2))
    inner = torch.arange(merge)
    rows = (torch.arange(h)[:, None, None, None] * merge + inner[:, None]).expand(
        h, w, merge, merge
    )
    columns = (torch.arange(w)[:, None, None] * merge + inner).expand(h, w, merge, merge)
    places = torch.stack([rows, columns], dim=-1).flatten(2, 3).flatten(0, 1).float()
    return (places[..., None] * frequency).flatten(-2)


def same_grids(
    grids: list[tuple[int, int]], kinds: Sequence[int] | None = None
) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Every grid with the numbers of the images that have it and are of one kind, in order of
    appearance."""
    groups: dict[tuple, list[int]] = {}
    for number, key in enumerate(zip(grids, kinds or [0] * len(grids), strict=True)):
        groups.setdefault(key, []).append(number)
    yield from ((grid, numbers) for (grid, _), numbers in groups.items())
