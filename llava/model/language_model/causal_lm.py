"""A decoder that sees images, as transformers sees it: forward and generate, for every family."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from ...devices import device_of
from ...linear import Linear
from ...mm_utils import KeywordsStoppingCriteria
from ...pruning.drafter import Drafter
from ...pruning.required import required
from ..context import answer_room
from ..generation import GenerationStrategies, setting
from ..kv_cache import KVCache, holds_tokens
from ..patches import check_decoder, replacement
from ..prompt import Prompt, positions_behind
from ..pruner_slot import in_one_method
from ..reuse import Prefix
from ..visuals import Visuals
from .compiled_step import CompiledStep
from .compiling import check_compiler
from .cuda_graphs import GraphStep
from .decode_step import DecodeStep, Ending
from .layers import DecoderLayer, is_watched
from .modeling_llama import DecoderOutput, LlamaModel, LlamaPreTrainedModel

#: tokens of an answer that a cache has room for where nobody says how long that may be; it grows
RESERVED = 64
NO_ATTENTIONS = (
    "output_attentions is not supported, no attention map is ever built; rows of it are recorded "
    "with `trace_pruning(model, attention=[layers])` and found in `trace.attention`"
)


class VisionLanguageForCausalLM(GenerationStrategies, LlamaPreTrainedModel):
    """Base of the whole models. A family adds how its images get into the prompt (`splice`), its
    vision tower (`get_vision_tower`) and `pruner`, the pruning method in use."""

    lm_head: nn.Module
    #: decoder of the family
    model_class: type[LlamaModel] = LlamaModel
    _tied_weights_keys = ["lm_head.weight"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def compile_decoding(self) -> bool:
        """Whether steps of decoding are compiled, and on a GPU launched as CUDA graphs; off unless
        assigned, which on a GPU assigns `compile_prefill` as well. See
        `llava.model.language_model.compiled_step`."""
        return isinstance(self.model.step, CompiledStep)

    @compile_decoding.setter
    def compile_decoding(self, value: bool) -> None:
        """Raises RuntimeError where nothing can be compiled, saying what is missing."""
        kind: type[DecodeStep] = DecodeStep
        if value:
            device = self.model.layers[0].device
            check_compiler(device)
            kind = GraphStep if device.type == "cuda" else CompiledStep
        self.model.step = kind(self.model.rotary, self.config._attn_implementation)
        self.compile_prefill = kind is GraphStep

    @property
    def compile_prefill(self) -> bool:
        """Whether layers of the decoder on prompts, and those of the vision tower, are compiled.
        Assigning `compile_decoding` assigns this as well: True on a GPU alone, as a CPU gains
        little. See `llava.model.language_model.prompt_layer`."""
        return self.model.compile_layers

    @compile_prefill.setter
    def compile_prefill(self, value: bool) -> None:
        """Raises RuntimeError where nothing can be compiled, saying what is missing."""
        if value:
            check_compiler(self.model.layers[0].device)
        self.model.compile_layers = value
        tower = self.get_vision_tower()
        if tower is not None:
            tower.compile_layers = value

    def get_model(self) -> LlamaModel:
        return self.model

    def get_decoder(self) -> LlamaModel:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @in_one_method
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: list | None = None,
        return_dict: bool | None = None,
        questions: list[str] | None = None,
        visuals: Visuals | None = None,
        last_logits_only: bool = False,
        prefix: Prefix | None = None,
    ):
        """Logits (B, S, vocabulary), or (B, 1, vocabulary) with `last_logits_only`, and the loss.

        images, image_sizes, questions: as in `generate`. labels: (B, L), -100 is ignored; the loss
        is the mean cross-entropy of the next token. In training mode with labels, logits are
        computed for supervised tokens only and `logits` is None. When a method drops tokens inside
        the decoder, S counts the survivors. prefix: as in `generate_from`.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(NO_ATTENTIONS)
        if labels is not None and last_logits_only:
            raise ValueError("labels ask about all tokens, last_logits_only=True about one of them")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if self.engine is not None:
            raise ValueError(f"the decoder layers run in {self.engine!r}, which `generate` asks")
        tokens = required(
            input_ids if inputs_embeds is None else inputs_embeds,
            "give input_ids or inputs_embeds: there is no prompt",
        )
        continues = holds_tokens(past_key_values)
        if continues:
            self._check_continuation(tokens, attention_mask)
        else:
            check_decoder()
        sees = not continues and images is not None and self.get_vision_tower() is not None
        if inputs_embeds is None and sees:
            prompt = self.splice(tokens, attention_mask, labels, images, image_sizes, questions)
            inputs_embeds, attention_mask = prompt.inputs_embeds, prompt.attention_mask
            position_ids, visuals = prompt.position_ids, prompt.visuals
            labels = None if labels is None else prompt.labels
        elif inputs_embeds is None:
            if not continues and (tokens == IMAGE_TOKEN_INDEX).any():
                raise ValueError("the prompt holds <image> marks, but no images were given")
            inputs_embeds = self.model.embed_tokens(tokens)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache, trace = past_key_values, self.pruning_trace
        if cache is None and use_cache and not self.training:
            cache = KVCache(self.config.num_hidden_layers)
        loss: Tensor | None = None
        logits: Tensor | None
        hidden_states: tuple[Tensor, ...] | None = None
        logits_alone = labels is None and not output_hidden_states
        if cache is not None and continues and logits_alone and self._steps_in_one():
            layers = self.model.layers
            logits = self.step_logits(layers, inputs_embeds, cache, last_logits_only, trace=trace)
        else:
            ends = last_logits_only and not output_hidden_states
            out = self.model(
                inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                visuals=visuals,
                cache=cache,
                stage=None if visuals is None or not visuals.there else self.pruner.decoder,
                trace=trace,
                output_hidden_states=output_hidden_states,
                prefix=prefix,
                **(self.asking(lambda: 1) if ends else {}),
            )
            hidden_states = out.all_hidden_states
            loss, logits = self._loss_and_logits(out, labels, last_logits_only)
        if last_logits_only and logits is not None:
            logits = logits.to(inputs_embeds.device)  # where the rules that choose a token compute
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache, hidden_states=hidden_states
        )
        return output if return_dict is not False else output.to_tuple()

    def _check_continuation(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        """tokens (B, q) or (B, q, D) behind those of a cache are text, without padding."""
        count = tokens.shape[1]
        if count == 1:  # a step of decoding does not wait for the device
            return
        if tokens.ndim == 2 and (tokens == IMAGE_TOKEN_INDEX).any():
            raise ValueError(
                "<image> marks behind a filled past_key_values: all images belong to the prompt "
                "that fills it"
            )
        if attention_mask is not None and not attention_mask[:, -count:].all():
            raise ValueError("tokens that continue a filled past_key_values cannot be padded")

    def step_logits(
        self,
        layers: Iterable[DecoderLayer],
        x: Tensor,
        cache: KVCache,
        last: bool = False,
        most: int = 0,
        trace=None,
    ) -> Tensor:
        """fp32 logits (B, q, V), with `last` (B, 1, V) of the last token alone, that `layers`, norm
        and head give on tokens x (B, q, D) behind those in the cache, on the device of the head.
        most, trace: as in `DecodeStep`"""
        step = self.model.step
        if replacement(self, "logits_of", LOGITS_OF) is None:
            ending = Ending(self.model.norm, self.lm_head, last)
            return step(layers, x, cache, trace=trace, ending=ending, most=most)
        x = step(layers, x, cache, trace=trace, most=most)
        return self.logits_of(self.model.final_norm(x[:, -1:].contiguous() if last else x))

    def asking(self, count: Callable[[], int]) -> dict:
        """What tells the decoder that `count()` of its last hidden states are asked for; nothing
        where another function took the place of its forward, which may not know of that."""
        replaced = replacement(self.model, "forward", DECODER_FORWARD) is not None
        return {} if replaced else {"asked": count}

    def _steps_in_one(self) -> bool:
        """Whether a step of decoding may go past `LlamaModel.forward`: it is compiled, and nobody
        watches that method or put another one in its place."""
        replaced = replacement(self.model, "forward", DECODER_FORWARD) is not None
        return self.compile_decoding and not replaced and not is_watched(self.model)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., V) from hidden states (..., D) behind the final norm, on the device of
        the head."""
        return self.lm_head(hidden.to(device_of(self.lm_head))).float()

    def _loss_and_logits(
        self, out: DecoderOutput, labels: Tensor | None, last: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """What `forward` returns of it, from what leaves the decoder; labels: (B, S) of the tokens
        that entered it; last: whether logits of the last token alone are wanted."""
        hidden = out.hidden_states
        if labels is None:
            # A slice with gaps would make the product copy the whole head first.
            return None, self.logits_of(hidden[:, -1:].contiguous() if last else hidden)
        labels = labels_behind(out, labels.to(hidden.device))
        if self.training:
            return self._loss(hidden, labels), None
        logits = self.logits_of(hidden)
        targets = labels[:, 1:].flatten().to(logits.device)
        rows = logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(rows, targets, ignore_index=IGNORE_INDEX), logits

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over supervised tokens (0 without any), logits for those alone."""
        targets = labels[:, 1:]
        supervised = targets != IGNORE_INDEX
        logits = self.logits_of(hidden[:, :-1][supervised])
        total = F.cross_entropy(logits, targets[supervised].to(logits.device), reduction="sum")
        return total / supervised.sum().clamp(min=1).to(total.device)

    @torch.no_grad()
    @in_one_method
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: list | None = None,
        questions: list[str] | None = None,
        **kwargs,
    ):
        """Generates text; returns the new tokens only, (B, up to max_new_tokens).

        inputs:      (B, L) prompt ids with -200 where an image goes (also as `input_ids=`)
        images:      (n, 3, S, S), (n, crops, 3, S, S) or a list of crops per image, for all prompts
                     in order; see `llava.mm_utils.process_images`
        image_sizes: (width, height) of every image; needed where images are cut into crops
        questions:   the question of every image, for methods that read it
        The rest is transformers' `generate`: `attention_mask` (needed when prompts are padded; any
        side), `do_sample`, `temperature`, `top_p`, `num_beams`, `max_new_tokens`, `streamer`,
        `stopping_criteria`, ... and `generation_strategy`, see `llava.model.generation`: with
        "self_speculative" also the options of `llava.pruning.drafter`. An answer ends where the
        model has no more positions, whatever `max_new_tokens` says, see `llava.model.context`.
        With `use_cache=False` the prompt runs again for every token, and a method that looks at the
        text chooses anew by the answer so far: its answers are others than with a cache.

        Raises ValueError for what is not supported: contrastive search, assisted decoding, and
        `past_key_values` or `position_ids` of the caller's own.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        self.check_keywords(kwargs)
        if input_ids is None:
            raise ValueError("generate needs input_ids, the ids of the prompts")
        pruner, kwargs = self.pruner.published.for_call(self.pruner, kwargs)
        with self.using(pruner):
            prompt = self.splice(
                input_ids,
                kwargs.pop("attention_mask", None),
                images=images,
                image_sizes=image_sizes,
                questions=questions,
                padding_side="left",
            )
            return self.generate_from(prompt, **kwargs)

    @torch.no_grad()
    @in_one_method
    def generate_from(self, prompt: Prompt, prefix: Prefix | None = None, **kwargs):
        """`generate` for prompts that are embedded already, padded on the left.

        prefix: what is known of their first tokens, see `llava.model.reuse`
        """
        ends = setting(self, kwargs, "eos_token_id")
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        if self.engine is not None:
            self.engine.record(self, prompt)
            output = self.engine.generate(self, prompt, **kwargs)
            return self.pruner.published.present(self.pruner, output, ends)
        # Without ids of the prompt transformers puts a BOS there.
        known = 1 if prompt.token_ids is None else prompt.token_ids.shape[1]
        reserve = wanted = setting(self, kwargs, "max_new_tokens")
        if wanted is None:
            reserve, longest = RESERVED, setting(self, kwargs, "max_length")
            if longest is not None:  # it counts the start mark as well
                wanted = max(1, longest - 1)
        if (room := answer_room(self, prompt.num_positions, wanted)) != wanted:
            kwargs["max_new_tokens"] = room
            kwargs.pop("max_length", None)
        drafter = self.drafter_for(kwargs)
        if drafter is None and setting(self, kwargs, "use_cache") is not False:
            reserve = reserve if room is None else min(room, reserve)
            if prefix is not None:  # the rest of the prompt is appended, too
                reserve += prompt.inputs_embeds.shape[1] - prefix.size
            beams = setting(self, kwargs, "num_beams") or 1
            kwargs["past_key_values"] = KVCache(self.config.num_hidden_layers, reserve, beams)
        for rule in kwargs.get("stopping_criteria") or ():
            if prompt.token_ids is not None and isinstance(rule, KeywordsStoppingCriteria):
                rule.know_prompt(prompt.token_ids)
        output = super().generate(
            prompt.token_ids,
            inputs_embeds=prompt.inputs_embeds,
            attention_mask=prompt.attention_mask,
            position_ids=prompt.position_ids,
            visuals=prompt.visuals,
            prompt_ids=known,
            prefix=prefix,
            drafter=drafter,
            **kwargs,
        )
        output = drop_first_tokens(output, known)
        return self.pruner.published.present(self.pruner, output, ends)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        visuals: Visuals | None = None,
        use_cache: bool | None = None,
        prefix: Prefix | None = None,
        drafter: Drafter | None = None,
        prompt_ids: int = 1,
        **kwargs,
    ) -> dict:
        """The prompt's embeddings in the first step, the newest token afterwards.

        prompt_ids: how many of `input_ids` stand for the prompt
        """
        if drafter is not None:  # greedy search and sampling never get here with one
            raise ValueError(
                "generation_strategy 'self_speculative' works with greedy search and sampling "
                "(num_beams=1) only"
            )
        if past_key_values is not None and len(past_key_values):
            return {
                "input_ids": input_ids[:, -1:],
                "past_key_values": past_key_values,
                "use_cache": True,
                "last_logits_only": True,
            }
        if input_ids.shape[1] > prompt_ids and inputs_embeds is not None:
            # Without a cache every step runs the prompt again, with the answer so far behind it.
            mask = required(attention_mask, "a prompt of embeddings needs its attention_mask")
            position_ids = required(position_ids, "a prompt of embeddings needs its position_ids")
            answer = input_ids[:, prompt_ids:]
            grow = torch.ones_like(answer)
            places = positions_behind(position_ids, answer.shape[1])
            inputs_embeds = torch.cat([inputs_embeds, self.model.embed_tokens(answer)], dim=1)
            attention_mask = torch.cat([mask, grow.bool()], dim=1)
            position_ids = torch.cat([position_ids, places], dim=1)
            visuals = None if visuals is None else visuals.with_text(grow.shape[1])
        return {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "visuals": visuals,
            "past_key_values": past_key_values,
            "use_cache": past_key_values is not None,
            "last_logits_only": True,
            "prefix": prefix,
        }

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs) -> dict:
        """Only the cache changes from step to step; it knows masks and positions itself."""
        model_kwargs["past_key_values"] = outputs.past_key_values
        return model_kwargs


#: these methods as they came: a step goes past them only where nothing took their place
LOGITS_OF, DECODER_FORWARD = VisionLanguageForCausalLM.logits_of, LlamaModel.forward


def labels_behind(out: DecoderOutput, labels: Tensor) -> Tensor:
    """(B, S') labels of the tokens that left the decoder, from those (B, S) that entered it."""
    if out.index is None:
        return labels
    labels = labels.gather(1, out.index.clamp(min=0)).masked_fill(out.index < 0, IGNORE_INDEX)
    if out.valid is None:
        return labels
    real = out.valid & out.valid.roll(1, dims=1)  # what stands behind padding nothing predicts
    return labels.masked_fill(~real, IGNORE_INDEX)


def drop_first_tokens(output, count: int):
    """Without the ids that stand for the prompt in what transformers generates."""
    if isinstance(output, Tensor):
        return output[:, count:]
    output.sequences = output.sequences[:, count:]
    return output
