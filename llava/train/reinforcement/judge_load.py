"""Asks a judge many questions at once: does it answer, how fast, and does it tell right from wrong?

    python -m llava.train.reinforcement.judge_load --judge-url http://localhost:8000/v1

Ends with exit code 1 where a question has no verdict.
"""

from __future__ import annotations

import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from llava.answer_scores import JUDGE_MODEL, judge_question
from llava.errors import errors_as_messages
from llava.judge import Judge, JudgeError
from llava.program_parser import ProgramParser
from llava.progress import progress

from .rewards import LOCAL_JUDGE, check_judge, training_judge

#: question, right answer, and an answer to be scored
ITEMS = (
    ("What is written on the sign?", "stop", "It says stop."),
    ("What color is the car?", "red", "The car is dark blue."),
    ("How many people are there?", "three", "There are 3 people."),
    ("Where is the cat?", "on the sofa", "The cat lies on a couch."),
)


def load(judge: Judge, requests: int, items: int, threads: int) -> tuple[list[float], list[str]]:
    """Sends `requests` groups of `items` questions, `threads` groups at a time; returns seconds of
    the questions that were answered, and what was wrong with the others."""

    def one(number: int) -> list[float | str]:
        found: list[float | str] = []
        for place in range(items):
            question, answer, text = ITEMS[place % len(ITEMS)]
            begin = time.perf_counter()
            try:
                # The number keeps a server from answering out of its prefix cache.
                judge.ask(judge_question(f"{question} ({number}.{place})", answer, text))
                found.append(time.perf_counter() - begin)
            except JudgeError as error:
                found.append(str(error))
        return found

    results: list[float | str] = []
    with ThreadPoolExecutor(threads) as pool, progress(requests, "judge", "requests") as bar:
        for found in pool.map(one, range(requests)):
            results += found
            bar.update()
    seconds = sorted(entry for entry in results if isinstance(entry, float))
    return seconds, [entry for entry in results if isinstance(entry, str)]


@errors_as_messages()
def main(argv: list[str] | None = None) -> None:
    parser = ProgramParser(__doc__)
    environment = os.environ
    parser.add_argument(
        "--judge-url",
        default=environment.get("OPENAI_BASE_URL") or LOCAL_JUDGE,
        help="endpoint of the judge",
    )
    parser.add_argument(
        "--judge-model",
        default=environment.get("JUDGE_MODEL") or JUDGE_MODEL,
        help="model that judges",
    )
    parser.add_argument("--requests", type=int, default=50, help="groups of questions")
    parser.add_argument("--items", type=int, default=4, help="questions of a group")
    parser.add_argument("--threads", type=int, default=10, help="groups under way at once")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds for one attempt")
    args = parser.parse_args(argv)
    if min(args.requests, args.items, args.threads) < 1:
        parser.error("--requests, --items and --threads must be at least 1")
    judge = training_judge(args.judge_model, args.judge_url, timeout=args.timeout)
    check_judge(judge)
    begin = time.perf_counter()
    seconds, errors = load(judge, args.requests, args.items, args.threads)
    total = time.perf_counter() - begin
    print(
        f"{len(seconds)} of {len(seconds) + len(errors)} questions answered, "
        f"{len(seconds) / total:.1f} per second with {args.threads} at a time"
    )
    if seconds:
        shares = {"median": 0.5, "95 %": 0.95, "longest": 1.0}
        places = {name: math.ceil(share * len(seconds)) - 1 for name, share in shares.items()}
        shown = (f"{name} {seconds[place]:.2f}" for name, place in places.items())
        print(f"seconds per question: {', '.join(shown)}")
    if errors:
        sys.exit(f"error: {len(errors)} questions have no verdict, the first because: {errors[0]}")


if __name__ == "__main__":
    main()
