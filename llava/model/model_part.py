"""What mixins of a model use of the class they are mixed into: for readers and type checkers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..image_settings import ImageSettings


class ModelPart:
    """Base of the mixins. It has nothing of its own: all of this comes from transformers, from the
    family, or from another mixin (`pruner` from `llava.model.pruner_slot.PrunerSlot`)."""

    if TYPE_CHECKING:
        config: Any
        generation_config: Any
        training: bool
        pruner: Any
        pruning_trace: Any
        tokenizer: Any
        model: Any
        lm_head: Any

        def __init__(self, *args: Any, **keywords: Any) -> None: ...

        @property
        def image_settings(self) -> ImageSettings: ...

        def get_model(self) -> Any: ...

        def get_vision_tower(self) -> Any: ...

        def get_input_embeddings(self) -> Any: ...

        def get_output_embeddings(self) -> Any: ...

        def resize_token_embeddings(self, new_num_tokens: int) -> Any: ...

        def save_pretrained(self, *args: Any, **keywords: Any) -> Any: ...

        def image_tokens(self, images: Any, image_sizes: Any, questions: Any) -> list[Any]: ...

        def crops_in_budget(self, pruner: Any) -> int: ...

        def _init_weights(self, module: nn.Module) -> None: ...

        def greedy_search(self, *args: Any, **keywords: Any) -> Any: ...

        def sample(self, *args: Any, **keywords: Any) -> Any: ...

        def _validate_generated_length(
            self, generation_config: Any, input_ids_length: int, has_default_max_length: bool
        ) -> None: ...

        def _get_logits_processor(self, *args: Any, **keywords: Any) -> Any: ...

        def _maybe_initialize_input_ids_for_generation(
            self, inputs: Any, bos_token_id: Any, model_kwargs: Any
        ) -> Tensor: ...
