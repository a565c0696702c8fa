"""Label masks: every answer and its end mark are supervised, nothing else is."""

import functools
import json

import pytest
from transformers import LlamaTokenizer, Qwen2Tokenizer, Qwen2TokenizerFast
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from llava.constants import IGNORE_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.train import labels
from llava.train.labels import preprocess, token_spans, tokenize_with_spans
from llava.train.sample_images import preprocess_multimodal
from tests.golden_data import GOLDEN, golden_json
from tests.paths import GOLDEN as SHIPPED

RECORDED = golden_json("llava-base/train_labels.json")
WITH_TURNS = {k for k, c in conv_templates.items() if c.sep_style != SeparatorStyle.PLAIN}
# Templates whose published masks are wrong even with the tokenizer they were made for.
REPAIRED = {"mpt", "chatml_direct", "llava_v0", "v0_mmtag", "default"}


@functools.cache
def tokenizer(variant: str = "slow_legacy", model_max_length: int = 2048):
    made = LlamaTokenizer.from_pretrained(
        GOLDEN / "tiny-llava-v1.5",
        legacy="legacy_false" not in variant,
        model_max_length=model_max_length,
    )
    if "im_tokens" in variant:
        made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return made


def run(case, label_masks):
    conv = conv_templates[case["template"]]
    messages = RECORDED["samples"][case["sample"]]
    if case["has_image"]:
        messages = preprocess_multimodal(messages, conv, case["mm_use_im_start_end"])
        assert [m["value"] for m in messages] == case["after_preprocess_multimodal"]
    model_tokenizer = tokenizer(case["tokenizer"], case["model_max_length"])
    return preprocess(messages, model_tokenizer, conv, case["has_image"], label_masks)


@pytest.mark.parametrize("template", sorted({c["template"] for c in RECORDED["cases"]}))
def test_recorded_masks_are_reproduced(template):
    for case in (c for c in RECORDED["cases"] if c["template"] == template):
        if "error" in case:
            for label_masks in ("exact", "released"):
                with pytest.raises(ValueError, match="two messages"):
                    run(case, label_masks)
            continue
        exact, released = run(case, "exact"), run(case, "released")
        assert released["input_ids"].tolist() == exact["input_ids"].tolist() == case["input_ids"]
        assert released["labels"].tolist() == case["labels"], case["sample"]
        # A warning was printed where the published code drops a whole sample.
        if template not in REPAIRED and not case["printed"]:
            assert exact["labels"].tolist() == case["labels"], case["sample"]


@pytest.mark.parametrize("variant", ["slow_legacy", "slow_legacy_false", "slow_legacy+im_tokens"])
@pytest.mark.parametrize("template", sorted(WITH_TURNS))
def test_the_model_learns_to_say_every_answer_and_its_end(template, variant):
    conv = conv_templates[template]
    for messages in RECORDED["samples"].values():
        messages = messages[messages[0]["from"] == "gpt" :]
        has_image = any("<image>" in m["value"] for m in messages)
        item = preprocess(messages, tokenizer(variant), conv, has_image)
        end = {
            SeparatorStyle.TWO: conv.sep2,
            SeparatorStyle.LLAMA_2: conv.sep2,
            SeparatorStyle.MPT: conv.sep,
            SeparatorStyle.SINGLE: "###",
        }[conv.sep_style]
        answers = [m["value"] for m in messages if m["from"] == "gpt"]
        said = supervised_texts(item, tokenizer(variant))
        assert [text.replace(" ", "").replace("\n", "") for text in said] == [
            (answer + end).replace(" ", "").replace("\n", "") for answer in answers
        ]


def supervised_texts(item, model_tokenizer):
    runs, ids = [], []
    for token, label in zip(item["input_ids"].tolist(), item["labels"].tolist(), strict=True):
        if label == IGNORE_INDEX:
            runs, ids = (runs + [ids] if ids else runs), []
        else:
            assert label == token
            ids.append(token)
    return [model_tokenizer.decode(ids) for ids in [*runs, ids] if ids]


def test_an_answer_that_contains_the_separator_is_still_learned():
    messages = RECORDED["samples"]["answer_contains_role"]
    item = preprocess(messages, tokenizer(), conv_templates["vicuna_v1"], has_image=False)
    assert supervised_texts(item, tokenizer()) == [" ok ASSISTANT: yes</s>", " no</s>"]


@pytest.mark.parametrize("empty", ["", " ", "\n"])
@pytest.mark.parametrize("template", sorted(WITH_TURNS))
def test_an_answer_without_words_teaches_nothing(template, empty):
    turns = zip(("human", "gpt") * 2, ("What?", empty, "And?", "Red."), strict=True)
    messages = [{"from": who, "value": text} for who, text in turns]
    item = preprocess(messages, tokenizer(), conv_templates[template], has_image=False)
    (said,) = supervised_texts(item, tokenizer())
    assert "Red." in said


def test_a_caption_without_words_teaches_nothing():
    messages = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}]
    item = preprocess(messages, tokenizer(), conv_templates["plain"], has_image=True)
    assert supervised_texts(item, tokenizer()) == []


def test_token_spans_cover_the_text():
    text = "A chat. USER: <image>\nhé ☃ you? ASSISTANT: ok</s>USER: no"
    ids, spans = tokenize_with_spans(text, tokenizer(), has_image=True)
    assert len(ids) == len(spans) and spans[-1][1] == len(text)
    assert text[spans[ids.index(-200)][0] :].startswith("<image>")
    assert all(a[1] <= b[1] for a, b in zip(spans, spans[1:], strict=False))


def test_a_tokenizer_that_rewrites_its_input_gives_the_same_masks(monkeypatch):
    conv, messages = conv_templates["vicuna_v1"], RECORDED["samples"]["two_turn_image"]
    walked = preprocess(messages, tokenizer(), conv, has_image=True)
    monkeypatch.setattr(labels, "_walk", lambda *args: None)
    by_prefixes = preprocess(messages, tokenizer(), conv, has_image=True)
    assert by_prefixes["labels"].tolist() == walked["labels"].tolist()


@pytest.mark.parametrize("slow", [LlamaTokenizer, Qwen2Tokenizer])
def test_a_character_of_several_tokens_is_learned_from_its_first_one_on(slow):
    folder = (
        GOLDEN / "tiny-llava-v1.5" if slow is LlamaTokenizer else SHIPPED / "tiny-qwen2.5-vl-cut"
    )
    made, conv = slow.from_pretrained(folder), conv_templates["chatml_direct"]
    messages = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "\U00013000 or 🦙"}]
    item = preprocess(messages, made, conv, has_image=False)
    (said,) = supervised_texts(item, made)
    assert said.strip().startswith("\U00013000 or 🦙<|im_end|>")


@pytest.mark.parametrize("kind", [Qwen2Tokenizer, Qwen2TokenizerFast])
def test_a_line_break_that_an_answer_begins_with_is_no_part_of_the_question(tmp_path, kind):
    """In Qwen's vocabulary, two line breaks are one token."""
    vocabulary = [*bytes_to_unicode().values(), "ĊĊ", "<|endoftext|>"]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    (tmp_path / "vocab.json").write_text(json.dumps(numbers))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĊ Ċ\n")
    made, conv = kind.from_pretrained(tmp_path), conv_templates["qwen2_5_vl"]
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    turns = zip(("human", "gpt") * 2, ("What?\n\n", "\n\nRed.", "And?", "No.\n"), strict=True)
    messages = [{"from": who, "value": text} for who, text in turns]
    item = preprocess(messages, made, conv, has_image=False)
    assert supervised_texts(item, made) == ["\n\nRed.<|im_end|>", "No.\n<|im_end|>"]
    asked = conv.copy()
    asked.messages = [[conv.roles[0], "What?\n\n"], [conv.roles[1], None]]
    first = (item["labels"] != IGNORE_INDEX).nonzero()[0, 0]
    assert item["input_ids"][:first].tolist() == made(asked.get_prompt()).input_ids


@pytest.mark.parametrize("caption", ["日本", "\nred"])
def test_the_space_in_front_of_a_caption_is_learned_as_in_the_release(caption):
    messages = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
    exact, released = (
        preprocess(messages, tokenizer(), conv_templates["plain"], True, kind)["labels"].tolist()
        for kind in ("exact", "released")
    )
    assert exact == released


def test_ids_without_text_have_no_width():
    assert token_spans("ok", tokenizer()("ok").input_ids, tokenizer())[0] == (0, 0)


def test_roles_must_alternate():
    twice = [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]
    with pytest.raises(ValueError, match="expected 'gpt'"):
        preprocess(twice, tokenizer(), conv_templates["vicuna_v1"], has_image=False)


def test_an_unknown_kind_of_mask_is_an_error():
    with pytest.raises(ValueError, match="'exact' or 'released'"):
        preprocess([], tokenizer(), conv_templates["vicuna_v1"], False, "fancy")
