"""ScienceQA: GPT-4, and LLaVA where GPT-4 gives no answer.

python -m llava.eval.eval_science_qa_gpt4 --base-dir scienceqa --gpt4-result GPT4.json \
    --our-result A.jsonl
"""

from llava.eval.benchmarks import sqa_gpt4

if __name__ == "__main__":
    sqa_gpt4.main(__doc__)
