"""A judge: a language model behind any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

import llava
from llava.network import is_loopback

OPENAI_URL = "https://api.openai.com/v1"
FIRST_PAUSE = 0.5  # seconds, doubled after every failed attempt but the first
LONGEST_PAUSE, LONGEST_WISH = 30.0, 60.0  # seconds: of our own, and that an endpoint asks for
BUSY = frozenset((408, 409, 425, 429, *range(500, 600)))  # worth another attempt

Prompt = tuple[str, str]  # system text, user text


class JudgeError(ValueError):
    """The endpoint refused, or did not answer in several attempts."""


@dataclass
class Judge:
    """Asks one model at one endpoint.

    model:       name the endpoint knows the model by
    url:         address up to and with `/v1`
    api_key:     sent as a bearer token; empty: none
    temperature, max_tokens: as sent
    extra:       further fields of the request; None takes a field out
    cache:       verdicts that are there already, with `get(body)` and `put(body, reply)`, or None
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
    cache: Any = None
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
            # A judge on this machine is asked itself, and not a proxy of the environment.
            session.trust_env = not is_loopback(urlsplit(self.url).hostname or "")
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
        if reason.startswith("ConnectionError"):
            reason = "ConnectionError: nothing answers there, start the judge or name another"
        return JudgeError(
            f"no verdict from {self.url} in up to {self.attempts} attempts ({reason})"
            + ("; the verdicts so far are kept, start again to go on" if self.cache else "")
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
