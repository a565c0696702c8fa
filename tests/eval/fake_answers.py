"""Stands in for the answering programs when scripts are tested: the same files, without a model.

Answers what a scorer can read, writes down the command line, and records budgets as a method
would that decides per question.
"""

import json
import sys
from pathlib import Path

import numpy as np

from llava.eval.answering.questions import subset
from llava.eval.benchmarks import all_benchmarks
from llava.eval.files import box_counts


def interpreter(folder: Path) -> Path:
    """Writes an interpreter that runs this file in place of the answering programs."""
    path = folder / "python"
    path.write_text(
        "#!/usr/bin/env bash\n"
        f'if [[ "$*" == *"-m llava.eval.model_vqa"* ]]; then\n'
        f'    exec "{sys.executable}" -m tests.eval.fake_answers "$@"\n'
        "fi\n"
        f'exec "{sys.executable}" "$@"\n'
    )
    path.chmod(0o755)
    return path


def option(argv: list[str], name: str, default=None):
    return argv[argv.index(name) + 1] if name in argv else default


def main(argv: list[str]) -> None:
    questions, path = Path(option(argv, "--question-file")), Path(option(argv, "--answers-file"))
    found = [b for b in all_benchmarks().values() if str(questions).endswith(f"/{b.questions}")]
    benchmark = found["--brief" in argv]
    limit = option(argv, "--limit")
    limit = int(limit) if limit else None
    records = subset(benchmark.read(str(questions)), limit, benchmark.together)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            for number, question in enumerate(benchmark.to_questions(record)):
                line = question.answer_line("A", f"id-{number}", "fake")
                kept = {"visual_tokens": 32, "visual_tokens_at_end": 32}
                kept["visual_tokens_unpruned"] = 576
                if question.boxes and option(argv, "--pruning-method") != "pool":
                    mask = np.arange(576) < 32
                    kept[box_counts.KEY] = box_counts.counts(mask, ~mask)
                file.write(json.dumps(line | {"metadata": kept}) + "\n")
    path.with_suffix(".argv.json").write_text(json.dumps(argv), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
