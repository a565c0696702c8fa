"""Label masks: which ids of a conversation the model is trained to produce.

A prompt comes as text together with the character spans of its answers (`rendering.py`). Spans
become label masks through the position of every token in the text, so no rule about how a tokenizer
counts is needed, and every template is right by construction: what closing a turn adds to the
prompt (the answer and its end mark) is what the model has to say.

Differs from the release: its masks drift for `###` templates, drop whole samples for ChatML
templates with Llama tokenizers and for answers that contain a separator. They are kept, as they
are, in `released_labels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle

from .released_labels import preprocess_released
from .rendering import Rendered, Span, render, with_system


def preprocess(
    messages: Sequence[dict],
    tokenizer,
    conv: Conversation,
    has_image: bool,
    label_masks: str = "exact",
) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels`, both (S,) int64, of one conversation in the template `conv`.

    messages: `{"from": "human" | "gpt", "value": text}`, alternating; a leading answer is dropped.
    A system turn in front takes the place of the template's system prompt.
    With an image, `<image>` becomes IMAGE_TOKEN_INDEX and nothing is cut; without, the text is
    cut to `tokenizer.model_max_length` ids.
    """
    if label_masks == "released":
        return preprocess_released(messages, tokenizer, conv, has_image)
    if label_masks != "exact":
        raise ValueError(f"label_masks {label_masks!r} is unknown, choose 'exact' or 'released'")
    rendered = render(*with_system(messages, conv))
    has_image = has_image or conv.sep_style == SeparatorStyle.PLAIN
    ids, spans = tokenize_with_spans(rendered.text, tokenizer, has_image)
    ids, spans = parted(ids, spans, rendered, tokenizer)
    labels = [
        token if token != IMAGE_TOKEN_INDEX and _overlaps(span, rendered.answers) else IGNORE_INDEX
        for token, span in zip(ids, spans, strict=True)
    ]
    if not has_image:
        ids, labels = ids[: tokenizer.model_max_length], labels[: tokenizer.model_max_length]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def tokenize_with_spans(text: str, tokenizer, has_image: bool) -> tuple[list[int], list[Span]]:
    """Ids of a prompt and the character span each covers; `<image>` is one id if has_image.

    The pieces between image tokens are tokenised one by one, as `tokenizer_image_token` does.
    """
    ids: list[int] = []
    spans: list[Span] = []
    start = 0
    for k, piece in enumerate(text.split(DEFAULT_IMAGE_TOKEN) if has_image else [text]):
        if k > 0:
            ids.append(IMAGE_TOKEN_INDEX)
            spans.append((start, start + len(DEFAULT_IMAGE_TOKEN)))
            start += len(DEFAULT_IMAGE_TOKEN)
        piece_ids = tokenizer(piece, truncation=False).input_ids
        piece_spans = token_spans(piece, piece_ids, tokenizer)
        drop = int(k > 0 and piece_ids[:1] == [tokenizer.bos_token_id])
        ids += piece_ids[drop:]
        spans += [(a + start, b + start) for a, b in piece_spans[drop:]]
        start += len(piece)
    return ids, spans


def parted(
    ids: list[int], spans: list[Span], rendered: Rendered, tokenizer
) -> tuple[list[int], list[Span]]:
    """Ids and spans in which no token begins in front of an answer and ends within it.

    Behind the line break that opens an answer of ChatML, Qwen's tokenizer reads one of the answer's
    own as part of the same token; the model, which is asked behind the first, has to write it.
    """
    inside = [
        next((start for start, _ in rendered.answers if a < start < b), None) for a, b in spans
    ]
    if not any(inside):
        return ids, spans
    found: list[tuple[int, Span]] = []
    for token, (a, b), start in zip(ids, spans, inside, strict=True):
        halves = [(a, b)] if start is None else [(a, start), (start, b)]
        for half in halves:
            text = rendered.text[slice(*half)]
            own = [token] if start is None else tokenizer(text, add_special_tokens=False).input_ids
            found += [(number, half) for number in own]
    return [number for number, _ in found], [span for _, span in found]


def token_spans(text: str, ids: list[int], tokenizer) -> list[Span]:
    """Character span of every id in `text`; ids that stand for no character have start == end."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True, truncation=False)
        if encoded.input_ids == ids:
            return [tuple(span) for span in encoded.offset_mapping]
    spans = _walk(text.encode(), tokenizer.convert_ids_to_tokens(ids), tokenizer)
    if spans is None:
        return _spans_from_prefixes(text, ids, tokenizer)
    if text.isascii():
        return spans
    chars = _byte_to_char(text)  # several tokens may be bytes of one character
    return [(chars[a], chars[b - 1] + 1 if b > a else chars[a]) for a, b in spans]


def _walk(text: bytes, pieces: list[str], tokenizer) -> list[Span] | None:
    """Byte spans of pieces laid over the text they came from, None if they differ.

    A piece of sentencepiece may begin with a space the text lacks: the tokenizer puts one in front
    of its input and behind special tokens. Such a space has no width.
    """
    spans, at = [], 0
    for piece in pieces:
        if at == 0 and piece == tokenizer.bos_token:
            spans.append((0, 0))
            continue
        span = _place(text, at, _piece_bytes(piece, tokenizer))
        if span is None:
            return None
        spans.append(span)
        at = span[1]
    return None if text[at:].strip() else spans


def _piece_bytes(piece: str, tokenizer) -> bytes:
    table = getattr(tokenizer, "byte_decoder", None)  # of a tokenizer whose pieces are bytes
    if table is not None and all(char in table for char in piece):
        return bytes(table[char] for char in piece)
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("\u2581", " ").encode()


def _place(text: bytes, at: int, content: bytes) -> Span | None:
    """Where a piece lies in the text from offset `at` on."""
    for candidate in (content, content.removeprefix(b" ")):
        if text.startswith(candidate, at):
            return at, at + len(candidate)
    # Some tokenizers turn any run of white space into one space.
    start = len(text) - len(text[at:].lstrip())
    content = content.lstrip(b" ")
    return (at, start + len(content)) if text.startswith(content, start) else None


def _spans_from_prefixes(text: str, ids: list[int], tokenizer) -> list[Span]:
    """Spans for tokenizers that rewrite their input, by tokenising growing prefixes (slow).

    A token ends at the first character after which it and all before it are the ids of the prefix.
    """
    spans, start, done = [], 0, 0
    for end in range(len(text) + 1):
        prefix = tokenizer(text[:end], truncation=False).input_ids
        same = next((i for i, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), None)
        same = min(len(prefix), len(ids)) if same is None else same
        if same > done:
            spans += [(start, end)] * (same - done)
            start, done = end, same
    return spans + [(start, len(text))] * (len(ids) - done)


def _byte_to_char(text: str) -> list[int]:
    """For every byte offset of the UTF-8 form, the character it belongs to."""
    chars = [i for i, char in enumerate(text) for _ in char.encode()]
    return [*chars, len(text)]


def _overlaps(span: Span, answers: list[Span]) -> bool:
    """Whether a token covers some of an answer, or is the space that a tokenizer puts in front."""
    start, end = span
    return any(
        start < answer_end and (end > answer_start or start == end == answer_start)
        for answer_start, answer_end in answers
    )
