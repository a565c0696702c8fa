"""Shows answers files side by side in a web page, with images, boxes and the tokens that were kept.

python -m llava.eval.browse A.jsonl [B.jsonl ...]

The files are those of any benchmark here; where they lie as the scripts put them, questions and
images are found. Kept tokens are shown where the answering program was told to `--save-masks`,
scores where a judge has scored the file or the right answers are there.
"""

from __future__ import annotations

import argparse
import os

from llava.errors import errors_as_messages
from llava.eval.browse.runs import Run, find_source
from llava.gradio_pages import load_gradio, no_proxy_for
from llava.program_parser import ProgramParser

LOCAL = "127.0.0.1"


def build_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(__doc__)
    parser.add_argument("files", nargs="+", help="answers files; the first two are shown first")
    parser.add_argument(
        "--benchmark", help="name of the benchmark (default: by the files' folders)"
    )
    parser.add_argument("--data-dir", help="folder of its data (default: where the files lie)")
    parser.add_argument(
        "--question-file",
        help="file of the questions (default: the benchmark's, in the data folder)",
    )
    parser.add_argument(
        "--image-folder",
        help="folder of the images (default: the benchmark's); no other files are shown",
    )
    parser.add_argument(
        "--host",
        default=LOCAL,
        help="address of the page (default: one that this machine alone can see)",
    )
    parser.add_argument("--port", type=int, default=7861, help="port of the page")
    return parser


def read_runs(args) -> dict[str, Run]:
    """The files by what they are called on the page."""
    runs: dict[str, Run] = {}
    options = (args.benchmark, args.data_dir, args.question_file, args.image_folder)
    for path in dict.fromkeys(map(os.path.expanduser, args.files)):
        run = Run.read(path, find_source(path, *options))
        runs[run.name if run.name not in runs else path] = run
    return runs


def launch(args):
    """Starts the page in threads of its own; returns (gradio application, address)."""
    load_gradio("the page")
    from llava.eval.browse.page import CSS, THEME, Page

    no_proxy_for(args.host)
    blocks = Page(read_runs(args)).blocks
    _, address, _ = blocks.launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        allowed_paths=[],
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        css=CSS,
        theme=THEME,
    )
    return blocks, address


@errors_as_messages()
def main() -> None:
    blocks, address = launch(build_parser().parse_args())
    print(f"The page is at {address}", flush=True)
    try:
        blocks.block_thread()
    finally:
        blocks.close(verbose=False)


if __name__ == "__main__":
    main()
