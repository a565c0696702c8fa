"""Recorded prompts, token ids, checkpoint names and stop words."""

import torch

from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    tokenizer_image_token,
)
from tests.golden_cases import load_json, locate


def check_prompts(case, folder, report):
    """Fields of every template, and its prompt for every dialogue."""
    content = load_json(case, folder)
    for name, recorded in content["templates"].items():
        conv = conv_templates[name]
        for field in ("system", "offset", "sep", "sep2", "version", "skip_next"):
            report.equal(f"{name}.{field}", getattr(conv, field), recorded[field])
        report.equal(f"{name}.roles", list(conv.roles), recorded["roles"])
        report.equal(f"{name}.messages", len(conv.messages), recorded["n_messages"])
        style = SeparatorStyle[recorded["sep_style"]]
        report.true(f"{name}.sep_style is {conv.sep_style}", conv.sep_style is style)
        for dialogue, result in recorded["dialogues"].items():
            report.prefix = f"{name}, {dialogue}: "
            check_prompt(conv.copy(), content["_dialogues"][dialogue], result, report)
        report.prefix = ""


def check_prompt(conv, dialogue, recorded, report):
    for speaker, message in dialogue:
        message = tuple(message) if isinstance(message, list) else message
        conv.append_message(conv.roles[speaker == "assistant"], message)
    try:
        prompt = conv.get_prompt()
    except ValueError as error:
        report.true(f"raises {error}", recorded.get("error") == "AssertionError")
        return
    if recorded.get("error") == "TypeError":
        return  # the release could not add None to a text, we can
    report.equal("prompt", prompt, recorded.get("prompt", f"an error: {recorded.get('error')}"))


def check_text(case, folder, report):
    """Token ids around image marks, names of checkpoints, stopping at keywords."""
    from transformers import AutoTokenizer

    content = load_json(case, folder)
    tokenizer = AutoTokenizer.from_pretrained(locate(case["checkpoint"], folder), use_fast=False)
    for row in content["tokenizer_image_token"]:
        prompt = row["prompt"]
        report.equal(f"ids of {prompt!r}", tokenizer_image_token(prompt, tokenizer), row["ids"])
        other = tokenizer_image_token(prompt, tokenizer, image_token_index=-1)
        report.equal(f"ids of {prompt!r}, mark -1", other, row["ids_index_m1"])
    try:
        tokenizer_image_token("a", tokenizer, return_tensors="np")
        report.add("return_tensors 'np' is accepted")
    except ValueError as error:
        report.equal("return_tensors 'np'", str(error), content["bad_return_tensors"]["text"])
    for row in content["get_model_name_from_path"]:
        try:
            name = get_model_name_from_path(row["path"])
        except IndexError:
            name = None
        report.equal(f"name of {row['path']}", name, row.get("name"))
    for row in content["keywords_stopping"]:
        check_keywords(row, tokenizer, report)


def check_keywords(row, tokenizer, report):
    prompt = torch.tensor([row["prompt_ids"]])
    stop = KeywordsStoppingCriteria(row["keywords"], tokenizer, prompt)
    report.equal("keyword_ids", [ids.tolist() for ids in stop.keyword_ids], row["keyword_ids"])
    report.equal("max_keyword_len", stop.max_keyword_len, row["max_keyword_len"])
    report.equal("start_len", stop.start_len, row["start_len"])
    for case in row["cases"]:
        new = torch.tensor([case["generated_ids"]])
        name = f"stop of {row['keywords']} after {case['generated_text']!r}"
        stopped = stop(torch.cat([prompt, new], dim=1), None)
        report.equal(name, bool(stopped), case["stop"])
        report.equal(f"{name}, without the prompt", bool(stop(new, None)), case["stop"])
