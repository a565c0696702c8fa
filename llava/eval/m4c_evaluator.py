"""LLaVA's name of `llava.eval.scoring.m4c`."""

from llava.eval.scoring.m4c import (
    EvalAIAnswerProcessor,
    STVQAAccuracyEvaluator,
    STVQAANLSEvaluator,
    TextVQAAccuracyEvaluator,
)

__all__ = [
    "EvalAIAnswerProcessor",
    "STVQAANLSEvaluator",
    "STVQAAccuracyEvaluator",
    "TextVQAAccuracyEvaluator",
]
