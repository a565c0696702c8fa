"""All methods side by side, by what their classes say of themselves: docs/Choosing_a_Method.md.

python -m llava.eval.compare.method_table [--markdown docs/Choosing_a_Method.md]
"""

from __future__ import annotations

from llava.clone_files import clone_file
from llava.eval.efficiency.random_model import empty_model, shapes
from llava.eval.markdown import marks, run_table_program, table
from llava.pruning import METHODS, DecoderStage, Pruner, build_pruner
from llava.pruning.about import acts, how_it_chooses, is_trained, where_it_acts
from llava.pruning.apart import reason_apart
from llava.pruning.cues import names_for
from llava.pruning.program import SIZES, Plan

HEAD = ("method", "how it chooses", "training", "acts", "reads the question", "families")
HEAD += ("batch", "FlashAttention", "one image, many questions", "engine")
HEAD += ("tokens per layer", "operations", "cache", "choosing, kernels")
#: the setting of the last four columns
BUDGET, SIZE = 64, "7B"
MARK = "methods"
#: the page with the table that the last column is taken from, its name there and its column
COUNTED, LAUNCHES, MORE = "docs/Efficiency.md", "launches", "more than dense"


def reads(method: type[Pruner]) -> bool:
    return getattr(method, "reads_text", False) or getattr(method, "reads_question", False)


def shared(method: type[Pruner]) -> str:
    """What several questions about one image share (`llava.model.reuse`)."""
    if getattr(method, "reads_question", False):
        return "nothing"
    return "up to its first layer" if acts(method, DecoderStage) else "all of the image"


def kernels() -> dict[str, str]:
    """What every method asks a device for beyond the unpruned model, as it was counted. Raises
    ValueError where the page has no such table."""
    page = clone_file(COUNTED).read_text(encoding="utf-8")
    begin, end = marks(LAUNCHES)
    text = page.partition(begin)[2].partition(end)[0]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    heads = [number for number, cells in enumerate(lines) if MORE in cells]
    if not heads:
        raise ValueError(f"{COUNTED} has no table with a column {MORE!r}")
    column = lines[heads[0]].index(MORE)
    rows = (cells for cells in lines[heads[0] + 2 :] if len(cells) > column)
    return {cells[0].strip("`"): cells[column] for cells in rows}


def row(name: str, everywhere: list[str], counted: dict[str, str]) -> list[str]:
    """
    everywhere: names of the methods that work on Qwen2.5-VL, too
    counted:    what `kernels` gave
    """
    method = METHODS[name]
    pruner = build_pruner(name) if method is Pruner else build_pruner(name, visual_token_num=BUDGET)
    plan, dense = (Plan.of(one, SIZES[SIZE], 1) for one in (pruner, Pruner()))
    most = "at most " if pruner.adaptive else ""
    operations = [one.flops(SIZES[SIZE], BUDGET, "exact") for one in (plan, dense)]
    cache = [one.kv_bytes(SIZES[SIZE], BUDGET) for one in (plan, dense)]
    return [
        f"[`{name}`](Methods.md#{name})",
        how_it_chooses(method),
        "its own part" if is_trained(method) else "none",
        where_it_acts(method),
        "yes" if reads(method) else "no",
        "all" if name in everywhere else "LLaVA",
        "yes",  # of every method: `test_batching_changes_nothing` of the contract
        "SDPA in its place" if pruner.vision.biases_attention else "yes",
        shared(method),
        "no" if reason_apart(pruner) else "yes",
        f"{most}{plan.average:.0f}",
        f"{most}{operations[0] / operations[1]:.0%}",
        f"{most}{cache[0] / cache[1]:.0%}",
        "0" if method is Pruner else counted.get(name, "not counted"),
    ]


def report() -> str:
    """The table as Markdown."""
    qwen = empty_model(*shapes("qwen2.5-vl-3b", layers=1)).get_vision_tower()
    everywhere = names_for(qwen, METHODS.own.values())
    counted = kernels()
    rows = (row(name, everywhere, counted) for name in METHODS.own)
    return table(HEAD, rows, "llllllllllr") + "\n"


def main() -> None:
    run_table_program(__doc__, report, MARK)


if __name__ == "__main__":
    main()
