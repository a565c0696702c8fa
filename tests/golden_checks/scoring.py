"""Recorded scorers and converters: normaliser tables, and programs with their files and output."""

import tempfile
from pathlib import Path

from llava.eval.scoring.m4c import (
    EvalAIAnswerProcessor,
    STVQAAccuracyEvaluator,
    STVQAANLSEvaluator,
    TextVQAAccuracyEvaluator,
)
from tests.eval import eval_cases
from tests.golden_cases import load_json


def check_scoring(case, folder, report):
    """One file of recordings; programs that are not part of the project yet are reported."""
    content = load_json(case, folder)
    if isinstance(content, dict):
        check_normaliser(content, report)
        return
    for run in content:
        if "script" not in run or eval_cases.program(run) is None:
            report.add(f"{run.get('id')}: {run.get('script')} is not part of the project")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            for problem in eval_cases.differences(run, Path(scratch)):
                report.add(f"{run['id']}: {problem}")


def check_normaliser(content, report):
    """The answer normaliser in its stages, and the scores built on it."""
    processor, soft = EvalAIAnswerProcessor(), TextVQAAccuracyEvaluator()
    for row in content["normalise"]:
        stage = processor.word_tokenize(row["in"])
        report.equal(f"word_tokenize({row['in']!r})", stage, row["word_tokenize"])
        stage = stage.replace("\n", " ").replace("\t", " ").strip()
        report.equal(f"punct({row['in']!r})", processor.process_punctuation(stage), row["punct"])
        report.equal(f"normalise({row['in']!r})", processor(row["in"]), row["out"])
    for row in content["textvqa_scores"]:
        report.equal("unique_scores", soft.answer_scores(row["gts"]), row["unique_scores"])
        report.equal("textvqa", soft.score(row["pred"], row["gts"]), row["score"])
    entries = [
        {"pred_answer": r["pred"], "gt_answers": r["gts"]} for r in content["textvqa_scores"]
    ]
    report.equal("textvqa mean", soft.eval_pred_list(entries), content["textvqa_mean_of_all"])
    for row in content["stvqa"]:
        accuracy = STVQAAccuracyEvaluator().score(row["pred"], row["gts"])
        report.equal("stvqa accuracy", accuracy, row["acc"])
        report.equal("anls", STVQAANLSEvaluator().score(row["pred"], row["gts"]), row["anls"])
