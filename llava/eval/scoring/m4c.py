"""Answer normalisation and soft accuracies of the VQA family (VQAv2, VizWiz, TextVQA, ST-VQA).

The rules are those of the public EvalAI servers, oddities included, because published scores
depend on them.
"""

import re
from collections.abc import Iterable
from functools import lru_cache, reduce
from operator import add

NUMBER_WORDS = {"none": "0"} | {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = (*';/[]"{}()=+\\_-><@`', ",", "?", "!")
COMMA_BETWEEN_DIGITS = re.compile(r"(?<=\d),+(?=\d)")
PERIOD = re.compile(r"\.(?!\d)")
# The reference passes a regex flag where the replacement count belongs: 32 periods, no more.
MAX_PERIODS = 32

# Every form is also recognised with exactly one of its apostrophes missing.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
""".split()
CONTRACTIONS = {
    form[:i] + form[i + 1 :]: form
    for form in CONTRACTED
    for i, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


class EvalAIAnswerProcessor:
    """Brings an answer to the form in which answers are compared: `processor("The Dogs.")`."""

    def __call__(self, text: str) -> str:
        text = self.word_tokenize(text).replace("\n", " ").replace("\t", " ").strip()
        return self.process_digit_article(self.process_punctuation(text))

    def word_tokenize(self, text: str) -> str:
        """Returns `text` in lower case without commas and question marks, `'s` set apart."""
        text = text.lower().replace(",", "").replace("?", "")
        return text.replace("'s", " 's").strip()

    def process_punctuation(self, text: str) -> str:
        """Removes a mark that touches a space anywhere in `text`, else puts a space in its place.

        Periods go unless a digit follows.
        """
        result = text
        for mark in PUNCTUATION:
            beside_space = f"{mark} " in text or f" {mark}" in text
            remove = beside_space or COMMA_BETWEEN_DIGITS.search(text)
            result = result.replace(mark, "" if remove else " ")
        return PERIOD.sub("", result, count=MAX_PERIODS)

    def process_digit_article(self, text: str) -> str:
        """Number words to digits, articles dropped, missing apostrophes restored."""
        words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
        return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


class TextVQAAccuracyEvaluator:
    """Soft accuracy against ten human answers: an answer counts fully when three others agree."""

    num_answers = 10

    def __init__(self):
        self.answer_processor = EvalAIAnswerProcessor()
        # Humans repeat each other: most of the two million answers of VQAv2 are seen before.
        self.normalise = lru_cache(maxsize=2**16)(self.answer_processor)

    def answer_scores(self, raw_answers: list[str]) -> dict[str, float]:
        """Returns the score of every normalised answer, averaged over the held-out human."""
        if len(raw_answers) != self.num_answers:
            raise ValueError(f"expected {self.num_answers} human answers, got {len(raw_answers)}")
        answers = [self.normalise(answer) for answer in raw_answers]
        scores = {}
        for answer in set(answers):
            others = [answers.count(answer) - (held_out == answer) for held_out in answers]
            scores[answer] = _sum(min(1, num / 3) for num in others) / len(others)
        return scores

    def score(self, pred_answer: str, gt_answers: list[str]) -> float:
        """Returns the soft accuracy of one prediction, 0 to 1."""
        return self.answer_scores(gt_answers).get(self.normalise(pred_answer), 0.0)

    def eval_pred_list(self, pred_list: list[dict]) -> float:
        """Returns the mean over entries `{"pred_answer": str, "gt_answers": [str] * 10}`."""
        return _mean(self.score(entry["pred_answer"], entry["gt_answers"]) for entry in pred_list)


class STVQAAccuracyEvaluator:
    """Share of predictions that equal one of the answers after normalisation."""

    def __init__(self):
        self.answer_processor = EvalAIAnswerProcessor()

    def score(self, pred_answer: str, gt_answers: list[str]) -> float:
        """Returns 1.0 when the prediction equals any answer, else 0.0."""
        prediction = self.answer_processor(pred_answer)
        return float(any(prediction == self.answer_processor(answer) for answer in gt_answers))

    def eval_pred_list(self, pred_list: list[dict]) -> float:
        """Returns the mean over entries `{"pred_answer": str, "gt_answers": [str]}`."""
        return _mean(self.score(entry["pred_answer"], entry["gt_answers"]) for entry in pred_list)


class STVQAANLSEvaluator:
    """Average normalised Levenshtein similarity; similarities below one half count as zero."""

    def score(self, pred_answer: str, gt_answers: list[str]) -> float:
        """Returns the best similarity to any of the answers, 0 to 1."""
        return max(self.similarity(pred_answer, answer) for answer in gt_answers)

    def similarity(self, first: str, second: str) -> float:
        """Returns 1 - distance / longer length, cut to 0 below one half."""
        first, second = first.lower().strip(), second.lower().strip()
        longest = max(len(first), len(second))
        value = 1 - edit_distance(first, second) / longest if longest else 1.0
        return value if value >= 0.5 else 0.0

    def eval_pred_list(self, pred_list: list[dict]) -> float:
        """Returns the mean over entries `{"pred_answer": str, "gt_answers": [str]}`."""
        return _mean(self.score(entry["pred_answer"], entry["gt_answers"]) for entry in pred_list)


def edit_distance(first: str, second: str) -> int:
    """Returns the number of insertions, deletions and replacements between two strings."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _mean(scores) -> float:
    scores = list(scores)
    return _sum(scores) / len(scores) if scores else 0.0


def _sum(values: Iterable[float]) -> float:
    """One after the other, as the official program sums; since Python 3.12 `sum` rounds less."""
    return reduce(add, values, 0.0)
