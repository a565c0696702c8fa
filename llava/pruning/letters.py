"""A tokenizer for models with random weights, which have no vocabulary."""

from __future__ import annotations

from types import SimpleNamespace


class Letters:
    """One id per letter; the two highest are the marks of start and end.

    size: how many ids there are
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, text: str, add_special_tokens: bool = True, **_) -> SimpleNamespace:
        """With `input_ids` of a text, between a start and an end mark unless these are left out."""
        ids = [ord(letter) % (self.size - 2) for letter in text]
        if add_special_tokens:
            ids = [self.size - 2, *ids, self.size - 1]
        return SimpleNamespace(input_ids=ids)
