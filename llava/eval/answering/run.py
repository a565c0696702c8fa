"""Questions in, answers file out, by one process or several; continued after any interruption."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import shortuuid
from tqdm import tqdm

from llava.eval.answering.answers_file import AnswersFile, Journal
from llava.eval.answering.loop import AnswerLoop
from llava.eval.answering.questions import Question
from llava.eval.answering.workers import Workers
from llava.eval.files.answer_lines import Answer, Failure
from llava.eval.files.mask_files import REFERENCE, mask_path, write_mask
from llava.model.block_encoding import UnfitBudget

FILE_SYSTEM_SECONDS = 90.0
#: between two states of a progress bar in a file
SECONDS_IN_LOGS = 15.0

Batch = list[int]  # numbers of questions
Share = list[Batch]  # what one process takes at a time


@dataclass
class Answered:
    """What a run did.

    num_before:    answers that were there
    seconds:       time this process took to answer, without loading; None when answers were there
                   before: it would be that of a part
    visual_tokens: of a prompt, entering the decoder and on average over its layers; None: none seen
    num_failed:    questions in the file that failed, as the main process knows it
    """

    num_before: int
    seconds: float | None
    visual_tokens: tuple[float, float] | None
    num_failed: int = 0


@dataclass
class Task:
    """A set of questions and where the answers go.

    images:   folder of the images
    path:     answers file
    model:    name of the model in the answer lines
    settings: what must be equal for two runs to continue each other (JSON values)
    label:    what the progress bar says; by default the name of the answers file
    follow:   print the lines of the answers file as they come
    masks:    write the masks of what was kept of each image, see `mask_files`
    """

    questions: list[Question]
    images: str
    path: str
    model: str
    settings: dict
    label: str = ""
    follow: bool = False
    masks: bool = False

    def line(self, number: int, answer: Answer | Failure) -> dict:
        """The record for the answers file; its id follows from question and settings, so that a
        run that was interrupted ends with the same file as one that was not."""
        question = self.questions[number]
        name = json.dumps([self.digest, question.head, number], sort_keys=True)
        if isinstance(answer, Failure):
            return question.failed_line(answer.reason, shortuuid.uuid(name), self.model)
        return question.answer_line(answer.text, shortuuid.uuid(name), self.model, answer.metadata)

    def keep_masks(self, number: int, answer: Answer | Failure) -> None:
        """Writes the masks of an answer beside the answers file, where they are wanted."""
        if not self.masks or isinstance(answer, Failure):
            return
        for image, mask in enumerate(answer.masks or ()):
            write_mask(mask.kept, mask_path(self.path, number, image), mask.frames)
            if mask.reference is not None:
                path = mask_path(self.path, number, image, REFERENCE)
                write_mask(mask.reference, path, mask.frames)

    @cached_property
    def digest(self) -> str:
        """Stands for the settings in the names of the answers."""
        return shortuuid.uuid(json.dumps(self.settings, sort_keys=True))


def answer_questions(
    task: Task,
    make_loop: Callable[[], AnswerLoop],
    batch_size: int = 1,
    by_image: bool = True,
    overwrite: bool = False,
    workers: Workers | None = None,
) -> Answered:
    """Answers what the answers file does not hold yet; when it returns, the file is complete.

    make_loop: called where there is something to answer; may load the model
    by_image:  questions about one image come together, see `plan_shares`
    workers:   the processes that call this alike, with a file system in common
    Questions that failed in an earlier run are asked again. Raises ValueError when the file belongs
    to other questions or settings.
    """
    workers = workers or Workers()
    key = workers.next_key()
    if not workers.main:
        with workers.in_touch():
            return _answer_beside(task, make_loop, workers, key)
    heads = [question.head for question in task.questions]
    with AnswersFile(task.path, heads, task.settings, overwrite) as answers:
        known = frozenset(answers.known)
        shares = plan_shares(task.questions, batch_size, by_image)
        open_shares = ([b for b in share if not known.issuperset(b)] for share in shares)
        todo = [share for share in open_shares if share]
        workers.tell(key, [len(known), todo])
        outcome = _part(task, todo, make_loop, workers, key, answers.put, len(known))
        workers.wait(f"{key}/answered")
        given_up = workers.given_up(key)
        if not given_up:
            answers.finish(FILE_SYSTEM_SECONDS if workers.size > 1 else 0.0)
        outcome.num_failed = answers.num_failed
    workers.wait(f"{key}/merged")
    _raise_unfit(given_up)
    return outcome


def _answer_beside(task: Task, make_loop, workers: Workers, key: str) -> Answered:
    """The part of a process that is not the main one; its answers go into a journal of its own."""
    num_before, todo = workers.tell(key)
    journal = Journal(task.path, workers.rank)
    if workers.replaces(key):
        answered = journal.go_on()
        todo = [[b for b in share if not answered.issuperset(b)] for share in todo]
    outcome = _part(task, todo, make_loop, workers, key, journal.put, num_before)
    journal.close()
    workers.done(key)
    workers.wait(f"{key}/answered")
    given_up = workers.given_up(key)
    workers.wait(f"{key}/merged")
    _raise_unfit(given_up)
    return outcome


def _part(task, todo, make_loop, workers: Workers, key: str, put, num_before) -> Answered:
    """As `_answer`. Where a budget does not fit an image, which is so whoever asks, all processes
    stop, and raise the same error when they have met."""
    try:
        return _answer(task, todo, make_loop, workers, key, put, num_before)
    except ValueError as error:
        if workers.size == 1 or not isinstance(error.__cause__, UnfitBudget):
            raise
        workers.give_up(key, [str(error), str(error.__cause__)])
        return Answered(num_before, None, None)


def _raise_unfit(given_up: list[str] | None) -> None:
    if given_up:
        message, reason = given_up
        raise ValueError(message) from UnfitBudget(reason)


def _answer(task, todo: list[Share], make_loop, workers, key: str, put, num_before) -> Answered:
    """This process's part: answers shares as long as there are some, and hands them to `put`."""
    batches = (batch for number in workers.claim(key, len(todo)) for batch in todo[number])
    first = next(batches, None)
    if first is None:
        return Answered(num_before, None, None)
    loop = make_loop()
    loop.visual_tokens, start = None, time.perf_counter()
    asked = ((b, [task.questions[n] for n in b]) for b in chain([first], batches))
    label = task.label or os.path.basename(task.path)
    # Logs of long runs show how far they are as well, now and then.
    bar = {"desc": label, "unit": " answers", "disable": not workers.main}
    bar["mininterval"] = 0.1 if sys.stderr.isatty() else SECONDS_IN_LOGS
    with tqdm(total=len(task.questions), initial=num_before, **bar) as progress:
        for numbers, answers in loop.run(asked, task.images):
            for number, answer in zip(numbers, answers, strict=True):
                line = task.line(number, answer)
                task.keep_masks(number, answer)
                put(number, line)
                if task.follow:
                    progress.write(json.dumps(line), file=sys.stdout)
            if workers.main and loop.visual_tokens and not progress.postfix:
                entering, mean = loop.visual_tokens
                progress.set_postfix_str(f"visual tokens {entering:g}, mean {mean:.1f}")
            done = workers.count(key, len(numbers))
            progress.update(max(0, min(num_before + done, len(task.questions)) - progress.n))
    seconds = time.perf_counter() - start if not num_before else None
    return Answered(num_before, seconds, loop.visual_tokens)


# Which questions are answered together: one image's side by side, prompts of like length.


def plan_shares(questions: list[Question], batch_size: int, by_image: bool = True) -> list[Share]:
    """Returns every question's number once, in batches of at most `batch_size`.

    by_image: batches about one image make one share, so that what belongs to the image is computed
              once; images with few questions are put together, each in one batch
    The longest prompts come first: what does not fit into memory fails at once. The plan follows
    from the questions alone, so a run that is continued answers in the same batches.
    """
    if batch_size == 1 and not by_image:
        return [[[number]] for number in range(len(questions))]
    length = [(len(question.images), len(question.text)) for question in questions]
    groups: dict[object, Batch] = {}
    for number, question in enumerate(questions):
        key = tuple(question.images) if by_image and question.images else number
        groups.setdefault(key, []).append(number)
    ordered = [sorted(group, key=length.__getitem__, reverse=True) for group in groups.values()]
    ordered.sort(key=lambda group: length[group[0]], reverse=True)
    large = [split(group, batch_size) for group in ordered if len(group) >= batch_size]
    small = packed((group for group in ordered if len(group) < batch_size), batch_size)
    shares = [*large, *([batch] for batch in small)]
    return sorted(shares, key=lambda share: length[share[0][0]], reverse=True)


def split(group: Batch, batch_size: int) -> list[Batch]:
    """Returns a group in as few batches as it takes, of sizes that differ by one at most."""
    count = -(-len(group) // batch_size)
    ends = [len(group) * part // count for part in range(count + 1)]
    return [group[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def packed(groups: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
    """Yields batches of whole groups."""
    batch: Batch = []
    for group in groups:
        if len(batch) + len(group) > batch_size:
            yield batch
            batch = []
        batch = batch + group
    if batch:
        yield batch
