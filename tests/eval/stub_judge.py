"""A local endpoint that speaks OpenAI's chat completions, with replies a test chooses."""

import json
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer

from tests.local_server import JSONHandler, running


class StubJudge(ThreadingHTTPServer):
    """Answers with `reply(number of the request, body)`: a text, or (status, text) to fail, with a
    third entry for headers of its own.

    requests: bodies in the order they came; paths, headers: of the latest
    """

    daemon_threads = True

    def __init__(self, reply: Callable):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.path, self.headers = None, {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(JSONHandler):
    def do_POST(self):
        body = self.body()
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(body)
            self.server.path, self.server.headers = self.path, dict(self.headers)
        reply = self.server.reply(number, body)
        status, text, *headers = (200, reply) if isinstance(reply, str) else reply
        if status == 200:
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
        self.send(status, text, *headers)


def stub_judge(reply: Callable | list[str]):
    """Runs an endpoint for the block; a list gives its replies in order, the last one for ever."""
    replies = reply if callable(reply) else lambda n, _: reply[min(n, len(reply) - 1)]
    return running(StubJudge(replies))
