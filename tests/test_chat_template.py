"""Prompt templates as Jinja: the same prompts as `Conversation.get_prompt`."""

import pytest
from transformers import LlamaTokenizer

from llava.chat_template import chat_template
from llava.conversation import conv_templates
from tests.model.checkpoint_tools import CHECKPOINT

#: texts without roles, preset messages, images in tags
NONE = {"default", "v0", "plain", "v0_plain", "v0_mmtag", "v1_mmtag"}
QUESTION = [{"type": "text", "text": "What is it?"}, {"type": "image"}]


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer.from_pretrained(CHECKPOINT)


@pytest.mark.parametrize("name", sorted(conv_templates))
def test_prompts_are_those_of_the_template(tokenizer, name):
    template = chat_template(conv_templates[name])
    if name in NONE:
        assert template is None
        return
    conv, messages = conv_templates[name].copy(), []

    def render(**options) -> str:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )

    texts = ["<image>\nWhat is it?", "A ring.", "And its color?", "It is red."]
    contents = [QUESTION, "A ring.", "And its color?", [{"type": "text", "text": "It is red."}]]
    for turn, (text, content) in enumerate(zip(texts, contents, strict=True)):
        conv.append_message(conv.roles[turn % 2], text)
        messages.append({"role": ("user", "assistant")[turn % 2], "content": content})
        assert render() == conv.get_prompt()
        if turn % 2 == 0:
            conv.append_message(conv.roles[1], None)
            assert render(add_generation_prompt=True) == conv.get_prompt()
            conv.messages.pop()


@pytest.mark.parametrize("name", ["vicuna_v1", "chatml_direct", "mistral_instruct"])
def test_a_system_message_takes_the_place_of_the_templates_own(tokenizer, name):
    conv = conv_templates[name].copy()
    lead = "<|im_start|>system\n" if name == "chatml_direct" else ""
    conv.system = f"{lead}Be brief."
    conv.append_message(conv.roles[0], "What?")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    template = chat_template(conv_templates[name])
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert text == conv.get_prompt()
