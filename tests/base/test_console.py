"""Console output: what is hidden, and what stands in a file."""

import io

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
    assert capsys.readouterr().out.splitlines() == ["eval    digits (4/5)", "eval    digits (5/5)"]


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
