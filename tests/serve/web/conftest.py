"""A small service, the page that asks it, and that page as it is served."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def fake():
    pytest.importorskip("gradio")
    from tests.serve.web.web_service import FakeService, running

    with running(FakeService()) as service:
        yield service


@pytest.fixture(scope="module")
def page(fake, tmp_path_factory):
    """The page without a server; tests in a browser have a window of their own by this name."""
    from llava.serve.web.client import Service
    from llava.serve.web.log import ConversationLog
    from llava.serve.web.page import Page, PageOptions

    log = ConversationLog(tmp_path_factory.mktemp("log"))
    return Page(Service(fake.url), log, PageOptions(models=tuple(fake.models)))


@pytest.fixture
def warnings(monkeypatch):
    """Sentences shown at the edge of the page."""
    import gradio

    shown = []
    monkeypatch.setattr(gradio, "Warning", shown.append)
    return shown


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """The folder for what visitors of the served page upload."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def address(fake, uploads):
    """Where the page is served."""
    from llava.serve import gradio_web_server

    args = gradio_web_server.build_parser().parse_args(["--controller-url", fake.url])
    blocks, address = gradio_web_server.launch(args, str(uploads))
    yield address
    blocks.close(verbose=False)
