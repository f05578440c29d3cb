"""Console output: what is hidden, and what stands in a file."""

import io
import math
import re

import pytest
from rich.console import Console

from vismt.base import console


def test_quiet_hides_lines_of_its_body_alone(capsys):
    with console.quiet():
        console.stage("a", "hidden")
    console.stage("b", "shown")
    console.set_quiet(True)
    with console.quiet():
        pass
    console.stage("c", "still hidden")
    assert "".join(capsys.readouterr()).split() == ["b", "shown"]


def test_outside_a_terminal_short_work_has_no_line_and_long_work_some(capsys, monkeypatch):
    """So that a log does not have every line twice, before and after the work."""
    for _ in console.track(range(3), "eval", "digits"):
        pass
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    with console.bar("eval", "digits", 5, done=3) as bar:
        bar.advance()
        bar.advance()
    assert capsys.readouterr().out.splitlines() == [
        "eval    digits 4 of 5   0 s passed, 0 s left",
        "eval    digits 5 of 5   0 s passed",
    ]


def test_lines_of_a_bar_hold_its_note_and_the_time_left(capsys, monkeypatch):
    """Of the steps of this session alone: 2 of them took 90 s, so that 10 more take 450 s."""
    monkeypatch.setattr(console.time, "monotonic", lambda: clock)
    clock = 1000.0
    with console.bar("train", "step", 1_512, done=1_500) as bar:
        bar.note("loss 0.5")
        bar.advance()
        clock += 90
        bar.advance()
        assert capsys.readouterr().out == (
            "train   step 1,502 of 1,512   loss 0.5   1 min 30 s passed, 7 min 30 s left\n"
        )
        bar.note("loss 0.25")
        clock += 1  # too soon for a line
        bar.advance(10)
    assert capsys.readouterr().out == "train   step 1,512 of 1,512   loss 0.25   1 min 31 s passed\n"
    with console.bar("train", "step", 1) as bar:
        bar.note("loss 0.5")
        clock += 30
        bar.advance()
    assert capsys.readouterr().out.count("\n") == 1  # and not the same line once more at the end
    with console.quiet(), console.bar("train", "step", 2) as bar:
        bar.note("loss 0.5")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.6, "5 s"), (65, "1 min 05 s"), (3900, "1 h 05 min"), (None, ""), (-1, ""), (math.inf, "")]
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


def test_a_terminal_shows_times_and_the_note_in_one_line(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(console, "_console", Console(file=out, force_terminal=True, width=80, color_system=None))
    with console.bar("train", "step", 3000) as bar:
        bar.note("[loss] 0.5  " + "accuracy 0.25  " * 5)
        bar.advance(1500)
    *_, last = (line for line in out.getvalue().splitlines() if "1500/3000" in line)
    assert "train   step" in last and re.search(r"1500/3000 0:00:00 \S+ \[loss\] 0.5  \S*…$", last.strip()), last


def test_names_are_printed_as_they_are(capsys, monkeypatch):
    """Also those that rich takes for emoji, markup or fields."""
    console.stage("eval", "expert:cat:1 [red]")
    assert capsys.readouterr().out == "eval    expert:cat:1 [red]\n"
    out = io.StringIO()
    monkeypatch.setattr(console, "_console", Console(file=out, force_terminal=True, width=80))
    with console.bar("eval", "set {b} [red] :cat:", 2):
        pass
    assert "set {b} [red] :cat:" in out.getvalue()


def test_a_terminal_without_a_character_shows_a_question_mark(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(console, "_console", Console(file=out, highlight=False, soft_wrap=True, emoji=False))
    console.stage("eval", "1.0 ± 2.0 ≈")
    out.seek(0)
    assert out.read() == "eval    1.0 ± 2.0 ?\n"
