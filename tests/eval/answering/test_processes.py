"""Several processes share the questions; whatever is killed, the answers file ends the same."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from tqdm import tqdm

from llava.eval.answering.answers_file import (
    AnswersFile,
    Journal,
    folder,
    journal_line,
    read_journals,
)
from llava.eval.answering.questions import Question
from llava.eval.answering.run import Task, answer_questions, plan_shares
from llava.eval.answering.workers import Workers
from llava.eval.files.answer_lines import Answer
from tests.paths import ROOT
from tests.ports import free_port

FORK = multiprocessing.get_context("fork")  # what is imported here is there at once
SETTINGS = {"model": "m", "pruner": "Pruner()"}
tqdm.set_lock(threading.RLock())  # the usual one is shared with forks, even with killed ones


def questions(count=60, per_image=7):
    """Questions about images in no order, of different lengths."""
    draw = random.Random(0)
    order = [f"{n // per_image}.png" for n in range(count)]
    draw.shuffle(order)
    return [
        Question({"question_id": n, "prompt": "?"}, "why " * draw.randint(1, 9), [image])
        for n, image in enumerate(order)
    ]


class FakeLoop:
    """Answers with the number of the question, after a while; not while `held()` is true, so that
    a run is not over before it is killed, however late that is."""

    def __init__(self, seconds=0.0, log=None, held=lambda: False):
        self.seconds, self.log, self.held = seconds, log, held
        self.visual_tokens = None

    def run(self, batches, images):
        for numbers, batch in batches:
            time.sleep(self.seconds)
            while self.held():
                time.sleep(0.002)
            if self.log is not None:
                self.log.append(numbers)
            yield numbers, [Answer(f"answer {q.head['question_id']}") for q in batch]


def run(path, asked, seconds=0.0, log=None, held=lambda: False, **options):
    task = Task(asked, "", str(path), "m", SETTINGS)
    return answer_questions(task, lambda: FakeLoop(seconds, log, held), 4, **options)


@pytest.fixture
def undisturbed(tmp_path):
    run(tmp_path / "whole.jsonl", questions())
    return (tmp_path / "whole.jsonl").read_bytes()


# --- the plan -----------------------------------------------------------------------------------


@pytest.mark.parametrize("by_image", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_the_plan_has_every_question_once_and_fills_its_batches(batch_size, by_image):
    shares = plan_shares(questions(), batch_size, by_image)
    batches = [batch for share in shares for batch in share]
    assert sorted(n for batch in batches for n in batch) == list(range(60))
    assert max(map(len, batches)) <= batch_size
    if not by_image:
        assert len(batches) == -(-60 // batch_size)


def test_questions_about_one_image_make_one_share():
    asked = questions()
    shares = plan_shares(asked, 4)
    images = [{asked[n].images[0] for batch in share for n in batch} for share in shares]
    assert all(len(own) == 1 for own in images)
    assert len({own.pop() for own in images}) == len(shares)
    assert {tuple(map(len, share)) for share in shares} == {(3, 4), (4,)}  # of 7, and the rest
    asked = questions(per_image=3)
    together = [{asked[n].images[0] for n in share[0]} for share in plan_shares(asked, 8)]
    assert all(len(images) == 2 for images in together)  # whole groups: 3 and 3 of 8


def test_batches_hold_prompts_of_like_length_and_the_longest_come_first():
    asked = questions()
    shares = plan_shares(asked, 10, by_image=False)
    lengths = [[len(asked[n].text) for n in share[0]] for share in shares]
    assert lengths == sorted(lengths, reverse=True)
    assert sum(max(batch) - min(batch) for batch in lengths) <= 36  # all lengths together span 32


# --- one process --------------------------------------------------------------------------------


def test_the_file_is_in_question_order_whatever_the_order_of_answering(tmp_path, undisturbed):
    records = [json.loads(line) for line in undisturbed.splitlines()]
    assert [record["question_id"] for record in records] == list(range(60))
    assert all(record["text"] == f"answer {record['question_id']}" for record in records)
    assert len({record["answer_id"] for record in records}) == 60
    assert not os.path.exists(folder(str(tmp_path / "whole.jsonl")))


def killed(path, victim, name, log, dies):
    """Runs in a process that is killed inside `victim.name`: at its first call where `dies(*args)`
    is true, which also may do what was half done by then. Returns the batches it was asked."""

    def die(*args, **kwargs):
        if dies(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    class Logged(list):
        def append(self, batch):
            with open(log, "a") as file:
                print(json.dumps(batch), file=file)

    def child():
        setattr(victim, name, die)
        run(path, questions(), log=Logged())

    method = getattr(victim, name)
    process = FORK.Process(target=child)
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("count", range(2, 60, 3))  # 20 counts, inside of batches and between them
def test_a_kill_loses_the_batch_in_flight_and_no_more(count, tmp_path, undisturbed):
    path, whole, second = tmp_path / "a.jsonl", [], []
    run(tmp_path / "b.jsonl", questions(), log=whole)
    kept = []

    def dies(journal, number, line):
        kept.append(number)
        if len(kept) > count:  # a part of this line is in the file
            journal.file.write(journal_line(number, line)[: 1 - count])
            journal.file.flush()
        return len(kept) > count

    first = killed(path, Journal, "put", tmp_path / "log", dies)
    assert not path.exists() and len(read_journals(str(path), ())) == count
    in_flight = first[-1]
    assert 0 <= count - sum(map(len, first[:-1])) < len(in_flight)  # the rest was finished
    assert run(path, questions(), log=second).num_before == count
    assert first[:-1] + second == whole and second[0] == in_flight
    assert path.read_bytes() == undisturbed
    assert not os.path.exists(folder(str(path)))


@pytest.mark.parametrize("written", [False, True])
def test_a_kill_at_the_end_loses_nothing(written, tmp_path, undisturbed):
    path, again = tmp_path / "a.jsonl", []

    def dies(temporary, target):
        if target == str(path) and written:
            os.rename(temporary, target)
        return target == str(path)

    killed(path, os, "replace", tmp_path / "log", dies)
    assert path.exists() is written
    assert run(path, questions(), log=again).num_before == 60 and not again
    assert path.read_bytes() == undisturbed
    assert not os.path.exists(folder(str(path)))


def test_a_run_killed_from_outside_again_and_again_ends_with_the_same_file(tmp_path, undisturbed):
    path, target = tmp_path / "a.jsonl", 0

    def enough():
        return num_answered(path) >= target

    while (target := target + 9) < 50:
        process = FORK.Process(target=run, args=(path, questions(), 0.01, None, enough))
        process.start()
        wait_for(enough)
        process.kill()
        process.join()
        assert target <= num_answered(path) < 60 and not path.exists()
    run(path, questions())
    assert path.read_bytes() == undisturbed


def num_answered(path):
    """Answers that lie in journals; 0 while a run that goes on puts those of before into one."""
    try:
        return len(read_journals(str(path), (), tolerant=True))
    except FileNotFoundError:
        return 0


def wait_for(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_answers_are_printed_as_they_come_where_that_is_asked_for(tmp_path, capsys, undisturbed):
    run(tmp_path / "a.jsonl", questions())
    assert not capsys.readouterr().out
    task = Task(questions(), "", str(tmp_path / "b.jsonl"), "m", SETTINGS, follow=True)
    answer_questions(task, FakeLoop, 4)
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == sorted(undisturbed.decode().splitlines())
    assert "60/60" in err
    answer_questions(task, FakeLoop, 4)
    assert not capsys.readouterr().out  # nothing new


def test_a_continued_run_answers_in_the_same_batches_and_nothing_twice(tmp_path):
    path, whole, first, second = tmp_path / "a.jsonl", [], [], []
    run(tmp_path / "whole.jsonl", questions(), log=whole)

    class Stopped(FakeLoop):
        def run(self, batches, images):
            for count, item in enumerate(super().run(batches, images)):
                if count == 5:
                    raise KeyboardInterrupt
                yield item

    task = Task(questions(), "", str(path), "m", SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        answer_questions(task, lambda: Stopped(log=first), 4)
    assert run(path, questions(), log=second).num_before == sum(map(len, whole[:5]))
    assert first[:5] + second == whole
    assert run(path, questions(), log=second).num_before == 60
    assert first[:5] + second == whole


def test_answers_ahead_of_other_settings_or_questions_are_not_continued(tmp_path):
    path = tmp_path / "a.jsonl"
    run(path, questions()[:1])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    os.truncate(path, 0)
    journal = Journal(str(path), 3)
    journal.put(0, *lines)
    journal.close()
    with pytest.raises(ValueError, match="made with other settings"):
        answer_questions(Task(questions(), "", str(path), "m", {"model": "x"}), FakeLoop)
    with pytest.raises(ValueError, match="belongs to other questions"):
        run(path, questions()[1:])
    log = []
    assert run(path, questions()[:1], log=log).num_before == 1 and not log
    run(path, questions()[1:3], overwrite=True)
    assert len(path.read_text().splitlines()) == 2


def test_half_a_line_of_a_journal_is_cut_off(tmp_path):
    path, heads = str(tmp_path / "a.jsonl"), [{"question_id": n} for n in range(8)]
    with AnswersFile(path, heads, {}) as answers:
        answers.put(4, heads[4] | {"text": "d"})
        answers.put(2, heads[2] | {"text": "b"})
    with open(os.path.join(folder(path), "0.jsonl"), "ab") as file:
        file.write(b'{"number": 7, "li')
    assert list(read_journals(path, ())) == [4, 2]
    with AnswersFile(path, heads, {}) as answers:
        answers.put(5, heads[5] | {"text": "e"})
    assert list(read_journals(path, ())) == [4, 2, 5]


# --- several processes --------------------------------------------------------------------------


def worker(path, rank, size, port, seconds, log, held=lambda: False):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    found = []
    run(path, questions(), seconds, found, held, workers=Workers.from_environment())
    log.put((rank, found))


def start(path, size, seconds=0.0, ranks=None, port=None, held=lambda: False):
    """Starts processes of a run of `size`: those of one group of nodes, or all of them."""
    port, log = port or free_port(), FORK.Queue()
    args = [(path, rank, size, port, seconds, log, held) for rank in ranks or range(size)]
    processes = [FORK.Process(target=worker, args=own, daemon=True) for own in args]
    for process in processes:
        process.start()
    return processes, log


def test_processes_share_the_questions_as_they_ask_for_them(tmp_path, undisturbed):
    path, begun = tmp_path / "a.jsonl", tmp_path / "begun"
    begun.mkdir()

    def others_are_missing():
        (begun / str(os.getpid())).touch()
        return len(os.listdir(begun)) < 3

    processes, log = start(path, 3, seconds=0.02, held=others_are_missing)
    done = dict(log.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert path.read_bytes() == undisturbed
    assert not os.path.exists(folder(str(path)))
    answered = [n for batches in done.values() for batch in batches for n in batch]
    assert sorted(answered) == list(range(60))  # each by one process
    assert all(done.values())  # and none was idle


def test_what_a_killed_process_had_is_answered_when_the_run_is_continued(tmp_path, undisturbed):
    path, killed = tmp_path / "a.jsonl", tmp_path / "killed"
    target = 0

    def enough():
        return num_answered(path) >= target

    for target, size, victim in ((8, 2, 1), (20, 3, 0), (32, 2, 1)):  # noqa: B007 by `enough`
        processes, _ = start(path, size, 0.03, held=lambda: enough() and not killed.exists())
        wait_for(enough)
        os.kill(processes[victim].pid, signal.SIGKILL)
        killed.touch()
        time.sleep(0.05)
        for process in processes:  # as a launcher does
            process.kill()
            process.join()
        killed.unlink()
        assert not path.exists()
    assert run(path, questions()).num_before >= 32
    assert path.read_bytes() == undisturbed


@pytest.mark.parametrize("target", [1, 8, 16])
def test_a_group_that_is_killed_and_started_again_joins_the_others(target, tmp_path, undisturbed):
    path, port, killed = tmp_path / "a.jsonl", free_port(), tmp_path / "killed"

    def enough():
        return sum(len(lines_of(path, rank)) for rank in (2, 3)) >= target

    # The first group leaves the second one enough to answer, which does not answer all of it.
    first, log = start(path, 4, 0.05, [0, 1], port, held=lambda: not killed.exists())
    second, _ = start(path, 4, 0.05, [2, 3], port, held=enough)
    wait_for(enough)
    for process in second:
        process.kill()
        process.join()
    killed.touch()
    taken = [lines_of(path, rank) for rank in (2, 3)]
    assert not path.exists()
    with open(journal_of(path, 3), "a") as file:
        file.write('{"number": 7, "li')  # what it was writing
    again, log_again = start(path, 4, 0.05, ranks=[2, 3], port=port)
    done = [own for queue in (log, log_again) for own in (queue.get(timeout=600)[1] for _ in "ab")]
    for process in first + again:
        process.join(600)
        assert process.exitcode == 0
    assert path.read_bytes() == undisturbed
    assert not os.path.exists(folder(str(path)))
    answered = [n for batches in done for batch in batches for n in batch]
    repeated = len(answered) + sum(map(len, taken)) - 60
    assert sorted({*answered, *taken[0], *taken[1]}) == list(range(60))
    assert 0 <= repeated < 2 * 4  # a batch in flight is answered again, and nothing else


def test_without_the_store_the_others_end_with_what_to_do(tmp_path):
    path, port, killed = tmp_path / "a.jsonl", free_port(), tmp_path / "killed"
    (main,), _ = start(path, 2, 0.05, ranks=[0], port=port, held=lambda: True)
    reason = FORK.Queue()

    def has_answered():
        return bool(lines_of(path, 1))

    def other():
        try:
            worker(path, 1, 2, port, 0.05, None, lambda: has_answered() and not killed.exists())
        except ConnectionError as error:
            reason.put(str(error))

    beside = FORK.Process(target=other, daemon=True)
    beside.start()
    wait_for(has_answered)
    main.kill()
    main.join()
    killed.touch()
    assert reason.get(timeout=600).endswith(
        "is gone: start all of them again to answer what is left"
    )
    beside.join(600)
    assert run(path, questions()).num_before > 0


def journal_of(path, rank):
    return os.path.join(folder(str(path)), f"{rank}.jsonl")


def lines_of(path, rank):
    """Numbers of the questions that a process has answered."""
    if not os.path.exists(journal_of(path, rank)):
        return []
    lines = open(journal_of(path, rank)).read().split("\n")[:-1]
    return [json.loads(line)["number"] for line in lines]


@pytest.mark.slow
def test_two_processes_of_a_script_write_what_one_writes(tmp_path):
    data = ROOT / "playground" / "benchmark"
    files = []
    for count in ("1", "2"):
        target = tmp_path / count
        (target / "pope").mkdir(parents=True)
        for name in ("llava_pope_test.jsonl", "coco"):
            (target / "pope" / name).symlink_to(data / "pope" / name)
        (target / "pope" / "val2014").symlink_to(data / "images")
        env = {**os.environ, "PYTHON": sys.executable, "DATA_DIR": str(target)}
        env |= {"LIMIT": "24", "NPROC": count, "BATCH_SIZE": "4", "OMP_NUM_THREADS": "1"}
        script = str(ROOT / "scripts" / "v1_5" / "eval" / "pope.sh")
        subprocess.run(["bash", script, "64"], env=env, check=True, capture_output=True)
        files.append(next(target.rglob("n_64_limit24.jsonl")).read_bytes())
    assert files[0] == files[1] and len(files[0].splitlines()) == 24


@pytest.mark.slow
def test_two_launches_share_the_questions_and_the_second_may_be_started_again(tmp_path):
    """What docs/Evaluation.md tells to type on two machines, here on one."""
    source, port, groups = ROOT / "playground" / "benchmark", free_port(), {}
    answers = "pope/answers/llava_pope_test/tiny-llava-v1.5/vispruner/n_64_limit60.jsonl"
    (tmp_path / "pope").mkdir(parents=True)
    for name in ("llava_pope_test.jsonl", "coco"):
        (tmp_path / "pope" / name).symlink_to(source / "pope" / name)
    (tmp_path / "pope" / "val2014").symlink_to(source / "images")
    env = {**os.environ, "PYTHON": sys.executable, "DATA_DIR": str(tmp_path), "LIMIT": "60"}
    env |= {"CKPT": str(ROOT / "tests/golden/tiny-llava-v1.5"), "BATCH_SIZE": "2", "NPROC": "4"}
    env |= {"EXTRA": "--device cpu --no-reuse --max_new_tokens 24", "OMP_NUM_THREADS": "1"}

    def launch(rank):
        words = f"--num_machines 2 --machine_rank {rank} --main_process_ip 127.0.0.1"
        own = {**env, "LAUNCH": f"{words} --main_process_port {port}"}
        command = ["bash", str(ROOT / "scripts/v1_5/eval/pope.sh"), "64"]
        log = open(tmp_path / f"log{rank}", "a")
        groups[rank] = subprocess.Popen(
            command, env=own, stdout=log, stderr=log, start_new_session=True
        )

    path = tmp_path / answers
    try:
        launch(0), launch(1)
        wait_for(lambda: lines_of(path, 2) or lines_of(path, 3))
        os.killpg(groups[1].pid, signal.SIGKILL)
        assert groups[1].wait() == -signal.SIGKILL and not path.exists()
        launch(1)
        codes = [groups[rank].wait(600) for rank in (0, 1)]
        assert codes == [0, 0], (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    finally:
        for group in groups.values():
            if group.poll() is None:
                os.killpg(group.pid, signal.SIGKILL)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["question_id"] for record in records}) == len(records) == 60
    assert not os.path.exists(folder(str(path)))
    score = json.loads((tmp_path / "log0").read_text().splitlines()[-1])
    assert score["answers_file"] == str(path)
