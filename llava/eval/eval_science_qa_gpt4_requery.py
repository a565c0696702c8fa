"""ScienceQA: GPT-4 decides where LLaVA and GPT-4 differ, having been shown both answers.

python -m llava.eval.eval_science_qa_gpt4_requery --base-dir scienceqa --gpt4-result GPT4.json \
    --our-result A.jsonl --requery-result AGAIN.jsonl --output-result R.json
"""

from llava.eval.benchmarks import sqa_gpt4

if __name__ == "__main__":
    sqa_gpt4.main(__doc__, requery=True)
