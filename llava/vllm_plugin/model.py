"""LLaVA as vLLM runs it, with a pruning method behind its vision tower."""

from __future__ import annotations

import torch
from vllm.model_executor.models import llava as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..image_io import resized_square
from .plan import OVERRIDE, PruningPlan, plan_of, prune
from .tower import TowerShape, tower_tokens


def plan_for(config) -> PruningPlan | None:
    """What the override in a model's config asks for."""
    values = getattr(config, OVERRIDE, None)
    if values is None:
        return None
    return plan_of(values, TowerShape.of(config), config.text_config.num_hidden_layers)


class PrunedInfo(stock.LlavaProcessingInfo):
    """Every image has the tokens that the method keeps."""

    def __init__(self, ctx, plan: PruningPlan):
        super().__init__(ctx)
        self.plan = plan

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.plan.count


class PrunedProcessor(stock.LlavaMultiModalProcessor):
    """Images that are not square are padded, as LLaVA-1.5 was trained and `llava` does it. They get
    their size here, too: which pixels that gives depends on the library, and which patches a method
    keeps on the pixels."""

    def _call_hf_processor(self, hf_data, hf_kwargs):
        mean = self.info.get_hf_processor(**hf_kwargs).image_processor.image_mean
        colour = tuple(int(255 * share) for share in mean)
        side = self.info.get_hf_config().vision_config.image_size
        images = [resized_square(image.convert("RGB"), colour, side) for image in hf_data["images"]]
        return super()._call_hf_processor({**hf_data, "images": images}, hf_kwargs)


def build_info(ctx):
    """What vLLM wants to know of images; its own where no method is named."""
    plan = plan_for(ctx.get_hf_config())
    return stock._build_llava_or_pixtral_hf_info(ctx) if plan is None else PrunedInfo(ctx, plan)


def build_processor(info, dummy_inputs):
    if isinstance(info, PrunedInfo):
        return PrunedProcessor(info, dummy_inputs)
    return stock._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    build_processor, info=build_info, dummy_inputs=stock.LlavaDummyInputsBuilder
)
class PrunableLlava(stock.LlavaForConditionalGeneration):
    """vLLM's class, and no other than that until the override `pruning` names a method."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.plan = plan_for(self.config)
        if self.plan is None:
            return
        self.shape = TowerShape.of(self.config)
        if any(layer.self_attn.tp_size > 1 for layer in self.clip.encoder.layers):
            raise ValueError(
                "pruning needs whole heads of the vision tower on every GPU: with tensor "
                "parallelism start vLLM with --mm-encoder-tp-mode data"
            )

    @property
    def clip(self):
        return self.vision_tower.vision_model

    def embed_multimodal(self, **inputs):
        """Embeddings (n, D) of every image; those that come as embeddings stay as they are."""
        pixels = inputs.get("pixel_values")
        if self.plan is None or pixels is None:
            return super().embed_multimodal(**inputs)
        if not isinstance(pixels, torch.Tensor):
            pixels = torch.stack(list(pixels))
        vision = tower_tokens(self.clip, pixels, self.shape, self.plan.pruner.vision)
        return prune(self.plan.pruner, vision, self.multi_modal_projector)
