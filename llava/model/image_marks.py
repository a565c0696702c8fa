"""Tokens that mark an image in the text: added to tokenizer and embeddings, loaded for training."""

from __future__ import annotations

from torch import Tensor

from ..constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from .checkpoint import read_file
from .model_part import ModelPart
from .split_parameters import whole


class ImageMarks(ModelPart):
    """Mixin of causal language models."""

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
