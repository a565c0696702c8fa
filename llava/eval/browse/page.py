"""The page: two answers to one question with their pictures; a condition chooses the questions.

No address, file or folder comes from the page: a visitor chooses among the files that the program
was started with, and sees pictures below their image folders.
"""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from llava.eval.browse.conditions import HELP, read_condition
from llava.eval.browse.pictures import draw
from llava.eval.browse.runs import Pair, Run

NOTHING = "(none)"
CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; }
"""
#: fonts of the reader's own system: nothing is loaded from elsewhere
THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
QUIET = dict(show_progress="hidden", queue=False, api_visibility="private")


@dataclass
class Page:
    """All of the page: `blocks` is what gradio serves. runs: the files, by what they are called"""

    runs: dict[str, Run]

    def __post_init__(self):
        names = list(self.runs)
        second = names[1] if len(names) > 1 else NOTHING
        with gr.Blocks(title="Answers side by side", analytics_enabled=False) as self.blocks:
            with gr.Row():
                self.left = gr.Dropdown(names, value=names[0], label="gen: answers")
                self.right = gr.Dropdown([NOTHING, *names], value=second, label="ref: answers")
            with gr.Row():
                self.condition = gr.Textbox(
                    label="Show questions where", placeholder="gen < ref and iou < 0.3",
                    info=HELP, elem_id="condition", scale=4,
                )  # fmt: skip
                self.boxes = gr.Checkbox(True, label="boxes", elem_id="boxes", min_width=80)
                self.mask = gr.Checkbox(True, label="kept tokens", elem_id="mask", min_width=80)
            with gr.Row(equal_height=False):
                back = gr.Button("Previous", elem_id="back", size="md", min_width=120)
                on = gr.Button("Next", elem_id="next", size="md", min_width=120)
                self.number = gr.Number(1, label="Go to", precision=0, minimum=1, elem_id="number")
                self.count = gr.Markdown(elem_id="count")
            self.question = gr.Markdown(elem_id="question")
            with gr.Row():
                self.panels = [self._panel("gen"), self._panel("ref")]
        inputs = [self.left, self.right, self.condition, self.boxes, self.mask, self.number]
        outputs = [self.number, self.count, self.question]
        outputs += [part for panel in self.panels for part in panel]
        with self.blocks:
            step = lambda by: lambda *values: self.show(*values[:-1], (values[-1] or 1) + by)  # noqa: E731
            back.click(step(-1), inputs, outputs, **QUIET)
            on.click(step(1), inputs, outputs, **QUIET)
            self.number.submit(self.show, inputs, outputs, **QUIET)
            for part in (self.boxes, self.mask):
                part.change(self.show, inputs, outputs, **QUIET)
            first = lambda *values: self.show(*values[:-1], 1)  # noqa: E731
            for event in (self.left.change, self.right.change, self.condition.submit):
                event(first, inputs, outputs, **QUIET)
            self.blocks.load(self.show, inputs, outputs, **QUIET)

    @staticmethod
    def _panel(name: str) -> tuple:
        with gr.Column(min_width=320):
            answer = gr.Textbox(label=f"{name}: answer", elem_id=f"{name}-answer", lines=2)
            numbers = gr.Markdown(elem_id=f"{name}-numbers")
            gallery = gr.Gallery(
                label=f"{name}: pictures", columns=1, height=520, object_fit="contain",
                elem_id=f"{name}-pictures", buttons=[],
            )  # fmt: skip
        return answer, numbers, gallery

    def show(self, left: str, right: str, condition: str, boxes: bool, mask: bool, number: int):
        """What every part of the page shows; number: place among the questions
        that were chosen, from 1; beyond their end they begin again."""
        blank = [""] * 2 + [("", "", [])] * 2
        try:
            pair = Pair(self.runs[left], self.runs.get(right))
            chosen = pair.chosen(read_condition(condition or ""))
        except (ValueError, KeyError) as error:
            return self._outputs(0, f"**{error}**", *blank[1:])
        if not chosen:
            count = f"none of {len(pair.places)} questions"
            return self._outputs(0, count, *blank[1:])
        where = (int(number or 1) - 1) % len(chosen)
        place = chosen[where]
        of = f"{len(chosen)} of {len(pair.places)} questions" if condition else f"{len(chosen)}"
        panels = [self._shown(pair.run, place, boxes, mask), ("", "", [])]
        if (there := pair.places[place]) is not None:
            panels[1] = self._shown(pair.other, there, boxes, mask)
        return self._outputs(where, f"{where + 1} of {of}", self._asked(pair, place), *panels)

    @staticmethod
    def _outputs(where: int, count: str, question: str, *panels: tuple) -> list:
        return [where + 1, count, question, *(part for panel in panels for part in panel)]

    @staticmethod
    def _asked(pair: Pair, place: int) -> str:
        line = pair.run.lines[place]
        question = pair.run.source.question(line)
        text = line.get("prompt") or (question.text if question else "")
        right = line.get("answer", line.get("ground_truth"))
        wanted = "" if right is None else f"\n\nRight answer: {escaped(right)}"
        return f"Question {escaped(line.get('question_id', place))}: {escaped(text)}{wanted}"

    @staticmethod
    def _shown(run: Run, place: int, boxes: bool, mask: bool) -> tuple:
        """(answer, numbers, pictures) of a line of a file."""
        question, error = run.source.question(run.lines[place]), ""
        pictures = []
        try:
            if question is None:
                error = "its question is not in the question file"
            else:
                pictures = draw(question, run, place, boxes, mask)
        except (ValueError, OSError) as failure:
            error = str(failure)
        numbers = [("score", run.score(place)), ("IoU", run.iou(place)), ("kept", run.ratio(place))]
        known = [f"{name} {number:.3f}" for name, number in numbers if number is not None]
        note = f"\n\n*{escaped(error)}*" if error else ""
        return run.lines[place]["text"], ", ".join(known) + note, pictures


def escaped(value) -> str:
    """A text that is shown as it is, on lines of its own."""
    text = "".join(f"\\{c}" if c in "\\`*_{}[]()#+-!|<>$~" else c for c in str(value))
    return text.replace("\n", "<br>")
