"""Requests per second of running workers, by the number of requests at the same time.

    python -m llava.serve.throughput --concurrency 1 4 16 \
        --worker-address http://localhost:40000 http://localhost:40001

All workers get the same questions, those of the playground unless files are named, and answer with
the likeliest tokens. They take turns, round after round, so that a machine that is busy with other
things slows all of them down alike. Requests go straight to the workers, not to a controller.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from ..constants import DEFAULT_IMAGE_TOKEN
from ..errors import errors_as_messages
from ..playground import benchmark_dir
from ..program_parser import ProgramParser, Several
from ..progress import progress
from .auth import add_token_arg, read_token
from .direct import checked_address
from .register_worker import post, said
from .test_message import answer_texts, request_body, template_at

QUESTIONS, IMAGES = "gqa/llava_gqa_testdev_balanced.jsonl", "images"
SECONDS = 600  # longest silence of a worker


@dataclass(frozen=True)
class Answered:
    """One answer. first_seconds: from the request to the first text; seconds: to its end"""

    text: str
    first_seconds: float
    seconds: float


@dataclass
class Speed:
    """What a worker did with so many requests at the same time.

    per_second:    requests, median over the rounds
    first_seconds: until the first text, median over all requests; seconds: until the end
    same:          share of answers equal to those of the first worker, in percent
    """

    worker: str
    concurrency: int
    per_second: float
    first_seconds: float
    seconds: float
    same: float


def ask(address: str, body: dict, token: str | None = None) -> Answered:
    """Raises ValueError where the worker refuses, fails or goes away."""
    start, first, text = time.perf_counter(), None, ""
    for text in answer_texts(address, body, token, SECONDS):
        if first is None and len(text) > len(body["prompt"]):
            first = time.perf_counter() - start
    seconds = time.perf_counter() - start
    return Answered(text, seconds if first is None else first, seconds)


def measure(
    workers: list[str],
    bodies: dict[str, list[dict]],
    concurrency: list[int],
    rounds: int,
    token: str | None = None,
) -> list[Speed]:
    """The speed of every worker at every number of requests at the same time.

    bodies: worker -> the requests of a round, the same questions for all
    """
    for worker in workers:  # whatever happens once only
        ask(worker, bodies[worker][0], token)
    rates, answers = {}, {}
    total = rounds * len(concurrency) * sum(len(bodies[worker]) for worker in workers)
    bar = progress(total, "asking", "answers")
    for _ in range(rounds):
        for count in concurrency:
            for worker in workers:
                start = time.perf_counter()
                with ThreadPoolExecutor(count) as pool:
                    asked = pool.map(partial(ask, worker, token=token), bodies[worker])
                    answered = []
                    for answer in asked:
                        answered.append(answer)
                        bar.update()
                seconds = time.perf_counter() - start
                rates.setdefault((worker, count), []).append(len(answered) / seconds)
                answers.setdefault((worker, count), []).extend(answered)
    bar.close()
    found = []
    for count in concurrency:
        for worker in workers:
            own, first = answers[worker, count], answers[workers[0], concurrency[0]]
            pairs = list(zip(own, first, strict=True))
            found.append(
                Speed(
                    worker,
                    count,
                    statistics.median(rates[worker, count]),
                    statistics.median(answer.first_seconds for answer in own),
                    statistics.median(answer.seconds for answer in own),
                    100 * sum(a.text == b.text for a, b in pairs) / len(pairs),
                )
            )
    return found


def read_questions(file: str, images: str, number: int) -> list[tuple[str, Path]]:
    """(text, image) of so many questions, from the start again when there are fewer."""
    with open(file, encoding="utf-8") as lines:
        try:
            found = [json.loads(line) for line in lines if line.strip()]
            pairs = [(question["text"], Path(images, question["image"])) for question in found]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: a line is no question about an image ({error})") from error
    if not pairs:
        raise ValueError(f"{file} holds no questions")
    return list(islice(cycle(pairs), number))


def requests_for(
    worker: str, questions: list[tuple[str, Path]], args, token: str | None
) -> list[dict]:
    """The requests to one worker, in the template that it says its model has."""
    template = template_at(worker, token)
    names = said(post(worker, "/worker_get_status", None, token), "model_names", list)
    name = next(iter(names), "")
    found = []
    for text, image in questions:
        message = f"{DEFAULT_IMAGE_TOKEN}\n{text}"
        body = request_body(name, message, args.max_new_tokens, template)
        body |= {"temperature": 0.0, "images": [base64.b64encode(image.read_bytes()).decode()]}
        if args.pruning_method:
            pruning = {"method": args.pruning_method, "visual_token_num": args.visual_token_num}
            body["pruning"] = pruning
        found.append(body)
    return found


def table(speeds: list[Speed]) -> str:
    """The speeds as a Markdown table, behind each how many times the first worker's it is."""
    first = {s.concurrency: s.per_second for s in reversed(speeds)}
    lines = [
        "| at once | worker | requests/s | times the first | first text, s | answer, s | same, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for s in speeds:
        numbers = f"{s.per_second:.2f} | {s.per_second / first[s.concurrency]:.1f} | "
        numbers += f"{s.first_seconds:.2f} | {s.seconds:.2f} | {s.same:.0f}"
        lines.append(f"| {s.concurrency} | {s.worker} | {numbers} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(__doc__)
    parser.add_argument(
        "--worker-address",
        action=Several,
        required=True,
        metavar="URL",
        help="addresses of the workers to measure",
    )
    parser.add_argument(
        "--concurrency",
        action=Several,
        type=int,
        default=[1, 4, 16],
        metavar="N",
        help="requests that are under way at a time",
    )
    parser.add_argument("--requests", type=int, default=32, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="the most tokens of an answer"
    )
    parser.add_argument(
        "--pruning-method",
        help="method of the requests (default: what each worker was started with)",
    )
    parser.add_argument(
        "--visual-token-num", type=int, help="token budget of the method (default: its own)"
    )
    parser.add_argument(
        "--question-file", help="file of the questions (default: the playground's GQA)"
    )
    parser.add_argument("--image-folder", help="folder of their images (default: the playground's)")
    add_token_arg(parser)
    return parser


@errors_as_messages()
def main() -> None:
    args = build_parser().parse_args()
    token = read_token(args.token_file)
    workers = [checked_address(one, "--worker-address") for one in args.worker_address]
    if min(args.concurrency) < 1 or args.requests < 1 or args.rounds < 1:
        raise ValueError("--concurrency, --requests and --rounds must be at least 1")
    if args.visual_token_num is not None and not args.pruning_method:
        raise ValueError("--visual-token-num belongs to a --pruning-method: name one")
    file = args.question_file or f"{benchmark_dir()}/{QUESTIONS}"
    images = args.image_folder or f"{benchmark_dir()}/{IMAGES}"
    questions = read_questions(file, images, args.requests)
    bodies = {one: requests_for(one, questions, args, token) for one in workers}
    speeds = measure(workers, bodies, args.concurrency, args.rounds, token)
    print(table(speeds))


if __name__ == "__main__":
    main()
