"""The judge of the evaluation: its options, and a file of its verdicts.

Every verdict is kept in a file, so that nothing is asked or paid for twice: a run that was stopped
goes on where it was, and two pruning methods that give the same answer share its verdict.
"""

import argparse
import hashlib
import json
import os
import threading

from llava.eval.files.records import parse_json
from llava.judge import OPENAI_URL, Judge, JudgeError, Prompt

__all__ = ["Judge", "JudgeError", "Prompt", "VerdictCache"]

CACHE_NAME = "judge_cache.jsonl"


class VerdictCache:
    """Replies by request, in a JSON-lines file; half a line at its end is harmless."""

    def __init__(self, path: str):
        self.path = path
        self.lock = threading.Lock()
        self.replies = {}
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        if os.path.exists(path):
            with open(path, "rb") as file:
                for line in file:
                    self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            record = parse_json(line)
        except ValueError:
            return  # cut off by a crash: asked again
        entry = record if isinstance(record, dict) else {}
        if isinstance(entry.get("key"), str) and isinstance(entry.get("reply"), str):
            self.replies[entry["key"]] = entry["reply"]

    def get(self, body: dict) -> str | None:
        return self.replies.get(_key(body))

    def put(self, body: dict, reply: str) -> None:
        line = json.dumps({"key": _key(body), "model": body["model"], "reply": reply})
        with self.lock:
            self.replies[_key(body)] = reply
            with open(self.path, "ab") as file:
                # The line break comes first, so that half a line before it spoils only itself.
                file.write(b"\n" * (file.tell() > 0) + line.encode())


def _key(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def add_judge_args(
    parser: argparse.ArgumentParser,
    model: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
) -> None:
    """Adds the options of the judge, with a program's own defaults.

    The key comes from OPENAI_API_KEY only: a command line can be read by everybody on a machine.
    """
    environment = os.environ
    own = " (default: the benchmark's own)" if max_tokens is None else ""
    group = parser.add_argument_group("judge (OPENAI_API_KEY holds the key, if one is needed)")
    group.add_argument(
        "--judge-model",
        default=environment.get("JUDGE_MODEL") or model,
        help=f"model that judges (default: JUDGE_MODEL, else {model or 'the published one'})",
    )
    group.add_argument(
        "--judge-url",
        default=environment.get("OPENAI_BASE_URL") or OPENAI_URL,
        help="any OpenAI-compatible endpoint, up to /v1 (default: OPENAI_BASE_URL, else OpenAI's)",
    )
    group.add_argument("--judge-cache", help="file of all verdicts (default: beside the output)")
    group.add_argument(
        "--judge-workers",
        type=int,
        default=environment.get("JUDGE_WORKERS") or 4,  # a text is read as from the command line
        help="questions under way at once (default: JUDGE_WORKERS, else 4)",
    )
    group.add_argument(
        "--judge-extra",
        type=_object,
        default=environment.get("JUDGE_EXTRA") or "{}",  # argparse reads it as if it were given
        metavar="JSON",
        help="fields to add to a request; null takes one out (default: JUDGE_EXTRA)",
    )
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, help="the most tokens of a verdict" + own
    )
    group.add_argument(
        "--judge-temperature",
        type=float,
        default=temperature,
        help="its temperature; 0: no sampling" + own,
    )


def _object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text!r} (JUDGE_EXTRA)")
    return value


def has_endpoint(args: argparse.Namespace) -> bool:
    """True when another endpoint than OpenAI's is named, or there is a key."""
    return args.judge_url != OPENAI_URL or bool(os.environ.get("OPENAI_API_KEY"))


def judge_from_args(args: argparse.Namespace, output: str) -> Judge:
    """Returns the judge of the options; its verdicts lie beside `output` unless told otherwise.

    Raises ValueError when OpenAI is meant and there is no key.
    """
    key = os.environ.get("OPENAI_API_KEY", "")
    if args.judge_url == OPENAI_URL and not key:
        raise ValueError(
            "there is no judge: set OPENAI_API_KEY, or OPENAI_BASE_URL to another endpoint that "
            "speaks OpenAI's protocol, such as http://localhost:8000/v1 of a local vLLM"
        )
    if args.judge_workers < 1:
        raise ValueError(f"--judge-workers must be at least 1, got {args.judge_workers}")
    path = args.judge_cache or os.path.join(os.path.dirname(output) or ".", CACHE_NAME)
    return Judge(
        args.judge_model,
        args.judge_url,
        key,
        args.judge_temperature,
        args.max_tokens,
        args.judge_extra,
        VerdictCache(path),
        workers=args.judge_workers,
    )
