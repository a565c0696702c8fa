"""The answer loop with its language model in a server: the same answers, many questions at once,
and a run that goes on where a server died."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.engine.stub_vllm import stub_vllm
from tests.eval import eval_cases
from tests.model.checkpoint_tools import CHECKPOINT, load
from tests.paths import GOLDEN

QUESTIONS = 9


@pytest.fixture(scope="module")
def server():
    with stub_vllm(load(CHECKPOINT)[1]) as server:
        yield server


@pytest.fixture(autouse=True)
def as_new(server):
    server.pause, server.die_after, server.most = 0.0, None, 0
    server.requests.clear()


@pytest.fixture
def run(tmp_path):
    """run(name, *options, server=None) -> the lines of the answers file `name`, by question."""
    image = GOLDEN / "images" / "img0_336x336.png"
    for number in range(3):
        shutil.copy(image, tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    names = ["0.png", "1.png", "2.png"] * (QUESTIONS // 3)
    lines = [
        {"question_id": f"q{n}", "image": name, "text": f"What is {n}?"}
        for n, name in enumerate(names)
    ]
    bad = {"question_id": "bad", "image": "bad.png", "text": "What?"}
    for name, own in (("q.jsonl", lines), ("some_bad.jsonl", [*lines[:3], bad])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in own))

    def run(name, *options, server=None, questions="q.jsonl"):
        argv = ["--model-path", CHECKPOINT, "--question-file", tmp_path / questions]
        argv += ["--image-folder", tmp_path, "--answers-file", tmp_path / name]
        argv += ["--temperature", 0, "--max_new_tokens", 3, "--device", "cpu", "--batch-size", 2]
        argv += ["--pruning-method", "vispruner"]
        if server is not None:
            argv += ["--engine", "vllm", "--engine-url", server.url]
        eval_cases.run_program("llava.eval.model_vqa_loader", [*map(str, argv), *options])
        return read(tmp_path / name)

    return run


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(lines):
    """What lines say, beside their ids, which settings decide."""
    kept = ("question_id", "text", "prompt", "metadata", "model_id")
    return [{key: line[key] for key in kept if key in line} for line in lines]


@pytest.mark.parametrize("options", [(), ("--no-reuse",)])
def test_answers_are_those_of_the_local_model_in_the_order_of_the_questions(run, server, options):
    expected = run("local.jsonl", *options)
    assert len(expected) == QUESTIONS
    assert told(run("remote.jsonl", *options, server=server)) == told(expected)
    assert all("prompt_embeds" in body for body in server.requests[2:])


def test_many_questions_are_under_way_at_once_and_no_more_than_asked_for(run, server):
    server.pause = 0.1
    run("many.jsonl", server=server)
    assert server.most > 2  # more than a batch
    server.most = 0
    run("few.jsonl", "--engine-requests", "1", server=server)
    assert server.most == 1


def test_a_run_goes_on_where_the_server_died(run, server, tmp_path):
    server.die_after_requests = 7  # two of them ask which model there is
    with pytest.raises(SystemExit, match=f"error: .*{server.url}"):
        run("a.jsonl", "--engine-requests", "2", server=server)
    server.die_after_requests = None
    assert not (tmp_path / "a.jsonl").exists()
    server.requests.clear()
    found = run("a.jsonl", server=server)
    assert len(server.requests) < QUESTIONS + 2
    assert found == run("whole.jsonl", server=server)


def test_a_server_that_is_gone_fails_no_question(run, server):
    """`--skip-bad` is about questions; it does not make failures of all that are left."""
    server.die_after_requests = 4
    with pytest.raises(SystemExit, match="error: "):
        run("a.jsonl", "--skip-bad", "--engine-requests", "1", server=server)
    server.die_after_requests = None
    assert all("text" in line for line in run("a.jsonl", "--skip-bad", server=server))


def test_bad_questions_are_recorded(run, server):
    found = run("a.jsonl", "--skip-bad", server=server, questions="some_bad.jsonl")
    assert ["error" in line for line in found] == [False, False, False, True]
    with pytest.raises(SystemExit, match="bad.png"):
        run("b.jsonl", server=server, questions="some_bad.jsonl")


def test_prompts_that_the_server_refuses_are_failed_questions(run, server):
    server.positions = 60
    try:
        found = run("a.jsonl", "--skip-bad", server=server)
        assert all("has 60 for it and an answer" in line["error"] for line in found)
    finally:
        server.positions = 2048


def test_seeds_follow_the_questions(run, server):
    run("a.jsonl", "--temperature", "0.5", server=server)
    assert sorted(body["seed"] for body in server.requests[2:]) == list(range(QUESTIONS))


def test_a_run_of_a_server_continues_none_of_the_local_model(run, server):
    run("a.jsonl")
    with pytest.raises(SystemExit, match="engine was None and is now 'vllm'"):
        run("a.jsonl", server=server)


def test_beams_are_refused_before_anything_is_asked(run, server):
    with pytest.raises(SystemExit, match="num_beams=2 is not possible with a server"):
        run("a.jsonl", "--num_beams", "2", server=server)
