"""The guard in front of the running page: what gets through to gradio, and what does not."""

import asyncio
import json
import random
import socket

import pytest

gr = pytest.importorskip("gradio")

import httpx  # noqa: E402

from llava.serve.web import guard, uploads  # noqa: E402
from tests.serve.web.test_parts import form, png  # noqa: E402


@pytest.fixture(scope="module")
def site(address, uploads):
    """A client of the launched page; where uploads go is in `.uploads`."""
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        client.uploads = uploads
        yield client


def test_the_page_listens_on_loopback_and_forbids_loading_from_elsewhere(site):
    assert site.base_url.host == "127.0.0.1"
    reply = site.get("/")
    policy = reply.headers["content-security-policy"]
    assert reply.status_code == 200 and "default-src 'self'" in policy
    assert "object-src 'none'" in policy and reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=https://example.com/",
        "/gradio_api/file=//example.com/",
        "/gradio_api/file=http:%2f%2fexample.com",
        "/gradio_api/file=%68ttp://example.com",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=/proc/self/environ",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=..%2f..%2f..%2fetc%2fpasswd",
        "/gradio_api/file=%252e%252e/setup.py",
        "/gradio_api/file=setup.py",
        "/gradio_api/proxy=http://169.254.169.254/latest/meta-data/",
        "/gradio_api/proxy=https://evil.hf.space/",
        "/gradio_api/deep_link",
        "/gradio_api/monitoring/summary",
        "/monitoring",
        "/login",
        "/docs",
        "/openapi.json",
        "/assets/../../../../etc/passwd",
        "/" + "a" * 5000,
    ],
)
def test_other_places_cannot_be_reached_through_the_page(site, path):
    reply = site.get(path, follow_redirects=False)
    assert 400 <= reply.status_code < 500 and "location" not in reply.headers
    assert "root:" not in reply.text


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/component_server", "/gradio_api/run/predict", "/gradio_api/call/ask", "/login"],
)
def test_endpoints_that_the_page_does_not_use_are_not_there(site, path):
    assert site.post(path, json={}).status_code == 404
    assert site.put(path, json={}).status_code == 405


def test_pages_of_other_sites_and_other_names_are_refused(site):
    kind, body = form("view.png", png(9, 9))
    headers = {"origin": "https://evil.example", "content-type": kind}
    assert site.post("/gradio_api/upload", headers=headers, content=body).status_code == 403
    assert site.get("/", headers={"host": "evil.example"}).status_code == 421
    assert site.get("/config", headers={"host": "evil.example:80"}).status_code == 421


def test_only_images_within_limits_are_stored(site, monkeypatch):
    def upload(name, data):
        kind, body = form(name, data)
        return site.post("/gradio_api/upload", headers={"content-type": kind}, content=body)

    stored = upload("view.png", png(9, 9))
    assert stored.status_code == 200 and stored.json()[0].startswith(str(site.uploads))
    files = len(list(site.uploads.rglob("*.*")))
    bomb = upload("bomb.png", png(9000, 9000))
    assert bomb.status_code == 413 and "million pixels" in bomb.text
    assert upload("a" * 100_000 + ".png", png(9, 9)).status_code == 400
    refused = upload("page.html", b"<script>")
    assert refused.status_code == 415 and "[refused, request " in refused.text
    assert upload("big.png", b"x" * (13 << 20)).status_code == 413
    damaged = upload("cut.png", png(90, 90)[:-30])
    assert damaged.status_code == 415 and "not complete" in damaged.text
    monkeypatch.setattr(uploads, "STORED_BYTES", 100)
    full = upload("other.png", png(9, 8))
    assert full.status_code == 507 and "no room" in full.text
    assert len(list(site.uploads.rglob("*.*"))) == files


@pytest.mark.parametrize(
    "event",
    [
        {"fn_index": 999, "data": [], "session_hash": "x"},
        {"fn_index": True, "data": [None], "session_hash": "x"},
        {"fn_index": 0, "data": [1, 2, 3], "session_hash": "x"},
        {"fn_index": 0, "data": [], "session_hash": "../x"},
        {"fn_index": 0, "data": [], "session_hash": "x" * 99},
        {"api_name": "ask", "data": [], "session_hash": "x"},
    ],
)
def test_events_that_the_page_does_not_have_are_refused(site, event):
    assert site.post("/gradio_api/queue/join", json=event).status_code == 400


@pytest.mark.parametrize(
    "file",
    [
        {"path": "http://169.254.169.254/latest", "meta": {"_type": "gradio.FileData"}},
        {"path": " https://example.com/a.png", "meta": {"_type": "gradio.FileData"}},
        {"path": "x", "url": "data:image/png;base64,AAAA", "meta": {"_type": "gradio.FileData"}},
    ],
)
def test_files_of_an_event_are_not_fetched(site, file):
    body = {"fn_index": 0, "data": [file, [{"deep": file}]], "session_hash": "test"}
    assert site.post("/gradio_api/queue/join", json=body).status_code == 400


def test_malformed_requests_end_in_4xx_and_the_page_still_answers(site):
    chance = random.Random(0)
    paths = ["/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/upload"]
    values = [None, -1, 1e308, 10**400, "x" * 9999, "\ud83d", "../" * 99, [], {}, [[[[]]]], True]

    def junk():
        kind = chance.randrange(4)
        if kind == 0:
            return bytes(chance.randrange(256) for _ in range(chance.randrange(200)))
        if kind == 1:
            return b"[" * 100_000
        body = {
            key: chance.choice(values) for key in ("data", "fn_index", "session_hash", "event_id")
        }
        return json.dumps(body if kind == 2 else [body]).encode()

    for _ in range(200):
        reply = site.post(
            chance.choice(paths), content=junk(), headers={"content-type": "application/json"}
        )
        assert 400 <= reply.status_code < 500, reply.text
        assert "Traceback" not in reply.text and "site-packages" not in reply.text
    assert site.get("/").status_code == 200
    assert site.get("/config").status_code == 200


def test_a_body_that_never_ends_is_given_up(site, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with socket.create_connection((site.base_url.host, site.base_url.port), timeout=20) as one:
        head = f"Host: {site.base_url.netloc.decode()}\r\nContent-Length: 100\r\n\r\n{{"
        one.sendall(f"POST /gradio_api/queue/join HTTP/1.1\r\n{head}".encode())
        assert b" 408 " in one.recv(1000).split(b"\r\n")[0]


#: files that gradio would have to read for an event: the component with an image is asked for one
STOLEN = ["/etc/passwd", "setup.py", "../setup.py", "/proc/self/environ", "\\\\host\\share"]


@pytest.mark.parametrize("path", STOLEN)
def test_a_file_of_the_server_is_not_read_for_an_event(site, path):
    config = site.get("/config").json()
    images = [one["id"] for one in config["components"] if one["props"].get("elem_id") == "image"]
    number, asked = next(
        (d["id"], d["inputs"]) for d in config["dependencies"] if images[0] in d["inputs"]
    )
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = [file if one == images[0] else None for one in asked]
    event = {"fn_index": number, "data": data, "session_hash": "thief"}
    joined = site.post("/gradio_api/queue/join", json=event)
    assert joined.status_code < 500
    if joined.status_code == 200:
        with site.stream("GET", "/gradio_api/queue/data?session_hash=thief") as reply:
            told = ""
            for line in reply.iter_lines():
                told += line
                if "process_completed" in line or "close_stream" in line:
                    break
        assert '"success":false' in told.replace(" ", "") and "root:" not in told
        assert "Traceback" not in told and str(site.uploads) not in told


def test_large_bodies_are_refused(site):
    join = "/gradio_api/queue/join"
    assert site.post(join, content=b" " * (2**18 + 1)).status_code == 413
    assert site.post(join, content=iter([b" " * 2**17] * 3)).status_code == 413


# What a stranger can make the page do.


SECRET = "swordfish"
JOIN, DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"


@pytest.fixture
def logged(caplog, capfd):
    """Returns the lines of the page's log so far; fails where one holds what it must not."""

    def lines() -> list[str]:
        printed = "".join(capfd.readouterr())
        assert "Traceback" not in caplog.text + printed
        assert SECRET not in caplog.text + printed
        assert all("\n" not in record.getMessage() for record in caplog.records)
        return [record.getMessage() for record in caplog.records if record.name != "httpx"]

    caplog.set_level("WARNING", "httpx")
    caplog.set_level("INFO")
    return lines


@pytest.mark.parametrize("session", ["unknown", SECRET, "a\nforged", "\ud83d", "", "x" * 999])
def test_an_unknown_session_is_refused_in_one_line(site, logged, session):
    query = httpx.QueryParams({"session_hash": session.encode("utf-8", "replace")})
    reply = site.get(f"{DATA}?{query}")
    assert reply.status_code == 404 and reply.text.startswith("Nothing is under way")
    lines = logged()
    assert len(lines) == 1 and lines[0].endswith(": refused, 404")


def event_of(site, name: str, value) -> dict:
    """An event in whose data the component `name` has `value` and all others have none."""
    config = site.get("/config").json()
    number = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == name)
    asked = (one for one in config["dependencies"] if number in one["inputs"])
    found = next(one for one in asked if one["backend_fn"])  # others run in the browser alone
    data = [value if one == number else None for one in found["inputs"]]
    return {"fn_index": found["id"], "data": data, "session_hash": f"of_{name}"}


def test_an_event_that_fails_is_one_line_without_what_the_visitor_sent(site, logged):
    event = event_of(site, "model", SECRET)
    assert site.post(JOIN, json=event).status_code == 200
    with site.stream("GET", f"{DATA}?session_hash={event['session_hash']}") as reply:
        assert any("process_completed" in line for line in reply.iter_lines())
    (line,) = logged()
    assert line.startswith("an event failed: Error at ")


@pytest.mark.slow
def test_a_session_that_ends_while_it_is_listened_to_is_no_failure(site, logged):
    """Two listen to one session; when the first leaves, gradio forgets it under the second."""
    slow = {**event_of(site, "question", "slow"), "session_hash": "twice"}
    assert site.post(JOIN, json=slow).status_code == 200
    with httpx.Client(base_url=site.base_url, timeout=60, trust_env=False) as other:
        with other.stream("GET", f"{DATA}?session_hash=twice") as second:
            with site.stream("GET", f"{DATA}?session_hash=twice") as first:
                next(first.iter_lines(), None)
            list(second.iter_lines())
    assert len(logged()) <= 2


@pytest.mark.parametrize(
    "path",
    [
        f"/?page={SECRET}",
        f"/config?page={SECRET}",
        f"/?deep_link={SECRET}",
        "/config?deep_link=../../x",
        "/assets/" + "a" * 300,
        "/pwa_icon/100000",
        "/gradio_api/heartbeat/" + "a" * 100,
        "/gradio_api/upload_progress?upload_id=a%0Ab",
        "/gradio_api/file=" + "a" * 300 + ".png",
        "/static/%00",
        "/%ed%a0%80",
    ],
)
def test_odd_addresses_end_in_4xx(site, logged, path):
    for method in ("GET", "HEAD"):
        assert 400 <= site.request(method, path).status_code < 500
    logged()


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-host": SECRET + "\x7f"},
        {"x-forwarded-host": "evil.example/\\"},
        {"x-forwarded-proto": "java\tscript"},
        {"x-gradio-server": "http://[\x01"},
        {"origin": "http://["},
        {"origin": "null"},
        {"host": "["},
    ],
)
def test_odd_headers_end_in_4xx(site, logged, headers):
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    cancel = {"session_hash": "a", "fn_index": 0, "event_id": "b"}
    assert 400 <= site.post("/gradio_api/cancel", json=cancel, headers=headers).status_code < 500
    assert site.get("/", headers=headers).status_code < 500
    logged()


@pytest.mark.parametrize("ranges", ["bytes=1-2-3", "bytes=a-b", "bytes=9-1", "bytes=-", "x=0-1"])
def test_odd_ranges_of_a_file_are_no_failure(site, logged, ranges):
    kind, body = form("view.png", png(9, 9))
    stored = site.post("/gradio_api/upload", headers={"content-type": kind}, content=body).json()
    for path in (f"/gradio_api/file={stored[0]}", "/theme.css", "/static/img/logo.svg"):
        assert site.get(path, headers={"range": ranges}).status_code < 500
    many = "bytes=" + ",".join("0-" for _ in range(2000))
    assert site.get(f"/gradio_api/file={stored[0]}", headers={"range": many}).status_code < 500
    logged()


NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "9" * 5000]


@pytest.mark.parametrize("value", [*NUMBERS, "[" * 50 + "]" * 50, '{"path": "x"}'])
def test_values_that_are_none_are_refused(site, logged, value):
    event = json.dumps({"fn_index": 0, "data": ["VALUE"], "session_hash": "numbers"})
    json_type = {"content-type": "application/json"}
    content = event.replace('"VALUE"', value)
    assert site.post(JOIN, content=content, headers=json_type).status_code == 400
    logged()


def test_a_folder_and_a_file_of_others_are_no_upload(site, logged):
    for path in (str(site.uploads), f"{site.uploads}/../x", "/etc/passwd", "a\0b", "x" * 5000):
        event = event_of(site, "image", {"path": path, "meta": {"_type": "gradio.FileData"}})
        assert site.post(JOIN, json=event).status_code == 400
    logged()


def test_gradio_gets_nothing_but_the_fields_that_were_checked():
    more = {"batched": True, "simple_format": True, "username": "x", "event_id": 5}
    event = {"fn_index": 3, "data": [1], "session_hash": "a", "trigger_id": None, **more}
    known = guard.checked_event(JOIN, json.dumps(event).encode(), {3: 1})
    assert json.loads(known) == {
        "data": [1],
        "fn_index": 3,
        "trigger_id": None,
        "session_hash": "a",
    }


# Uploads.


@pytest.mark.parametrize(
    "change",
    [
        lambda kind, body: (kind, b"This is a message in several parts.\r\n" + body),
        lambda kind, body: (kind, body + b"The end.\r\n"),
        lambda kind, body: (kind.replace("xyz", '"xyz"'), body),
        lambda kind, body: (kind, body.replace(b"--xyz\r\n", b"--xyz  \r\n")),
    ],
    ids=["a preamble", "an epilogue", "a quoted boundary", "blanks behind a boundary"],
)
def test_forms_as_the_standard_has_them_are_read(site, logged, change):
    kind, body = change(*form("view.png", png(9, 9)))
    reply = site.post("/gradio_api/upload", headers={"content-type": kind}, content=body)
    assert reply.status_code == 200 and reply.json()[0].endswith("image.png")
    assert logged() == []


@pytest.mark.parametrize(
    "kind, body",
    [
        form("view.png", png(9, 9), b"--xyz\r\n\r\n"),
        ("multipart/form-data; boundary=xyz", b"--xyz\r\nno form"),
        ("multipart/form-data; boundary=xyz", b"--xyz--\r\n"),
        ("multipart/form-data; boundary=" + "x" * 500, b""),
        ("multipart/form-data", b"--xyz"),
        ("text/plain", b"--xyz"),
        ("", b""),
    ],
)
def test_forms_that_are_none_end_in_4xx(site, logged, kind, body):
    reply = site.post("/gradio_api/upload", headers={"content-type": kind}, content=body)
    assert 400 <= reply.status_code < 500
    logged()


# The guard alone, in front of an application of ours.


def through_guard(app, *requests) -> list[httpx.Response]:
    async def run():
        transport = httpx.ASGITransport(guard.Guard(app, {}))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.request(method, path) for method, path in requests]

    return asyncio.run(run())


class Group(Exception):
    """As groups of Python 3.11 are."""

    exceptions = (KeyError(SECRET),)


@pytest.mark.parametrize(
    "error, status",
    [(RuntimeError(SECRET), 500), (OSError(28, SECRET), 507), (Group(SECRET), 500)],
)
def test_a_failure_of_gradio_is_one_line_and_a_sentence(logged, error, status):
    async def failing(scope, receive, send):
        raise error

    (reply,) = through_guard(failing, ("GET", "/"))
    assert reply.status_code == status and SECRET not in reply.text and "request" in reply.text
    (line,) = logged()
    kind = getattr(error, "exceptions", [error])[0]
    assert f": {type(kind).__name__} at " in line


def test_a_reply_that_breaks_off_is_one_line(logged):
    async def failing(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError(SECRET)

    (reply,) = through_guard(failing, ("GET", "/"))
    assert reply.text == "half" and len(logged()) == 1


def test_of_the_replies_that_go_on_the_oldest_ends_when_there_are_too_many(monkeypatch):
    monkeypatch.setitem(guard.STREAMS, "heartbeat", 3)
    began, left = [], []

    async def endless(scope, receive, send):
        began.append(scope["path"])
        await receive()  # of a request without a body; the next one is the visitor's leaving
        message = await receive()
        left.append((scope["path"], message["type"]))

    async def run():
        front = guard.Guard(endless, {})
        never = asyncio.Event()

        def scope(number):
            path = f"/gradio_api/heartbeat/{number}"
            headers = [(b"host", b"localhost")]
            return {"type": "http", "method": "GET", "path": path, "headers": headers}

        def receiver():
            messages = [{"type": "http.request", "body": b""}]

            async def receive():
                if not messages:
                    await never.wait()
                return messages.pop()

            return receive

        async def send(message):
            pass

        tasks = []
        for number in range(5):
            tasks.append(asyncio.ensure_future(front(scope(number), receiver(), send)))
            while len(began) <= number:
                await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*tasks[:2]), 60)
        assert not any(task.done() for task in tasks[2:])
        for task in tasks[2:]:
            task.cancel()

    asyncio.run(run())
    assert left == [
        ("/gradio_api/heartbeat/0", "http.disconnect"),
        ("/gradio_api/heartbeat/1", "http.disconnect"),
    ]


def test_held_connections_keep_no_visitor_out_of_the_page(site):
    held = []
    try:
        for number in range(800):  # more than the page has room for
            held.append(socket.create_connection((site.base_url.host, site.base_url.port), 60))
            held[-1].sendall(b"GET / HTTP/1.1\r\nHost: loc")
            if number % 200 == 199:
                assert httpx.get(f"{site.base_url}theme.css", timeout=60).status_code == 200
    finally:
        for one in held:
            one.close()
