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
from llava.model_args import (
    add_conv_mode_arg,
    add_length_arg,
    add_model_args,
    add_sampling_args,
    load_from_args,
)
from llava.playground import benchmark_dir, default_model_path
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
    group.add_argument("--image-folder", default="", metavar="DIR", help="folder of the images")
    group.add_argument("--question-file", default=question_file, help="file of the questions")
    group.add_argument(
        "--answers-file",
        default="answer.jsonl",
        help="file of the answers; one that was interrupted is continued",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="discard the answers that are there and begin anew"
    )
    group.add_argument(
        "--num-chunks",
        type=int,
        default=1,
        help="number of parts the questions are split into; this process answers one of them",
    )
    group.add_argument(
        "--chunk-idx",
        type=int,
        default=0,
        help="number of the part that this process answers, from 0 on",
    )
    group.add_argument("--follow", action="store_true", help="print answers as they come")
    group.add_argument("--limit", type=int, help="about so many of the questions, evenly spread")
    group.add_argument(
        "--save-masks",
        action="store_true",
        help="write what was kept of each image as a picture, one pixel per token",
    )
    add_speed_args(group)
    add_image_args(group)

    group = parser.add_argument_group("generation")
    add_conv_mode_arg(group, "auto")
    add_sampling_args(group)
    add_length_arg(group, max_new_tokens)
    add_pruning_args(parser)
    add_engine_args(parser)
    add_engine_requests(parser)
    return parser


def add_engine_requests(parser) -> None:
    """Adds the option of programs with an answer loop beside those of `add_engine_args`."""
    parser.add_argument(
        "--engine-requests",
        type=int,
        default=EngineLoop.engine_requests,
        help="questions that are under way in the server at the same time",
    )


def add_speed_args(parser, batch_size: int = 1) -> None:
    """Adds the options that change how fast answers come, and not what they are."""
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, help="prompts that are answered at a time"
    )
    parser.add_argument("--workers", type=int, default=4, help="threads that prepare images")
    parser.add_argument(
        "--reuse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute only once what several questions about an image have in common",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="record a question that cannot be answered as failed and go on with the next",
    )


def add_image_args(parser) -> None:
    """Adds the option that says how images are read."""
    parser.add_argument(
        "--upright-images",
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
    args.model_path = os.path.expanduser(default_model_path(args.model_path))
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

    args.question_file = os.path.join(benchmark_dir(), questions)
    args.image_folder = args.image_folder or os.path.join(benchmark_dir(), images)
    print(f"no question file given: using {args.question_file}", file=sys.stderr)


def say_without_images(records: list[dict], questions: list[Question]) -> None:
    """Says on stderr when no question has an image, as that is rarely what was meant."""
    if questions and not any(question.images or question.error for question in questions):
        place = getattr(records, "path", "the question file")
        fields = ", ".join(map(repr, records[0]))
        print(
            f"note: none of the {len(questions)} questions of {place} has an image, so all are "
            f"asked as text; the records have the fields {fields}",
            file=sys.stderr,
        )


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
    say_without_images(records, questions)
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
