"""Pairwise review: a judge scores a reference answer and a candidate on the same question.

Shared by `eval_gpt_review` (text only), `eval_gpt_review_bench` (LLaVA-Bench, with captions) and
`eval_gpt_review_visual` (with captions and boxes), which differ in what the judge is shown.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from llava.eval.answering.answers_file import AnswersFile
from llava.eval.files.matching import question_id, source
from llava.eval.files.records import read_json, read_jsonl
from llava.eval.scoring.judge import Judge, Prompt, add_judge_args, judge_from_args
from llava.program_parser import ProgramParser

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
OWN_RULES = str(Path(__file__).parents[1] / "table" / "rule.json")
#: SHA-256 of the rule text with which the published LLaVA-Bench numbers were made
LLAVA_BENCH_RULE = "2ce22b562d6008864970ea863ac8a4d385ea6f2e64ab1313a23f825202a9529d"
UNREADABLE = [-1, -1]


@dataclass(frozen=True)
class Kind:
    """What distinguishes the three programs.

    model:   judge of the published reviews
    rule_of: (question, rules) -> name of its rule
    shown:   context record -> what the judge is told about the image; None: nothing
    """

    model: str
    rule_of: Callable[[dict, dict], str]
    shown: Callable[[dict], str] | None = None


def captions_text(context: dict) -> str:
    """LLaVA-Bench: the caption, or several joined by line breaks."""
    caption = context["caption"]
    return f"{caption if isinstance(caption, str) else chr(10).join(caption)}\n\n"


def boxes_text(context: dict) -> str:
    """Captions, and one line `category: [x1, y1, x2, y2]` per object."""
    captions = "\n".join(context["captions"])
    boxes = "\n".join(f"{item['category']}: {item['bbox']}" for item in context["instances"])
    return f"{captions}\n\n{boxes}\n\n"


TEXT = Kind("gpt-4", lambda question, rules: _or_default(question.get("category"), rules))
BENCH = Kind("gpt-4-0314", lambda question, _: f"llava_bench_{question['category']}", captions_text)
VISUAL = Kind("gpt-4-0314", lambda question, _: question["category"], boxes_text)


def _or_default(category: str | None, rules: dict) -> str:
    return category if category in rules else "default"


def review_text(rule: dict, question: str, answers: tuple[str, str], shown: str = "") -> str:
    """Returns what the judge reads."""
    role = rule["role"]
    text = f"[Context]\n{shown}" if shown else ""
    text += f"[Question]\n{question}\n\n"
    for number, answer in enumerate(answers, start=1):
        text += f"[{role} {number}]\n{answer}\n\n[End of {role} {number}]\n\n"
    return text + f"[System]\n{rule['prompt']}\n\n"


def parse_scores(reply: str) -> list[float]:
    """Returns the two numbers in the first line of a reply: `8 9`, `8,9`, and `8, 9`.

    The release takes `8, 9` for three fields and leaves the question out; judges of today write it
    often. Raises ValueError when there are not exactly two numbers.
    """
    fields = reply.split("\n")[0].replace(",", " ").split()
    if len(fields) != 2:
        raise ValueError(f"{len(fields)} fields instead of two scores")
    scores = [float(word) for word in fields]
    if not all(map(isfinite, scores)):
        raise ValueError(f"{reply[:20]!r} holds a score that is no number")
    return scores


def heads_and_prompts(
    kind: Kind, questions: list[dict], answers: list[list[dict]], rules: dict, contexts: dict
) -> tuple[list[dict], list[Prompt]]:
    """Returns the identifying fields of every review line, and what the judge is asked.

    contexts: by image; not read by the text-only kind. Raises ValueError when an answer is
    missing or belongs to another question, or when there is no rule or context.
    """
    heads, prompts = [], []
    for given in answers:
        if len(given) > len(questions):
            print(
                f"note: {source(given)}: {len(given)} answers to {len(questions)} questions, the "
                "last ones are left out",
                file=sys.stderr,
            )
    for number, question in enumerate(questions, start=1):
        pair = [_answer_to(question, number, given) for given in answers]
        name = kind.rule_of(question, rules)
        if name not in rules:
            known = ", ".join(rules)
            raise ValueError(f"question {number}: the rule file has no {name!r}, only {known}")
        shown = kind.shown(_context_of(question, contexts)) if kind.shown else ""
        texts = (pair[0]["text"], pair[1]["text"])
        prompts.append((SYSTEM, review_text(rules[name], question["text"], texts, shown)))
        heads.append(
            {
                "id": number,
                "question_id": question["question_id"],
                "answer1_id": _id_of(pair[0]),
                "answer2_id": _id_of(pair[1]),
                "category": name if kind.shown else question.get("category", name),
            }
        )
    return heads, prompts


def _answer_to(question: dict, number: int, answers: list[dict]) -> dict:
    if number > len(answers):
        raise ValueError(
            f"{source(answers)}: there are more questions than answers ({len(answers)})"
        )
    answer = answers[number - 1]
    if "question_id" in answer and question_id(answer) != question_id(question):
        raise ValueError(
            f"{source(answers)}, line {number}: question {question['question_id']!r} meets an "
            f"answer to question {answer['question_id']!r}"
        )
    return answer


def _id_of(answer: dict) -> str:
    return answer.get("answer_id", answer.get("question_id"))


def _context_of(question: dict, contexts: dict) -> dict:
    if question["image"] not in contexts:
        raise ValueError(f"the context file does not know the image {question['image']!r}")
    return contexts[question["image"]]


def review(
    judge: Judge,
    heads: list[dict],
    prompts: list[Prompt],
    path: str,
    done: Callable[[int], str] = lambda number: str(number),
    overwrite: bool = False,
) -> None:
    """Writes one review line per prompt to `path`, going on where an earlier run stopped.

    done: what to print after line `number`
    """
    settings = judge.settings | {"rules": _digest(prompts)}
    with AnswersFile(path, heads, settings, overwrite, ("content", "tuple"), True) as file:
        for number in sorted(file.known):
            print(f"Skipping {number} as we already have it.")
            print(done(number + 1))
        rest = file.missing
        for number, reply in zip(rest, judge.ask_all([prompts[n] for n in rest]), strict=True):
            head = heads[number]
            file.put(number, {**head, "content": reply, "tuple": _scores_or_notice(reply)})
            print(done(head["id"]), flush=True)
        file.finish()


def _digest(prompts: list[Prompt]) -> str:
    """Changes with the questions, answers and rules that the judge is shown."""
    return hashlib.sha256(repr(prompts).encode()).hexdigest()[:16]


def _scores_or_notice(reply: str) -> list[float]:
    try:
        return parse_scores(reply)
    except ValueError as error:
        print(error)
        print("error", reply)
        return UNREADABLE


def main(kind: Kind, description: str) -> None:
    """The command line of the three programs."""
    parser = ProgramParser(description)
    parser.add_argument(
        "-q", "--question", required=True, help="file of the questions (JSON lines)"
    )
    if kind.shown:
        parser.add_argument(
            "-c", "--context", required=True, help="file of what the images show (JSON lines)"
        )
    parser.add_argument(
        *("-a", "--answer-list", "--answer"),
        nargs=2,
        required=True,
        metavar=("REFERENCE", "CANDIDATE"),
        help="two files of answers",
    )
    parser.add_argument(
        "-r",
        "--rule",
        default=OWN_RULES,
        help="file of what the judge is told, by kind of question",
    )
    parser.add_argument("-o", "--output", required=True, help="file of the reviews")
    parser.add_argument("--overwrite", action="store_true", help="discard reviews already there")
    add_judge_args(parser, kind.model, max_tokens=1024, temperature=0.2)
    args = parser.parse_args()
    rules = read_rules(args.rule)
    contexts = {c["image"]: c for c in read_jsonl(args.context, ("image",))} if kind.shown else {}
    heads, prompts = heads_and_prompts(
        kind,
        read_jsonl(args.question, ("question_id", "text")),
        [read_jsonl(path, ("text",)) for path in args.answer_list],
        rules,
        contexts,
    )
    judge = judge_from_args(args, args.output)
    done = str if kind.shown else lambda number: "success!"
    review(judge, heads, prompts, args.output, done, args.overwrite)


def read_rules(path: str) -> dict:
    """Returns the rules by name; says when they are not those of the published numbers."""
    rules = read_json(path)
    text = rules.get("llava_bench_conv", {}).get("prompt", "")
    if hashlib.sha256(text.encode()).hexdigest() != LLAVA_BENCH_RULE:
        print(
            f"note: {path} is not the rule file of the published LLaVA-Bench numbers; scores "
            "compare with each other, not with those (see docs/Evaluation.md)",
            file=sys.stderr,
        )
    return rules
