"""Prompts read backwards, those of strangers too."""

from __future__ import annotations

import time

import pytest

from llava.conversation import conv_templates
from llava.serve.dialogue import last_question, system_text, turns

LLAMA = conv_templates["llava_llama_2"]
BEGINS, ENDS = "<<SYS>>", "<</SYS>>"


def test_the_system_text_is_no_part_of_a_turn():
    prompt = f"<s>[INST] {BEGINS}\nBe good.\n{ENDS}\n\nHi{BEGINS}a{ENDS}! [/INST] Yes? [INST] So."
    assert turns(prompt, LLAMA) == [(0, "Hi!"), (1, "Yes?"), (0, "So.")]
    assert system_text(prompt, LLAMA) == "Be good." and last_question(prompt, LLAMA) == "So."


@pytest.mark.parametrize("name", [n for n, own in conv_templates.items() if own.system])
def test_the_system_text_of_every_template_is_found_without_its_marks(name):
    template = conv_templates[name].copy()
    template.append_message(template.roles[0], "Hi")
    template.append_message(template.roles[1], None)
    wanted = template.system.removeprefix("<|im_start|>system\n")
    assert system_text(template.get_prompt(), template) == wanted


@pytest.mark.parametrize("text", [f"a {BEGINS} b", f"a {ENDS} b", f"{ENDS} {BEGINS}", BEGINS])
def test_marks_that_are_not_closed_are_text(text):
    assert turns(f"[INST] {text} [/INST]", LLAMA) == [(0, text)]
    assert system_text(f"[INST] {text} [/INST]", LLAMA) == ""


@pytest.mark.parametrize("template", conv_templates)
def test_no_prompt_takes_long_to_read(template):
    began = time.monotonic()
    for piece in (BEGINS, ENDS, "[INST]", "[INST]" + BEGINS, "<image>", "USER:", "###", " \n"):
        prompt = piece * (65_536 // len(piece))
        turns(prompt, conv_templates[template])
        last_question(prompt, conv_templates[template])
        system_text(prompt, conv_templates[template])
    assert time.monotonic() - began < 2  # a mark alone took 3.5 s
