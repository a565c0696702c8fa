"""Questions per second: the same questions every way, answers in order."""

from llava.eval.answering.questions import Question
from llava.eval.efficiency import throughput
from llava.eval.files.answer_lines import Answer


class FakeLoop:
    """Answers with the text of the question; remembers the batches of every way."""

    def __init__(self):
        self.reuse, self.batches = None, []

    def run(self, batches, images):
        for numbers, questions in batches:
            self.batches.append((self.reuse, [q.text for q in questions]))
            yield numbers, [Answer(q.text) for q in questions]


def asked(count):
    return [Question({"question_id": n}, f"{n} " * (n + 1), [f"{n % 3}.png"]) for n in range(count)]


def test_every_image_gets_as_many_questions_and_they_start_again_at_the_end():
    groups = throughput.arranged(asked(6), num_images=2, per_image=4)
    assert [{q.images[0] for q in group} for group in groups] == [{"0.png"}, {"1.png"}]
    texts = [question.text.split()[0] for group in groups for question in group]
    assert texts == list("01234501")


def test_all_ways_answer_the_same_questions_in_order():
    groups, loop = throughput.arranged(asked(6), 3, 5), FakeLoop()
    assert throughput.answer(loop, groups[0], "", 2, True) == [q.text for q in groups[0]]
    loop = FakeLoop()
    speeds = throughput.measure(loop, groups, "", "none", 2)
    assert [s.way for s in speeds] == [throughput.PLAIN, throughput.BATCHED, throughput.REUSED]
    assert all(s.same_as_plain == 100 and s.per_second > 0 for s in speeds)
    assert speeds[0].times_plain == 1
    assert {len(batch) for reuse, batch in loop.batches if reuse} == {1, 2}
    rows = throughput.table(speeds).splitlines()
    assert len(rows) == 5 and rows[2].startswith("| none | one by one |")
