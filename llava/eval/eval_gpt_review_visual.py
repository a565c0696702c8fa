"""Review with captions and boxes: the judge scores a reference and a candidate.

python -m llava.eval.eval_gpt_review_visual -q Q.jsonl -c caps_boxes.jsonl \
    -a REFERENCE.jsonl A.jsonl -r rule.json -o REVIEW.jsonl

The judge is any OpenAI-compatible endpoint (`--help`); a run that was stopped goes on.
`python -m llava.eval.summarize_gpt_review -f REVIEW.jsonl` prints the scores.
"""

from llava.errors import errors_as_messages
from llava.eval.benchmarks import gpt_review


@errors_as_messages()
def main():
    gpt_review.main(gpt_review.VISUAL, __doc__)


if __name__ == "__main__":
    main()
