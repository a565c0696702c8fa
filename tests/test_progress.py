"""Programs that measure say how far they are, where somebody looks on, and nowhere else."""

import io

import pytest

from llava import progress as bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    """stderr(stream) puts it in place of what programs write their bars to."""

    def put(stream):
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr("tqdm.std.sys.stderr", stream)
        return stream

    return put


def test_a_bar_goes_through_the_steps_and_shows_what_is_done(stderr, monkeypatch):
    monkeypatch.setattr(bars, "PATIENCE", 0)
    seen = stderr(Terminal())
    assert list(bars.progress([1, 2, 3], "costs", "prompts")) == [1, 2, 3]
    assert "costs" in seen.getvalue() and "3/3" in seen.getvalue()
    with bars.progress(4, "rounds", "runs") as bar:
        bar.update(4)
    assert "rounds" in seen.getvalue() and "4/4" in seen.getvalue()


def test_what_is_over_soon_and_what_nobody_looks_at_has_no_bar(stderr, monkeypatch):
    seen = stderr(Terminal())
    list(bars.progress([1, 2, 3], "costs", "prompts"))
    assert "costs" not in seen.getvalue()
    monkeypatch.setattr(bars, "PATIENCE", 0)
    seen = stderr(io.StringIO())
    list(bars.progress([1, 2, 3], "costs", "prompts"))
    assert seen.getvalue() == ""
