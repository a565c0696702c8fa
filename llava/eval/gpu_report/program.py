"""Checks a GPU and measures it in a few minutes: one JSON file, one page.

    bash scripts/gpu_report.sh
    python -m llava.eval.gpu_report --budget 460 --page docs/gpu/CARD.md
    python -m llava.eval.gpu_report --small        tiny models on a CPU: does all of it work?

Every step is a program of its own with a limit; what is done is kept, and a further call does what
is missing. See docs/Efficiency.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import traceback
from pathlib import Path

from llava.errors import errors_as_messages
from llava.eval.gpu_report.runner import DONE, Report, last_line, run_program, run_steps
from llava.eval.gpu_report.steps import STEPS
from llava.program_parser import ProgramParser, Several

#: seconds for all steps: under eight minutes with what comes before and after
BUDGET = 460.0
MACHINE_LIMIT = 90.0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ProgramParser(__doc__, whole=True)
    names = [step.name for step in STEPS]
    parser.add_argument(
        "--small", action="store_true", help="tiny models on the CPU, to see that all of it works"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="SECONDS",
        help="time for all steps together",
    )
    parser.add_argument(
        "--steps",
        action=Several,
        choices=names,
        default=names,
        metavar="STEP",
        help=f"what is done, of {', '.join(names)} (default: all)",
    )
    parser.add_argument("--out", default="runs/gpu_report", help="folder of results and logs")
    parser.add_argument(
        "--page",
        metavar="FILE",
        help="the page (default: docs/gpu/CARD.md, named after the card; with --small in --out)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="discard the results that are there and begin anew"
    )
    args = parser.parse_args(argv)
    if args.budget <= 0:
        parser.error(f"--budget ({args.budget:g}) must be more than 0 seconds")
    return args


def machine_of(folder: Path) -> dict:
    """The machine, found out in a process of its own. Raises ValueError where it has none of what
    is needed."""
    file, log = folder / "machine.json", folder / "machine.log"
    file.unlink(missing_ok=True)
    run_program(["-m", "llava.eval.gpu_report.machine", str(file)], log, MACHINE_LIMIT)
    if not file.exists():
        raise ValueError(last_line(log).removeprefix("error: "))
    return json.loads(file.read_text(encoding="utf-8"))


def card_name(device: str) -> str:
    """The name of a card as one of a file."""
    return re.sub(r"\W+", "_", device).strip("_") or "card"


@errors_as_messages()
def main(argv: list[str] | None = None) -> Report:
    args = parse_args(argv)
    folder = Path(args.out)
    if args.overwrite and (folder / "report.json").exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder, args.small, machine_of(folder))
    if report.machine["capability"] is None and not args.small:
        raise ValueError(
            "torch sees no CUDA device here; --small tries all of it with tiny models on the CPU"
        )
    # What writes the page imports the package, which the machine has only now shown to fit.
    from llava.eval.gpu_report.page import page

    report.read()
    card = card_name(report.machine["device"])
    path = Path(args.page or (folder / "page.md" if args.small else f"docs/gpu/{card}.md"))
    path.parent.mkdir(parents=True, exist_ok=True)

    def draft(report: Report) -> None:
        try:
            path.write_text(page(report), encoding="utf-8")
        except Exception:  # a line that cannot be written must not end the steps that follow
            traceback.print_exc()

    chosen = [step for step in STEPS if step.name in args.steps]
    run_steps(chosen, report, args.budget, draft)
    path.write_text(page(report), encoding="utf-8")
    missing = [s.name for s in STEPS if report.steps.get(s.name, {}).get("status") != DONE]
    print(f"written: {report.file}, {path}")
    if missing:
        print(f"not done: {', '.join(missing)}; the same command again does what is missing")
    return report
