"""A judge: a language model behind any endpoint that speaks OpenAI's chat completions.

Every verdict is kept in a file, so that nothing is asked or paid for twice: a run that was stopped
goes on where it was, and two pruning methods that give the same answer share its verdict.
"""

import argparse
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

import llava
from llava.eval.files.records import parse_json

OPENAI_URL = "https://api.openai.com/v1"
CACHE_NAME = "judge_cache.jsonl"
FIRST_PAUSE = 0.5  # seconds, doubled after every failed attempt but the first
LONGEST_PAUSE, LONGEST_WISH = 30.0, 60.0  # seconds: of our own, and that an endpoint asks for
BUSY = frozenset((408, 409, 425, 429, *range(500, 600)))  # worth another attempt

Prompt = tuple[str, str]  # system text, user text


class JudgeError(ValueError):
    """The endpoint refused, or did not answer in several attempts."""


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


@dataclass
class Judge:
    """Asks one model at one endpoint.

    model:       name the endpoint knows the model by
    url:         address up to and with `/v1`
    api_key:     sent as a bearer token; empty: none
    temperature, max_tokens: as sent
    extra:       further fields of the request; None takes a field out
    cache:       verdicts that are there already, or None
    attempts:    before a busy or silent endpoint is given up
    timeout:     seconds per attempt
    workers:     questions under way at once
    """

    model: str
    url: str = OPENAI_URL
    api_key: str = ""
    temperature: float = 0.0
    max_tokens: int = 1024
    extra: dict = field(default_factory=dict)
    cache: VerdictCache | None = None
    attempts: int = 8
    timeout: float = 120.0
    workers: int = 4

    @property
    def settings(self) -> dict:
        """What must agree for two sets of verdicts to continue each other."""
        names = ("temperature", "max_tokens", "extra")
        own = {name: getattr(self, name) for name in names}
        return {"judge": self.model, "version": llava.__version__, **own}

    def body(self, prompt: Prompt) -> dict:
        """Returns the request for one prompt."""
        system, user = prompt
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {
            "model": self.model,
            "messages": messages if system else messages[1:],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        return {key: value for key, value in (body | self.extra).items() if value is not None}

    def ask(self, prompt: Prompt) -> str:
        """Returns the reply to one prompt. Raises JudgeError when there is none to be had."""
        body = self.body(prompt)
        reply = self.cache.get(body) if self.cache else None
        if reply is None:
            reply = self._request(body)
            if self.cache:
                self.cache.put(body, reply)
        return reply

    def ask_all(self, prompts: Iterable[Prompt]) -> Iterator[str]:
        """Yields the replies in the order of the prompts, some of them asked for at once.

        After a JudgeError, the replies that came in by then are in the cache.
        """
        pool = ThreadPoolExecutor(self.workers)
        try:
            yield from pool.map(self.ask, prompts)
        finally:
            pool.shutdown(cancel_futures=True)

    def _request(self, body: dict) -> str:
        retries = PatientRetry(
            self.attempts - 1,
            allowed_methods=None,  # all of them: a question may be asked twice
            status_forcelist=BUSY,
            backoff_factor=FIRST_PAUSE,
            backoff_max=LONGEST_PAUSE,
            raise_on_status=False,
        )
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        address = self.url.rstrip("/") + "/chat/completions"
        with requests.Session() as session:
            session.mount(self.url, HTTPAdapter(max_retries=retries))
            try:
                response = session.post(address, json=body, headers=headers, timeout=self.timeout)
            except requests.RequestException as error:
                raise self._no_verdict(f"{type(error).__name__}: {error}") from error
        return self._reply(response)

    def _reply(self, response: requests.Response) -> str:
        """The text of a response. Raises JudgeError where there is none."""
        status, text = response.status_code, response.text[:300]
        if status in BUSY:
            raise self._no_verdict(f"status {status}: {text}")
        if status != 200:  # asking again would not help
            raise JudgeError(f"{self.url} refuses with status {status}: {text}")
        try:
            return response.json()["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeError(f"{self.url} does not answer as a chat endpoint: {text}") from error

    def _no_verdict(self, reason: str) -> JudgeError:
        return JudgeError(
            f"no verdict from {self.url} in up to {self.attempts} attempts ({reason}); the "
            "verdicts so far are kept, start again to go on"
        )


class PatientRetry(Retry):
    """Waits as long as the endpoint asks, at most a minute, and never less than after an attempt
    at which it asked for nothing."""

    def get_retry_after(self, response) -> float:
        try:
            asked = super().get_retry_after(response) or 0.0
        except InvalidHeader:
            asked = 0.0
        return max(min(asked, LONGEST_WISH), self.get_backoff_time())


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
    group = parser.add_argument_group("judge (OPENAI_API_KEY holds the key, if one is needed)")
    group.add_argument(
        "--judge-model",
        default=environment.get("JUDGE_MODEL") or model,
        help=f"default: JUDGE_MODEL from the environment, else {model or 'as published'}",
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
        default=int(environment.get("JUDGE_WORKERS") or 4),
        help="questions under way at once (default: JUDGE_WORKERS, else 4)",
    )
    group.add_argument(
        "--judge-extra",
        type=_object,
        default=environment.get("JUDGE_EXTRA") or "{}",  # argparse reads it as if it were given
        metavar="JSON",
        help="fields to add to a request; null takes one out (default: JUDGE_EXTRA)",
    )
    group.add_argument("--max-tokens", type=int, default=max_tokens)
    group.add_argument("--judge-temperature", type=float, default=temperature)


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
