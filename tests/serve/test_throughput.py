"""Requests per second of running workers."""

from __future__ import annotations

import asyncio
import json
from itertools import count, cycle
from types import SimpleNamespace

import pytest
from PIL import Image

from llava.serve import throughput
from llava.serve.errors import ServeError
from llava.serve.throughput import Answered, ask, measure, read_questions
from tests.serve.serve_tools import Words, live, words_app


class Recorded(Words):
    """Notes what it was asked, and how many requests it had at the same time.

    together: takes the number of a request; whether it waits until there are four
    """

    def __init__(self, together=lambda number: False):
        super().__init__()
        self.together, self.asked, self.most = together, [], 0

    async def prepare(self, request, request_id):
        self.asked.append(request)
        return request

    async def stream(self, job):
        number = next(n for n, request in enumerate(self.asked) if request is job)
        async for chunk in super().stream(job):
            self.most = max(self.most, self.running)
            for _ in range(6000):
                if not self.together(number) or self.most >= 4:
                    break
                await asyncio.sleep(0.01)
            yield chunk


def questions(folder, count: int = 3):
    """A file of questions, and the folder with their images."""
    lines = []
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        lines.append(json.dumps({"text": f"question {number}", "image": f"{number}.png"}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return str(folder / "questions.jsonl"), str(folder)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["throughput", *map(str, arguments)])
    throughput.main()


def test_workers_get_the_same_requests_and_are_compared(monkeypatch, capsys, tmp_path):
    # Behind the first request come, twice, four one after the other and four at once.
    one, other = Recorded(lambda number: (number + 3) // 4 % 2 == 0 < number), Recorded()
    file, images = questions(tmp_path)
    with live(words_app(one)) as first, live(words_app(other)) as second:
        flags = ["--question-file", file, "--image-folder", images, "--requests", 4]
        flags += ["--rounds", 2, "--concurrency", 1, 4, "--worker-address", first, second]
        run(monkeypatch, *flags, "--pruning-method", "vispruner", "--visual-token-num", 7)
    assert len(one.asked) == len(other.asked) == 1 + 2 * 2 * 4
    assert one.most == 4
    prompts = [request.prompt for request in one.asked]
    assert sorted(prompts) == sorted(request.prompt for request in other.asked)
    assert "question 2" in "".join(prompts) and "<image>\nquestion 0" in prompts[0]
    request = one.asked[0]
    assert (request.temperature, len(request.images)) == (0.0, 1)
    assert (request.pruning.method, request.pruning.visual_token_num) == ("vispruner", 7)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert [(row[0], row[1]) for row in rows] == [
        ("1", first),
        ("1", second),
        ("4", first),
        ("4", second),
    ]
    assert [row[3] for row in rows[::2]] == ["1.0", "1.0"]
    assert {row[6] for row in rows} == {"100"}


def test_speeds_are_medians_of_rounds_beside_those_of_the_first_worker(monkeypatch):
    seconds = {"slow": cycle([0.5]), "quick": cycle([0.05, 0.1, 1.0])}
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def answer(worker, body, token):
        clock.now += (took := next(seconds[worker]))
        return Answered("text", took / 5, took)

    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(throughput, "ask", answer)
    found = measure(["slow", "quick"], dict.fromkeys(seconds, [{}]), [1], rounds=3)
    assert [speed.per_second for speed in found] == pytest.approx([2, 10])
    assert [speed.first_seconds for speed in found] == pytest.approx([0.1, 0.02])
    assert [speed.seconds for speed in found] == pytest.approx([0.5, 0.1])
    rows = throughput.table(found).splitlines()[2:]
    assert rows == ["| 1 | slow | 2.00 | 1.0 | 0.10 | 0.50 | 100 |"] + [
        "| 1 | quick | 10.00 | 5.0 | 0.02 | 0.10 | 100 |"
    ]


def test_an_answer_is_timed_at_its_first_text_and_at_its_end(monkeypatch):
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=count().__next__))
    with live(words_app()) as worker:
        found = ask(worker, {"prompt": "Hi", "temperature": 0, "max_new_tokens": 4})
    assert found == Answered("Hi one two three", 1, 2)


def test_other_answers_are_counted():
    body = {"prompt": "Hi", "temperature": 0, "max_new_tokens": 4}
    with live(words_app(Words())) as first, live(words_app(Words(words=("other",)))) as second:
        found = measure([first, second], {one: [body] for one in (first, second)}, [2], rounds=1)
    assert [speed.same for speed in found] == [100, 0]


def test_a_worker_that_refuses_or_is_away_is_named(monkeypatch, tmp_path):
    class Full(Words):
        async def prepare(self, request, request_id):
            raise ServeError("busy", "All places are taken.")

    file, images = questions(tmp_path, 1)
    flags = ["--question-file", file, "--image-folder", images, "--requests", 1, "--rounds", 1]
    with live(words_app(Full())) as address, pytest.raises(SystemExit, match="places are taken"):
        run(monkeypatch, *flags, "--worker-address", address)
    with pytest.raises(SystemExit, match=f"error: no worker answers at {address} "):
        run(monkeypatch, *flags, "--worker-address", address)


def test_questions_start_again_and_a_file_without_them_is_named(tmp_path):
    file, images = questions(tmp_path, 2)
    assert [text[-1] for text, _ in read_questions(file, images, 5)] == list("01010")
    (tmp_path / "wrong.jsonl").write_text('{"text": "no image"}\n')
    with pytest.raises(ValueError, match="wrong.jsonl: a line is no question about an image"):
        read_questions(str(tmp_path / "wrong.jsonl"), images, 1)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl holds no questions"):
        read_questions(str(tmp_path / "empty.jsonl"), images, 1)


@pytest.mark.parametrize("flags", [["--rounds", 0], ["--concurrency", 0], ["--requests", 0]])
def test_numbers_below_one_are_refused(flags, monkeypatch):
    with pytest.raises(SystemExit, match="at least 1"):
        run(monkeypatch, "--worker-address", "http://127.0.0.1:9", *flags)


def test_a_budget_needs_a_method(monkeypatch):
    with pytest.raises(SystemExit, match="--pruning-method"):
        run(monkeypatch, "--worker-address", "http://127.0.0.1:9", "--visual-token-num", 5)
