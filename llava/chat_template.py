"""Prompt templates as Jinja texts, the form in which other programs read them from a checkpoint.

A message is {"role": "system", "user" or "assistant", "content": a text, or a list of
{"type": "image"} and {"type": "text", "text": ...}}. Images stand before the text of their message.
"""

from __future__ import annotations

import json

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle

CHATML_SYSTEM = "<|im_start|>system\n"
#: the text of a message, images in front
WORDS = (
    "{%- macro words(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{ IMAGE }}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
)
#: a system message takes the place of the template's own
SPLIT = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = words(messages[0]['content']) -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = SYSTEM -%}{%- set turns = messages -%}{%- endif -%}"
)
TURNS = (
    "{{ LEAD + system + SEP }}{%- for turn in turns -%}"
    "{%- if turn['role'] == 'assistant' -%}{{ ANSWERER + words(turn['content']) + SEP2 }}"
    "{%- else -%}{{ ASKER + words(turn['content']) + SEP }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ OPEN }}{%- endif -%}"
)
INSTRUCTIONS = (
    "{%- for turn in turns -%}{%- if turn['role'] == 'assistant' -%}"
    "{{ ' ' + words(turn['content']) + ' ' + SEP2 }}{%- else -%}"
    "{%- if not loop.first -%}{{ SEP }}{%- endif -%}{{ '[INST] ' }}"
    "{%- if loop.first and system -%}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif -%}"
    "{{ words(turn['content']) + ' [/INST]' }}{%- endif -%}{%- endfor -%}"
)


def chat_template(conv: Conversation) -> str | None:
    """The Jinja text that gives the prompts of `conv`; None for one that it cannot give: texts
    without roles, preset messages, images in tags."""
    style = conv.sep_style
    if style is SeparatorStyle.PLAIN or conv.messages or "mmtag" in conv.version:
        return None
    values = {"IMAGE": f"{DEFAULT_IMAGE_TOKEN}\n", "LEAD": "", "SYSTEM": conv.system}
    values |= {"SEP": conv.sep, "SEP2": conv.sep if conv.sep2 is None else conv.sep2}
    if style is SeparatorStyle.MPT:
        values |= {"LEAD": CHATML_SYSTEM, "SYSTEM": conv.system.removeprefix(CHATML_SYSTEM)}
    colon = "" if style is SeparatorStyle.MPT else ":"
    values |= {"OPEN": conv.roles[1] + colon}
    for key, role in zip(("ASKER", "ANSWERER"), conv.roles, strict=True):
        values[key] = f"{role}{colon}{colon and ' '}"
    body = WORDS + SPLIT + (INSTRUCTIONS if style is SeparatorStyle.LLAMA_2 else TURNS)
    given = (f"{{%- set {key} = {json.dumps(text)} -%}}" for key, text in values.items())
    return "".join(given) + body
