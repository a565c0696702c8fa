"""LLaVA-Bench: a judge that knows the captions scores a reference and a candidate.

python -m llava.eval.eval_gpt_review_bench -q questions.jsonl -c context.jsonl \
    -a answers_gpt4.jsonl A.jsonl -r rule.json -o REVIEW.jsonl

The judge is any OpenAI-compatible endpoint (`--help`); a run that was stopped goes on.
`python -m llava.eval.summarize_gpt_review -f REVIEW.jsonl` prints the scores.
"""

from llava.errors import errors_as_messages
from llava.eval.benchmarks import gpt_review


@errors_as_messages()
def main():
    gpt_review.main(gpt_review.BENCH, __doc__)


if __name__ == "__main__":
    main()
