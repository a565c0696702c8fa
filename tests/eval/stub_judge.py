"""A local endpoint that speaks OpenAI's chat completions, with replies a test chooses."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(body)
            self.server.path, self.server.headers = self.path, dict(self.headers)
        reply = self.server.reply(number, body)
        status, text, *headers = (200, reply) if isinstance(reply, str) else reply
        if status == 200:
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers[0] if headers else {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def stub_judge(reply: Callable | list[str]) -> Iterator[StubJudge]:
    """Runs an endpoint for the block; a list gives its replies in order, the last one for ever."""
    replies = reply if callable(reply) else lambda n, _: reply[min(n, len(reply) - 1)]
    server = StubJudge(replies)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
