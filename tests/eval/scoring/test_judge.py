"""Judged evaluation against a local endpoint: retried, cached, resumed, and refusals are told."""

import json
import sys
import threading

import pytest
from urllib3.util import retry

from llava.eval import eval_gpt_review_bench
from llava.eval.answering.answers_file import read_journals
from llava.eval.scoring import judge
from llava.eval.scoring.judge import Judge, JudgeError, VerdictCache
from tests.eval.stub_judge import stub_judge


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "JUDGE_MODEL", "JUDGE_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    return pauses


def test_a_busy_endpoint_is_asked_again_after_longer_and_longer_pauses(no_pauses):
    with stub_judge([(429, "slow down"), (500, "oops"), (503, ""), "8 9"]) as server:
        assert Judge("m", server.url).ask(("s", "u")) == "8 9"
    assert no_pauses == [1.0, 2.0]  # the first time it is asked again at once


@pytest.mark.parametrize(
    "wish, pauses", [("7", [7, 7]), ("86400", [60, 60]), ("0", [1]), ("soon", [1])]
)
def test_an_endpoint_is_given_the_time_it_asks_for_up_to_a_minute(no_pauses, wish, pauses):
    busy = (429, "slow down", {"Retry-After": wish})
    with stub_judge([busy, busy, "8 9"]) as server:
        assert Judge("m", server.url).ask(("s", "u")) == "8 9"
    assert no_pauses == pauses


def test_an_endpoint_that_does_not_answer_in_time_is_asked_again():
    late = threading.Event()

    def reply(number, body):
        return "8 9" if number or late.wait(600) else "too late"

    with stub_judge(reply) as server:
        # Once would do; a busy machine may be late several times.
        assert Judge("m", server.url, timeout=0.2, attempts=50).ask(("s", "u")) == "8 9"
        late.set()
    assert len(server.requests) >= 2


def test_an_address_that_is_none_is_told():
    with pytest.raises(JudgeError, match="no verdict from localhost:1/v1 .*InvalidURL"):
        Judge("m", "localhost:1/v1").ask(("s", "u"))


def test_an_endpoint_that_stays_busy_is_given_up_with_its_reason():
    with stub_judge([(429, "quota is used up")]) as server:
        with pytest.raises(JudgeError, match="3 attempts .status 429: quota is used up"):
            Judge("m", server.url, attempts=3).ask(("s", "u"))
    assert len(server.requests) == 3


def test_a_silent_endpoint_is_given_up():
    with stub_judge(["x"]) as server:
        url = server.url
    with pytest.raises(JudgeError, match="2 attempts .ConnectionError"):
        Judge("m", url, attempts=2).ask(("s", "u"))


def test_a_refusal_is_told_at_once():
    with stub_judge([(401, "wrong key")]) as server:
        with pytest.raises(JudgeError, match="refuses with status 401: wrong key"):
            Judge("m", server.url).ask(("s", "u"))
    assert len(server.requests) == 1


def test_the_key_travels_as_a_bearer_token_and_fields_can_be_added_and_taken_out():
    with stub_judge(["x"]) as server:
        extra = {"max_tokens": None, "max_completion_tokens": 7}
        Judge("m", server.url, "secret", extra=extra).ask(("s", "u"))
    assert server.headers["Authorization"] == "Bearer secret"
    assert server.path == "/v1/chat/completions"
    assert "max_tokens" not in server.requests[0]
    assert server.requests[0]["max_completion_tokens"] == 7


def test_a_verdict_is_asked_for_once_even_by_another_run(tmp_path):
    path = str(tmp_path / "cache.jsonl")
    with stub_judge(["one", "two"]) as server:
        for _ in range(2):
            own = Judge("m", server.url, cache=VerdictCache(path))
            assert own.ask(("s", "u")) == "one"
        assert own.ask(("s", "another")) == "two"
        hotter = Judge("m", server.url, temperature=0.5, cache=VerdictCache(path))
        hotter.ask(("s", "u"))
    assert len(server.requests) == 3


def test_half_a_cached_line_is_asked_again_and_spoils_no_other(tmp_path):
    path = tmp_path / "cache.jsonl"
    with stub_judge(lambda n, body: body["messages"][-1]["content"]) as server:
        first = Judge("m", server.url, cache=VerdictCache(str(path)))
        first.ask(("s", "a")), first.ask(("s", "b"))
        path.write_bytes(path.read_bytes()[:-5])
        second = Judge("m", server.url, cache=VerdictCache(str(path)))
        assert [second.ask(("s", text)) for text in "abc"] == ["a", "b", "c"]
        assert len(server.requests) == 4
        third = Judge("m", server.url, cache=VerdictCache(str(path)))
        assert [third.ask(("s", text)) for text in "abc"] == ["a", "b", "c"]
    assert len(server.requests) == 4


def test_replies_come_in_the_order_of_the_questions_whatever_is_ready_first(tmp_path):
    with stub_judge(lambda n, body: body["messages"][-1]["content"]) as server:
        prompts = [("s", str(number)) for number in range(20)]
        own = Judge("m", server.url, workers=5)
        assert list(own.ask_all(prompts)) == [str(number) for number in range(20)]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Writes the files of a review; returns a function that runs the program on them."""
    rows = range(6)
    files = {
        "q": [
            {"question_id": n, "image": "a.jpg", "text": f"Q{n}?", "category": "conv"} for n in rows
        ],
        "a1": [{"question_id": n, "text": f"ref {n}", "answer_id": f"r{n}"} for n in rows],
        "a2": [{"question_id": n, "text": f"own {n}", "answer_id": f"c{n}"} for n in rows],
        "c": [{"image": "a.jpg", "caption": "A dog."}],
    }
    for name, records in files.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(text)

    def run(url, *options):
        argv = "-q q.jsonl -c c.jsonl -a a1.jsonl a2.jsonl -o out.jsonl --judge-workers 1".split()
        argv = [str(tmp_path / word) if word.endswith(".jsonl") else word for word in argv]
        monkeypatch.setattr(sys, "argv", ["review", *argv, "--judge-url", url, *options])
        eval_gpt_review_bench.main()

    run.folder = tmp_path
    return run


def lines(run):
    return [json.loads(line) for line in (run.folder / "out.jsonl").read_text().splitlines()]


def scored(number, body):
    """7 for the reference, 5 + n for the answer "own n"."""
    text = body["messages"][-1]["content"]
    return f"7 {5 + int(text.split('own ')[1][0])}\nreasons"


def test_a_review_that_broke_off_continues_and_equals_an_undisturbed_one(bench):
    with stub_judge(lambda n, body: (400, "gone") if n == 3 else scored(n, body)) as server:
        with pytest.raises(SystemExit, match="error: .* refuses"):
            bench(server.url)
        assert len(read_journals(str(bench.folder / "out.jsonl"), ("content",))) == 3
        bench(server.url)
    assert len(server.requests) == 7  # six questions, and the one that was refused
    assert [record["tuple"] for record in lines(bench)] == [[7, 5 + n] for n in range(6)]
    assert [record["question_id"] for record in lines(bench)] == list(range(6))


def test_the_answers_may_be_called_by_the_short_word(bench, monkeypatch):
    with stub_judge(["7 8"]) as server:
        bench(server.url)
        words = ["--answer" if word == "-a" else word for word in sys.argv]
        monkeypatch.setattr(sys, "argv", [*words, "--overwrite"])
        (bench.folder / "out.jsonl").unlink()
        eval_gpt_review_bench.main()
    assert len(lines(bench)) == 6


def test_reviews_of_another_judge_are_not_continued(bench):
    with stub_judge(["7 8"]) as server:
        bench(server.url)
        with pytest.raises(SystemExit, match="judge was 'gpt-4-0314' and is now 'another'"):
            bench(server.url, "--judge-model", "another")
        bench(server.url, "--judge-model", "another", "--overwrite")
    assert len(lines(bench)) == 6


def test_answers_in_another_order_than_the_questions_are_refused(bench):
    path = bench.folder / "a2.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    with pytest.raises(SystemExit, match="question 0 meets an answer to question 5"):
        bench("http://127.0.0.1:9/v1")


def test_without_a_key_for_openai_nothing_is_asked(bench):
    with pytest.raises(SystemExit, match="set OPENAI_API_KEY, or OPENAI_BASE_URL"):
        bench(judge.OPENAI_URL)


def test_fields_that_are_no_json_object_are_refused(bench, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_EXTRA", "max_tokens=3")
    with pytest.raises(SystemExit):
        bench("http://127.0.0.1:9/v1")
    assert "not a JSON object: 'max_tokens=3' (JUDGE_EXTRA)" in capsys.readouterr().err
