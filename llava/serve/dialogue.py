"""Reads a prompt backwards: which of its text the user said, and which the assistant."""

from __future__ import annotations

import re

from ..chat_template import CHATML_SYSTEM
from ..constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from ..conversation import Conversation, SeparatorStyle

#: around the system text of Llama 2
SYSTEM_BEGINS, SYSTEM_ENDS = "<<SYS>>", "<</SYS>>"
_MARKS = re.compile(
    "|".join(map(re.escape, (DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, DEFAULT_IM_END_TOKEN)))
)


def turns(prompt: str, template: Conversation) -> list[tuple[int, str]]:
    """(0 user or 1 assistant, text) of every turn; one of the user when no role is found.

    template: the one the prompt was written in. Its system text and the open turn are left out.
    """
    user, assistant = _role_marks(template)
    if not user or not assistant:
        return [(0, prompt.strip())]
    pieces = re.split(f"({re.escape(user)}|{re.escape(assistant)})", prompt)
    found = [
        (int(mark == assistant), _without_separators(text, template))
        for mark, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    found = [(speaker, text) for speaker, text in found if text]
    return found or [(0, prompt.strip())]


def last_question(prompt: str, template: Conversation) -> str:
    """The user's latest turn, without image marks."""
    said = [text for speaker, text in turns(prompt, template) if speaker == 0]
    return _MARKS.sub("", said[-1] if said else prompt).strip()


def system_text(prompt: str, template: Conversation) -> str:
    """What stands before the first turn of the user."""
    user, _ = _role_marks(template)
    if not user:
        return ""
    if template.sep_style is SeparatorStyle.LLAMA_2:
        text, ends, _ = prompt.partition(SYSTEM_BEGINS)[2].partition(SYSTEM_ENDS)
        return text.strip() if ends else ""
    before, mark, _ = prompt.partition(user)
    return _without_separators(before.removeprefix(CHATML_SYSTEM), template) if mark else ""


def _role_marks(template: Conversation) -> tuple[str, str]:
    if template.sep_style is SeparatorStyle.LLAMA_2:
        return "[INST]", "[/INST]"
    if template.sep_style is SeparatorStyle.MPT:
        return template.roles
    return tuple(role and f"{role}:" for role in template.roles)


def _without_separators(text: str, template: Conversation) -> str:
    text = _without_system_text(text).strip()
    for separator in (template.sep, template.sep2):
        if separator and separator.strip():
            text = text.removesuffix(separator.strip()).strip()
    return text


def _without_system_text(text: str) -> str:
    """Read once from left to right: `re.sub` with `.*?` would look for the end of every beginning
    up to the end of the text, which takes seconds where a client sends thousands of them."""
    kept, place = [], 0
    while (begins := text.find(SYSTEM_BEGINS, place)) >= 0:
        ends = text.find(SYSTEM_ENDS, begins)
        if ends < 0:
            break
        kept.append(text[place:begins])
        place = ends + len(SYSTEM_ENDS)
    return "".join([*kept, text[place:]])
