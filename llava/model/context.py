"""How long a prompt and its answer may be.

What counts are the positions of the decoder: text, and the visual tokens that are left when the
prompt enters it (a method that keeps the places of the unpruned image needs all of those).
"""

from __future__ import annotations

import warnings

from ..pruning.tokens import ImageTokens


class PromptTooLong(ValueError):
    """A prompt needs more positions than the decoder has."""


def position_limit(config) -> int | None:
    """Positions a decoder works on: `max_position_embeddings`, times the factor of `rope_scaling`.

    None where the config does not say.
    """
    limit = getattr(config, "max_position_embeddings", None)
    scaling = getattr(config, "rope_scaling", None) or {}
    return None if limit is None else int(limit * scaling.get("factor", 1.0))


def count_positions(num_text: int, images: list[ImageTokens], policy: str) -> int:
    """Positions of a prompt of `num_text` tokens and images; policy: as in `build_row`."""
    whole = policy == "grid"
    return num_text + sum(image.extent if whole else len(image.patches) for image in images)


def check_prompts(model, positions: list[int]) -> None:
    """Raises PromptTooLong when a prompt of a batch has more positions than there are; says once
    per model when one is longer than what it was trained on."""
    limit = position_limit(model.config)
    longest = max(positions, default=0)
    if limit is not None and longest > limit:
        number = positions.index(longest) + 1
        which = "the prompt" if len(positions) == 1 else f"prompt {number} of {len(positions)}"
        raise PromptTooLong(
            f"{which} takes {longest} positions, and the model has {limit} "
            "(max_position_embeddings): use fewer images, fewer visual tokens or less text"
        )
    usual = getattr(model.config, "tokenizer_model_max_length", None)
    if usual is not None and longest > usual:
        _warn_once(
            model,
            "prompt",
            f"a prompt takes {longest} positions; the model was trained on {usual} "
            "(tokenizer_model_max_length) and may answer worse. Nothing is cut",
        )


def answer_room(model, prompt_positions: int | None, wanted: int | None) -> int | None:
    """How many of `wanted` new tokens fit behind a prompt (None: not known); says once per model
    when not all do.

    The last token of an answer takes no position: nothing is computed from it.
    """
    limit = position_limit(model.config)
    if limit is None or wanted is None or prompt_positions is None:
        return wanted
    room = limit - prompt_positions + 1
    if wanted <= room:
        return wanted
    _warn_once(
        model,
        "answer",
        f"the settings allow an answer of up to {wanted} tokens; behind a prompt of "
        f"{prompt_positions} positions it ends after {room}, as the model has {limit} "
        "(max_position_embeddings)",
    )
    return room


def _warn_once(model, kind: str, text: str) -> None:
    said = model.__dict__.setdefault("_length_warnings", set())
    if kind not in said:
        said.add(kind)
        warnings.warn(text, stacklevel=4)
