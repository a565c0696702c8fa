"""Runs recorded cases of scorers, converters and answering programs: same in, same out."""

import base64
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

from tests.eval.stub_judge import stub_judge
from tests.paths import ROOT

CATEGORY_RULE = "=" * 36
IMAGE_NAME = re.compile(r"[\w-]+\.(?:png|jpg|jpeg)")


def program(case: dict) -> list[str] | None:
    """Returns the command of a case; None when it belongs to a program that is not ours yet."""
    script, argv = case["script"], case["argv"]
    if script.startswith("gqa official"):
        return ["llava/eval/benchmarks/gqa.py", *argv]
    if script == "MME convert_answer_to_mme.py":
        name = argv[argv.index("--experiment") + 1]
        result = ["--result-file", f"answers/{name}.jsonl"]
        return [
            "llava/eval/benchmarks/mme.py",
            *result,
            "--output-dir",
            f"eval_tool/answers/{name}",
        ]
    if script == "MME eval_tool/calculation.py":
        return [
            "llava/eval/benchmarks/mme.py",
            "--results-dir",
            argv[argv.index("--results_dir") + 1],
        ]
    path = script.removeprefix("python -m ")
    if path != script:
        path = path.replace(".", "/") + ".py"
    return [path, *argv] if (ROOT / path).exists() else None


def run(case: dict, folder: Path, judge_url: str | None = None) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of a case run in `folder`.

    judge_url: endpoint of the recorded judge; it is asked one question at a time
    """
    for name, content in case["inputs"].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    script, *argv = program(case)
    judge = {"OPENAI_BASE_URL": judge_url, "JUDGE_WORKERS": "1"} if judge_url else {}
    done = subprocess.run(
        [sys.executable, ROOT / script, *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **judge},
        capture_output=True,
        encoding="utf-8",
    )
    return done.returncode, done.stdout, done.stderr


def differences(case: dict, folder: Path) -> list[str]:
    """Returns what a run of the case in the empty `folder` does differently; empty: reproduced."""
    replies = case.get("judge_replies")
    with stub_judge(replies) if replies else nullcontext() as judge:
        code, stdout, stderr = run(case, folder, judge.url if judge else None)
    found = []
    if judge and judge.requests != case["judge_requests"]:
        found.append(f"asked {judge.requests} instead of {case['judge_requests']}")
    if case["returncode"] == 0 or _refusal_is_wanted(case):
        if code != case["returncode"]:
            found.append(f"exit code {code} instead of {case['returncode']}: {stderr[-500:]}")
        silent = "--output-dir" in program(case)  # our converter also prints the score
        if not silent and _blocks(stdout) != _blocks(case["stdout"]):
            found.append(f"printed {stdout!r} instead of {case['stdout']!r}")
    else:
        # The reference crashed on legal input; we go on, and what it printed before is the same.
        if code != 0:
            found.append(f"exit code {code}: {stderr[-500:]}")
        if not stdout.startswith(case["stdout"]):
            found.append(f"printed {stdout!r}, which does not start with {case['stdout']!r}")
    if case["returncode"] == 0:
        for name, content in case["outputs"].items():
            found += _file_differences(folder / name, content)
    return found


def _refusal_is_wanted(case: dict) -> bool:
    """Input that is wrong (AssertionError), as opposed to a defect of the reference."""
    return case["error"] is not None and case["error"].startswith("AssertionError")


def _blocks(stdout: str) -> list[str]:
    """The categories of POPE come in the order of the folder; our mean of them is extra."""
    if CATEGORY_RULE not in stdout:
        return [stdout]
    blocks = [block.strip() for block in stdout.split(CATEGORY_RULE)]
    return sorted(block for block in blocks if block and not block.startswith("Average F1"))


def _file_differences(path: Path, content) -> list[str]:
    if not path.exists():
        return [f"{path.name} was not written"]
    if isinstance(content, dict):
        written = _sheet(path)
        wanted = content
    else:
        written, wanted = path.read_text(encoding="utf-8"), content
        if path.suffix == ".json":
            written, wanted = json.loads(written), json.loads(wanted)
    return [] if written == wanted else [f"{path.name}: {written!r} instead of {wanted!r}"]


def _sheet(path: Path) -> dict:
    import openpyxl

    sheet = openpyxl.load_workbook(path).active
    return {"sheet": sheet.title, "rows": [list(row) for row in sheet.iter_rows(values_only=True)]}


def inference_argv(case: dict, folder: Path, locate) -> list[str]:
    """Writes the inputs of a recorded answering program; returns its command line.

    locate: name of a checkpoint or image -> its path
    """
    for name, content in case["inputs"].items():
        for image in set(re.findall(r"<base64 of ([^>]+)>", content)):
            picture = base64.b64encode(locate(image).read_bytes()).decode()
            content = content.replace(f"<base64 of {image}>", picture)
        (folder / name).write_text(content, encoding="utf-8")
    argv = case["argv"]
    named = IMAGE_NAME.findall(" ".join([*case["inputs"].values(), *argv]))
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for image in set(named):
        shutil.copyfile(locate(image), images / image)
    places = {"@CK": locate(case["checkpoint"]), "@D": folder, "@IMG": images}
    for mark, place in places.items():
        argv = [word.replace(mark, str(place)) for word in argv]
    cap = ["--max_new_tokens", str(case["generation_cap"])]
    if "default conv mode llava_v0" in case.get("notes", ""):
        argv += ["--conv-mode", "llava_v0"]  # ours asks the checkpoint which template it has
    return [*argv, *cap, "--device", "cpu", "--dtype", "float32"]


def run_program(module: str, argv: list[str]) -> str:
    """Runs a program in this process; returns what it printed."""
    before, sys.argv = sys.argv, [module, *argv]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            importlib.import_module(module).main()
    finally:
        sys.argv = before
    return printed.getvalue()


def read_answers(path: Path) -> list[dict]:
    """The answer lines without the random part."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "answer_id"} for line in lines]


def inference_differences(case: dict, folder: Path, locate) -> list[str]:
    """Returns what an answering program does differently from its recording."""
    argv = inference_argv(case, folder, locate)
    printed = run_program(case["module"], argv).splitlines()
    if case["returncode"]:  # a defect of the reference on legal input: ours answers
        return [] if printed and printed[-1] else ["gave no answer"]
    if case["answers"] is None:
        wanted = case["stdout"][-1]
        return [] if printed[-1:] == [wanted] else [f"printed {printed!r} instead of {wanted!r}"]
    written = (folder / "a.jsonl").read_text(encoding="utf-8").splitlines()
    if [list(json.loads(line)) for line in written] != [list(a) for a in case["answers"]]:
        return [f"other keys or number of lines: {written}"]
    pairs = zip(read_answers(folder / "a.jsonl"), case["answers"], strict=True)
    return [
        f"answer {ours} instead of {recorded}"
        for ours, recorded in pairs
        if ours != {key: value for key, value in recorded.items() if key != "answer_id"}
    ]
