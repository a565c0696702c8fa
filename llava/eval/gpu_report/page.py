"""The page of a report: what was run, what tests found, the numbers and what bounds them."""

from __future__ import annotations

from collections import Counter

from llava.eval import markdown
from llava.eval.efficiency.bandwidth import bandwidth_share, decode_gigabytes_per_second
from llava.eval.efficiency.decode_report import Row
from llava.eval.efficiency.decode_report import table as decode_table
from llava.eval.efficiency.launches import LaunchCounts
from llava.eval.efficiency.launches import table as launch_table
from llava.eval.efficiency.throughput import Speed
from llava.eval.efficiency.throughput import table as throughput_table
from llava.eval.gpu_report.runner import Report
from llava.eval.gpu_report.steps import STEPS

GIGA = 1e9
STAGES = ("vision", "select", "prefill", "first_token", "decode")


def page(report: Report) -> str:
    """The whole page; a step that gave nothing has a line that says why."""
    lines = [*head(report), *steps(report)]
    for name, title, write in SECTIONS:
        entry = report.steps.get(name, {})
        found = entry.get("tests" if name == "tests" else "result")
        if found:
            lines += ["", f"## {title}", "", *write(found)]
    return "\n".join(lines) + "\n"


def head(report: Report) -> list[str]:
    machine = report.machine
    memory = "" if machine["memory"] is None else f", {machine['memory'] / 2**30:.0f} GiB"
    versions = [f"{name} {own or 'missing'}" for name, own in machine["packages"].items()]
    lines = [f"# {machine['device']}", ""]
    if report.small:
        lines += [
            "**Tiny models on a CPU, to see that the report works: no number means anything.**",
            "",
        ]
    card = f"{machine['device']}{memory}"
    if machine["capability"] is not None:
        card += f", compute capability {machine['capability']}, CUDA {machine['cuda']}"
    lines.append(f"Written by `bash scripts/gpu_report.sh`. {card}; Python {machine['python']},")
    return [*lines, f"{', '.join(versions)}. How to read it: `docs/Efficiency.md`."]


def steps(report: Report) -> list[str]:
    rows = []
    for step in STEPS:
        entry = report.steps.get(step.name)
        if entry is None:
            rows.append([step.name, step.what, "not asked for", "", ""])
            continue
        cells = [entry["status"], f"{entry['seconds']:.0f}", entry.get("reason", "")]
        rows.append([step.name, step.what, *cells])
    return ["", "## Steps", "", markdown.table(["step", "what", "", "seconds", "reason"], rows)]


def tests(found: list[dict]) -> list[str]:
    """What passed, what was skipped and why, what failed and how, and the numbers noted."""
    counts = Counter(own["outcome"] for own in found)
    lines = [", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + "."]
    reasons = Counter(own["reason"] for own in found if own["outcome"] == "skipped")
    if reasons:
        lines += ["", "Skipped:", ""]
        lines += [f"- {count} x {reason}" for reason, count in reasons.most_common()]
    failures = [own for own in found if own["outcome"] == "failed"]
    if failures:
        lines += ["", "Failed:", "", *(f"- `{own['test']}`: {own['reason']}" for own in failures)]
    noted = [[f"`{own['test']}`", "; ".join(own["notes"])] for own in found if own["notes"]]
    if noted:
        lines += ["", "<details><summary>What the tests measured</summary>", ""]
        lines += [markdown.table(["test", "found"], noted), "", "</details>"]
    return lines


def efficiency(result: dict) -> list[str]:
    """Times by stage, ratios, and the share of the card's bandwidth that decoding reaches."""
    about, lines = result["about"], []
    for run in result["runs"]:
        dense = next(row for row in run["variants"] if row["variant"] == "dense")
        read = (dense["weight_bytes"] + dense["kv_bytes"]) / GIGA
        lines += [
            f"`{about['command']}`",
            "",
            f"{about['dtype']}, batch {run['batch_size']}, {about['prompt_length']} text tokens "
            f"and one image per prompt, {run['rounds']} rounds, medians in milliseconds.",
        ]
        if about["copy_bandwidth"]:
            floor = 1e3 * read * GIGA / about["copy_bandwidth"]
            lines[-1] += (
                f" A copy reads and writes {about['copy_bandwidth'] / GIGA:.0f} GB/s. A token of "
                f"the unpruned model reads {read:.2f} GB (weights and cache), for which that takes "
                f"{floor:.2f} ms."
            )
        lines += ["", _stage_table(run["variants"], about), ""]
    if result["refused"]:
        lines += ["Not measured:", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in result["refused"].items()]
    return lines


def _stage_table(rows: list[dict], about: dict) -> str:
    columns = ["vision", "select", "prefill", "first token", "decode"]
    columns = ["method", "visual tokens", *columns, "p10-p90 of first token", "/ own oracle"]
    columns += ["/ dense", "decode GB/s", "of a copy, %", "KV, MB", "peak, MB"]
    lines = []
    for row in rows:
        ms, own = row["ms"], row.get("times_own_oracle", {}).get("first_token")
        if "first_token" not in ms:
            continue
        cells = [f"`{row['variant']}`" if row["oracle"] else row["variant"]]
        cells.append(f"{row['visual_tokens_mean']:.4g}")
        cells += [f"{ms[name]['median']:.2f}" if name in ms else "–" for name in STAGES]
        first = ms["first_token"]
        cells.append(f"{first['p10']:.1f}-{first['p90']:.1f}")
        cells.append("–" if own is None else f"{own:.2f}")
        cells.append(f"{row['times_dense']['first_token']:.2f}")
        rate, share = decode_gigabytes_per_second(row), bandwidth_share(row, about)
        cells.append("–" if rate is None else f"{rate:.0f}")
        cells.append("–" if share is None else f"{100 * share:.0f}")
        peak = row["peak_bytes_over_weights"]
        cells.append(f"{row['kv_bytes'] / 1e6:.0f}")
        cells.append("–" if peak is None else f"{peak / 1e6:.0f}")
        lines.append(cells)
    return markdown.table(columns, lines, "lr")


def kernels(result: dict) -> list[str]:
    """Operations asked for, and what the card ran for a token."""
    counts = [LaunchCounts(**own) for own in result["launches"]]
    lines = [f"`{result['about']['command']}`", "", launch_table(counts)]
    for way, profile in result.get("profile", {}).items():
        found = profile["per_token"]
        lines += [
            "",
            f"By the profiler, a further token of the unpruned model, {way}, is "
            f"{found['kernels']:.0f} kernels, {found['copies']:.0f} copies and "
            f"{found['fills']:.0f} fills, started by {found['launches']:.0f} calls of the host; "
            f"the kernels take "
            f"{profile['busy_ms']:.2f} ms. The longest:",
            "",
            markdown.table(
                ["kernel", "microseconds per token"],
                [[f"`{name[:90]}`", f"{spent:.1f}"] for name, spent in profile["top"]],
                "lr",
            ),
        ]
    return lines


def guessing(result: dict) -> list[str]:
    return [decode_table([Row(**row) for row in result["rows"]])]


def throughput(result: dict) -> list[str]:
    return [throughput_table([Speed(**own) for own in result["speeds"]])]


#: step, title, what writes the lines of its result
SECTIONS = (
    ("tests", "Tests", tests),
    ("efficiency", "First token and decoding", efficiency),
    ("compiled", "Compiled steps", efficiency),
    ("batch", "A batch", efficiency),
    ("kernels", "Kernels", kernels),
    ("guessing", "Guessing", guessing),
    ("throughput", "Throughput", throughput),
)
