"""The web page of the demo: ask about images, and see what a pruning method keeps.

    python -m llava.serve.gradio_web_server --controller-url http://localhost:21001 --port 7860

Listens on loopback unless told otherwise; texts and images are stored only when that is asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import signal
import tempfile
import threading
import warnings

from llava.errors import errors_as_messages
from llava.gradio_pages import load_gradio, no_proxy_for
from llava.network import is_loopback
from llava.program_parser import ProgramParser

from .auth import add_token_arg, read_token
from .direct import checked_address, page_port
from .service import set_up_logging

logger = logging.getLogger("llava.serve.web")
WAITING_QUESTIONS = 64  # in line behind those that are answered; more are turned away
SESSIONS = 256  # visitors whose dialogue is remembered


def build_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(__doc__)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of the page; 0.0.0.0 opens it to a network"
    )
    parser.add_argument(
        "--port", type=page_port, help="port of the page (default: the first free one from 7860 on)"
    )
    parser.add_argument(
        "--controller-url", default="http://localhost:21001", help="where the controller is"
    )
    parser.add_argument(
        "--concurrency-count",
        type=int,
        default=16,
        help="answers that are written at the same time",
    )
    parser.add_argument(
        "--model-list-mode",
        choices=("once", "reload"),
        default="once",
        help="whether models are asked for at the start, or at every visit",
    )
    parser.add_argument(
        "--share", action="store_true", help="give the page a public address through gradio's site"
    )
    parser.add_argument(
        "--moderate", action="store_true", help="ask OpenAI's moderation service about every text"
    )
    parser.add_argument(
        "--embed", action="store_true", help="make the page fit into a frame of another one"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name under which visitors reach the page, for example behind a proxy; repeatable "
        "(default: those of loopback, or any where --host is not loopback)",
    )
    parser.add_argument("--log-dir", default=".", help="folder of what the two options below write")
    parser.add_argument(
        "--log-conversations", action="store_true", help="write dialogues and votes to a file"
    )
    parser.add_argument(
        "--save-images", action="store_true", help="store the images of logged dialogues, too"
    )
    add_token_arg(parser)
    return parser


def allowed_hosts(args) -> tuple[str, ...] | None:
    """Names under which the page may be asked for; None for any."""
    from .web.guard import LOOPBACK

    if args.allow_host:
        return (*LOOPBACK, *(name.lower() for name in (args.host, *args.allow_host)))
    return None if args.share or not is_loopback(args.host) else LOOPBACK


def first_models(service) -> tuple[str, ...]:
    """The models at the start; none while there is no controller, the page asks again then."""
    from .web.failures import Failure

    try:
        return tuple(asyncio.run(service.models()))
    except Failure as failure:
        logger.warning("%s", failure.sentence)
        return ()


def build_page(args):
    """The gradio application that the options ask for."""
    from .web.client import Service
    from .web.log import ConversationLog
    from .web.page import Page, PageOptions

    if args.save_images and not args.log_conversations:
        raise ValueError("--save-images goes with --log-conversations, which is missing")
    controller = checked_address(args.controller_url, "--controller-url")
    service = Service(controller, read_token(args.token_file))
    reload = args.model_list_mode == "reload"
    options = PageOptions(
        models=() if reload else first_models(service),
        reload=reload,
        embed=args.embed,
        moderate=args.moderate,
        concurrency=args.concurrency_count,
    )
    log = ConversationLog(args.log_dir, args.log_conversations, args.save_images)
    return Page(service, log, options).blocks


def launch(args, uploads: str):
    """Starts the page in threads of its own; returns (gradio application, address).

    uploads: folder for uploaded images, private to this process
    """
    os.environ["GRADIO_TEMP_DIR"] = uploads  # read by gradio when it is imported
    load_gradio("the web page")
    from starlette.middleware import Middleware

    from .web.guard import UPLOAD_BYTES, Guard
    from .web.script import HEAD
    from .web.server import limited_server, log_failed_events
    from .web.style import FRAME, css, theme

    page = build_page(args)
    page.queue(
        api_open=False,
        max_size=WAITING_QUESTIONS,
        default_concurrency_limit=args.concurrency_count,
    )
    functions = {number: len(one.inputs) for number, one in page.fns.items() if one.fn}
    guard = Middleware(
        Guard,
        functions=functions,
        hosts=allowed_hosts(args),
        embed=args.embed,
        uploads=uploads,
        listens=lambda session: session in page._queue.pending_messages_per_session,
    )
    log_failed_events()
    no_proxy_for(args.host)
    options = dict(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        prevent_thread_lock=True,
        show_error=False,
        quiet=True,
        allowed_paths=[],
        max_file_size=UPLOAD_BYTES,
        state_session_capacity=SESSIONS,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        app_kwargs={"middleware": [guard], "openapi_url": None, "docs_url": None},
        theme=theme(),
        css=css(),
        head=FRAME + HEAD,
    )
    with limited_server():
        _, address, shared = page.launch(**options)
    return page, shared or address


@errors_as_messages()
def main() -> None:
    args = build_parser().parse_args()
    set_up_logging()
    warnings.filterwarnings("ignore", module=r"gradio\b")  # one or two for every question
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    uploads = tempfile.mkdtemp(prefix="llava-page-")
    tempfile.tempdir = uploads  # what gradio leaves behind is deleted, too
    try:
        page, address = launch(args, uploads)
        print(f"The page is at {address}", flush=True)
        stop.wait()
        page.close(verbose=False)
    finally:
        shutil.rmtree(uploads, ignore_errors=True)


if __name__ == "__main__":
    main()
