"""The text tower of the CLIP model that a vision tower belongs to, for methods that compare patches
with the question in the space both towers meet in.

All of it is fp32, whatever the model is in: temperatures of 0.01 make a hundredfold of what half
precision leaves of a cosine. A question is read once, and the tower is small."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear import fast_linears
from ..weight_files import CACHE_DIR, local_folder, weight_files
from .base import Pruner
from .interfaces import LanguageModel
from .letters import Letters
from .ops import normalize
from .required import assigned, tower_of
from .stages import VisionStage
from .tokens import VisionTokens

#: the extra from one hook to the next: (B, N) how much of the question a patch is about
RELEVANCE = "relevance"
QUESTIONS_REMEMBERED = 256
VOCABULARY = 1024  # of the random text tower


class ClipText(nn.Module):
    """What maps texts and patches into the space CLIP compares them in.

    text:       text model with projection
    norm, projection: of the vision model
    tokenizer:  of the text model
    folder:     where all of it comes from; None: it is random
    """

    def __init__(self, text, norm: nn.LayerNorm, projection: nn.Linear, tokenizer, folder=None):
        super().__init__()
        self.folder = folder
        self.text, self.norm, self.projection = text, norm, projection
        self.tokenizer = tokenizer
        self.known: dict[str, Reading] = {}
        self.requires_grad_(False).eval()
        fast_linears(self)

    @classmethod
    def load(cls, folder: str) -> "ClipText":
        """From the folder or hub name of a full CLIP model; ValueError when it is not full."""
        from transformers import (
            CLIPTextModelWithProjection,
            CLIPTokenizerFast,
            CLIPVisionModelWithProjection,
        )

        try:
            folder = local_folder(folder)
            weight_files(folder)  # all there, none outside of the folder
        except OSError as error:
            raise ValueError(f"{folder} holds no weights of a CLIP model: {error}") from error
        parts = []
        for kind in (CLIPTextModelWithProjection, CLIPVisionModelWithProjection):
            try:
                part, info = kind.from_pretrained(
                    folder,
                    output_loading_info=True,
                    torch_dtype=torch.float32,
                    cache_dir=CACHE_DIR.get(),
                )
            except OSError as error:
                raise ValueError(f"{folder} holds no weights of a CLIP model: {error}") from error
            if info["missing_keys"]:
                raise ValueError(
                    f"{folder} lacks {len(info['missing_keys'])} weights of a full CLIP model, "
                    f"{info['missing_keys'][0]} for one: this method needs the text tower and both "
                    "projections beside the vision tower"
                )
            parts.append(part)
        text, vision = parts
        tokenizer = CLIPTokenizerFast.from_pretrained(folder, cache_dir=CACHE_DIR.get())
        norm = vision.vision_model.post_layernorm
        return cls(text, norm, vision.visual_projection, tokenizer, folder)

    @classmethod
    def random(cls, vision) -> "ClipText":
        """Random weights in the sizes of CLIP's text tower, beside a vision tower of config
        `vision`; its tokenizer reads letter by letter."""
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        width = vision.projection_dim
        # Released CLIP models have a text tower as wide as the space both towers meet in.
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=max(1, width // 64),
            vocab_size=VOCABULARY,
            projection_dim=width,
            eos_token_id=VOCABULARY - 1,
        )
        norm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        projection = nn.Linear(vision.hidden_size, width, bias=False)
        return cls(CLIPTextModelWithProjection(config), norm, projection, Letters(VOCABULARY))

    def image_embeds(self, features: Tensor) -> Tensor:
        """(B, N, P) fp32 embeddings of patch features (B, N, C)."""
        norm = self.norm
        normed = F.layer_norm(
            features.float(),
            norm.normalized_shape,
            norm.weight.float(),
            norm.bias.float(),
            norm.eps,
        )
        return F.linear(normed, self.projection.weight.float())

    def directions(self, texts: list[str]) -> Tensor:
        """(n, P) means of the unit embeddings of each text's segments."""
        found = torch.stack([reading.direction for reading in self.read(texts)])
        return found.to(self.projection.weight.device)

    def read(self, texts: list[str], words: bool = False) -> "list[Reading]":
        """What the text tower makes of each text; words: with its single tokens."""
        new = [text for text in dict.fromkeys(texts) if not self.knows(text, words)]
        if new:
            if len(self.known) + len(new) > QUESTIONS_REMEMBERED:
                self.known = {text: self.known[text] for text in texts if text in self.known}
            segments = [self.segments(text) for text in new]
            pooled, states = self.run([ids for own in segments for ids in own])
            parts = normalize(pooled).split([len(own) for own in segments])
            for text, own, unit in zip(new, segments, parts, strict=True):
                rows, states = states[: len(own)], states[len(own) :]
                tokens = None
                if words:  # those of all segments but the mark that ends the last one
                    pairs = zip(rows, own, strict=True)
                    tokens = torch.cat([row[: len(ids)] for row, ids in pairs])[:-1]
                    tokens = normalize(self.text.text_projection(tokens))
                self.known[text] = Reading(unit.mean(dim=0), tokens)
        return [self.known[text] for text in texts]

    def knows(self, text: str, words: bool) -> bool:
        return text in self.known and not (words and self.known[text].words is None)

    def segments(self, text: str) -> list[list[int]]:
        """The ids of a text, start and end mark included, cut at the length the model can read."""
        ids = self.tokenizer(text, verbose=False).input_ids
        size = self.text.config.max_position_embeddings
        return [ids[start : start + size] for start in range(0, len(ids), size)]

    @torch.no_grad()
    def run(self, segments: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(embeddings (m, P), normed states (m, L, width) of the tokens) of m segments, fp32."""
        self.text.float()  # a model that is cast takes it along
        rows = [torch.tensor(ids) for ids in segments]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        device = self.projection.weight.device
        found = self.text(ids.to(device), attention_mask=mask.to(device))
        return found.text_embeds, found.last_hidden_state


class Reading(NamedTuple):
    """
    direction: (P,) mean of the unit embeddings of a text's segments
    words:     (M, P) unit directions of its tokens, the start mark included; None: not asked for
    """

    direction: Tensor
    words: Tensor | None


class AsksClip(VisionStage, Pruner):
    """Base of methods that compare patches with the question: their `module` is a `ClipText`,
    unless the setting does without it, which `reads_question` says."""

    needs = frozenset({"text_tower"})
    reads_question = True
    module: ClipText | None = None

    @property
    def trained(self) -> ClipText:
        """`module`, see `assigned`."""
        return assigned(self.module, self.name)

    def ask_nothing(self) -> None:
        """For settings that do without the question."""
        self.needs, self.reads_question = frozenset(), False

    def relevance_left(self, vision: VisionTokens) -> Tensor:
        """(B, N) fp32 the extra `RELEVANCE`; 1 where no hook left it, as nothing was asked."""
        relevance = vision.extras.get(RELEVANCE)
        if relevance is None:
            return torch.ones_like(vision.positions, dtype=torch.float32)
        return relevance

    def use_random_parts(self, model: LanguageModel) -> None:
        if self.reads_question:
            self.module = ClipText.random(tower_of(model, self.name).config)

    def attach(self, model: LanguageModel) -> None:
        tower = model.get_vision_tower()
        if tower is not None and self.reads_question:
            folder = tower.vision_tower_name
            if self.module is None or self.module.folder not in (None, folder):
                self.module = ClipText.load(folder)
            if tower.is_loaded:
                self.module.to(tower.device, torch.float32)
            width = self.module.projection.in_features
            if tower.hidden_size != width:
                raise ValueError(
                    f"{self.name} compares features of width {width} with the question, this "
                    f"vision tower gives {tower.hidden_size}"
                )
