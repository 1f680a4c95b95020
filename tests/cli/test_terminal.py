"""Terminal output: tables, progress, and no control characters."""

from __future__ import annotations

import sys

import pytest
from command_line import Capture, at_a_terminal

from tritgguf.cli import terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_control_characters_do_not_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, is_terminal: bool
) -> None:
    text = "a\x1b[2J\x07\x9b\x7f\n\tb é"
    if is_terminal:
        at_a_terminal(monkeypatch)
    terminal.write_answer(text)
    assert capsys.readouterr().out == ("a[2J\n\tb é" if is_terminal else text)


def test_tables_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    at_a_terminal(monkeypatch)
    terminal.print_table("a title", ("name", ">count"), [("[red]x[/red]\x1b[2J", "7")])
    out = capsys.readouterr().out
    assert "a title" in out
    assert "[red]x[/red][2J" in out


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with terminal.progress(in_bytes=True) as report:
        report("blk.0.x[/red]", 10**6, 10**7)
        report("blk.1.x", 10**7, 10**7)
    with terminal.progress(in_bytes=False) as report:
        report("runner", 0, 2)
        report("source", 2, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "blk.1.x" in captured.err
    assert "100%" in captured.err
