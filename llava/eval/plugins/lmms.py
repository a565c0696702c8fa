"""The model `llava_pruning` of lmms-eval: LLaVA or Qwen2.5-VL with any pruning method.

    python -m lmms_eval --model llava_pruning --tasks pope --batch_size 8 \\
        --model_args pretrained=liuhaotian/llava-v1.5-7b,method=vispruner,visual_token_num=64

lmms-eval finds it through the entry point `lmms_eval.models` of this package. Its own model `llava`
works with this package, too (unpruned). See docs/Comparing.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llava.eval.answering.loop import AnswerLoop
from llava.eval.answering.workers import own_gpu
from llava.eval.plugins.model import ask, open_loop, read_pruner
from llava.image_io import to_rgb
from llava.model.inputs import generate_inputs
from llava.pruning import all_option_names

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as error:
    raise ImportError(
        "llava.eval.plugins.lmms is a plug-in of lmms-eval (0.7 or newer), which is not installed "
        "here; docs/Comparing.md says how to install the two side by side"
    ) from error

DEFAULT_LENGTH = 1024  # of lmms-eval's own LLaVA, where a task names none


def manifest() -> ModelManifest:
    """What the entry point tells lmms-eval."""
    return ModelManifest("llava_pruning", simple_class_path=f"{__name__}.LlavaPruning")


class LlavaPruning(lmms):
    """
    pretrained:       checkpoint; none: the playground's
    method:           pruning method, or two as METHOD+METHOD; none: what the options belong to
    visual_token_num: its budget; none: the method's own
    pruning_args:     its other options, KEY=VALUE with semicolons between them
    options:          the same, one by one: important_ratio=0.5
    conv_template:    prompt template; "auto" is what the checkpoint says of itself
    min_pixels, max_pixels: bounds of the area of an image, for Qwen2.5-VL
    attn_implementation: sdpa, flash_attention_2 or eager
    adapter_dir:      LoRA adapter, which is merged into the checkpoint (adapter_merge=True)
    system_prompt:    in place of the template's own
    reasoning_prompt: what is put behind every question
    use_cache:        True; nothing else works
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        method: str | None = None,
        visual_token_num: int | str | None = None,
        pruning_args: str = "",
        conv_template: str = "auto",
        model_base: str | None = None,
        vision_tower: str | None = None,
        min_pixels: int | str | None = None,
        max_pixels: int | str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        attn_implementation: str | None = None,
        adapter_dir: str | None = None,
        adapter_merge: bool | str = True,
        system_prompt: str | None = None,
        reasoning_prompt: str | None = None,
        use_cache: bool | str = True,
        **options,
    ):
        super().__init__()
        for name, value in (("use_cache", use_cache), ("adapter_merge", adapter_merge)):
            if str(value) not in ("True", "1"):
                raise ValueError(f"{name}={value}: llava_pruning works with {name}=True alone")
        self.reasoning_prompt = reasoning_prompt or ""
        known = all_option_names()
        if unknown := [key for key in options if key not in known]:
            raise TypeError(f"unknown model_args of llava_pruning: {', '.join(unknown)}")
        pruner = read_pruner(method, visual_token_num, pruning_args, options)
        self.batch_size = int(batch_size)
        self.loop: AnswerLoop = open_loop(
            pretrained,
            model_base,
            conv_template,
            pruner,
            device or own_gpu(),  # lmms-eval shares the requests among the processes itself
            dtype,
            vision_tower,
            min_pixels,
            max_pixels,
            attn_implementation,
            adapter_dir,
            system_prompt,
        )

    def generate_until(self, requests: list) -> list[str]:
        """Answers, in the order of the requests; prompts with equal settings share a batch."""
        answers: list[str | None] = [None] * len(requests)
        for numbers in self._batches(requests):
            own = [requests[number].args for number in numbers]
            settings = own[0][1]
            self.loop.temperature = float(settings.get("temperature") or 0)
            self.loop.top_p = settings.get("top_p")
            self.loop.num_beams = int(settings.get("num_beams") or 1)
            length = int(settings.get("max_new_tokens") or DEFAULT_LENGTH)
            prompts = [(self._asked(args[0]), self._pictures(*args[2:])) for args in own]
            texts = ask(self.loop, prompts, length)
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = cut(text, settings.get("until") or [])
        return answers

    def _batches(self, requests: list) -> Iterator[list[int]]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            numbers.sort(key=lambda number: -len(requests[number].args[0]))
            for start in range(0, len(numbers), self.batch_size):
                yield numbers[start : start + self.batch_size]

    def _asked(self, text: str) -> str:
        return text.strip() + self.reasoning_prompt if self.reasoning_prompt else text

    def _pictures(self, doc_to_visual, doc_id, task: str, split: str) -> list:
        return list(doc_to_visual(self.task_dict[task][split][doc_id]) or [])

    @torch.inference_mode()
    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """(loss, whether greedy decoding gives the continuation), one by one.

        The loss is the mean negative log-probability of the continuation's tokens: lmms-eval takes
        the choice with the *smallest* number, as its own models return their loss.
        """
        return [self._loglikelihood(*request.args) for request in requests]

    def _loglikelihood(self, context, target, doc_to_visual, doc_id, task, split):
        front = self.loop.front
        if not isinstance(target, str):
            target = target(self.task_dict[task][split][doc_id])
        images = self._pictures(doc_to_visual, doc_id, task, split)
        pictures = [front.picture(to_rgb(image, background=None)) for image in images]
        prompt = front.prompt(context, len(images))
        # A template that ends in a line break has the answer begin right behind it.
        space = "" if prompt[-1:].isspace() else " "
        before, whole = front.encode(prompt), front.encode(f"{prompt}{space}{target.strip()}")
        count = len(whole) - len(before)
        inputs = generate_inputs(self.loop.model, [whole], [pictures], [context])
        out = self.loop.model(**inputs, use_cache=False)
        # Methods drop visual tokens only: counted from behind, the text is where it was.
        logits = out.logits[0, -count - 1 : -1].float().log_softmax(dim=-1)
        wanted = whole[-count:].to(logits.device)
        loss = -logits.gather(1, wanted[:, None]).mean()
        return loss.item(), bool((logits.argmax(dim=-1) == wanted).all())

    def generate_until_multi_round(self, requests: list) -> list[str]:
        raise NotImplementedError("llava_pruning answers one round: choose a task of one round")


def cut(text: str, until: str | list[str]) -> str:
    """The text up to the first of the stop words."""
    for stop in [until] if isinstance(until, str) else until:
        if stop:
            text = text.split(stop)[0]
    return text.strip()
