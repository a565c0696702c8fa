"""`llava COMMAND ...`: the programs of this package by one short name each.

    llava run --image-file view.jpg --query "What is shown here?" --pruning-method vispruner
    llava eval pope 64 --pruning-method vispruner --limit 100
    llava methods vispruner --visual-token-num 64

`llava COMMAND --help` lists the options of a command. Commands are modules for `python -m`, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from .errors import errors_as_messages
from .program_parser import TYPED, typed_command
from .spelling import unknown

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path("scripts") / "v1_5" / "eval" / "benchmark.sh"


@dataclass(frozen=True)
class Command:
    """
    module: with a function `main` that reads the command line; None: it is in this file
    about:  what it does
    """

    module: str | None
    about: str


COMMANDS = {
    "run": Command("llava.eval.run_llava", "asks one question about an image or a video"),
    "chat": Command("llava.serve.cli", "a chat about an image, in the terminal"),
    "eval": Command(None, "runs a benchmark and scores it"),
    "compare": Command("llava.eval.compare.program", "compares methods, budgets and benchmarks"),
    "browse": Command("llava.eval.browse.program", "shows the answers of two runs side by side"),
    "demo": Command("llava.serve.demo", "the web page, with everything behind it"),
    "methods": Command("llava.pruning.program", "lists the methods, or explains one setting"),
    "needs": Command("llava.eval.efficiency.needs", "memory and time of a model, by formula"),
    "efficiency": Command(
        "llava.eval.efficiency.program", "measures what a method costs and saves"
    ),
}
#: a family of benchmarks whose members help does not list
MANY = "viscot"
#: options of `llava eval` that the scripts take from the environment
VARIABLES = {
    "--model-path": "CKPT",
    "--data-dir": "DATA_DIR",
    "--limit": "LIMIT",
    "--batch-size": "BATCH_SIZE",
    "--conv-mode": "CONV_MODE",
    "--pruning-method": "METHOD",
    "--split": "SPLIT",
    "--processes": "NPROC",
}
EVAL_HELP = f"""usage: llava eval BENCHMARK [TOKENS] [options]

Asks the questions of a benchmark, scores the answers, and prints the score as its last line.
Without a model or data those of the playground are used. The same as bash {SCRIPT}.

  BENCHMARK            one of: {{names}}
  TOKENS               visual tokens of an image to keep, or a share of them (0.222)
  --pruning-method M   see llava methods; default: none, with TOKENS the package's default method
  --model-path MODEL   folder, or name on the hub
  --dtype TYPE         type of numbers: fp32, fp16 or bf16 (default: what suits the device)
  --data-dir DIR       evaluation data (default: playground/data/eval)
  --limit N            about so many questions, evenly spread
  --batch-size N       prompts at a time (default: 8)
  --conv-mode NAME     prompt template (default: the one that the checkpoint asks for)
  --split NAME         another split of the benchmark, such as val or testA
  --processes N        several processes that share the questions
  KEY=VALUE            options of the method; everything else goes to the answering program:
                       python -m llava.eval.model_vqa_loader --help
"""


def evaluate(words: list[str]) -> int:
    """`llava eval`: the exit code of the script. Raises ValueError on bad input, and where the
    scripts are not there, as they come with the repository and not with the package."""
    from .eval.benchmarks import all_benchmarks, find_benchmark

    if not words or "-h" in words or "--help" in words:
        names = [name for name in all_benchmarks() if not name.startswith(f"{MANY}_")]
        listed = textwrap.wrap(", ".join([*names, f"{MANY}_NAME"]), 70)
        print(EVAL_HELP.format(names=f"\n{' ' * 23}".join(listed)), end="")
        return 0 if words else 2
    if not (ROOT / SCRIPT).is_file():
        raise ValueError(
            f"{ROOT / SCRIPT} is not there: the scripts come with a clone of the repository, not "
            "with the installed package. llava compare runs benchmarks without them"
        )
    benchmark, *words = words
    find_benchmark(benchmark)
    settings, rest = from_options(words)
    command = ["bash", str(ROOT / SCRIPT), benchmark, *rest]
    python = os.environ.get("PYTHON") or sys.executable
    typed = f"{typed_command()} eval {benchmark}"
    environment = {**os.environ, "PYTHON": python, TYPED: typed, **settings}
    return subprocess.run(command, env=environment).returncode


def from_options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """(environment variables, other words) of a command line. Raises ValueError on an option of
    `VARIABLES` without its value."""
    settings, rest, left = {}, [], iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag not in VARIABLES:
            rest.append(word)
            continue
        value = value if equals else next(left, "")
        if not value:
            raise ValueError(f"{flag} needs a value")
        if flag == "--data-dir" or (flag == "--model-path" and os.path.isdir(value)):
            value = os.path.abspath(os.path.expanduser(value))
        settings[VARIABLES[flag]] = value
    return settings, rest


def overview() -> str:
    lines = [__doc__, "commands:"]
    lines += [f"  {name:<12} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    name, *rest = (sys.argv[1:] if words is None else words) or [""]
    if name in ("", "-h", "--help"):
        print(overview())
        sys.exit(0 if name else 2)
    if name not in COMMANDS:
        sys.exit(f"error: {unknown('command', name, COMMANDS)}")
    if (module := COMMANDS[name].module) is None:
        with errors_as_messages():
            sys.exit(evaluate(rest))
    sys.argv = [f"{typed_command()} {name}", *rest]
    import_module(module).main()


if __name__ == "__main__":
    main()
