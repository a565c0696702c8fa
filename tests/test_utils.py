"""Logging, moderation and what importing the package costs."""

import asyncio
import logging
import subprocess
import sys

import pytest
import requests

import llava
from llava import constants, utils

EXTRAS = {"gradio", "fastapi", "peft", "deepspeed", "matplotlib", "bitsandbytes", "flash_attn"}


def run(code, cwd):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=600
    )


@pytest.fixture
def answer(monkeypatch):
    """Sets what the moderation service answers; returns the list of requests sent."""
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    sent = []

    def set_answer(content):
        def post(url, **kwargs):
            sent.append({"url": url, **kwargs})
            response = requests.Response()
            response._content = content
            return response

        monkeypatch.setattr(requests, "post", post)
        return sent

    return set_answer


def test_constants_are_the_published_ones():
    assert (constants.IGNORE_INDEX, constants.IMAGE_TOKEN_INDEX) == (-100, -200)
    assert constants.IMAGE_PLACEHOLDER == "<image-placeholder>"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llava.nothing


def imported(names, code, cwd):
    """Those of `names` that are imported after running `code`."""
    done = run(f"{code}\nimport sys\nprint(*({names!r} & set(sys.modules)))", cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_templates_and_utils_need_no_torch(pytestconfig):
    code = "import llava.conversation, llava.utils, llava.image_io"
    assert imported({"torch", "transformers"} | EXTRAS, code, pytestconfig.rootpath) == []


@pytest.mark.slow
def test_the_model_needs_no_extra(pytestconfig):
    code = "from llava import LlavaLlamaForCausalLM\nimport llava.mm_utils"
    assert imported(EXTRAS, code, pytestconfig.rootpath) == []


def test_the_log_file_gets_every_line_once(tmp_path, pytestconfig):
    code = (
        "import logging\n"
        "from llava import constants, utils\n"
        f"constants.LOGDIR = {str(tmp_path / 'logs')!r}\n"
        "utils.build_logger('controller', 'controller.log')\n"
        "logger = utils.build_logger('controller.table', 'ignored.log')\n"
        "logger.info('registered')\n"
        "print('printed')"
    )
    done = run(code, pytestconfig.rootpath)
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "logs").iterdir()
    lines = log.read_text().splitlines()
    assert log.name == "controller.log"
    assert [line.split(" | ")[1:] for line in lines] == [
        ["INFO", "controller.table", "registered"],
        ["INFO", "stdout", "printed"],
    ]


def test_a_stream_logs_whole_lines(caplog):
    caplog.set_level(logging.INFO)
    stream = utils.StreamToLogger(logging.getLogger("stdout"))
    stream.write("half ")
    assert caplog.messages == []
    stream.write("line\nrest")
    assert caplog.messages == ["half line"]
    stream.flush()
    assert caplog.messages == ["half line", "rest"]
    assert stream.encoding == sys.stdout.encoding


def test_moderation_sends_the_text_in_one_line(answer):
    sent = answer(b'{"results": [{"flagged": true}]}')
    assert utils.violates_moderation('say "x"\nnow') is True
    assert sent[0]["json"] == {"input": 'say "x"now'}
    assert sent[0]["timeout"] == 5


@pytest.mark.parametrize("content", [b"", b"{}", b'{"results": []}', b"[]"])
def test_failed_moderation_gives_the_chosen_answer(answer, content):
    answer(content)
    assert utils.violates_moderation("x") is False
    assert utils.violates_moderation("x", on_error=True) is True


def test_moderation_without_a_key_fails(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert utils.violates_moderation("x") is False


def test_semaphores_are_printed_with_their_state():
    assert utils.pretty_print_semaphore(None) == "None"
    semaphore = asyncio.Semaphore(5)
    assert utils.pretty_print_semaphore(semaphore) == "Semaphore(value=5, locked=False)"


def test_disabling_the_initialisation_leaves_layers_as_they_are(monkeypatch):
    import torch

    for layer in (torch.nn.Linear, torch.nn.LayerNorm):  # restored after the test
        monkeypatch.setattr(layer, "reset_parameters", layer.reset_parameters)
    utils.disable_torch_init()
    layer = torch.nn.LayerNorm(3)
    layer.weight.data.fill_(7)
    layer.reset_parameters()
    assert layer.weight.tolist() == [7, 7, 7]
