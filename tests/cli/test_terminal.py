"""Terminal output: tables, progress, and no control characters."""

from __future__ import annotations

import io
import re
import sys

import pytest
from command_line import Capture, at_a_terminal

from tritgguf.cli import terminal
from tritgguf.cli.answer import AnswerWriter


@pytest.mark.parametrize("is_terminal", [True, False])
def test_control_characters_do_not_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, is_terminal: bool
) -> None:
    text = "a\x1b[2J\x07\x9b\x7f\n\tb é"
    if is_terminal:
        at_a_terminal(monkeypatch)
    writer = AnswerWriter()
    writer.write(text)
    writer.end()
    assert capsys.readouterr().out == ("a[2J\n\tb é\n" if is_terminal else text + "\n")


@pytest.mark.parametrize(("encoding", "expected"), [("ascii", '{"a": "\\u00fc\\udcff"}'), ("utf-8", '{"a": "ü?"}')])
def test_json_keeps_its_characters(monkeypatch: pytest.MonkeyPatch, encoding: str, expected: str) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="replace", newline=""))
    terminal.print_json({"a": "ü\udcff"})  # a byte of a file name that is no character
    sys.stdout.flush()
    assert written.getvalue().decode(encoding).rstrip() == expected


def test_tables_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    at_a_terminal(monkeypatch)
    terminal.print_table("a title", ("name", ">count"), [("[red]x[/red]\x1b[2J", "7")])
    out = capsys.readouterr().out
    assert "a title" in out
    assert "[red]x[/red][2J" in out


WIDE_ROWS = [("blk.0.attn_output.weight", "TRIT2", "576 x 576"), ("output_norm.weight", "F32", "")]


@pytest.mark.parametrize(("columns", "is_stacked"), [("40", True), ("50", False)])
def test_a_table_that_is_wider_than_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, columns: str, is_stacked: bool
) -> None:
    at_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", columns)
    terminal.print_table("tensors", ("name", "type", ">shape"), WIDE_ROWS)
    out = capsys.readouterr().out
    stacked = "tensors\n\nblk.0.attn_output.weight\n  type TRIT2, shape 576 x 576\noutput_norm.weight\n  type F32\n\n"
    assert (out == stacked) == is_stacked
    assert all(cell in out for row in WIDE_ROWS for cell in row)
    assert max(map(len, plain_lines(out))) <= int(columns)


def test_a_narrow_table_of_two_columns(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    at_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "30")
    terminal.print_table("summary", ("", ""), [("file", "model.gguf"), ("name", "a name that is longer than a line")])
    assert capsys.readouterr().out == "summary\n\nfile  model.gguf\nname\n  a name that is longer than a\n  line\n\n"


@pytest.mark.parametrize("columns", [30, 40, 60, 80])
@pytest.mark.parametrize("in_bytes", [True, False])
def test_progress_takes_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, columns: int, in_bytes: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    with terminal.progress(in_bytes=in_bytes) as report:
        report("blk.10.attn_output.weight", 500 * 10**6, 10**9)
    (line,) = [line for line in plain_lines(capsys.readouterr().err) if "50%" in line][-1:]
    assert line.startswith("blk.10")
    assert len(line) <= columns
    assert ("MB/s" in line or "?" in line) == (in_bytes and columns >= 80)


def plain_lines(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()


def test_progress_in_a_pipe_is_a_line_a_second(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    with terminal.progress(in_bytes=True) as report:
        for done in range(101):
            now += 1 / 16
            report("blk.0.x", done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == " 10 %  blk.0.x  15 B/s  6 s left"
    assert [line[:4] for line in lines] == [" 10 ", " 30 ", " 40 ", " 60 ", " 70 ", " 90 "]


def test_progress_of_half_a_second_in_a_pipe_is_silent(capsys: Capture) -> None:
    with terminal.progress(in_bytes=False) as report:
        for done in range(101):
            report("stage", done, 100)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("environment", "is_faint"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_notes_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, environment: dict[str, str], is_faint: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "20", **environment}.items():
        monkeypatch.setenv(name, value)
    terminal.note("words that do not fit on a line", dim=True)
    text = "words that do not\nfit on a line"
    assert capsys.readouterr().err == (f"\x1b[2m{text}\x1b[0m\n" if is_faint else f"{text}\n")


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
