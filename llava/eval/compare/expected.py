"""The unpruned scores of the literature beside our scripts, to see whether a set-up is right.

python -m llava.eval.compare.expected [--markdown docs/Getting_started.md]
"""

from __future__ import annotations

from llava.eval.benchmarks import find_benchmark
from llava.eval.compare.published import SAME_RULE, Published, read_published
from llava.eval.compare.scores import DENSE
from llava.eval.markdown import run_table_program, table

#: how the models are called in a table -> in the file of published numbers
MODELS = {
    "LLaVA-1.5-7B": "llava-1.5-7b",
    "LLaVA-NeXT-7B": "llava-next-7b",
    "LLaVA-1.5-13B": "llava-1.5-13b",
    "LLaVA-NeXT-13B": "llava-next-13b",
}
#: benchmark -> (the script and its split, questions in the released files)
SCRIPTS = {
    "pope": ("pope.sh", 8910),
    "textvqa": ("textvqa.sh", 5000),
    "gqa": ("gqa.sh", 12578),
    "vqav2": ("vqav2.sh", 107394),
    "vizwiz": ("vizwiz.sh", 8000),
    "vizwiz_val": ("SPLIT=val vizwiz.sh", None),
    "sqa": ("sqa.sh", 4241),
    "mmbench": ("mmbench.sh", 4377),
    "mmbench_cn": ("mmbench_cn.sh", None),
    "mme": ("mme.sh", 2374),
    "seed": ("seed.sh", 19242),
    "mmvet": ("mmvet.sh", 218),
    "refcoco": ("refcoco.sh", None),
    "refcoco+": ("refcocoplus.sh", None),
    "refcocog": ("refcocog.sh", None),
}
MARK = "expected"


def expected(benchmark: str, model: str, rows: list[Published]) -> str:
    """The unpruned scores of the file under our metric, those of several sources with commas."""
    metric = find_benchmark(benchmark).metric
    name, metric = SAME_RULE.get(benchmark, (benchmark, metric))
    found = {
        row.value
        for row in rows
        if (row.model, row.method) == (model, DENSE)
        and (row.benchmark, row.metric) == (name, metric)
    }
    return ", ".join(str(int(v) if v >= 100 else v) for v in sorted(found))


def report() -> str:
    """The table as Markdown."""
    rows, lines = read_published(), []
    for benchmark, (script, count) in SCRIPTS.items():
        scores = [expected(benchmark, model, rows) or "–" for model in MODELS.values()]
        metric = SAME_RULE.get(benchmark, (None, find_benchmark(benchmark).metric))[1]
        lines.append([f"`{script}`", f"{count:,}" if count else "", metric, *scores])
    return table(["script", "questions", "metric", *MODELS], lines, "lrlr") + "\n"


def main() -> None:
    run_table_program(__doc__, report, MARK)


if __name__ == "__main__":
    main()
