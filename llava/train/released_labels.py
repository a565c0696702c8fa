"""Label masks exactly as the published training code makes them, defects included.

Used only with `--label_masks released`, to repeat an old run. Known defects: a sample whose ids do
not add up (a separator inside an answer, ChatML with Llama tokenizers, several turns with a
non-legacy tokenizer) is masked as a whole; masks of `###` templates drift by one id per message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation, SeparatorStyle
from llava.mm_utils import tokenizer_image_token

from .rendering import caption_text, named_turns, render

logger = logging.getLogger(__name__)

Count = Callable[[str], int]


def preprocess_released(
    messages: Sequence[dict], tokenizer, conv: Conversation, has_image: bool
) -> dict[str, torch.Tensor]:
    """As `labels.preprocess`, with the published masks."""
    if conv.sep_style == SeparatorStyle.PLAIN:
        text, with_image = caption_text(messages, conv), True
    else:
        text, with_image = render(messages, conv).text, has_image

    def count(x: str) -> int:
        if with_image:
            return len(tokenizer_image_token(x, tokenizer))
        return len(tokenizer(x, truncation=False).input_ids)

    if with_image:
        ids = torch.tensor(tokenizer_image_token(text, tokenizer))
    else:
        ids = torch.tensor(tokenizer(text, truncation=True).input_ids)
    labels = ids.clone()
    if conv.sep_style == SeparatorStyle.PLAIN:
        labels[: count("<image>")] = IGNORE_INDEX
    elif conv.sep_style == SeparatorStyle.LLAMA_2:
        _mask_two(text, labels, count, conv, "[/INST] ", tokenizer, legacy_correction=False)
    elif conv.version.startswith("v1"):
        sep = f"{conv.sep}{conv.roles[1]}: "
        _mask_two(text, labels, count, conv, sep, tokenizer, legacy_correction=True)
    elif conv.version == "mpt":
        _mask_chatml(text, labels, count, conv, tokenizer)
    else:
        _mask_single(messages, labels, count, conv)
    return {"input_ids": ids, "labels": labels}


def _mask_two(text, labels, count: Count, conv, sep, tokenizer, legacy_correction: bool) -> None:
    """Rounds that end with `sep2`; the question part of each is masked, in place."""
    ids = labels.clone()
    cur = 1
    labels[:cur] = IGNORE_INDEX
    for i, turn in enumerate(text.split(conv.sep2)):
        parts = turn.split(sep)
        if turn == "" or len(parts) != 2:
            break
        length, question = count(turn), count(parts[0] + sep) - 2
        if legacy_correction and i > 0 and not getattr(tokenizer, "legacy", True):
            length, question = length - 1, question - 1
        labels[cur : cur + question] = IGNORE_INDEX
        cur += length
    labels[cur:] = IGNORE_INDEX
    _drop_if_mismatched(labels, ids, cur, tokenizer)


def _mask_chatml(text, labels, count: Count, conv, tokenizer) -> None:
    """Rounds of user and assistant blocks, each ended by `sep`, in place."""
    ids = labels.clone()
    blocks = text.split(conv.sep)
    turns = [conv.sep.join(blocks[:3])]
    turns += [conv.sep.join(blocks[i : i + 2]) for i in range(3, len(blocks), 2)]
    sep = conv.sep + conv.roles[1]
    cur = 0
    for i, turn in enumerate(turns):
        parts = turn.split(sep)
        if turn == "" or len(parts) != 2:
            break
        length, question = count(turn), count(parts[0] + sep) - 1
        if i > 0 and getattr(tokenizer, "legacy", False):
            length, question = length + 1, question + 1
        labels[cur : cur + question] = IGNORE_INDEX
        cur += length
    labels[cur:] = IGNORE_INDEX
    _drop_if_mismatched(labels, ids, cur, tokenizer)


def _mask_single(messages, labels, count: Count, conv) -> None:
    """`###` messages: each counted with its own start token, so the masks drift, in place."""
    cur = count(f"{conv.system}\n\n")
    labels[:cur] = IGNORE_INDEX
    for role, value in named_turns(messages, conv):
        length = count(f"{conv.sep} {role}: {value}\n")
        if role == conv.roles[0]:
            labels[cur + 2 : cur + length] = IGNORE_INDEX
        cur += length


def _drop_if_mismatched(labels, ids, cur: int, tokenizer) -> None:
    total = int((ids != tokenizer.pad_token_id).sum())
    if cur < tokenizer.model_max_length and cur != total:
        labels[:] = IGNORE_INDEX
        logger.warning("tokenization mismatch: %d vs. %d. (ignored)", cur, total)
