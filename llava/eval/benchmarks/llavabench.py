"""LLaVA-Bench in the wild: a judge sets our answers against those of text-only GPT-4."""

import os

import numpy as np

from llava.eval.benchmarks import gpt_review, review_summary
from llava.eval.benchmarks.benchmark import Benchmark, Judged, JudgedRun
from llava.eval.files.matching import question_id, source, texts_by_id, unique
from llava.eval.files.records import complete, read_jsonl
from llava.eval.scoring.judge import Judge
from llava.eval.scoring.units import COUNTS, WEIGHT, Unit, Units, ratio

FOLDER = "llava-bench-in-the-wild"
CONTEXT, REFERENCE = f"{FOLDER}/context.jsonl", f"{FOLDER}/answers_gpt4.jsonl"


def score(judge: Judge, run: JudgedRun) -> Units:
    """Returns what the judge thinks of our answers and of the reference, by category; pairs that it
    gave no scores are left out and counted."""
    contexts = read_jsonl(os.path.join(run.data_dir, CONTEXT), ("image", "caption"))
    reference = read_jsonl(os.path.join(run.data_dir, REFERENCE), ("question_id", "text"))
    questions = complete(run.asked, ("question_id", "text", "image", "category"))
    given, known = unique(run.answers), unique(reference)
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
    return units(read_jsonl(run.output), texts_by_id(run.answers))


def units(reviews: list[dict], texts: dict) -> Units:
    """Returns the pairs of scores in review lines; texts: of the answers, by question."""
    found = []
    for line in reviews:
        key, pair = question_id(line), tuple(line["tuple"])
        if -1 not in pair:
            groups = (line["category"],)
            found.append(Unit(key, pair[1] / 10, texts[key], groups=groups, counts=pair))
    if not found:
        raise ValueError(f"{source(reviews)}: no reply of the judge holds two scores")
    means, unreadable = review_summary.summarize(reviews)
    details = {"count": len(reviews), "unreadable": unreadable, "means": means}
    return Units(found, relative, details=details)


def relative(sums: np.ndarray) -> np.ndarray:
    """Our mean in percent of the reference's, both to three places, as the release rounds them."""
    means = ratio(sums[..., COUNTS:], sums[..., WEIGHT : WEIGHT + 1]).round(3)
    return ratio(100 * means[..., 1], means[..., 0])


def report(units: Units) -> str:
    return review_summary.report(units.details["means"])


BENCHMARKS = (
    Benchmark(
        "llavabench",
        f"{FOLDER}/questions.jsonl",
        f"{FOLDER}/images",
        "relative to GPT-4",
        {f"{FOLDER}/": "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"},
        truth=(CONTEXT, REFERENCE),
        program=("model_vqa",),
        judge=Judged(gpt_review.BENCH.model, 1024, 0.2, f"{FOLDER}/rule.json", score, report),
    ),
)
