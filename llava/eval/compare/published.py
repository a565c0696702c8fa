"""The literature's numbers, as `docs/published_numbers.csv` has them, beside our own."""

from __future__ import annotations

import csv
from dataclasses import dataclass

from transformers import PretrainedConfig

from llava.clone_files import clone_file
from llava.eval.compare.budget import Budget
from llava.eval.compare.comparison import Comparison, Row
from llava.eval.compare.scores import DENSE
from llava.eval.markdown import table

FILE = "docs/published_numbers.csv"
#: measured by the authors of the method, taken over from another paper, run anew by others; not
#: said
STATUSES = ("own", "copied", "rerun", "unstated")
CONVENTIONS = ("average", "input", "later", "label", "unpruned", "unstated")
HEAD = ("method", "tokens", "benchmark", "here", "published", "source", "status", "metric")
#: what the file says where a source leaves open which metric its number is
AS_PRINTED = "as printed"
#: size of a LLaVA -> decoder layers up to which a model counts as one of it: 7B has 32, 13B 40
SIZES = {"7b": 36, "13b": 50}
#: our benchmark -> the one of the file that asks the same questions, and the metric of both. The
#: literature's MMBench numbers are those of its server, which are circular.
SAME_RULE = {
    "gqa": ("gqa", "accuracy"),
    "pope": ("pope", "F1"),
    "textvqa": ("textvqa", "accuracy"),
    "vqav2": ("vqav2", "accuracy"),
    "mmbench": ("mmbench", "circular accuracy"),
    "mmbench_cn": ("mmbench_cn", "circular accuracy"),
    "sqa": ("sqa", "accuracy on images"),
    "seed": ("seed", "accuracy"),
    "vizwiz_val": ("vizwiz_val", "accuracy"),
    "refcoco": ("refcoco_val", "accuracy at IoU 0.5"),
    "refcoco+": ("refcoco+_val", "accuracy at IoU 0.5"),
    "refcoco+_testA": ("refcoco+_testA", "accuracy at IoU 0.5"),
    "refcoco+_testB": ("refcoco+_testB", "accuracy at IoU 0.5"),
    "refcocog": ("refcocog_val", "accuracy at IoU 0.5"),
    "refcocog_test": ("refcocog_test", "accuracy at IoU 0.5"),
    "mme": ("mme", "perception"),
}


@dataclass(frozen=True)
class Published:
    """One number of one paper; fields as in the file, see docs/Comparing.md."""

    model: str
    method: str
    variant: str
    budget: float
    unit: str
    convention: str
    benchmark: str
    metric: str
    value: float
    protocol: str
    source: str
    status: str


def read_published(path: str | None = None) -> list[Published]:
    """The rows of a file like `FILE` (None: that one); ValueError names a row that is not of its
    form."""
    path = str(clone_file(FILE)) if path is None else path
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [_published(row, f"{path}, line {line}") for line, row in enumerate(rows, start=2)]


def _published(row: dict, where: str) -> Published:
    try:
        found = Published(**{**row, "budget": float(row["budget"]), "value": float(row["value"])})
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{where}: {error}") from error
    if found.status not in STATUSES or found.convention not in CONVENTIONS:
        raise ValueError(
            f"{where}: status {found.status!r} must be one of {', '.join(STATUSES)}, convention "
            f"{found.convention!r} one of {', '.join(CONVENTIONS)}"
        )
    return found


def model_beside(asked: str, config: PretrainedConfig) -> str:
    """The model of the file that is meant; asked: "" where nobody named one, which leaves that of
    the family and size of the model with this config. Raises ValueError on a name that the file
    does not have, and where it has no model of that size."""
    found = asked or _like(config)
    check_known(read_published(), found)
    return found


def _like(config: PretrainedConfig) -> str:
    if config.model_type == "qwen2_5_vl":
        return "qwen2.5-vl-7b"
    layers = config.num_hidden_layers
    size = next((size for size, most in SIZES.items() if layers <= most), None)
    if size is None:
        raise ValueError(
            f"there are no published numbers of a LLaVA with {layers} decoder layers: leave "
            "--published out, or name the model that is meant (--published MODEL)"
        )
    crops = getattr(config, "image_aspect_ratio", None) == "anyres"
    return f"llava-{'next' if crops else '1.5'}-{size}"


def check_known(rows: list[Published], model: str) -> None:
    """Raises ValueError when none of the rows is about the model."""
    known = sorted({row.model for row in rows})
    if model not in known:
        raise ValueError(f"no published numbers of {model!r}, choose from {', '.join(known)}")


def published_table(comparison: Comparison, rows: list[Published], model: str) -> str:
    """Markdown: for every run and benchmark that the literature has, our share of the unpruned
    score beside theirs. Raises ValueError when the file has nothing on `model`."""
    check_known(rows, model)
    rows = [row for row in rows if row.model == model]
    found = []
    for row in comparison.rows:
        for task in comparison.tasks:
            for entry in _matching(rows, row, task):
                whole = _unpruned(rows, entry)
                share = "" if whole is None else f"{100 * entry.value / whole:.1f} "
                own, dense = row.cells[task].percent, comparison.dense.cells[task].percent
                here = f"{100 * own / dense:.1f} ({own:.1f})" if dense else f"({own:.1f})"
                name = f"`{row.method}` {entry.variant}".strip()
                theirs = f"{share}({entry.value:g})"
                said = (entry.source, entry.status, entry.metric)
                found.append((name, row.budget.label, task, here, theirs, *said))
    if found:
        text = (
            f"**Beside the literature** ({model}; scores in percent of the unpruned score of the "
            "same source and protocol, the score itself in brackets; as printed: the source does "
            f"not say which metric it is)\n\n{table(HEAD, found, 'lrlrrl')}"
        )
    else:
        text = f"The literature on {model} has no number for these runs."
    return "\n".join([text, *_not_compared(comparison)]) + "\n"


def _not_compared(comparison: Comparison) -> list[str]:
    """Says which benchmarks were scored by another rule than the literature's."""
    cells = comparison.dense.cells
    other = [t for t in comparison.tasks if t in SAME_RULE and SAME_RULE[t][1] != cells[t].metric]
    return [
        f"\n{task} is not compared: ours is {cells[task].metric}, the literature's is "
        f"{SAME_RULE[task][1]}."
        for task in other
    ]


def _matching(rows: list[Published], run: Row, task: str) -> list[Published]:
    """The rows on a method, budget and benchmark that have our metric, as far as they say."""
    rule = SAME_RULE.get(task)
    if rule is None or rule[1] != run.cells[task].metric or run.method == DENSE:
        return []
    return [
        row
        for row in rows
        if row.method == run.method
        and _budget(row) == run.budget
        and row.benchmark == rule[0]
        and row.metric in (rule[1], AS_PRINTED)
    ]


def _budget(row: Published) -> Budget:
    if row.unit == "tokens":
        return Budget(tokens=int(row.budget))
    return Budget(share=round(row.budget / 100, 4))


def _unpruned(rows: list[Published], entry: Published) -> float | None:
    """The unpruned score under the protocol of `entry`."""
    same = (
        row.value
        for row in rows
        if row.method == DENSE
        and (row.benchmark, row.metric) == (entry.benchmark, entry.metric)
        and row.protocol == entry.protocol
    )
    return next(same, None)
