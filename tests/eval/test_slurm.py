"""Evaluation on a SLURM cluster: what sbatch runs, with stand-ins for srun and scontrol."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.eval import fake_answers
from tests.paths import ROOT
from tests.ports import free_port

NODES, TASKS_PER_NODE = 2, 2

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    echo "$1" >>"$LOG/options"
    shift
done
for ((task = 0; task < SLURM_NNODES * SLURM_NTASKS_PER_NODE; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) \\
        SLURM_NTASKS=$((SLURM_NNODES * SLURM_NTASKS_PER_NODE)) "$@" &
    echo $! >>"$LOG/processes"
    own+=($!)
done
status=0
for process in "${own[@]}"; do
    wait -n || { status=1 && kill "${own[@]}" 2>/dev/null; }
done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node[1-2]" ] && printf '%s\\n' 127.0.0.1 node2
"""


class Job:
    """What sbatch makes of a submission from `folder`: a copy of the file, run elsewhere."""

    def __init__(self, place: Path, folder: Path = ROOT, python=sys.executable, **environment):
        self.log = place / "log"
        programs, copy = place / "programs", place / "job12345/slurm_script"
        for path in (self.log, programs, copy.parent):
            path.mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts/slurm/eval.sbatch", copy)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        self.script, self.environment = (
            copy,
            {
                **inherited,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "PYTHON": str(python),
                "LOG": str(self.log),
                "SLURM_SUBMIT_DIR": str(folder),
                "SLURM_JOB_ID": "123456",
                "SLURM_JOB_NODELIST": "node[1-2]",
                "SLURM_NNODES": str(NODES),
                "SLURM_NTASKS_PER_NODE": str(TASKS_PER_NODE),
                "SLURM_CPUS_PER_TASK": "3",
                **environment,
            },
        )

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", self.script, *words],
            cwd=self.script.parent,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def run(self, *words: str) -> subprocess.CompletedProcess:
        process = self.start(*words)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def written(self, name: str) -> list[str]:
        return (self.log / name).read_text().splitlines()


@pytest.fixture
def data(tmp_path):
    """The playground's POPE alone, in a folder that answers may go to."""
    source, target = ROOT / "playground/benchmark", tmp_path / "data"
    (target / "pope").mkdir(parents=True)
    for name in ("llava_pope_test.jsonl", "coco"):
        (target / "pope" / name).symlink_to(source / "pope" / name)
    (target / "pope/val2014").symlink_to(source / "images")
    return target


@pytest.fixture
def counted_python(tmp_path):
    """An interpreter whose answering programs write down who they are; the first one answers."""
    (tmp_path / "bin").mkdir()
    inner, path = fake_answers.interpreter(tmp_path / "bin"), tmp_path / "bin/counted"
    path.write_text(
        "#!/usr/bin/env bash\n"
        'if [ -n "${RANK:-}" ]; then\n'
        '    echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS"'
        ' >>"$LOG/tasks"\n'
        '    [ "$RANK" = 0 ] || exit 0\n'
        "fi\n"
        f'exec "{inner}" "$@"\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", ["eval.sbatch", "task.sh"])
def test_what_the_nodes_run_is_valid_shell(name):
    subprocess.run(["bash", "-n", ROOT / "scripts/slurm" / name], check=True)


def test_options_of_sbatch_stand_before_the_first_command():
    lines = (ROOT / "scripts/slurm/eval.sbatch").read_text().splitlines()
    end = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert len(options) == len([line for line in lines[:end] if line.startswith("#SBATCH")]) >= 8
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in options)
    assert "#SBATCH --gpus-per-task=1" in options and "#SBATCH --requeue" in options


def test_every_gpu_gets_one_process_of_one_run_and_the_score_comes_once(
    tmp_path, data, counted_python
):
    job = Job(tmp_path, python=counted_python, DATA_DIR=str(data), METHOD="divprune", LIMIT="6")
    done = job.run("scripts/v1_5/eval/pope.sh", "64")
    assert done.returncode == 0, done.stderr
    tasks = sorted(line.split() for line in job.written("tasks"))
    assert [task[:3] for task in tasks] == [
        ["0", "0", "4"],
        ["1", "1", "4"],
        ["2", "0", "4"],
        ["3", "1", "4"],
    ]
    assert {tuple(task[3:]) for task in tasks} == {("127.0.0.1", "13456", "3")}
    assert job.written("options") == ["--cpus-per-task=3", "--kill-on-bad-exit=1"]
    score = json.loads(done.stdout.splitlines()[-1])
    assert score["answers_file"].endswith("/divprune/n_64_limit6.jsonl")
    argv = Path(score["answers_file"]).with_suffix(".argv.json").read_text()
    assert "--pruning-method" in argv and "divprune" in argv and done.stdout.count('"score"') == 1


@pytest.mark.parametrize("words", [(), ("64",), ("scripts/v1_5/eval/popp.sh", "64")])
def test_a_job_without_an_evaluation_script_says_what_it_wants(tmp_path, words):
    done = Job(tmp_path).run(*words)
    assert done.returncode == 1
    given = words[0] if words else ""
    assert f"scripts/v1_5/eval/pope.sh, and is '{given}'" in done.stderr


def test_a_job_from_another_folder_or_without_sbatch_says_so(tmp_path):
    done = Job(tmp_path, folder=tmp_path).run("scripts/v1_5/eval/pope.sh")
    assert done.returncode == 1 and f"repository, not from {tmp_path}" in done.stderr
    job = Job(tmp_path)
    del job.environment["SLURM_SUBMIT_DIR"]
    done = job.run("scripts/v1_5/eval/pope.sh")
    assert done.returncode != 0 and "this file is for sbatch: sbatch scripts/slurm" in done.stderr


@pytest.mark.slow
def test_a_job_that_loses_a_node_goes_on_when_it_is_submitted_again(tmp_path, data):
    words = ("scripts/v1_5/eval/pope.sh", "64")
    options = {"LIMIT": "60", "BATCH_SIZE": "2", "SLURM_CPUS_PER_TASK": "1"}
    options |= {"DATA_DIR": str(data), "CKPT": str(ROOT / "tests/golden/tiny-llava-v1.5")}
    options["EXTRA"] = "--device cpu --no-reuse --max_new_tokens 4"
    options["MASTER_PORT"] = str(free_port())
    job = Job(tmp_path, **options)
    process = job.start(*words)
    deadline = time.monotonic() + 1800
    while len(answered := list(answers_in_journals(data))) < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    for number in job.written("processes")[TASKS_PER_NODE:]:  # those of the second node
        os.kill(int(number), 9)
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0 and not list(data.rglob("n_64_limit60.jsonl"))
    assert len(set(answered)) == len(answered)

    done = job.run(*words)
    assert done.returncode == 0, done.stderr
    before = int(re.search(r"(\d+) of 60 answers were there already", done.stdout)[1])
    assert 6 <= before < 60
    (path,) = data.rglob("n_64_limit60.jsonl")
    several = path.read_bytes()
    for part in (path, path.with_suffix(".settings.json"), path.with_suffix(".score.json")):
        part.unlink()
    alone = {**job.environment, "NPROC": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", ROOT / words[0], "64"], env=alone, check=True, capture_output=True)
    assert path.read_bytes() == several and len(several.splitlines()) == 60


def answers_in_journals(data):
    """Numbers of the questions that have been answered so far, by all processes."""
    for path in data.rglob("*.parts/*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)["number"]
