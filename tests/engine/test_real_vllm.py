"""The playground's language model in a real vLLM on the CPU, also one that dies.

bash scripts/test_vllm.sh
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llava.conv_mode import choose_conv_mode
from llava.engine import EngineError, VLLMEngine
from llava.front_end import FrontEnd
from llava.mm_utils import get_model_name_from_path, load_image
from llava.model.builder import load_pretrained_model
from llava.model.export import export
from llava.playground import benchmark_dir, default_model_path
from llava.pruning import METHODS, build_pruner, trace_pruning
from llava.pruning.apart import reason_apart
from llava.pruning.base import option_names
from tests.engine.real_vllm import VARIABLE, RealServer
from tests.paths import ROOT

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        VARIABLE not in os.environ,
        reason=f"needs an environment with vLLM in {VARIABLE}: bash scripts/test_vllm.sh",
    ),
]

CONCURRENT = 16
QUESTIONS = (
    "What color is the ring?\nAnswer the question using a single word or phrase.",
    "Describe the image.",
)
IMAGES = sorted(Path(benchmark_dir(), "images").iterdir())[:4]
#: methods that leave the decoder alone, and so may go this way
OUTSIDE = [name for name in METHODS if reason_apart(build_pruner(name)) is None]
INSIDE = [name for name in METHODS if name not in OUTSIDE]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server; one that a test has killed is started again by `server.start()`."""
    folder = tmp_path_factory.mktemp("vllm")
    export(default_model_path(), str(folder / "llama"), "llama")
    server = RealServer(folder / "llama", folder / "vllm.log")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@dataclass
class Side:
    """A model, and the prompts that it is asked."""

    front: FrontEnd

    @property
    def model(self):
        return self.front.model

    def inputs(self, question: str, images: list[Path]) -> dict:
        ids = self.front.encode(self.front.prompt(question, len(images)))
        pictures = [self.front.picture(load_image(str(image))) for image in images]
        return self.front.inputs([ids], [pictures], [question])


def side(**options) -> Side:
    path = default_model_path()
    name = get_model_name_from_path(path)
    found = load_pretrained_model(
        path, None, name, device="cpu", torch_dtype=torch.float32, **options
    )
    tokenizer, model, processor, _ = found
    mode = choose_conv_mode(model.config, name).name
    return Side(FrontEnd(tokenizer, model, processor, mode))


@pytest.fixture(scope="module")
def here():
    """All of the model in this process."""
    return side()


@pytest.fixture(scope="module")
def connected(server):
    return side(engine=VLLMEngine(server.url))


@pytest.fixture
def there(server, connected):
    """The model with its decoder in the server."""
    server.start()
    return connected


def pruner_of(name: str, tokens: int = 64):
    budget = (
        {"visual_token_num": tokens} if "visual_token_num" in option_names(METHODS[name]) else {}
    )
    return build_pruner(name, **budget)


def local_answer(here: Side, name: str, inputs: dict, tokens: int = 64) -> list[int]:
    here.model.pruner = pruner_of(name, tokens)
    with torch.inference_mode():
        answer = here.model.generate(**inputs, do_sample=False, max_new_tokens=48)
    return answer[0].tolist()


def prompt_of(there: Side, name: str, inputs: dict, tokens: int = 64):
    there.model.pruner = pruner_of(name, tokens)
    with torch.inference_mode():
        return there.model.engine.encode(there.model, **inputs)


def ask(there: Side, prompt, **options) -> list[int]:
    options = {"do_sample": False, "max_new_tokens": 48, **options}
    return there.model.engine.generate(there.model, prompt, **options)[0].tolist()


@pytest.mark.parametrize("name", OUTSIDE)
def test_every_method_outside_the_decoder_answers_as_here(name, here, there):
    asked = [there.inputs(question, [image]) for question in QUESTIONS for image in IMAGES]
    asked.append(there.inputs(QUESTIONS[0], IMAGES[:2]))
    asked.append(there.inputs(QUESTIONS[1], IMAGES[2:0:-1]))
    expected = [local_answer(here, name, inputs) for inputs in asked]
    prompts = [prompt_of(there, name, inputs) for inputs in asked]
    with ThreadPoolExecutor(CONCURRENT) as pool:
        found = list(pool.map(lambda prompt: ask(there, prompt), prompts))
    assert found == expected
    assert len({tuple(answer) for answer in found}) > 2


def test_sixteen_requests_of_all_methods_at_once_do_not_see_each_other(here, there):
    cases = [
        (OUTSIDE[number % len(OUTSIDE)], QUESTIONS[number % 2], IMAGES[number % len(IMAGES)])
        for number in range(CONCURRENT)
    ]
    asked = [
        (name, there.inputs(question, [image]), 32 + 8 * number)
        for number, (name, question, image) in enumerate(cases)
    ]
    expected = [local_answer(here, *case) for case in asked]
    prompts = [prompt_of(there, *case) for case in asked]
    assert len({prompt.inputs_embeds.shape[1] for prompt in prompts}) > 8  # of many lengths
    with ThreadPoolExecutor(CONCURRENT) as pool:
        found = list(pool.map(lambda prompt: ask(there, prompt), prompts))
    assert found == expected


@pytest.mark.parametrize("name", INSIDE)
def test_a_method_that_cannot_go_this_way_is_refused_with_the_reason(name, there):
    pruner = build_pruner(name)
    reason = reason_apart(pruner)
    with pytest.raises(ValueError) as refused:
        there.model.pruner = pruner
    assert reason in str(refused.value)


def test_the_trace_says_what_a_local_one_does(here, there):
    inputs = there.inputs(QUESTIONS[0], [IMAGES[0]])
    traces = []
    for one, answer in ((here, local_answer), (there, prompt_of)):
        with trace_pruning(one.model) as trace:
            answer(one, "vispruner", inputs)
        traces.append(trace)
    local, remote = traces
    assert remote.visual_positions[0].tolist() == local.visual_positions[0].tolist()
    assert list(map(int, remote.visual_tokens)) == list(map(int, local.visual_tokens))
    assert list(map(int, remote.prompt_tokens)) == list(map(int, local.prompt_tokens))
    assert remote.kv_bytes == local.kv_bytes and remote.grids == local.grids


class Pieces:
    """A streamer that notes when ids came; then: called after the first of them."""

    def __init__(self, then=lambda: None):
        self.ids, self.times, self.then = [], [], then

    def put(self, ids) -> None:
        if not ids.numel():
            return
        self.ids += ids.flatten().tolist()
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            self.then()

    def end(self) -> None:
        self.times.append(time.perf_counter())


def long_prompt(there: Side):
    return prompt_of(there, "vispruner", there.inputs(QUESTIONS[1], [IMAGES[0]]))


def test_an_answer_comes_token_by_token(there):
    prompt, pieces = long_prompt(there), Pieces()
    answer = ask(there, prompt, streamer=pieces)
    assert pieces.ids == answer and len(pieces.times) > len(answer) // 2 > 5
    assert pieces.times[0] < pieces.times[-1]


def test_sampling_with_a_seed_can_be_repeated_and_without_one_differs(there):
    prompt = long_prompt(there)
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 24}
    first, again = (ask(there, prompt, seed=7, **options) for _ in range(2))
    assert first == again
    assert len({tuple(ask(there, prompt, **options)) for _ in range(4)}) > 1


def test_an_answer_that_nobody_wants_any_more_ends_in_the_server(server, there):
    prompt, wanted = long_prompt(there), True

    def lose_interest():
        nonlocal wanted
        assert server.running() == 1
        wanted = False

    pieces = Pieces(then=lose_interest)
    options = {"max_new_tokens": 3000, "eos_token_id": [], "streamer": pieces}
    answer = ask(there, prompt, should_stop=lambda: not wanted, **options)
    assert 0 < len(answer) < 3000
    end = time.monotonic() + 60
    while server.running():
        assert time.monotonic() < end
        time.sleep(0.1)


def command(server: RealServer, answers: Path, *options) -> list[str]:
    """The evaluation of one benchmark of the playground."""
    folder = Path(benchmark_dir())
    return [
        *(sys.executable, "-m", "llava.eval.model_vqa_loader", "--dtype", "float32"),
        *("--device", "cpu", "--temperature", "0", "--max_new_tokens", "16"),
        *("--question-file", str(folder / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl")),
        *("--image-folder", str(folder / "images"), "--limit", "96", "--batch-size", "4"),
        *("--pruning-method", "vispruner", "--visual-token-num", "64"),
        *("--answers-file", str(answers), *options),
    ]


def lines(path: Path) -> list[dict]:
    """The records in a file so far."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def in_journal(answers: Path) -> int:
    """How many answers a run that has not ended yet has kept."""
    return sum(len(lines(path)) for path in answers.parent.glob(f"{answers.stem}.parts/*.jsonl"))


def test_an_evaluation_whose_server_is_killed_says_so_and_continues(server, there, tmp_path):
    answers, local = tmp_path / "answers.jsonl", tmp_path / "local.jsonl"
    remote = command(server, answers, "--engine", "vllm", "--engine-url", server.url)
    process = subprocess.Popen(remote, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while in_journal(answers) < 8:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    server.kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and server.url in last, said
    assert "Traceback" not in said
    assert not answers.exists() and 8 <= in_journal(answers) < 96

    server.start()
    done = subprocess.run(remote, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "answers were there already" in done.stdout
    subprocess.run(command(server, local), cwd=ROOT, check=True, timeout=900)
    finished, expected = lines(answers), lines(local)
    assert len(finished) == 96
    assert [line["text"] for line in finished] == [line["text"] for line in expected]


def test_a_server_that_is_killed_in_the_middle_of_an_answer_is_named(server, there):
    prompt, pieces = long_prompt(there), Pieces(then=server.kill)
    with pytest.raises(EngineError, match="went away in the middle of an answer") as gone:
        ask(there, prompt, streamer=pieces)
    assert server.url in str(gone.value)
    with pytest.raises(EngineError, match="is it running|went away"):
        ask(there, prompt)
