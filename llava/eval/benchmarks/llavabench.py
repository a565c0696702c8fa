"""LLaVA-Bench in the wild: a judge sets our answers against those of text-only GPT-4."""

import os

from llava.eval.benchmarks import gpt_review
from llava.eval.benchmarks import review_summary as summarize_gpt_review
from llava.eval.benchmarks.benchmark import Benchmark, Judged, JudgedRun
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import question_id, source, unique
from llava.eval.files.records import complete, read_jsonl
from llava.eval.scoring.judge import Judge

FOLDER = "llava-bench-in-the-wild"


def score(judge: Judge, run: JudgedRun) -> dict:
    """LLaVA-Bench: our answers in percent of those of text-only GPT-4 that saw the captions."""
    folder = os.path.join(run.data_dir, FOLDER)
    contexts = read_jsonl(os.path.join(folder, "context.jsonl"), ("image", "caption"))
    reference = read_jsonl(os.path.join(folder, "answers_gpt4.jsonl"), ("question_id", "text"))
    questions = complete(run.asked, ("question_id", "text", "image", "category"))
    answers = read_answers(run.answers_file)
    given, known = unique(answers), unique(reference)
    questions = [question for question in questions if question_id(question) in given]
    if missing := [key for key in map(question_id, questions) if key not in known]:
        raise ValueError(f"{source(reference)}: no answer to question {missing[0]!r}")
    heads, prompts = gpt_review.heads_and_prompts(
        gpt_review.BENCH,
        questions,
        [[found[question_id(question)] for question in questions] for found in (known, given)],
        gpt_review.read_rules(run.wording or gpt_review.OWN_RULES),
        {context["image"]: context for context in contexts},
    )
    gpt_review.review(judge, heads, prompts, run.output, overwrite=True)
    means, unreadable = summarize_gpt_review.summarize(read_jsonl(run.output))
    total = means.get("all", (0.0, 0.0))
    return {
        "score": summarize_gpt_review.relative(*total),
        "count": len(heads),
        "unreadable": unreadable,
        "means": means,
    }


def report(result: dict) -> str:
    return summarize_gpt_review.report(result["means"])


BENCHMARKS = (
    Benchmark(
        "llavabench",
        f"{FOLDER}/questions.jsonl",
        f"{FOLDER}/images",
        "relative to GPT-4",
        {f"{FOLDER}/": "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"},
        truth=(f"{FOLDER}/context.jsonl", f"{FOLDER}/answers_gpt4.jsonl"),
        program=("model_vqa",),
        judge=Judged(gpt_review.BENCH.model, 1024, 0.2, f"{FOLDER}/rule.json", score, report),
    ),
)
