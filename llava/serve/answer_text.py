"""The text of an answer while its tokens arrive: the same as that of all tokens together."""

from __future__ import annotations

from torch import Tensor
from transformers import TextStreamer

from ..mm_utils import known_ids


class AnswerStreamer(TextStreamer):
    """`TextStreamer` that keeps the spaces at the start of lines. It decodes every line alone, and
    tokenizers of Llama drop a space in front of the first token that they are given."""

    def put(self, value: Tensor) -> None:
        """value: (n,) or (1, n) new ids, the prompt's first"""
        of_prompt = self.skip_prompt and self.next_tokens_are_prompt
        if not of_prompt:
            value = value.new_tensor(known_ids(self.tokenizer, value.flatten().tolist()))
        super().put(value)
        if not of_prompt and value.numel() and not self.token_cache:
            self.token_cache = value.flatten()[-1:].tolist()  # the line break, shown already
            self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))


def without_begun(text: str, stop: str | None) -> str:
    """`text` without an end that may become `stop`."""
    for length in range(min(len(stop or ""), len(text) + 1) - 1, 0, -1):
        if text.endswith(stop[:length]):
            return text[:-length]
    return text
