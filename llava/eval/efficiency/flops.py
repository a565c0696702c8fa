"""Operations that the answers of a file took, from what its lines say: no model is loaded.

python -m llava.eval.efficiency.flops A.jsonl B.jsonl [--num-samples 100]

The lines of `model_vqa_viscot` hold the numbers. They are the decoder's, with the exact formula of
`llava.pruning.cost` for the tokens that entered each layer, text included, and for the caches that
the tokens of the answer looked at. Neither the vision tower nor what a method itself computes is
counted; `python -m llava.eval.efficiency` measures those.
"""

import json
import os

from llava.errors import errors_as_messages
from llava.eval import markdown
from llava.eval.files import costs
from llava.eval.files.answer_lines import read_answers
from llava.program_parser import ProgramParser

TERA = 1e12
HEAD = (
    "answers",
    "questions",
    "tokens of the answer",
    "prefill, TFLOP",
    "of unpruned",
    "answer, TFLOP",
    "of unpruned",
    "both",
)


def operations(path: str, num_samples: int | None = None) -> dict:
    """Means over the first `num_samples` answers of a file: `questions`, `new_tokens`, the keys of
    `costs.FLOPS`, and the shares `prefill_ratio`, `decode_ratio` and `ratio` of an unpruned run.

    Raises ValueError when its lines say nothing of operations.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"--num-samples {num_samples} leaves no answer: give at least 1")
    answers = read_answers(path)[:num_samples]
    found = costs.summarize(answers)
    if costs.FLOPS not in found:
        raise ValueError(f"{path}: no line says what it cost; llava.eval.model_vqa_viscot does")
    flops = found[costs.FLOPS]
    prefill, dense = flops[costs.PREFILL], flops[costs.PREFILL_UNPRUNED]
    decode, dense_decode = flops[costs.DECODE], flops[costs.DECODE_UNPRUNED]
    return {
        "questions": len(answers),
        "new_tokens": found["avgNumGenTokens"],
        **flops,
        "prefill_ratio": prefill / dense,
        "decode_ratio": decode / dense_decode,
        "ratio": (prefill + decode) / (dense + dense_decode),
    }


def table(found: dict[str, dict]) -> str:
    rows = [
        (
            name,
            own["questions"],
            f"{own['new_tokens']:.1f}",
            f"{own[costs.PREFILL] / TERA:.4g}",
            f"{100 * own['prefill_ratio']:.1f} %",
            f"{own[costs.DECODE] / TERA:.4g}",
            f"{100 * own['decode_ratio']:.1f} %",
            f"{100 * own['ratio']:.1f} %",
        )
        for name, own in found.items()
    ]
    return markdown.table(HEAD, rows, "lr")


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("files", nargs="+", help="answers files")
    parser.add_argument(
        "--num-samples", type=int, help="count only the first so many answers of each file"
    )
    args = parser.parse_args()
    found = {path: operations(os.path.expanduser(path), args.num_samples) for path in args.files}
    print(table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
