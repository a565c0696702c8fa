"""Benchmarks that a judge scores: one function each, gathered for `benchmarks`."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from llava.eval.benchmarks import gpt_review
from llava.eval.benchmarks import mmvet as eval_mmvet
from llava.eval.benchmarks import review_summary as summarize_gpt_review
from llava.eval.benchmarks import viscot as eval_viscot
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import question_id, source, unique
from llava.eval.files.records import complete, read_json, read_jsonl
from llava.eval.scoring.judge import Judge


@dataclass(frozen=True)
class JudgedRun:
    """A complete set of answers and what its judge may need besides.

    output:  file of verdicts to write; what an earlier run was told comes from the judge's cache
    wording: file with the benchmark's own instruction to the judge; None: ours
    """

    data_dir: str
    question_file: str
    answers_file: str
    output: str
    wording: str | None = None


@dataclass(frozen=True)
class Judged:
    """How a judge scores a benchmark.

    model, max_tokens, temperature: of the published verdicts
    wording: file in the data folder with the benchmark's own instruction, if the user put it there
    score: (judge, run) -> dict with `score` in percent, `count` and details
    """

    model: str
    max_tokens: int
    temperature: float
    wording: str | None
    score: Callable[[Judge, JudgedRun], dict]
    report: Callable[[dict], str]


def llava_bench(judge: Judge, run: JudgedRun) -> dict:
    """LLaVA-Bench: our answers in percent of those of text-only GPT-4 that saw the captions."""
    folder = os.path.join(run.data_dir, "llava-bench-in-the-wild")
    contexts = read_jsonl(os.path.join(folder, "context.jsonl"), ("image", "caption"))
    reference = read_jsonl(os.path.join(folder, "answers_gpt4.jsonl"), ("question_id", "text"))
    asked = ("question_id", "text", "image", "category")
    questions = complete(read_jsonl(run.question_file), asked)
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


def llava_bench_report(result: dict) -> str:
    return summarize_gpt_review.report(result["means"])


def mmvet(judge: Judge, run: JudgedRun) -> dict:
    entries = read_json(os.path.join(run.data_dir, "mm-vet", "mm-vet.json"))
    instruction = eval_mmvet.read_instruction(run.wording)
    answers = read_answers(run.answers_file)
    return eval_mmvet.grade(judge, entries, answers, run.output, instruction, overwrite=True)


def viscot(judge: Judge, run: JudgedRun) -> dict:
    return eval_viscot.score_file(run.answers_file, judge, overwrite=True)


LLAVA_BENCH = Judged(
    gpt_review.BENCH.model,
    1024,
    0.2,
    "llava-bench-in-the-wild/rule.json",
    llava_bench,
    llava_bench_report,
)
MMVET = Judged(eval_mmvet.MODEL, 16, 0.0, "mm-vet/prompt.txt", mmvet, eval_mmvet.report)
VISCOT = Judged(eval_viscot.MODEL, 512, 0.0, None, viscot, eval_viscot.report)
