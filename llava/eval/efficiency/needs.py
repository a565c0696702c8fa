"""Memory and time that a model needs to answer, by formula: nothing is downloaded or loaded.

    python -m llava.eval.efficiency.needs                             # the published models
    python -m llava.eval.efficiency.needs 7b next-7b --batch-size 8
    python -m llava.eval.efficiency.needs CHECKPOINT --tflops 990 --bandwidth 3350

Memory is that of the weights, in 16 bits and as bitsandbytes packs the decoder in 8 and 4, of the
cache, and of the widest layer at work. Not counted: CUDA itself (about 1 GB) and what the allocator
loses to fragments; leave a tenth free. Times are the least that the operations and the bytes take
on a device. Real ones are longer, and `python -m llava.eval.efficiency` measures them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from llava.errors import errors_as_messages
from llava.eval.efficiency.bandwidth import weight_bytes
from llava.eval.efficiency.random_model import CONFIGS, empty_model, shapes
from llava.eval.markdown import publish, table
from llava.model.quantization import quantizable
from llava.playground import default_model_path
from llava.program_parser import ProgramParser, Several
from llava.pruning import build_pruner
from llava.pruning.cost import DecoderShape, kv_cache_bytes, prefill_flops

GB, HALF = 1e9, 2  # bytes
#: bytes per weight of a packed matrix, and per row of it. 8 bits: a float32 scale per row; 4 bits:
#: a byte per block of 64, which has a float32 scale per 256 of them
PACKED = {8: (1, 4), 4: (0.5 + 1 / 64 + 4 / (64 * 256), 0)}
#: a published model of each size
PUBLISHED = {
    "7b": "llava-v1.5-7b",
    "13b": "llava-v1.5-13b",
    "next-7b": "llava-v1.6-vicuna-7b",
    "next-13b": "llava-v1.6-vicuna-13b",
    "next-mistral-7b": "llava-v1.6-mistral-7b",
    "qwen2.5-vl-3b": "Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen2.5-VL-7B-Instruct",
}
#: of an image of 672 x 672 pixels, where images have grids of their own: tokens, patches of each
QWEN_TOKENS, QWEN_PATCHES = 576, 4
#: the share that is kept in the last columns: 64 of 576, 320 of 2880
SHARE = 1 / 9
QUESTIONS = 1000
#: GB of common GPUs, those that CUDA itself takes, and the share that is used at most
GPUS, CUDA, USED = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141), 1, 0.9
MARK = "needs"


@dataclass(frozen=True)
class Needs:
    """What one model needs.

    parameters:     of all its parts
    weights:        bits -> bytes
    tower:          parameters that every patch goes through
    patches:        of one image, in all its crops
    visual_tokens:  of one image, without pruning
    decoder_bytes:  read for every new token, in 16 bits
    shape:          of the decoder
    """

    parameters: int
    weights: dict[int, float]
    tower: int
    patches: int
    visual_tokens: int
    decoder_bytes: int
    shape: DecoderShape

    @classmethod
    def of(cls, name: str) -> Needs:
        """name: one of `CONFIGS`, or a folder with a checkpoint, whose weights are not read.
        Raises ValueError for others."""
        config, tower_config = shapes(name)
        model = empty_model(config, tower_config)
        if config.tie_word_embeddings:
            model.tie_weights()
        tower = model.get_vision_tower()
        if tower.grid is None:
            tokens, patches = QWEN_TOKENS, QWEN_TOKENS * QWEN_PATCHES
        else:
            tokens = patches = tower.num_patches * model.crops_in_budget(build_pruner())
        count = sum(weight.numel() for weight in model.parameters())
        matrices = [linear.weight for *_, linear in quantizable(model)]
        rest = HALF * (count - sum(matrix.numel() for matrix in matrices))
        weights = {16: HALF * count}
        for bits, (each, row) in PACKED.items():
            weights[bits] = rest + sum(each * m.numel() + row * len(m) for m in matrices)
        return cls(
            parameters=count,
            weights=weights,
            tower=sum(weight.numel() for weight in tower.parameters()),
            patches=patches,
            visual_tokens=tokens,
            decoder_bytes=HALF * weight_bytes(model) // model.dtype.itemsize,
            shape=DecoderShape.from_config(config),
        )

    @property
    def kept(self) -> int:
        """Tokens of an image at the share of the last columns."""
        return round(self.visual_tokens * SHARE)

    def working_bytes(self, visual: int, text: int, batch: int) -> int:
        """Bytes of the cache of `batch` prompts with so many tokens in every layer, and of all that
        one layer keeps while it works on them."""
        tokens = batch * (visual + text)
        inside = HALF * tokens * (8 * self.shape.hidden_size + 3 * self.shape.intermediate_size)
        return kv_cache_bytes(self.shape, tokens * self.shape.num_layers) + inside

    def gpu(self, bits: int, working: float) -> str:
        """GB of the smallest common GPU that holds the model and `working` bytes."""
        needed = (self.weights[bits] + working) / GB + CUDA
        return str(next((size for size in GPUS if needed <= USED * size), "several"))

    def first_token(self, visual: int, text: int, flops: float, bandwidth: float) -> float:
        """Seconds from pixels to the first token of one prompt, at least. A part is bound by its
        operations or by reading its weights, whichever takes longer."""
        decoder = prefill_flops(self.shape, [visual + text] * self.shape.num_layers)
        parts = ((2 * self.tower * self.patches, HALF * self.tower), (decoder, self.decoder_bytes))
        return sum(max(work / flops, read / bandwidth) for work, read in parts)

    def next_token(self, visual: int, text: int, bandwidth: float) -> float:
        """Seconds of every further token, at least: weights and cache are read once."""
        cache = kv_cache_bytes(self.shape, (visual + text) * self.shape.num_layers)
        return (self.decoder_bytes + cache) / bandwidth


def memory_table(found: dict[str, Needs], args: argparse.Namespace) -> str:
    head = ["size", "for example", "billion weights"]
    head += [f"{bits} bits, GB" for bits in (16, 8, 4)]
    head += ["cache and work, GB (visual tokens)", "with a ninth of the tokens"]
    head += ["smallest GPU, GB: 16, 8, 4 bits"]
    lines = []
    for name, needs in found.items():
        cells = [f"`{name}`", PUBLISHED.get(name, ""), f"{needs.parameters / 1e9:.2f}"]
        cells += [f"{needs.weights[bits] / GB:.1f}" for bits in (16, 8, 4)]
        for visual in (needs.visual_tokens, needs.kept):
            extra = needs.working_bytes(visual, args.prompt_length, args.batch_size)
            cells.append(f"{extra / GB:.2f} ({visual})")
        whole = needs.working_bytes(needs.visual_tokens, args.prompt_length, args.batch_size)
        cells.append(", ".join(needs.gpu(bits, whole) for bits in (16, 8, 4)))
        lines.append(cells)
    return table(head, lines, "llr")


def time_table(found: dict[str, Needs], args: argparse.Namespace) -> str:
    head = ["size", "first token, ms", "each further, ms", "with a ninth: first", "each further"]
    head += [f"{QUESTIONS} answers of {args.output_tokens} tokens, minutes", "with a ninth"]
    flops, bandwidth, text = args.tflops * 1e12, args.bandwidth * GB, args.prompt_length
    lines = []
    for name, needs in found.items():
        cells, whole = [], []
        for visual in (needs.visual_tokens, needs.kept):
            first = needs.first_token(visual, text, flops, bandwidth)
            further = needs.next_token(visual, text, bandwidth)
            cells += [f"{1e3 * first:.0f}", f"{1e3 * further:.1f}"]
            seconds = QUESTIONS * (first + (args.output_tokens - 1) * further)
            whole.append(f"{seconds / 60:.1f}")
        lines.append([f"`{name}`", *cells, *whole])
    return table(head, lines, "lr")


def report(names: Sequence[str], args: argparse.Namespace) -> str:
    """Markdown: memory, time, and what the numbers are about."""
    paths = {name: default_model_path() if name == "playground" else name for name in names}
    found = {name: Needs.of(path) for name, path in paths.items()}
    prompts = "one prompt" if args.batch_size == 1 else f"{args.batch_size} prompts"
    return (
        f"{memory_table(found, args)}\n\n"
        f"Cache and work: of {prompts} with one image and {args.prompt_length} text tokens each. "
        f"Smallest GPU: with all tokens, {CUDA} GB for CUDA, and a tenth left free.\n"
        f"\n{time_table(found, args)}\n\n"
        f"At best, one prompt after the other in 16 bits, on a device with {args.tflops:g} TFLOP/s "
        f"and {args.bandwidth:g} GB/s; choosing tokens and preparing images not counted.\n"
    )


def positive(kind: type, text: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ProgramParser(__doc__, whole=True)
    parser.add_argument(
        "models",
        nargs="*",
        action=Several,
        default=[],
        metavar="MODEL",
        help=f"{', '.join(CONFIGS)}, playground, or a folder with a checkpoint (default: the "
        "published ones)",
    )
    count, number = partial(positive, int), partial(positive, float)
    text = "text tokens per prompt, those of the answer included (default: 64)"
    parser.add_argument("--prompt-length", type=count, default=64, help=text)
    parser.add_argument(
        "--batch-size", type=count, default=1, help="prompts at a time (default: 1)"
    )
    tokens = "tokens of every answer, for the times"
    parser.add_argument("--output-tokens", type=count, default=3, help=tokens)
    tflops = "TFLOPS of the device in half precision (default: 312, an A100)"
    parser.add_argument("--tflops", type=number, default=312, help=tflops)
    gigabytes = "bandwidth in GB/s of the device's memory (default: 2039, an A100 with 80 GB)"
    parser.add_argument("--bandwidth", type=number, default=2039, help=gigabytes)
    parser.add_argument("--markdown", metavar="FILE", help="write the table into this page, too")
    return parser.parse_args(argv)


@errors_as_messages()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    publish(report(args.models or list(PUBLISHED), args), args.markdown, MARK)


if __name__ == "__main__":
    main()
