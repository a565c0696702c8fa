"""Questions per second: one by one, in batches, and in batches that share what their image needs.

python -m llava.eval.efficiency.throughput --methods none vispruner fastv --visual-token-num 64
python -m llava.eval.efficiency.throughput --config 7b --device cuda --batch-size 30
python -m llava.eval.efficiency.throughput --config qwen2.5-vl-3b --layers 8 --max-pixels 451584

Without a checkpoint the model has random weights; without questions, those of the playground's GQA
are asked, as many about an image as in GQA. The ways take turns on every image, so that a machine
that is busy with other things slows all of them down alike. Loading is not counted; decoding and
preparing images is.
"""

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from itertools import count

import torch

from llava.errors import errors_as_messages
from llava.eval import markdown
from llava.eval.answering.loop import AnswerLoop
from llava.eval.answering.program import load_loop
from llava.eval.answering.questions import Question, jsonl_questions
from llava.eval.answering.run import plan_shares
from llava.eval.efficiency.arguments import (
    add_layers_arg,
    add_question_args,
    check_layers,
    fill_in_questions,
    placed,
)
from llava.eval.efficiency.measure import with_budget
from llava.eval.efficiency.random_model import CONFIGS, build_random_model, shapes
from llava.eval.files.records import read_jsonl
from llava.eval.files.writing import write_json
from llava.front_end import FrontEnd
from llava.model.multimodal_encoder.qwen2_5_vl_images import Qwen2_5_VLImageProcessor
from llava.model_args import PIXELS, add_model_args
from llava.playground import default_model_path
from llava.program_parser import ProgramParser, Several
from llava.progress import progress
from llava.pruning.cli import method_name

QUESTIONS = "gqa/llava_gqa_testdev_balanced.jsonl"
#: sizes for a busy CPU, behind the tower of the playground: width, inner width, layers, heads
MODERATE = (384, 1056, 6, 6)
PLAIN, BATCHED, REUSED = "one by one", "batched", "batched + reuse"


@dataclass
class Speed:
    """One way of answering with one method.

    per_second:    questions per second, median over the images
    times_plain:   how many times faster than one by one, median over the images
    cpu_times:     the same by the processor time of this program, which other programs that run
                   meanwhile hardly change; says nothing about work on a GPU
    same_as_plain: share of answers equal to those one by one, in percent
    """

    method: str
    way: str
    per_second: float
    times_plain: float
    cpu_times: float
    same_as_plain: float


def measure(
    loop: AnswerLoop, groups: list[list[Question]], images: str, method: str, batch_size: int
) -> list[Speed]:
    """Returns the speed of every way on `groups`, each the questions about one image."""
    ways = {PLAIN: (1, False), BATCHED: (batch_size, False), REUSED: (batch_size, True)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    same = dict.fromkeys(ways, 0)
    for size, reuse in ways.values():  # whatever happens once only
        answer(loop, groups[0][: 2 * size], images, size, reuse)
    for group in progress(groups, method, "images"):
        texts = {}
        for way, (size, reuse) in ways.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            texts[way] = answer(loop, group, images, size, reuse)
            seconds[way].append(time.perf_counter() - start)
            cpu[way].append(time.process_time() - cpu_start)
            same[way] += sum(a == b for a, b in zip(texts[way], texts[PLAIN], strict=True))
    total = sum(len(group) for group in groups)
    return [
        Speed(
            method,
            way,
            statistics.median(len(g) / s for g, s in zip(groups, seconds[way], strict=True)),
            median_ratio(seconds[PLAIN], seconds[way]),
            median_ratio(cpu[PLAIN], cpu[way]),
            100 * same[way] / total,
        )
        for way in ways
    ]


def median_ratio(times: list[float], others: list[float]) -> float:
    """Returns the median of how many times longer `times` are than `others`, pair by pair."""
    return statistics.median(a / max(b, 1e-9) for a, b in zip(times, others, strict=True))


def answer(loop: AnswerLoop, questions, images: str, batch_size: int, reuse: bool) -> list[str]:
    """Returns the answers in question order."""
    loop.reuse = reuse
    shares = plan_shares(questions, batch_size, by_image=reuse)
    batches = [batch for share in shares for batch in share]
    texts = {}
    for numbers, found in loop.run(((b, [questions[n] for n in b]) for b in batches), images):
        texts.update(zip(numbers, (answer.text for answer in found), strict=True))
    return [texts[number] for number in range(len(questions))]


def arranged(questions: list[Question], num_images: int, per_image: int) -> list[list[Question]]:
    """Returns `per_image` questions about each of the first images, taken in order."""
    images = list(dict.fromkeys(image for question in questions for image in question.images))
    if num_images > len(images):
        raise ValueError(f"there are {len(images)} images, not {num_images}")
    texts = [questions[n % len(questions)].text for n in range(num_images * per_image)]
    return [
        [
            Question({"question_id": n}, text, [image])
            for n, text in zip(count(), texts[i * per_image : (i + 1) * per_image], strict=False)
        ]
        for i, image in enumerate(images[:num_images])
    ]


def random_loop(args) -> AnswerLoop:
    """Returns a loop around a model of random weights that reads the playground's prompts."""
    bounds = dict.fromkeys(PIXELS)  # those are of the model with random weights
    given = argparse.Namespace(**vars(args) | {"model_path": default_model_path()} | bounds)
    playground = load_loop(given)
    config, tower = shapes(default_model_path() if args.config == "moderate" else args.config)
    if args.config == "moderate":
        config.hidden_size, config.intermediate_size = MODERATE[:2]
        config.num_hidden_layers, config.num_attention_heads = MODERATE[2:]
        config.num_key_value_heads = config.num_attention_heads
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    config.vocab_size = playground.model.config.vocab_size
    model = build_random_model(config, tower, **placed(args))
    model.compile_decoding = args.compile
    options = {"workers": args.workers, "max_new_tokens": args.max_new_tokens}
    processor = image_processor_of(model, args)
    front = FrontEnd(playground.front.tokenizer, model, processor, args.conv_mode)
    return AnswerLoop(front, **options)


def image_processor_of(model, args):
    """What prepares images for a model of random weights."""
    tower = model.get_vision_tower()
    if tower.grid is not None:
        return tower.image_processor
    bounds = {name: getattr(args, name) for name in PIXELS if getattr(args, name) is not None}
    return Qwen2_5_VLImageProcessor(**bounds)


def table(speeds: list[Speed]) -> str:
    """Returns the speeds as a Markdown table."""
    head = ["method", "way", "questions/s", "times one by one", "by processor time"]
    rows = []
    for s in speeds:
        numbers = f"{s.per_second:.2f} {s.times_plain:.1f} {s.cpu_times:.1f} {s.same_as_plain:.0f}"
        rows.append([s.method, s.way, *numbers.split()])
    return markdown.table([*head, "same answers, %"], rows)


def parse_args() -> argparse.Namespace:
    parser = ProgramParser(__doc__)
    add_model_args(parser)
    parser.add_argument(
        "--config",
        default="moderate",
        help="sizes of random weights when there is no --model-path: moderate, "
        f"{', '.join(CONFIGS)}, or the folder of a checkpoint",
    )
    add_layers_arg(parser)
    parser.add_argument(
        "--methods",
        action=Several,
        default=["none"],
        type=method_name,
        metavar="METHOD",
        help="methods to measure",
    )
    parser.add_argument(
        "--visual-token-num", type=int, help="token budget per image (default: each method's own)"
    )
    add_question_args(parser, QUESTIONS)
    parser.add_argument("--images", type=int, default=5, help="images that are asked about")
    parser.add_argument("--per-image", type=int, default=30, help="questions about each image")
    parser.add_argument("--batch-size", type=int, default=15, help="prompts at a time")
    parser.add_argument("--workers", type=int, default=4, help="threads that prepare images")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=3,
        help="tokens of an answer; random weights write exactly so many",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    check_layers(args.layers)
    if args.layers and args.model_path:
        parser.error("--layers is for random weights: name their --config, not a --model-path")
    fill_in_questions(args, QUESTIONS)  # random weights read the playground's prompts
    return args


@errors_as_messages()
def main():
    args = parse_args()
    records = read_jsonl(args.question_file, ("question_id", "text"))
    questions = [question for record in records for question in jsonl_questions(record)]
    groups = arranged(questions, args.images, args.per_image)
    loop = load_loop(args) if args.model_path else random_loop(args)
    speeds = []
    for method in args.methods:
        loop.model.pruner = with_budget(method, args.visual_token_num)
        speeds += measure(loop, groups, args.image_folder, method, args.batch_size)
        print(f"{method}: {speeds[-1].times_plain:.1f} times", file=sys.stderr, flush=True)
    print(
        f"{len(groups)} images, {args.per_image} questions each, batches of {args.batch_size}, "
        f"{loop.model.device}, {loop.model.dtype}, torch {torch.__version__}\n"
    )
    print(table(speeds))
    if args.json:
        result = {"settings": vars(args), "speeds": [asdict(s) for s in speeds]}
        write_json(result, args.json, indent=1)


if __name__ == "__main__":
    main()
