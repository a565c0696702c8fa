"""Images into the language model: vision tower, projector, and the splice into the prompt.

Two of the three hook sites of a pruning method are here: after the encoder and after the projector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from ..devices import device_of, moved
from ..mm_utils import get_anyres_image_grid_shape
from ..pruning.tokens import ImageTokens, VisionTokens
from .checkpoint import read_file
from .context import check_prompts, count_positions
from .image_layout import (
    flat_layout,
    image_layout,
    spatial_layout,
    unpad_image,
    with_newline,
)
from .multimodal_encoder.builder import build_vision_tower
from .multimodal_encoder.clip_encoder import CLIPVisionTower
from .multimodal_projector.builder import build_vision_projector
from .patches import SPLICE, check_tower, refuse, replacement, spliced_outside
from .prompt import Prompt, build_row, pad_rows
from .pruner_slot import PrunerSlot
from .split_parameters import whole

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "unpad_image"]


class LlavaMetaModel:
    """Mixin of the inner model: holds tower, projector and the newline embedding."""

    def __init__(self, config):
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config, delay_load=True)
            if "unpad" in getattr(config, "mm_patch_merge_type", "flat"):
                self.image_newline = nn.Parameter(torch.empty(config.hidden_size))

    def get_vision_tower(self):
        tower = getattr(self, "vision_tower", None)
        return tower[0] if isinstance(tower, list) else tower

    def initialize_vision_modules(self, model_args, fsdp=None) -> None:
        """Adds tower and projector to a language model, or readies those it has, for training.

        `model_args` names them as in `llava.train.arguments.ModelArguments`; weights of
        `pretrain_mm_mlp_adapter` are loaded into the projector (and newline embedding, if there).
        """
        config = self.config
        config.mm_vision_tower = model_args.vision_tower
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = model_args.mm_vision_select_feature
        config.mm_patch_merge_type = model_args.mm_patch_merge_type
        tower = self.get_vision_tower()
        if tower is None:
            tower = build_vision_tower(model_args)
            self.vision_tower = [tower] if fsdp else tower  # a list keeps FSDP from wrapping it
        else:
            tower.load_model()
        config.use_mm_proj = True
        config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
        config.mm_hidden_size = tower.hidden_size
        if getattr(self, "mm_projector", None) is None:
            self.mm_projector = build_vision_projector(config)
            if "unpad" in config.mm_patch_merge_type:
                width = config.hidden_size
                self.image_newline = nn.Parameter(torch.randn(width) / math.sqrt(width))
        else:
            self.mm_projector.requires_grad_(True)
        if model_args.pretrain_mm_mlp_adapter:
            self._load_adapter(model_args.pretrain_mm_mlp_adapter)

    def _load_adapter(self, path: str) -> None:
        weights = read_file(path)
        projector = {
            key.split("mm_projector.", 1)[1]: value
            for key, value in weights.items()
            if "mm_projector." in key
        }
        with whole(self.mm_projector.parameters(), change=True):
            wanted = {key: tuple(p.shape) for key, p in self.mm_projector.state_dict().items()}
            given = {key: tuple(value.shape) for key, value in projector.items()}
            if given != wanted:
                raise ValueError(
                    f"{path} holds a projector of shapes {given or 'none at all'}, the model has "
                    f"{wanted}: does mm_projector_type {self.config.mm_projector_type!r} fit?"
                )
            self.mm_projector.load_state_dict(projector)
        for key, value in weights.items():
            if key.endswith("image_newline") and hasattr(self, "image_newline"):
                with whole([self.image_newline], change=True):
                    self.image_newline.data.copy_(value)


class LlavaMetaForCausalLM(PrunerSlot):
    """Mixin of the causal language models: encoding and splicing, with a pruning method in use."""

    #: set by `trace_pruning` for the time of its block
    pruning_trace = None
    #: whether the splice follows the rules of training: a long prompt is cut, a text-only one uses
    #: up a dummy image. None: with labels, and in training mode
    as_in_training: bool | None = None

    def get_model(self):
        raise NotImplementedError(f"{type(self).__name__} must define get_model()")

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    @property
    def patch_grid(self) -> tuple[int, int] | None:
        """(h, w) patches of one crop; None without a vision tower."""
        tower = self.get_vision_tower()
        return None if tower is None else (tower.num_patches_per_side,) * 2

    # --- vision -------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> Tensor:
        """Projected, pruned features (B, T, D) of crops (B, 3, S, S)."""
        return self.encode_vision(images).features

    def encode_vision(
        self,
        crops: Tensor,
        image_index: Tensor | None = None,
        questions: list[str] | None = None,
        arrangements: list[tuple] | None = None,
    ) -> VisionTokens:
        """Tokens of crops (B, 3, S, S) as they enter the language model.

        image_index:  (B,) image each crop belongs to (default: one crop per image)
        arrangements: per image (crops, tiles, size), see `image_layout`
        """
        pruner, tower = self.pruner, self.get_vision_tower()
        if isinstance(tower, CLIPVisionTower):
            check_tower(tower, AS_IT_CAME["forward"])
        budget = self.crops_in_budget(pruner)
        if image_index is None:
            image_index = torch.arange(crops.shape[0], device=crops.device)
        vision = tower.tokens(crops, pruner.needs, pruner, budget, image_index)
        vision.image_index = image_index.to(vision.features.device)
        vision.questions = questions if pruner.reads_question else None
        if arrangements is not None:
            vision.layouts = [
                image_layout(crops, tiles, vision.grid, size) for crops, tiles, size in arrangements
            ]
        vision = pruner.after_encoder(vision)
        projector = self.get_model().mm_projector
        weight = next(projector.parameters(), None)
        if weight is not None and (device := device_of(projector)) != vision.features.device:
            vision = moved(vision, device)
        features = vision.features if weight is None else vision.features.to(weight.dtype)
        vision.features = projector(features)
        vision, home = pruner.after_projector(vision), device_of(self.get_input_embeddings())
        return vision if vision.features.device == home else moved(vision, home)

    def image_tokens(self, images, image_sizes=None, questions=None) -> list[ImageTokens]:
        """Tokens of every image, laid out for the prompt; arguments as in `generate`."""
        if replacement(self, "encode_images", AS_IT_CAME["encode_images"]) is not None:
            refuse("encode_images")
        given = (images,) if isinstance(images, Tensor) else images
        if odd := [type(image).__name__ for image in given if not isinstance(image, Tensor)]:
            raise ValueError(
                f"images must be tensors, as process_images makes of pictures, not {odd[0]}"
            )
        tiled = isinstance(images, list) or images.ndim == 5
        parts = [image if image.ndim == 4 else image[None] for image in images]
        counts = [len(part) for part in parts]
        if questions is not None and len(questions) != len(counts):
            raise ValueError(f"{len(questions)} questions for {len(counts)} images: give one each")
        crops = torch.cat(parts) if tiled else images
        owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        plans, start = [], 0
        for number, count in enumerate(counts):
            size = None if image_sizes is None else image_sizes[number]
            plans.append(self._arrange(slice(start, start + count), tiled, size, number))
            start += count
        vision = self.encode_vision(crops, owner.to(crops.device), questions, plans)
        return [
            self.pruner.after_layout(self._layout(vision, layout, tiled))
            for layout in vision.layouts
        ]

    def _arrange(self, crops: slice, tiled: bool, image_size, number: int) -> tuple:
        """(crops, tiles, size) of image `number` as `image_layout` takes them."""
        merge = getattr(self.config, "mm_patch_merge_type", "flat") or "flat"
        if merge == "flat" or not tiled:
            return crops, None, None
        if not merge.startswith("spatial"):
            raise ValueError(
                f"Unexpected mm_patch_merge_type: {merge!r}, choose flat or spatial..."
            )
        count, tower = crops.stop - crops.start, self.get_vision_tower()
        if count == 1:
            return crops, None, None
        if tower.select_feature != "patch":
            raise ValueError(
                f"mm_patch_merge_type {merge!r} needs mm_vision_select_feature 'patch'"
            )
        if getattr(self.config, "image_aspect_ratio", "square") != "anyres":
            raise ValueError(
                f"mm_patch_merge_type {merge!r} with several crops needs "
                "image_aspect_ratio 'anyres'"
            )
        if image_size is None:
            raise ValueError(
                f"image {number} has {count} crops: pass its (width, height) in image_sizes"
            )
        pinpoints = self.config.image_grid_pinpoints
        selection = getattr(self.config, "anyres_selection", None) or "area"
        tiles = get_anyres_image_grid_shape(image_size, pinpoints, tower.image_size, selection)
        if count != 1 + math.prod(tiles):
            raise ValueError(
                f"image {number} has {count} crops, but {pinpoints} cuts size {tuple(image_size)} "
                f"into 1 + {tiles[0]} x {tiles[1]}; prepare images with process_images and the "
                "config of this model after choosing the pruning method"
            )
        return crops, tiles, image_size if "unpad" in merge else None

    def _layout(self, vision: VisionTokens, layout, tiled: bool) -> ImageTokens:
        """Tokens of one image in their order, newlines included."""
        merge = getattr(self.config, "mm_patch_merge_type", "flat") or "flat"
        class_token = self.get_vision_tower().select_feature == "cls_patch"
        num_patches = math.prod(vision.grid) + class_token
        newline = self.get_model().image_newline if "unpad" in merge and tiled else None
        newline = None if newline is None else newline.to(vision.features.device)
        if layout.tiles is not None:
            return spatial_layout(vision, layout, num_patches, newline)
        flat = flat_layout(vision, layout.crops, num_patches)
        return flat if newline is None else with_newline(flat, newline)

    # --- splice -------------------------------------------------------------------------------

    @property
    def outside_splice(self):
        """What another package assigned to `prepare_inputs_labels_for_multimodal`, or None."""
        return replacement(self, SPLICE, AS_IT_CAME[SPLICE])

    def splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images=None,
        image_sizes=None,
        questions: list[str] | None = None,
        padding_side: str | None = None,
    ) -> Prompt:
        """`build_prompt`, or what another package put in its place."""
        outside = None if images is None else self.outside_splice
        if outside is not None:
            return spliced_outside(
                outside, self.pruner, input_ids, attention_mask, labels, images, image_sizes
            )
        return self.build_prompt(
            input_ids, attention_mask, labels, images, image_sizes, questions, padding_side
        )

    def build_prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | list[Tensor] | list[ImageTokens] | None = None,
        image_sizes=None,
        questions: list[str] | None = None,
        padding_side: str | None = None,
    ) -> Prompt:
        """Embeds prompts (B, L) and puts the images in place of their marks.

        Images go to the marks in order of appearance, sample after sample, and their number must
        equal the number of marks; they may also be what `image_tokens` made of them. Nothing is
        cut: a prompt longer than `max_position_embeddings` is an error, see `llava.model.context`.
        In training (see `as_in_training`) images may exceed the marks by one per text-only sample,
        which uses up a dummy, and rows are cut to `tokenizer_model_max_length`. Raises ValueError.
        In training mode dummies are encoded as well when a batch holds nothing else, and every
        parameter that images use gets a gradient: processes that train together wait for each
        other at each of them.
        """
        training = self.as_in_training
        if training is None:
            training = self.training or labels is not None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask, ids = mask.bool().cpu(), input_ids.cpu()
        check_ids(ids, mask, self.config.vocab_size)
        marked = (ids == IMAGE_TOKEN_INDEX) & mask
        num_images = 0 if images is None else len(images)
        slots = image_slots(marked.sum(dim=1).tolist(), num_images, training)
        tokens, only_dummies = [], self.training and images is not None and not any(slots)
        if any(slots) or only_dummies:
            encoded = isinstance(images[0], ImageTokens)
            tokens = images if encoded else self.image_tokens(images, image_sizes, questions)
        newline = getattr(self.get_model(), "image_newline", None)
        if self.training and tokens and newline is not None:
            # Gradients have to come in the same order whether the images of a batch use it or not:
            # before the projector's, behind those of the embeddings.
            first = tokens[0].embeds
            tokens[0].embeds = torch.cat([first, newline[None, :][:0].to(first)])
        if self.pruning_trace is not None and not only_dummies:
            for image in tokens:
                self.pruning_trace.add_image(image.patches, image.embeds, image.length)
        embeds = self.get_model().embed_tokens(input_ids.clamp(0, self.config.vocab_size - 1))
        if labels is None:
            labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels = labels.to(embeds.device)
        limit = getattr(self.config, "tokenizer_model_max_length", None) if training else None
        widths = [image.context.shape[1] for image in tokens if image.context is not None]
        rows, policy, positions = [], self.pruner.position_policy, []
        for row, own in enumerate(slots):
            keep = mask[row].nonzero()[:, 0]
            marks = marked[row][keep].nonzero()[:, 0].tolist()
            texts = len(keep) - len(marks)
            positions.append(count_positions(texts, [tokens[i] for i in own], policy))
            keep = keep.to(embeds.device)
            rows.append(
                build_row(
                    embeds[row, keep],
                    labels[row, keep],
                    marks,
                    [tokens[i] for i in own],
                    policy,
                    limit,
                    max(widths, default=0),
                )
            )
        if only_dummies:  # none of their rows, yet a gradient of zeros
            rows[0]["x"] = torch.cat([rows[0]["x"], tokens[0].embeds[:0].to(rows[0]["x"])])
        if not training:
            check_prompts(self, positions)
        side = padding_side or getattr(self.config, "tokenizer_padding_side", "right")
        prompt = pad_rows(rows, side, tagged=any(image.tags is not None for image in tokens))
        prompt.num_positions = max(positions)
        return prompt

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        image_sizes=None,
    ):
        """The splice in the form of LLaVA: (input_ids, position_ids, attention_mask,
        past_key_values, inputs_embeds, labels). What was None stays None, except that the mask is
        kept when rows were padded."""
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        prompt = self.build_prompt(input_ids, attention_mask, labels, images, image_sizes)
        if attention_mask is not None:
            attention_mask = prompt.attention_mask.to(attention_mask.dtype)
        elif not bool(prompt.attention_mask.all()):
            attention_mask = prompt.attention_mask
        return (
            None,
            None if position_ids is None else prompt.position_ids,
            attention_mask,
            past_key_values,
            prompt.inputs_embeds,
            None if labels is None else prompt.labels,
        )

    def initialize_vision_tokenizer(self, model_args, tokenizer) -> None:
        """Adds the image marker tokens `model_args` asks for; new rows are the mean of the old."""
        if model_args.mm_use_im_patch_token:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
            self.resize_token_embeddings(len(tokenizer))
        tune = model_args.tune_mm_mlp_adapter
        if model_args.mm_use_im_start_end:
            markers = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
            added = tokenizer.add_tokens(markers, special_tokens=True)
            self.resize_token_embeddings(len(tokenizer))
            tables = (self.get_input_embeddings(), self.get_output_embeddings())
            if added:
                for table in tables:
                    with whole([table.weight], change=True):
                        weight = table.weight.data
                        weight[-added:] = weight[:-added].mean(dim=0, keepdim=True)
            if tune:
                tables[0].requires_grad_(True)
                tables[1].requires_grad_(False)
            if model_args.pretrain_mm_mlp_adapter:
                self._load_marker_rows(model_args.pretrain_mm_mlp_adapter, added)
        elif model_args.mm_use_im_patch_token and tune:
            self.get_input_embeddings().requires_grad_(False)
            self.get_output_embeddings().requires_grad_(False)

    def _load_marker_rows(self, path: str, added: int) -> None:
        saved = read_file(path).get("model.embed_tokens.weight")
        if saved is None:
            raise ValueError(f"{path} holds no embeddings of the image marks (embed_tokens)")
        table = self.get_input_embeddings().weight
        with whole([table], change=True):
            self._copy_marker_rows(path, saved, table.data, added)

    @staticmethod
    def _copy_marker_rows(path: str, saved: Tensor, weight: Tensor, added: int) -> None:
        if added != 2 or (saved.shape != weight.shape and len(saved) != added):
            raise ValueError(
                f"embeddings of shape {tuple(saved.shape)} in {path} do not fit a table of shape "
                f"{tuple(weight.shape)} with {added} new tokens (2 expected)"
            )
        weight[-added:] = saved[-added:]


#: what other packages replace, as it came
AS_IT_CAME = {name: getattr(LlavaMetaForCausalLM, name) for name in (SPLICE, "encode_images")}
AS_IT_CAME["forward"] = CLIPVisionTower.forward


def check_ids(ids: Tensor, mask: Tensor, vocabulary: int) -> None:
    """Raises ValueError unless `ids` are prompts (B, L) of tokens and image marks where `mask`, of
    the same shape, is True. Both are on the host: on a GPU an id that is no token ends everything.
    """
    if ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(
            f"input_ids must be (prompts, tokens), one token at least, not {tuple(ids.shape)}"
        )
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} must have the shape of input_ids, "
            f"{tuple(ids.shape)}"
        )
    known = (ids == IMAGE_TOKEN_INDEX) | (ids >= 0) & (ids < vocabulary)
    if odd := ids[mask & ~known].tolist():
        raise ValueError(
            f"input_ids hold {odd[0]}, which is neither a token (0 to {vocabulary - 1}) nor an "
            f"image mark ({IMAGE_TOKEN_INDEX})"
        )


def image_slots(marks: list[int], num_images: int, training: bool = True) -> list[list[int]]:
    """Which images each sample gets, from its number of marks.

    Raises ValueError unless the images match the marks, or, in training, exceed them by one per
    text-only sample.
    """
    text_only = marks.count(0)
    dummies = training and num_images == sum(marks) + text_only
    if num_images != sum(marks) and not dummies:
        rule = "write <image> into the prompts once for every image"
        if training:
            rule = f"they must match, or exceed by one for each of {text_only} text-only prompts"
        raise ValueError(
            f"{num_images} images for {sum(marks)} <image> marks in {len(marks)} prompts: {rule}"
        )
    slots, used = [], 0
    for count in marks:
        slots.append(list(range(used, used + count)))
        used += count or int(dummies)
    return slots
