"""What an efficiency run shows of its numbers: rows, a table for a terminal, Markdown, a plot."""

from __future__ import annotations

from statistics import median, quantiles

from llava.eval.efficiency.bandwidth import bandwidth_share, decode_gigabytes_per_second
from llava.eval.efficiency.facts import sentence, size
from llava.eval.efficiency.measure import DENSE, ORACLE, STAGES, Variant
from llava.eval.markdown import table
from llava.eval.plotting import import_pyplot
from llava.pruning.cost import FORMULAS

#: stages that follow one another in a bar of the plot
PARTS = ("vision", "select", "prefill")
#: the place of a page that the tables are written into
MARK = "efficiency"


def summarize(variants: list[Variant]) -> list[dict]:
    """One row per variant: milliseconds (median, p10, p90) of every stage and ratios.

    A ratio is the median over the rounds of the quotient within one round, to the dense model, to
    the oracle of the budget and to the oracle with the variant's own token counts.
    """
    by_name = {variant.name: variant for variant in variants}
    rows = []
    for variant in variants:
        row = {"variant": variant.name, "oracle": variant.oracle, **variant.facts}
        row["ms"] = {
            stage: spread([1000 * seconds[stage] for seconds in variant.rounds])
            for stage in variant.rounds[0]
        }
        bases = {"times_oracle": ORACLE, "times_dense": DENSE, "times_own_oracle": variant.oracle}
        for key, base in bases.items():
            if base is not None:
                row[key] = ratios(variant, by_name[base])
        rows.append(row)
    return rows


def ratios(variant: Variant, base: Variant) -> dict[str, float]:
    """Median quotient of every stage that both have; `select` is next to nothing in a base."""
    pairs = list(zip(variant.rounds, base.rounds, strict=True))
    stages = [stage for stage in variant.rounds[0] if stage in base.rounds[0] and stage != "select"]
    return {stage: median(own[stage] / other[stage] for own, other in pairs) for stage in stages}


def spread(values: list[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p10", "p90"), values[0])
    tenths = quantiles(values, n=10, method="inclusive")
    return {"median": median(values), "p10": tenths[0], "p90": tenths[-1]}


def format_table(rows: list[dict]) -> str:
    """The rows for people; times are medians in milliseconds."""
    head = ["variant", "tokens", *STAGES, "p10-p90", "x own oracle", "x oracle", "x dense"]
    head += ["decode GB/s", "KV MB", "peak MB", *(f"TFLOP ({formula})" for formula in FORMULAS)]
    lines = [head]
    for row in rows:
        ms, cells = row["ms"], [row["variant"]]
        cells.append(_number(row.get("visual_tokens_mean"), "{:.4g}"))
        cells += [_number(ms.get(stage, {}).get("median"), "{:.1f}") for stage in STAGES]
        whole = ms.get("end_to_end")
        cells.append("-" if whole is None else f"{whole['p10']:.0f}-{whole['p90']:.0f}")
        for base in ("own_oracle", "oracle", "dense"):
            cells.append(_number(row.get(f"times_{base}", {}).get("end_to_end"), "{:.3f}"))
        cells.append(_number(decode_gigabytes_per_second(row), "{:.0f}"))
        for name in ("kv_bytes", "peak_bytes_over_weights"):
            cells.append(_number(row.get(name), "{:.1f}", 1e-6))
        cells += [_number(row.get(f"flops_{name}"), "{:.3f}", 1e-12) for name in FORMULAS]
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else form.format(value * scale)


def markdown(result: dict) -> str:
    """The result as Markdown: what was measured, one table per workload, what did not run."""
    about = result["about"]
    prompts = f"{about['prompt_length']} text tokens and one image ({about['image_size']})"
    what = f"{about['attention']} attention", size(about), f"{about['layers']} layers"
    lines = [f"`{about['command']}`", "", sentence(about, *what, f"{prompts} per prompt")]
    for run in result["runs"]:
        what = f"Batch {run['batch_size']}, {run['output_tokens']} tokens out, "
        lines += ["", f"**{what}{run['rounds']} rounds.**", ""]
        lines.append(_markdown_table(run["variants"], about))
    if result["refused"]:
        lines += ["", f"Not measured with a budget of {about['visual_token_num']}:", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in result["refused"].items()]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: list[dict], about: dict) -> str:
    head = ["method", "visual tokens in / mean", "own work, ms", "first token, ms"]
    head += ["/ own oracle: first token", "end to end", "/ dense: first token", "end to end"]
    head += ["decode, ms", "of the bandwidth, %", "KV cache, MB", "peak memory, MB", "TFLOP"]
    lines = []
    for row in rows:
        if row["oracle"] is None and row["variant"] not in (DENSE, ORACLE):
            continue  # the oracles of single methods are in the ratios
        ms, own = row["ms"], row.get("times_own_oracle", {})
        tokens = (row[f"visual_tokens_{name}"] for name in ("first_layer", "mean"))
        cells = [f"`{row['variant']}`" if row["oracle"] else row["variant"]]
        cells.append(" / ".join(f"{number:.4g}" for number in tokens))
        cells += [_number(ms[stage]["median"], "{:.1f}") for stage in ("select", "first_token")]
        cells += [_number(own.get(stage), "{:.2f}") for stage in ("first_token", "end_to_end")]
        cells += [f"{row['times_dense'][stage]:.2f}" for stage in ("first_token", "end_to_end")]
        cells.append(_number(ms.get("decode", {}).get("median"), "{:.2f}"))
        cells.append(_number(bandwidth_share(row, about), "{:.0f}", 100))
        cells += [
            _number(row[name], "{:.0f}", 1e-6) for name in ("kv_bytes", "peak_bytes_over_weights")
        ]
        cells += [f"{row['flops_exact'] / 1e12:.3f}"]
        lines.append(cells)
    return table(head, lines, "lr")


def plot(result: dict, path: str) -> None:
    """Bars of the time to the first token by stage, one panel per workload; the mark on a bar is
    the oracle with the same token counts."""
    pyplot = import_pyplot()
    runs = result["runs"]
    shown = [[r for r in run["variants"] if r["oracle"] or r["variant"] == DENSE] for run in runs]
    height = 0.28 * max(map(len, shown)) + 1.2
    figure, panels = pyplot.subplots(
        1, len(runs), figsize=(1.5 + 5 * len(runs), height), squeeze=False, layout="constrained"
    )
    for axes, run, rows in zip(panels[0], runs, shown, strict=True):
        rows = sorted(rows, key=lambda row: row["ms"]["first_token"]["median"])
        by_name = {row["variant"]: row for row in run["variants"]}
        start = [0.0] * len(rows)
        for stage in PARTS:
            widths = [row["ms"][stage]["median"] for row in rows]
            axes.barh(range(len(rows)), widths, left=start, height=0.7, label=stage)
            start = [left + width for left, width in zip(start, widths, strict=True)]
        marks = [
            (by_name[row["oracle"]]["ms"]["first_token"]["median"], place)
            for place, row in enumerate(rows)
            if row["oracle"]
        ]
        if marks:
            axes.plot(*zip(*marks, strict=True), "k|", markersize=11, label="own oracle")
        axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
        axes.set(
            xlabel="milliseconds to the first token",
            title=f"batch {run['batch_size']}, {run['output_tokens']} tokens out",
        )
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
