"""Training prompts as text: what a template makes of a conversation, and where its answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle

Span = tuple[int, int]  # [start, end) in characters, or in bytes where said


@dataclass
class Rendered:
    """A training prompt and the character spans the model learns to write; an answer without words
    has none: its end mark would teach the model to say nothing."""

    text: str
    answers: list[Span]


def with_system(
    messages: Sequence[dict], conv: Conversation
) -> tuple[Sequence[dict], Conversation]:
    """The messages without a system turn in front, and the template with its text."""
    if not messages or messages[0]["from"] != "system":
        return messages, conv
    conv = conv.copy()
    # ChatML templates keep the role's own line in front of the text.
    head = conv.system.partition("\n")[0] + "\n" if conv.sep_style == SeparatorStyle.MPT else ""
    conv.system = head + messages[0]["value"]
    return messages[1:], conv


def render(messages: Sequence[dict], conv: Conversation) -> Rendered:
    """The training prompt of a conversation and the spans of its answers."""
    if conv.sep_style == SeparatorStyle.PLAIN:
        return _render_caption(messages, conv)
    if conv.sep_style == SeparatorStyle.SINGLE:
        return _render_single(named_turns(messages, conv), conv)
    conv = conv.copy()
    conv.messages = []
    answers = []
    for i, (role, value) in enumerate(alternating(messages, conv)):
        conv.append_message(role, value if i % 2 == 0 else None)
        if i % 2 == 1:
            open_turn = len(conv.get_prompt())
            conv.messages[-1][1] = value
            if not value.strip():
                continue
            # A line break behind the end mark belongs to the next turn: generation stops before it.
            answers.append((open_turn, len(conv.get_prompt().rstrip("\n"))))
    return Rendered(conv.get_prompt(), answers)


def named_turns(messages: Sequence[dict], conv: Conversation) -> list[tuple[str, str]]:
    """(template role, text) per message."""
    roles = {"human": conv.roles[0], "gpt": conv.roles[1]}
    return [(roles.get(message["from"], "unknown"), message["value"]) for message in messages]


def alternating(messages: Sequence[dict], conv: Conversation) -> list[tuple[str, str]]:
    """`named_turns`, starting with a human; ValueError unless human and gpt alternate."""
    messages = messages[1:] if messages and messages[0]["from"] != "human" else messages
    for i, message in enumerate(messages):
        expected = ("human", "gpt")[i % 2]
        if message["from"] != expected:
            raise ValueError(
                f"message {i} is from {message['from']!r}, expected {expected!r}: "
                "human and gpt must alternate"
            )
    return named_turns(messages, conv)


def caption_text(messages: Sequence[dict], conv: Conversation) -> str:
    """The text of a projector-pretraining sample: the image, then the caption."""
    if len(messages) != 2 or DEFAULT_IMAGE_TOKEN not in messages[0]["value"]:
        raise ValueError(
            f"the plain template needs two messages, the first with {DEFAULT_IMAGE_TOKEN}; "
            f"got {len(messages)}, the first {messages[0]['value']!r}"
        )
    return DEFAULT_IMAGE_TOKEN + messages[1]["value"] + conv.sep


def _render_caption(messages: Sequence[dict], conv: Conversation) -> Rendered:
    text = caption_text(messages, conv)
    said = bool(messages[1]["value"].strip())
    return Rendered(text, [(len(DEFAULT_IMAGE_TOKEN), len(text))] if said else [])


def _render_single(turns: list[tuple[str, str]], conv: Conversation) -> Rendered:
    # An answer ends with the separator that opens the next message: generation stops there.
    text, answers = f"{conv.system}\n\n", []
    for role, value in turns:
        start = len(f"{text}{conv.sep} {role}:")
        text += f"{conv.sep} {role}: {value}\n"
        if role == conv.roles[1] and value.strip():
            answers.append((start, len(text) + len(conv.sep)))
    return Rendered(f"{text}{conv.sep} ", answers)
