"""Answers the questions of a benchmark, in batches; an interrupted run continues where it stopped.

python -m llava.eval.model_vqa_loader --model-path llava-v1.5-7b --question-file Q.jsonl \
    --image-folder DIR --answers-file A.jsonl --temperature 0 --conv-mode vicuna_v1

Without a model and a question file, the playground's are used.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator

import shortuuid
import torch
from tqdm import tqdm

from llava.conversation import conv_templates
from llava.eval.answer_loop import AnswerLoop
from llava.eval.answers import AnswersFile, fingerprint
from llava.eval.errors import errors_as_messages
from llava.eval.tasks import Question, get_chunk, jsonl_questions, read_jsonl, subset
from llava.mm_utils import get_model_name_from_path, infer_conv_mode
from llava.pruning.cli import add_pruning_args, pruner_from_args

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build_parser(
    description: str,
    question_file: str = "tables/question.jsonl",
    conv_mode: str = "llava_v1",
    max_new_tokens: int = 1024,
) -> argparse.ArgumentParser:
    """Returns the options that all answering programs share, with a program's own defaults."""
    parser = argparse.ArgumentParser(description=description)
    group = parser.add_argument_group("model")
    group.add_argument("--model-path", "--model_path", help="default: the playground checkpoint")
    group.add_argument("--model-base", "--model_base", help="for partial checkpoints")
    group.add_argument("--vision-tower", "--vision_tower", help="replaces the checkpoint's own")
    group.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    group.add_argument("--dtype", choices=sorted(DTYPES), help="default: what suits the device")
    group.add_argument("--load-8bit", "--load_8bit", action="store_true")
    group.add_argument("--load-4bit", "--load_4bit", action="store_true")
    group.add_argument("--attn-implementation", "--attn_implementation")

    group = parser.add_argument_group("questions and answers")
    group.add_argument("--image-folder", "--image_folder", default="")
    group.add_argument("--question-file", "--question_file", default=question_file)
    group.add_argument("--answers-file", "--answers_file", default="answer.jsonl")
    group.add_argument("--overwrite", action="store_true", help="discard answers already there")
    group.add_argument("--num-chunks", "--num_chunks", type=int, default=1)
    group.add_argument("--chunk-idx", "--chunk_idx", type=int, default=0)
    group.add_argument("--limit", type=int, help="about so many questions, evenly spread")
    group.add_argument("--batch-size", "--batch_size", type=int, default=1)
    group.add_argument("--workers", type=int, default=4, help="threads that prepare images")

    group = parser.add_argument_group("generation")
    group.add_argument(
        "--conv-mode", "--conv_mode", default=conv_mode, help="prompt template; auto: by model name"
    )
    group.add_argument("--temperature", type=float, default=0.2)
    group.add_argument("--top_p", "--top-p", type=float)
    group.add_argument("--num_beams", "--num-beams", type=int, default=1)
    group.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=max_new_tokens)
    add_pruning_args(parser)
    return parser


def resolve_conv_mode(conv_mode: str, model_name: str) -> str:
    """Returns the template name; raises ValueError on an unknown one.

    "auto" goes by the model's name. Checkpoints named "plain" were trained with the `_mmtag`
    variant of their template.
    """
    if conv_mode == "auto":
        conv_mode = infer_conv_mode(model_name)
    plain = "plain" in model_name and "finetune" not in model_name.lower()
    if plain and "mmtag" not in conv_mode:
        conv_mode += "_mmtag"
        print(f"{model_name} looks like a plain model: using the conv mode {conv_mode}")
    if conv_mode not in conv_templates:
        names = ", ".join(conv_templates)
        raise ValueError(f"unknown conv mode {conv_mode!r}, choose from auto, {names}")
    return conv_mode


def run(args, records: list[dict], to_questions: Callable[[dict], Iterator[Question]]) -> None:
    """Answers the questions of this process's chunk of `records` into `args.answers_file`."""
    records = get_chunk(subset(records, args.limit), args.num_chunks, args.chunk_idx)
    questions = [question for record in records for question in to_questions(record)]
    path = os.path.expanduser(args.answers_file)
    heads = [question.head for question in questions]
    with AnswersFile(path, heads, settings_of(args), args.overwrite) as answers:
        remaining = questions[answers.num_done :]
        if answers.num_done:
            print(f"{path}: {answers.num_done} of {len(questions)} answers are there already")
        if remaining:
            loop = load(args)
            with tqdm(total=len(questions), initial=answers.num_done, unit=" answers") as progress:
                for batch, texts in loop.answer(remaining, os.path.expanduser(args.image_folder)):
                    answers.write(
                        [
                            question.answer_line(text, shortuuid.uuid(), args.model_name)
                            for question, text in zip(batch, texts, strict=True)
                        ]
                    )
                    if loop.visual_tokens and not progress.postfix:
                        entering, mean = loop.visual_tokens
                        progress.set_postfix_str(f"visual tokens {entering:g}, mean {mean:.1f}")
                    progress.update(len(batch))


def load(args) -> AnswerLoop:
    """Returns the answer loop around the model that the options name."""
    from llava.model.builder import load_pretrained_model

    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        args.model_name,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        device=args.device,
        torch_dtype=DTYPES.get(args.dtype),
        attn_implementation=args.attn_implementation,
        pruner=args.pruner,
        vision_tower=args.vision_tower,
    )
    if image_processor is None:
        raise ValueError(f"{args.model_path} has no vision tower: it cannot look at images")
    return AnswerLoop(
        tokenizer,
        model,
        image_processor,
        args.conv_mode,
        args.batch_size,
        args.workers,
        args.max_new_tokens,
        args.temperature,
        args.top_p,
        args.num_beams,
    )


def settings_of(args) -> dict:
    """Returns what must agree for two runs to continue each other."""
    names = ("model_base", "vision_tower", "conv_mode", "temperature", "top_p", "num_beams")
    names += ("max_new_tokens", "dtype", "load_8bit", "load_4bit")
    names += ("single_pred_prompt", "lang")  # some programs only; they change what the model reads
    settings = {name: getattr(args, name, None) for name in names}
    return settings | {
        "model": args.model_name,
        "weights": fingerprint(args.model_path),
        "pruner": repr(args.pruner),
    }


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line; fills in the playground, the model's name, template and pruner."""
    args = parser.parse_args()
    if args.model_path is None:
        from llava.playground import default_model_path

        args.model_path = default_model_path()
        if args.conv_mode == parser.get_default("conv_mode"):
            args.conv_mode = "auto"
    args.model_path = os.path.expanduser(args.model_path)
    args.question_file = os.path.expanduser(args.question_file)
    args.model_name = get_model_name_from_path(args.model_path)
    args.conv_mode = resolve_conv_mode(args.conv_mode, args.model_name)
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


@errors_as_messages()
def main():
    parser = build_parser(__doc__.splitlines()[0], max_new_tokens=128)
    args = parse_args(parser)
    use_playground_questions(parser, args, "textvqa/llava_textvqa_val_v051_ocr.jsonl", "images")
    run(args, read_jsonl(args.question_file, ("question_id", "text")), jsonl_questions)


if __name__ == "__main__":
    main()
