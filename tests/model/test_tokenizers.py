"""Which tokenizer a checkpoint is read with: the one that it was trained with, in any form."""

import json
from types import SimpleNamespace

import pytest
from transformers import LlamaTokenizer

from llava.model.builder import has_json_alone, is_fast, load_tokenizer
from tests.model.checkpoint_tools import CHECKPOINT, copy_of

PROMPT = "[INST] What? [/INST] Red.</s>[INST] And? [/INST]"


def read(folder, family: str):
    """The tokenizer of a checkpoint of this family."""
    fast = is_fast(str(folder), SimpleNamespace(family=family))
    return load_tokenizer(str(folder), SimpleNamespace(vocab_size=700), fast)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompts_are_read_as_by_the_slow_tokenizer_of_training(tmp_path, family, legacy):
    folder = copy_of(CHECKPOINT, tmp_path / "m")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"legacy": legacy}))
    tokenizer = read(folder, family)
    assert tokenizer.is_fast == (family == "mistral" and legacy)
    assert tokenizer(PROMPT).input_ids == LlamaTokenizer.from_pretrained(folder)(PROMPT).input_ids


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_tokenizer_json_alone_is_read(tmp_path, family):
    folder = copy_of(CHECKPOINT, tmp_path / "m")
    expected = LlamaTokenizer.from_pretrained(folder)(PROMPT).input_ids
    read(folder, "mistral").save_pretrained(folder)
    assert not has_json_alone(str(folder))
    (folder / "tokenizer.model").unlink()
    assert has_json_alone(str(folder)) and read(folder, family)(PROMPT).input_ids == expected
