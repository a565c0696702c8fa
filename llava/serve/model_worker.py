"""Answers requests with one model, and any pruning method a request names.

    python -m llava.serve.model_worker --controller http://localhost:10000 --port 40000 \
        --worker http://localhost:40000 --model-path liuhaotian/llava-v1.5-7b

Without --model-path it serves the playground checkpoint. --pruning-method and its options are what
requests get that name none. With --engine vllm --engine-url URL the language model is in a server
of its own, and images are encoded and pruned here: see docs/Serving.md.
"""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import redirect_stderr

from ..engine.options import add_engine_args
from ..errors import errors_as_messages
from ..mm_utils import get_model_name_from_path
from ..model_args import add_model_args, load_from_args
from ..playground import default_model_path
from ..program_parser import ProgramParser
from ..pruning.cli import add_pruning_args, pruner_from_args
from ..utils import StreamToLogger
from .service import serve, set_up_logging

from .auth import add_token_arg, check_exposure, read_token  # isort: skip
from .direct import check_place, checked_address
from .errors import new_request_id
from .heart_beat import HeartBeat
from .methods import folder_option
from .worker_app import Places, worker_app

CONCURRENCY = 5
CONCURRENCY_OF_ENGINE = 64  # a server computes the steps of many answers together

logger = logging.getLogger(__name__)


def add_service_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all kinds of workers share."""
    parser.add_argument("--host", default="localhost", help="address to listen on")
    parser.add_argument("--port", type=int, default=21002, help="port to listen on")
    parser.add_argument(
        "--worker-address",
        help="how controller and clients call this worker (default: http://HOST:PORT)",
    )
    parser.add_argument(
        "--controller-address", default="http://localhost:21001", help="where the controller is"
    )
    parser.add_argument("--model-name", help="what clients call the model (default: its own name)")
    parser.add_argument(
        "--limit-model-concurrency",
        type=int,
        metavar="N",
        help=f"requests that are answered at the same time (default: {CONCURRENCY}; with --engine "
        f"{CONCURRENCY_OF_ENGINE})",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=32,
        metavar="N",
        help="requests that may wait beside them; more are refused with 503",
    )
    parser.add_argument("--stream-interval", type=int, default=1, help="accepted, has no effect")
    parser.add_argument("--no-register", action="store_true", help="run without a controller")
    parser.add_argument("--log-dir", metavar="DIR", help="also log to a file in DIR")
    add_token_arg(parser)


def build_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(__doc__)
    add_service_args(parser)
    add_model_args(parser)
    add_engine_args(parser)
    parser.add_argument(
        "--use-flash-attn",
        action="store_true",
        help="the same as --attn-implementation flash_attention_2",
    )
    parser.add_argument(
        "--multi-modal", action="store_true", help="accepted, has no effect: the checkpoint says it"
    )
    add_pruning_args(parser)
    parser.add_argument(
        "--trained-part",
        action="append",
        default=[],
        metavar="METHOD=FOLDER",
        help="trained part of a method that requests may choose, repeatable (of --pruning-method: "
        "--pruning-arg)",
    )
    return parser


def load_engine(args):
    """The model that the options ask for, ready to answer."""
    # Both before the model: a typing error should not cost a minute.
    pruner, folders = pruner_from_args(args), trained_parts(args.trained_part)
    path = os.path.expanduser(default_model_path(args.model_path))
    name = get_model_name_from_path(path)
    from .engine import Engine

    if args.use_flash_attn:
        args.attn_implementation = "flash_attention_2"
    with redirect_stderr(StreamToLogger(logger, logging.INFO)):  # notes; errors are raised
        tokenizer, model, image_processor = load_from_args(args, path, name, pruner)
    engine = Engine(
        tokenizer,
        model,
        image_processor,
        args.model_name or name,
        concurrency(args),
        folders=folders,
        checkpoint=name,
    )
    logger.info("%s", engine.conv_mode)
    return engine


def concurrency(args) -> int:
    """How many requests are answered at the same time."""
    if args.limit_model_concurrency is not None:
        return args.limit_model_concurrency
    return CONCURRENCY_OF_ENGINE if getattr(args, "engine", None) else CONCURRENCY


def trained_parts(pairs: list[str]) -> dict[str, str]:
    """method -> folder, from METHOD=FOLDER. Raises ValueError where there is no such method."""
    found = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not folder:
            raise ValueError(f"--trained-part {pair!r} must have the form METHOD=FOLDER")
        folder_option(name)
        found[name] = os.path.expanduser(folder)
    return found


def own_address(args) -> str:
    """How others call this worker. Raises ValueError where --host does not say it."""
    if args.worker_address is not None:
        return checked_address(args.worker_address, "--worker-address", path=False)
    if args.port == 0:
        raise ValueError(
            "--port 0 is any free port, which the controller cannot be told: name one, or the "
            "address that leads there with --worker-address"
        )
    if args.host in ("0.0.0.0", "::"):
        raise ValueError(
            f"--host {args.host} is no address that the controller could call: name one with "
            f"--worker-address http://NAME:{args.port}"
        )
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"http://{host}:{args.port}"


def run_worker(args, load_backend) -> None:
    """Loads what answers, then serves it until the process is stopped."""
    if concurrency(args) < 1 or args.max_queue < 0:
        raise ValueError("--limit-model-concurrency must be at least 1, --max-queue at least 0")
    token = read_token(args.token_file)
    check_exposure(args.host, token)
    heart_beat = None
    if not args.no_register:
        controller = checked_address(args.controller_address, "--controller-address")
        heart_beat = HeartBeat(controller, own_address(args), dict, token)
    check_place(args.host, args.port)
    set_up_logging(f"model_worker_{new_request_id()[:6]}.log", args.log_dir)
    backend = load_backend(args)
    places = Places(concurrency(args) + args.max_queue)
    logger.info("serving %s", backend.model_name)
    serve(worker_app(backend, places, token, heart_beat), args.host, args.port)


@errors_as_messages()
def main() -> None:
    args = build_parser().parse_args()
    if args.multi_modal:
        logger.warning("--multi-modal has no effect: the checkpoint says what it can do")
    run_worker(args, load_engine)


if __name__ == "__main__":
    main()
