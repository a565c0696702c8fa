"""What the answering programs share: their options, the model they load, a run from questions to
answers."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial

from llava.conv_mode import resolve_conv_mode
from llava.engine.options import add_engine_args
from llava.eval.answering.engine_loop import EngineLoop
from llava.eval.answering.loop import AnswerLoop
from llava.eval.answering.questions import Question, get_chunk, questions_of, subset
from llava.eval.answering.run import Task, answer_questions
from llava.eval.answering.settings import settings_of
from llava.eval.answering.workers import Workers
from llava.front_end import FrontEnd
from llava.mm_utils import get_model_name_from_path
from llava.model_args import add_model_args, load_from_args
from llava.program_parser import ProgramParser
from llava.pruning.cli import add_pruning_args, pruner_from_args
from llava.weight_files import local_folder


def build_parser(
    description: str,
    question_file: str = "tables/question.jsonl",
    max_new_tokens: int = 1024,
) -> argparse.ArgumentParser:
    """Returns the options that all answering programs share, with a program's own defaults."""
    parser = ProgramParser(description)
    add_model_args(parser)
    group = parser.add_argument_group("questions and answers")
    group.add_argument("--image-folder", "--image_folder", default="")
    group.add_argument("--question-file", "--question_file", default=question_file)
    group.add_argument("--answers-file", "--answers_file", default="answer.jsonl")
    group.add_argument("--overwrite", action="store_true", help="discard answers already there")
    group.add_argument("--num-chunks", "--num_chunks", type=int, default=1)
    group.add_argument("--chunk-idx", "--chunk_idx", type=int, default=0)
    group.add_argument("--follow", action="store_true", help="print answers as they come")
    group.add_argument("--limit", type=int, help="about so many questions, evenly spread")
    group.add_argument(
        "--save-masks",
        "--save_masks",
        action="store_true",
        help="write what was kept of each image as a picture, one pixel per token",
    )
    add_speed_args(group)
    add_image_args(group)

    group = parser.add_argument_group("generation")
    group.add_argument(
        "--conv-mode",
        "--conv_mode",
        default="auto",
        help="prompt template (default: auto, what the checkpoint says of itself)",
    )
    group.add_argument("--temperature", type=float, default=0.2)
    group.add_argument("--top_p", "--top-p", type=float)
    group.add_argument("--num_beams", "--num-beams", type=int, default=1)
    group.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=max_new_tokens)
    add_pruning_args(parser)
    add_engine_args(parser)
    add_engine_requests(parser)
    return parser


def add_engine_requests(parser) -> None:
    """Adds the option of programs with an answer loop beside those of `add_engine_args`."""
    parser.add_argument(
        "--engine-requests",
        "--engine_requests",
        type=int,
        default=EngineLoop.engine_requests,
        help="questions that are under way in the server at the same time",
    )


def add_speed_args(parser, batch_size: int = 1) -> None:
    """Adds the options that change how fast answers come, and not what they are."""
    parser.add_argument("--batch-size", "--batch_size", type=int, default=batch_size)
    parser.add_argument("--workers", type=int, default=4, help="threads that prepare images")
    parser.add_argument(
        "--reuse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute what the questions about one image share once",
    )
    parser.add_argument(
        "--skip-bad",
        "--skip_bad",
        action="store_true",
        help="record a question that cannot be answered as failed, and go on",
    )


def add_image_args(parser) -> None:
    """Adds the option that says how images are read."""
    parser.add_argument(
        "--upright-images",
        "--upright_images",
        action="store_true",
        help="turn images upright as their EXIF data say and put transparent ones on white; "
        "published results did neither",
    )


def load_loop(args) -> AnswerLoop:
    """Returns the answer loop around the model that the options name, wherever its language model
    runs.

    args.pruner, when there is one, is the method in use; options of `AnswerLoop` that args lacks
    have their defaults.
    """
    pruner = getattr(args, "pruner", None)
    loaded = load_from_args(args, args.model_path, args.model_name, pruner)
    front = FrontEnd(*loaded, args.conv_mode)
    kind = AnswerLoop if front.model.engine is None else EngineLoop
    given = {field.name for field in fields(kind)} & vars(args).keys()
    options = {name: getattr(args, name) for name in given}
    return kind(front, **options)


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line; fills in the playground, the model's name, template and pruner."""
    args = parser.parse_args()
    if args.model_path is None:
        from llava.playground import default_model_path

        args.model_path = default_model_path()
    args.model_path = os.path.expanduser(args.model_path)
    args.question_file = os.path.expanduser(args.question_file)
    args.model_name = get_model_name_from_path(args.model_path)
    args.conv_mode = resolve_conv_mode(
        args.conv_mode, args.model_name, args.model_path, args.model_base
    )
    args.pruner = pruner_from_args(args)
    return args


def use_playground_questions(parser, args, questions: str, images: str) -> None:
    """Fills in the playground's questions when none were given and the default is not there."""
    default = parser.get_default("question_file")
    if args.question_file != default or os.path.exists(default):
        return
    from llava.playground import benchmark_dir

    args.question_file = os.path.join(benchmark_dir(), questions)
    args.image_folder = args.image_folder or os.path.join(benchmark_dir(), images)
    print(f"no question file given: using {args.question_file}", file=sys.stderr)


def run(
    args,
    records: list[dict],
    to_questions: Callable[[dict], Iterator[Question]],
    together: Callable[[dict], object] | None = None,
) -> bool:
    """Answers the questions of this process's chunk of `records` into `args.answers_file`. Returns
    whether this process is the one that speaks for all of the run.

    together: record -> what it shares with those it must not be parted from by a limit

    Processes that were started together (`accelerate launch`) share the chunk.
    """
    records = get_chunk(subset(records, args.limit, together), args.num_chunks, args.chunk_idx)
    questions = questions_of(records, to_questions, args.skip_bad)
    args.model_path = local_folder(args.model_path)
    path = os.path.expanduser(args.answers_file)
    task = Task(
        questions,
        os.path.expanduser(args.image_folder),
        path,
        args.model_name,
        settings_of(args, args.pruner),
        follow=args.follow,
        masks=args.save_masks,
    )
    workers = Workers.from_environment()
    args.device = args.device or workers.device()
    done = answer_questions(
        task, partial(load_loop, args), args.batch_size, args.reuse, args.overwrite, workers
    )
    if done.num_before and workers.main:
        print(f"{path}: {done.num_before} of {len(task.questions)} answers were there already")
    if done.num_failed and workers.main:
        print(
            f"{path}: {done.num_failed} of {len(task.questions)} questions failed; the same "
            "command asks them again",
            file=sys.stderr,
        )
    return workers.main
