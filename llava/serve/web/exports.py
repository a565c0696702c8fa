"""What a visitor may take along from an answer: the picture, the report, a link to the question."""

from __future__ import annotations

import base64
import html
import json
from dataclasses import dataclass

from .link import Link
from .report import Report


@dataclass(frozen=True)
class Asked:
    """
    example: number of the picture among the examples, from 0; None: it was none of them
    pruning: the field of the request
    """

    model: str
    question: str
    answer: str
    pruning: dict | None = None
    example: int | None = None

    @property
    def link(self) -> str | None:
        """Query of an address that brings all this back, but for pictures of visitors; None where
        that is too long."""
        example = None if self.example is None else self.example + 1
        return Link.of(self.model, example, self.question, self.pruning).query()


def exports(asked: Asked, report: Report, dense_seconds: float | None) -> str:
    """The row of buttons; `script.py` has what the first and the last do when pressed."""
    parts = [
        "<button type='button' class='pv-take' data-take='picture'>Download picture</button>",
        download(
            "Download report (JSON)", "report.json", answer_json(asked, report, dense_seconds)
        ),
    ]
    if asked.link is not None:
        own = "" if asked.example is not None else " (without your image)"
        parts.append(
            f"<a class='pv-take' data-take='link' href='{html.escape(asked.link)}'>"
            f"Copy link to this question{own}</a>"
        )
    return f"<div class='pv-takes'>{''.join(parts)}</div>"


def download(label: str, name: str, content: dict | list) -> str:
    """A link that holds its file."""
    data = base64.b64encode(json.dumps(content, indent=1).encode()).decode()
    return (
        f"<a class='pv-take' download='{name}' href='data:application/json;base64,{data}'>"
        f"{label}</a>"
    )


def answer_json(asked: Asked, report: Report | None, dense_seconds: float | None) -> dict:
    """Everything about an answer; seconds of the prefill without pruning are null where they were
    not measured."""
    return {
        "model": asked.model,
        "question": asked.question,
        "answer": asked.answer,
        "pruning": asked.pruning,
        "example": asked.example,
        "dense_prefill_seconds": dense_seconds,
        "report": report and report.data,
    }
