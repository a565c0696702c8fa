"""Writes answers files and runs scorers on them."""

import json

SHORT = "\nAnswer the question using a single word or phrase."


def write_lines(path, records) -> str:
    """Writes JSON lines; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def run_scorer(monkeypatch, scorer, *words) -> None:
    """Runs a program in this process with the command line `words`."""
    monkeypatch.setattr("sys.argv", [scorer.__name__, *map(str, words)])
    scorer.main()
