"""The report on a GPU: steps that fail or run out of time lose nothing, and the page says so."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.eval.gpu_report import machine, program
from llava.eval.gpu_report.page import page
from llava.eval.gpu_report.runner import TESTS_FILE, Report, run_steps
from llava.eval.gpu_report.steps import STEPS, Step
from tests.paths import ROOT

MACHINE = {
    "device": "Card 1",
    "memory": 2**36,
    "capability": "9.0",
    "count": 1,
    "cuda": "13.0",
    "python": "3.12.3",
    "packages": dict.fromkeys(machine.PACKAGES) | {"torch": "2.13.0"},
}
GOOD = "import json, sys; json.dump({'answer': 42}, open(sys.argv[1], 'w'))"
SLOW = f"{GOOD}; sys.stdout.write('measuring\\n'); import time; time.sleep(600)"
BROKEN = "raise SystemExit('error: out of memory')"


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path, small=False, machine=MACHINE)


@pytest.fixture
def step(tmp_path):
    """step(name, code, limit=120, least=0) runs Python code with the file of its result."""

    def make(name, code, limit=120.0, least=0.0):
        (tmp_path / f"{name}.py").write_text(code)
        command = f"{shlex.quote(f'{tmp_path / name}.py')} FILE SECONDS"
        return Step(name, f"what {name} does", command, command, limit, least)

    return make


#: limits of a step that never ends: on a busy machine it may not even begin within the first
LIMITS = (2.0, 10.0, 60.0)


def test_a_step_that_fails_is_ended_or_left_out_loses_nothing_of_the_others(tmp_path, step):
    for limit in LIMITS:
        report, seen = Report(tmp_path, small=False, machine=MACHINE), []
        steps = [
            step("broken", BROKEN),
            step("slow", SLOW, limit=limit),
            step("good", GOOD),
            step("late", GOOD, least=1000.0),
        ]
        run_steps(steps, report, 600, lambda report, seen=seen: seen.append(len(report.steps)))
        if report.steps["slow"].get("reason", "").endswith("measuring"):
            break
    assert seen == [1, 2, 3, 4]
    found = json.loads(report.file.read_text())["steps"]
    assert found == report.steps
    assert [found[s.name]["status"] for s in steps] == ["failed", "ended", "done", "not begun"]
    assert found["broken"]["reason"] == "exit status 1: error: out of memory"
    assert found["slow"]["reason"] == f"ended after {limit:.0f} seconds; its last words: measuring"
    assert found["slow"]["result"] == found["good"]["result"] == {"answer": 42}
    assert "seconds were left, it needs 1000" in found["late"]["reason"]


def runs(process):
    """Whether a process is there and has not ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    if not Path("/proc/self/stat").exists():
        return True
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_a_step_started_ends_with_it(report, step, tmp_path):
    child = tmp_path / "child"
    code = "import subprocess, sys, time; "
    code += f"p = subprocess.Popen(['sleep', '600']); open({str(child)!r}, 'w').write(str(p.pid)); "
    for limit in LIMITS:
        run_steps([step("slow", code + "time.sleep(600)", limit=limit)], report, 600)
        if child.exists() and child.read_text():
            break
    for _ in range(600):
        if not runs(int(child.read_text())):
            return
        time.sleep(0.1)
    raise AssertionError("sleep still runs")


def test_a_report_that_is_ended_ends_its_step(tmp_path):
    child, code = tmp_path / "child", tmp_path / "code.py"
    code.write_text(
        f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    command = shlex.quote(str(code))
    step = f"Step('slow', '', {command!r}, {command!r}, 600.0, 0.0)"
    names = "from llava.eval.gpu_report.runner import Path, Report, run_steps; "
    names += "from llava.eval.gpu_report.steps import Step; "
    run = f"run_steps([{step}], Report(Path({str(tmp_path)!r}), False, {{}}), 600)"
    report = subprocess.Popen([sys.executable, "-c", names + run], cwd=ROOT)
    for _ in range(6000):
        if child.exists() and child.read_text():
            break
        time.sleep(0.1)
    report.terminate()
    assert report.wait(120) == 128 + 15
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)


def test_a_further_call_does_what_is_missing(report, step, capsys):
    steps = [step("good", GOOD), step("broken", BROKEN)]
    run_steps(steps, report, 60)
    again = Report(report.folder, False, MACHINE)
    again.read()
    run_steps([step("good", BROKEN), step("broken", GOOD)], again, 60)
    assert [own["status"] for own in again.steps.values()] == ["done", "done"]
    assert "good: done before" in capsys.readouterr().out


def test_what_a_step_was_ended_in_the_middle_of_is_left_out(report, step):
    """A result, and a line of the tests: both are written as the time runs out."""
    code = "import os, sys; open(sys.argv[1], 'w').write('{\"answer\": 4'); "
    code += f"open(os.environ[{TESTS_FILE!r}], 'w').write('{{}}\\n{{\"test'); sys.exit('x')"
    run_steps([step("half", code), step("good", GOOD)], report, 60)
    assert "result" not in report.steps["half"] and report.steps["half"]["tests"] == [{}]
    assert report.steps["half"]["reason"] == "exit status 1: x"
    assert report.steps["good"]["result"] == {"answer": 42}


@pytest.mark.parametrize(
    "other, says", [({"device": "Card 2"}, "device"), ({"packages": {}}, "packages")]
)
def test_results_of_two_machines_do_not_mix(report, other, says):
    report.write()
    with pytest.raises(ValueError, match=f"{says} differ.*--overwrite begins anew"):
        Report(report.folder, False, MACHINE | other).read()
    with pytest.raises(ValueError, match="small differ"):
        Report(report.folder, True, MACHINE).read()


def test_all_steps_fit_the_budget_but_the_last_and_least():
    assert [s.name for s in STEPS][:2] == ["efficiency", "tests"]
    assert sum(s.least for s in STEPS) < program.BUDGET < 480 - 15
    for own in STEPS:
        assert own.least < own.limit
        for small in (True, False):
            words = own.words("result.json", 100.4, small)
            assert ("result.json" in words) == (own.name != "tests")
            assert ("100" in words) == (not small and "--time-limit" in words)


def row(name, oracle, **more):
    spread = {"median": 5.0, "p10": 4.0, "p90": 6.0}
    stages = ("vision", "select", "prefill", "first_token", "decode", "end_to_end")
    facts = {"visual_tokens_mean": 64.0, "kv_bytes": 2e8, "weight_bytes": 13e9}
    return {
        "variant": name,
        "oracle": oracle,
        "ms": {stage: spread for stage in stages},
        "times_dense": {"first_token": 0.5},
        "times_own_oracle": {"first_token": 1.02},
        "peak_bytes_over_weights": None,
        **facts,
        **more,
    }


def efficiency():
    about = {"command": "python -m x", "dtype": "float16", "prompt_length": 64}
    about["copy_bandwidth"] = 4e12
    rows = [row("dense", None), row("vispruner", "oracle"), {**row("stock", None), "ms": {}}]
    run = {"batch_size": 1, "output_tokens": 5, "rounds": 20, "variants": rows}
    return {"about": about, "refused": {"mustdrop": "unknown budget"}, "runs": [run]}


def test_the_page_says_what_was_found_and_what_was_not_done(report):
    counts = dict.fromkeys("vision select prefill first_token decode per_token".split(), 7)
    profile = {"per_token": dict.fromkeys(("kernels", "copies", "fills", "launches"), 9.0)}
    profile |= {"busy_ms": 3.2, "top": [("gemm|x", 12.5)]}
    outcome = {"test": "t.py::a", "outcome": "passed", "reason": "", "notes": ["within 1e-5"]}
    report.steps = {
        "efficiency": {"status": "done", "seconds": 200, "result": efficiency()},
        "tests": {
            "status": "ended",
            "seconds": 180,
            "reason": "ended after 180 seconds",
            "tests": [
                outcome,
                {**outcome, "outcome": "skipped", "reason": "no flash-attn", "notes": []},
                {**outcome, "outcome": "failed", "reason": "logits differ", "notes": []},
            ],
        },
        "kernels": {
            "status": "done",
            "seconds": 9,
            "result": {
                "about": efficiency()["about"],
                "launches": [{"name": "dense", "per_layer": 1.5, **counts}],
                "profile": {"plain": profile},
            },
        },
        "guessing": {"status": "failed", "seconds": 9, "reason": "exit status 1: error: x"},
    }
    text = page(report)
    assert text.startswith("# Card 1\n") and "64 GiB" in text and "flash-attn missing" in text
    assert "| guessing |" in text and "exit status 1: error: x" in text
    assert "| throughput |" in text and "not asked for" in text
    assert "1 failed, 1 passed, 1 skipped." in text and "- 1 x no flash-attn" in text
    assert "- `t.py::a`: logits differ" in text and "within 1e-5" in text
    assert "reads 13.20 GB" in text and "that takes 3.30 ms" in text and "- `mustdrop`" in text
    # 13.2 GB in 5 ms are 2640 GB/s, of 4000
    assert "| 2640 | 66 |" in text and "stock" not in text
    assert (
        "model, plain, is 9 kernels, 9 copies" in text
        and "gemm" in text
        and "## Guessing" not in text
    )


def test_a_card_s_name_is_one_of_a_file():
    assert program.card_name("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3"
    assert program.card_name("/") == "card"


def test_other_versions_are_named_with_what_to_do():
    fits = {"torch": "2.11.0", "transformers": machine.TRANSFORMERS}
    machine.check(fits)
    with pytest.raises(ImportError, match="5.17.0 is installed.*transformers==4.37.2.*WHEELS"):
        machine.check({**fits, "transformers": "5.17.0"})
    with pytest.raises(ImportError, match="torch is not installed"):
        machine.check({**fits, "torch": None})
    assert f'"transformers=={machine.TRANSFORMERS}"' in (ROOT / "setup.py").read_text()


def test_without_a_card_the_dry_run_is_named(monkeypatch, tmp_path):
    without = {**MACHINE, "capability": None, "memory": None}
    monkeypatch.setattr(program, "machine_of", lambda folder: without)
    with pytest.raises(SystemExit, match="no CUDA device here; --small"):
        program.main(["--out", str(tmp_path)])


def test_tests_note_how_they_ended_as_they_end(tmp_path):
    """In a process of its own, as in the report."""
    lines = tmp_path / "lines.jsonl"
    words = "-m pytest -q -p no:cacheprovider tests/gpu/test_costs.py -k waits_are_seen -m gpu"
    subprocess.run(
        [sys.executable, *words.split()],
        cwd=ROOT,
        env={**os.environ, TESTS_FILE: str(lines), "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
    )
    (line,) = map(json.loads, lines.read_text().splitlines())
    assert line["test"].startswith("test_costs.py::test_waits_are_seen")
    assert (line["outcome"], line["reason"]) == ("skipped", "torch sees no CUDA device")


@pytest.mark.slow
def test_the_dry_run_writes_a_whole_report(tmp_path):
    done = subprocess.run(
        ["bash", "scripts/gpu_report.sh", "--small", "--out", str(tmp_path), "--budget", "1800"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert {name: own["status"] for name, own in found["steps"].items()} == {
        step.name: "done" for step in STEPS
    }, done.stdout
    text = (tmp_path / "page.md").read_text()
    titles = ("Tests", "First token and decoding", "Compiled steps", "Kernels", "Guessing")
    for title in (*titles, "Throughput"):
        assert f"## {title}" in text
    assert "no number means anything" in text and "1 passed" in text
