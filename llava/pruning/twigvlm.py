"""TwigVLM: a small trained branch of the decoder chooses the tokens, and guesses the answer's.

Paper: Growing a Twig to Accelerate Large Vision-Language Models, https://arxiv.org/abs/2503.14075

The twig is T decoder layers, a norm and a head on the output of decoder layer K - 1. What the last
prompt token attends to in its last layer ranks the visual tokens before layer K; before the "final
wipe" layer all that are left go. `model.generate(..., generation_strategy="self_speculative")` lets
the twig guess tokens that the whole decoder verifies.

Differs from the release: scores and their head mean stay in fp32; text-only prompts, several images
(one pool), batches and any backend work; a budget out of reach is an error, or a warning where only
the largest images of LLaVA-NeXT have too many tokens for it; a twig that does not fit is refused; a
sharper budget than an image has tokens switches pruning off for it, wipe included.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..devices import empty_like_weights
from ..linear import Linear
from .base import BudgetPruner
from .drafter import DRAFTER_OPTIONS, Drafter
from .interfaces import Decoder, LanguageModel
from .learned import CONFIG_FILE, build_part, part_folder, read_part_config, save_part
from .ops import on_device, rank_within_groups, scale_layer
from .option_types import check_saved
from .prefill import Prefill
from .required import assigned
from .stages import DecoderStage
from .twig_files import check_owner, published_name, read_twig
from .twigvlm_release import TwigRelease

#: in a 32-layer decoder: K, the layer before which all visual tokens go, layers of the twig
FIRST_LAYER, WIPE_LAYER, TWIG_LAYERS = 2, 24, 3
#: what the config of a twig may say
SAVED = ("twig_K", "twig_T", "final_wipe_layer")


class Twig(nn.Module):
    """The trained part; layers of the same make as the decoder's, numbered behind them."""

    #: whether a pruning head belongs to it
    has_head: ClassVar[bool] = False

    def __init__(self, model: LanguageModel, count: int):
        super().__init__()
        decoder, config = model.model, model.config
        layer: Any = type(decoder.layers[0])
        first = config.num_hidden_layers
        self.layers = nn.ModuleList(layer(config, first + number) for number in range(count))
        self.norm = type(decoder.norm)(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, model.lm_head.weight.shape[0], bias=False)

    def forward(self, decoder: Decoder, prefill: Prefill) -> Tensor:
        """(B, S, D) behind the norm, for prompts as they enter decoder layer K; for training."""
        return self.norm(decoder.through(prefill, self.layers))


@dataclass
class TwigState:
    """wiped: for every prompt, whether its visual tokens go before `final_wipe_layer`"""

    wiped: list[bool]


@dataclass
class TwigVLM(DecoderStage, BudgetPruner):
    """
    visual_token_num: tokens per image, averaged over the decoder layers: all of them enter layers
                      0 to K - 1, as many as the average asks for layer K and those up to
                      `final_wipe_layer`, none the layers from there on
    twig:             folder of the twig; None: the one that comes with the playground checkpoint
    twig_K:           decoder layers in common. None: what the twig's config says, else the
                      environment variable twig_K, else 2 of 32, scaled to the depth
    twig_T:           layers of the twig; only checked, the file says how many there are
    final_wipe_layer: None: what the twig's config says, else 24 of 32, scaled to the depth, at most
                      24 (as published for 40 layers) and at least K + 1
    enable_pruning:   False keeps all visual tokens; the twig can still guess tokens
    num_speculations, draft_stop_prob, tree_depth, tree_width, tree_nodes: as in
                      `llava.pruning.drafter.Drafter`
    """

    twig: str | None = None
    twig_K: int | None = None
    twig_T: int | None = None
    final_wipe_layer: int | None = None
    enable_pruning: bool = True
    num_speculations: int = 5
    draft_stop_prob: float = 0.6
    tree_depth: int = 4
    tree_width: int | None = None
    tree_nodes: int | None = 0

    name = "twigvlm"
    reads_text = True
    published = TwigRelease()
    #: what is trained
    twig_class: ClassVar[type[Twig]] = Twig

    def __post_init__(self):
        number: float = self.visual_token_num
        if isinstance(number, float) and number.is_integer():  # the release takes 64.0 as well
            self.visual_token_num = int(number)
        super().__post_init__()
        if self.twig_T is not None and self.twig_T < 1:
            raise ValueError(f"twig_T ({self.twig_T}) must be at least 1 layer")
        Drafter(0, nn.ModuleList(), nn.Identity(), nn.Identity(), **self.drafting)  # checks them
        self.module: Twig | None = None
        self._config: dict = {}
        if self.twig is not None and os.path.isdir(self.twig):
            self._config = self._config_in(self.twig)

    # --- the twig -----------------------------------------------------------------------------

    @property
    def trained(self) -> Twig:
        """`module`, see `assigned`."""
        return assigned(self.module, self.name)

    def part_folders(self, model_path: str) -> list[str]:
        return [part_folder(self.name, self.twig, model_path, "twig")]

    def attach(self, model: LanguageModel) -> None:
        if self.module is None:
            (folder,) = self.part_folders(getattr(model.config, "_name_or_path", ""))
            self._config = self._config_in(folder)
            like = self._neighbour(model)
            self.module = load_twig(folder, model, self._said("twig_T"), like, self.twig_class)
        width = self.module.head.in_features
        if width != model.config.hidden_size:
            raise ValueError(
                f"the twig is {width} wide, this model {model.config.hidden_size}: load "
                "a twig that was trained on it"
            )
        like = self._neighbour(model)
        self.module.to(device=like.device, dtype=like.dtype)
        depth, layers = model.config.num_hidden_layers, len(self.module.layers)
        shared = self.shared_layers(depth)
        if shared + layers > depth:
            raise ValueError(
                f"twig_K ({shared}) and the twig's {layers} layers exceed the {depth} layers of "
                "the decoder"
            )

    def _config_in(self, folder: str) -> dict:
        """The values of the twig's config, those of `SAVED` checked."""
        values = read_part_config(folder, self.name)
        found = {name: values[name] for name in SAVED if name in values}
        check_saved(type(self), found, os.path.join(folder, CONFIG_FILE))
        return values

    def use_random_parts(self, model: LanguageModel) -> None:
        """Random weights in place of trained ones, where only costs and shapes matter."""
        count = self.twig_T or max(1, scale_layer(TWIG_LAYERS, model.config.num_hidden_layers))
        twig = self.twig_class(model, count)
        self.module = twig.apply(model._init_weights).requires_grad_(False).eval()

    def _neighbour(self, model: LanguageModel) -> Tensor:
        """An empty tensor with device and type of the decoder layer that the twig stands beside."""
        layers = model.model.layers
        beside = min(self.shared_layers(len(layers)), len(layers) - 1)
        return empty_like_weights(layers[beside].input_layernorm)

    def drafter(self, num_layers: int) -> Drafter | None:
        if self.module is None:
            return None
        return Drafter(
            self.shared_layers(num_layers),
            self.module.layers,
            self.module.norm,
            self.module.head,
            **self.drafting,
        )

    @property
    def drafting(self) -> dict[str, Any]:
        """The options that say how tokens are guessed."""
        return {name: getattr(self, name) for name in DRAFTER_OPTIONS}

    # --- budget -------------------------------------------------------------------------------

    def shared_layers(self, num_layers: int) -> int:
        """K in a decoder with `num_layers` layers."""
        given = self._said("twig_K")
        return scale_layer(FIRST_LAYER, num_layers) if given is None else given

    def _said(self, name: str) -> int | None:
        """What the option says, else the twig's config, else the environment; None: nobody does."""
        said = getattr(self, name), self._config.get(name), _environment(name)
        return next((number for number in said if number is not None), None)

    def wipe_layer(self, num_layers: int) -> int:
        """The layer before which all visual tokens go; `num_layers` for never."""
        for given in (self.final_wipe_layer, self._config.get("final_wipe_layer")):
            if given is not None:
                return given
        # The published setting of the 13B model, with 40 layers, wipes before 24 as well.
        layer = min(scale_layer(WIPE_LAYER, num_layers), WIPE_LAYER)
        return max(layer, self.shared_layers(num_layers) + 1)

    def check_depth(self, num_layers: int) -> None:
        first, wipe = self.shared_layers(num_layers), self.wipe_layer(num_layers)
        if not 0 <= first < wipe <= num_layers:
            raise ValueError(
                f"twig_K ({first}) must be at least 0 and below final_wipe_layer ({wipe}), which "
                f"must not exceed the {num_layers} decoder layers"
            )

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        if not self.enable_pruning:
            return self.check_depth(num_layers)
        super().check(num_patches, num_layers, crops)
        total, first = num_patches * crops, self.shared_layers(num_layers)
        least, budget = -(-first * total // num_layers), self.tokens_of(total)
        if budget >= least:
            return
        message = (
            f"visual_token_num ({budget}) is out of reach: all {total} tokens enter "
            f"the first {first} of {num_layers} layers, which alone are {least} on average"
        )
        if crops == 1 or budget * num_layers < first * num_patches:
            raise ValueError(message)
        warnings.warn(f"for the largest images {message}; they keep none after those", stacklevel=2)

    def kept_tokens(self, total: Tensor, budget: Tensor, num_layers: int) -> Tensor:
        """Visual tokens that enter layers K up to the wipe, of `total` tokens of a prompt; all
        three of one shape, `budget` being the average over all layers that is aimed at."""
        first, wipe = self.shared_layers(num_layers), self.wipe_layer(num_layers)
        kept = -((first * total - num_layers * budget) // (wipe - first))  # rounded up
        return torch.where(budget >= total, total, torch.minimum(kept.clamp(min=0), total))

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        total = torch.tensor(num_patches * crops)
        budget = torch.tensor(self.tokens_of(int(total)))
        if not self.enable_pruning or budget >= total:
            return [int(total)] * num_layers
        first, wipe = self.shared_layers(num_layers), self.wipe_layer(num_layers)
        kept = int(self.kept_tokens(total, budget, num_layers))
        return [int(total)] * first + [kept] * (wipe - first) + [0] * (num_layers - wipe)

    # --- pruning ------------------------------------------------------------------------------

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        num_layers = len(prefill.decoder.layers)
        if not self.enable_pruning:
            return prefill
        if index == self.shared_layers(num_layers):
            return self._choose(prefill, num_layers)
        state: TwigState | None = prefill.state
        if index == self.wipe_layer(num_layers) and state is not None:
            pairs = zip(state.wiped, prefill.counts.visual, strict=True)
            counts = prefill.counts.with_visual([0 if wiped else left for wiped, left in pairs])
            wiped = on_device([[own] for own in state.wiped], prefill.index.device).bool()
            left = prefill.keep(~(prefill.is_visual & wiped), counts=counts)
            # An answer to an image at the end goes on from there, as guesses behind it have done.
            left.next_position = prefill.follows
            return left
        return prefill

    def blind_cuts(self, num_layers: int) -> tuple[int, ...]:
        return (self.wipe_layer(num_layers),)

    def reusable_layers(self, prefill: Prefill) -> int:
        num_layers = len(prefill.decoder.layers)
        return self.shared_layers(num_layers) if self.enable_pruning else num_layers

    def _choose(self, prefill: Prefill, num_layers: int) -> Prefill:
        images = prefill.counts.images  # on the host, as what follows
        total = torch.tensor([sum(row) for row in images])
        # What an image has no tokens for is not given to the others.
        budget = torch.tensor([sum(min(self.tokens_of(n), n) for n in row if n) for row in images])
        wiped = budget < total
        if not wiped.any():
            return prefill
        kept = self.kept_tokens(total, budget, num_layers).tolist()
        prefill.state = TwigState(wiped.tolist())
        score = self.score(prefill)
        prefill.record_importance(score)
        rank = rank_within_groups(score, prefill.is_visual.long())
        most = on_device([[own] for own in kept], rank.device)
        counts = prefill.counts.with_visual(kept)
        return prefill.keep(~prefill.is_visual | (rank < most), counts=counts)

    def score(self, prefill: Prefill) -> Tensor:
        """(B, S) what the last prompt token attends to in the twig's last layer, head mean."""
        row = prefill.drafter_row
        if row is None:
            row = prefill.decoder.branch_attention(prefill, self.trained.layers)
        return row[:, :, 0].mean(dim=1)

    def with_options(self, **options) -> TwigVLM:
        """The same method with other options and the same twig."""
        other = replace(self, **options)
        other.module, other._config = self.module, self._config
        return other


def load_twig(
    folder: str,
    model: LanguageModel,
    count: int | None = None,
    like: Tensor | None = None,
    kind: type[Twig] = Twig,
) -> Twig:
    """The twig in `folder`, in the published layout or ours.

    count: layers it must have; None: any number
    like:  a tensor of the device and type it is to have; None: those of the model's final norm
    kind:  what it is to be
    Raises ValueError when it is of another kind, has another number, or does not fit the model.
    """
    path, tensors = read_twig(folder)
    numbers = {int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))}
    if not numbers:
        raise ValueError(f"{path} holds no layers of a twig (model.layers.0. ...)")
    check_owner(path, tensors, kind.has_head)
    if count is not None and len(numbers) != count:
        raise ValueError(f"twig_T is {count}, but the twig in {path} has {len(numbers)} layers")
    if len(numbers) > model.config.num_hidden_layers:
        raise ValueError(
            f"the twig in {path} has {len(numbers)} layers, more than the decoder it belongs to "
            f"({model.config.num_hidden_layers})"
        )
    like = empty_like_weights(model.model.norm) if like is None else like
    return build_part(lambda: kind(model, len(numbers)), tensors, path, like)


def grow_twig(
    model: LanguageModel, shared_layers: int, count: int, kind: type[Twig] = Twig
) -> Twig:
    """The twig that training starts from: copies of `count` decoder layers from `shared_layers` on,
    of the final norm and of the head; what else there is of its kind is fresh. Raises ValueError
    when there are not so many layers."""
    decoder, depth = model.model, model.config.num_hidden_layers
    if shared_layers < 0 or count < 1 or shared_layers + count > depth:
        raise ValueError(
            f"twig_K ({shared_layers}) and twig_T ({count}) need {shared_layers + count} decoder "
            f"layers, of which at least one for the twig; this model has {depth}"
        )
    twig = kind(model, count).to(empty_like_weights(decoder.norm))
    layers = decoder.layers[shared_layers : shared_layers + count]
    for copy, layer in zip(twig.layers, layers, strict=True):
        copy.load_state_dict(layer.state_dict())
    twig.norm.load_state_dict(decoder.norm.state_dict())
    twig.head.load_state_dict(model.lm_head.state_dict())
    return twig


def save_twig(
    folder: str,
    weights: dict[str, Tensor],
    shared_layers: int,
    base_model: str,
    method: str = TwigVLM.name,
    **others,
) -> None:
    """Writes a twig of `method` in the published layout, with our config.json; weights: its state
    dict, others: what else config.json is to say."""
    tensors = {published_name(name): tensor for name, tensor in weights.items()}
    numbers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    save_part(
        folder,
        method,
        tensors,
        base_model,
        twig_K=shared_layers,
        twig_T=len(numbers),
        hidden_size=weights["norm.weight"].shape[0],
        vocab_size=weights["head.weight"].shape[0],
        **others,
    )


def _environment(name: str) -> int | None:
    """The whole number in an environment variable of the published programs."""
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdigit():
        raise ValueError(f"the environment variable {name} ({text!r}) must be a whole number")
    return int(text)
