"""The chat at a pseudo-terminal, with a model whose answers are scripted."""

from __future__ import annotations

import itertools
import json
import re
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("pty")

from pseudo_terminal import CTRL_C, CTRL_D, PASTE_BEGIN, PASTE_END, PseudoTerminal

PROGRAM = str(Path(__file__).parents[1] / "support" / "chat_program.py")
ANSWER = "The dog sleeps in the sun and the cat sits on the mat."
SPEED = r"prompt \d+ tokens, [\d.]+ tokens/s \| decode \d+ tokens, [\d.]+ tokens/s\n"
PROMPT = r"\n> $"


def chat(endless: Path | None = None, columns: int = 80) -> PseudoTerminal:
    """Start a chat; while the file `endless` exists, its answers do not end."""
    terminal = PseudoTerminal([sys.executable, PROGRAM, ANSWER, str(endless or "/none")], columns=columns)
    terminal.wait_for(PROMPT)
    return terminal


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A file that makes answers endless."""
    path = tmp_path / "endless"
    path.touch()
    return path


def messages(path: Path) -> list[tuple[str, str]]:
    saved = json.loads(path.read_text("utf-8"))
    return [(message["role"], message["content"]) for message in saved["messages"]]


def test_messages_of_several_lines(tmp_path: Path) -> None:
    """Lines that are pasted are one message, and so are a block in quotes and lines that end with a backslash."""
    pasted, program = "first\n\nsecond\n  third", '"""A docstring."""\nprint(1)'
    with chat() as terminal:
        for text in (pasted, program):
            terminal.press(PASTE_BEGIN + text.replace("\n", "\r").encode() + PASTE_END + b"\r")
            terminal.wait_for(SPEED + "> $")
        terminal.press(b'"""one\r')
        terminal.wait_for(r"\.\.\. $")
        terminal.press(b'two\rthree"""\r')
        terminal.wait_for(SPEED + "> $")
        terminal.press(b"four\\\r")
        terminal.wait_for(r"\.\.\. $")
        terminal.press(b"five\r")
        terminal.wait_for(SPEED + "> $")
        terminal.press(f"/save {tmp_path / 'chat.json'}\r".encode())
        terminal.wait_for("8 messages saved")
        terminal.press(b"/exit\r")
        assert terminal.wait_for_end() == 0
    asked = [pasted, program, "one\ntwo\nthree", "four\nfive"]
    assert messages(tmp_path / "chat.json") == [
        pair for text in asked for pair in (("user", text), ("assistant", ANSWER))
    ]


def test_ctrl_c_at_the_prompt() -> None:
    with chat() as terminal:
        terminal.press_when_it_waits(CTRL_C)
        assert "Ctrl-D or /exit leaves" in terminal.wait_for(PROMPT)
        terminal.press(b"half a line")
        terminal.wait_for("half a line")
        terminal.press_when_it_waits(CTRL_C)
        assert "leaves" not in terminal.wait_for(PROMPT)
        terminal.press(b'"""half a block\r')
        terminal.wait_for(r"\.\.\. $")
        terminal.press_when_it_waits(CTRL_C)
        terminal.wait_for(PROMPT)
        terminal.press(b"Hi\r")  # the block is forgotten
        assert ANSWER in terminal.wait_for(SPEED + "> $")
        terminal.press(CTRL_D)
        assert terminal.wait_for_end() == 0


def test_keys_during_an_answer_wait_for_the_prompt(endless: Path) -> None:
    with chat(endless) as terminal:
        terminal.press(b"Hi\r")
        terminal.wait_for("The dog")
        terminal.press(PASTE_BEGIN + b"a\rb" + PASTE_END)
        terminal.wait_for("The dog")
        endless.unlink()
        shown = terminal.wait_for(SPEED + "> a\nb$")
        assert "a\nb" not in shown.rpartition("mat.")[0]  # it does not mix with the answer
        endless.touch()
        terminal.press(b"\r")
        terminal.wait_for("The dog")
        terminal.press(CTRL_D)
        terminal.wait_for("The dog")
        endless.unlink()
        terminal.wait_for(SPEED + "> ")
        assert terminal.wait_for_end() == 0


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(endless: Path) -> None:
    with chat(endless) as terminal:
        terminal.press(b"Hi\r")
        terminal.wait_for("The dog")
        terminal.press(CTRL_C)
        terminal.wait_for(SPEED + "> $")
        endless.unlink()
        terminal.press(b"/regenerate\r")
        assert "mat." in terminal.wait_for(SPEED + "> $")


@pytest.mark.parametrize("columns", [20, 40])
def test_words_are_whole_at_the_margin(columns: int) -> None:
    with chat(columns=columns) as terminal:
        terminal.press(b"Hi\r")
        shown = terminal.wait_for(r"mat\.\n")
    answer = shown[shown.index("The dog") : shown.index("mat.") + 4]
    assert answer.replace("\n", " ") == ANSWER
    lines = answer.split("\n")
    assert max(map(len, lines)) <= columns
    for line, after in itertools.pairwise(lines):  # the next word would not have fitted
        assert len(line) + 1 + len(after.split()[0]) > columns


def test_help_and_what_is_no_command() -> None:
    with chat() as terminal:
        terminal.press(b"/help\r")
        shown = terminal.wait_for(PROMPT)
        for command in ["/clear", "/regenerate", "/set", "/save", "/load", "/exit", "/bye", "/quit"]:
            assert re.search(rf"{command}\b", shown)
        terminal.press(b"/frobnicate\r")
        assert "error: there is no command /frobnicate" in terminal.wait_for(PROMPT)
        terminal.press(b"/etc/hosts is what?\r")
        assert ANSWER in terminal.wait_for(SPEED + "> $")
        terminal.press(b"/cl\t\r")
        assert "A new chat begins." in terminal.wait_for(PROMPT)
        terminal.press(b"caf\xe9\r")  # Latin-1
        assert ANSWER in terminal.wait_for(SPEED + "> $")
        terminal.press(b"/quit\r")
        assert terminal.wait_for_end() == 0


def test_without_readline_lines_that_arrive_at_once_are_one_message(tmp_path: Path) -> None:
    """As on Windows, with libedit, or here: the answers go to a file."""
    command = f"'{sys.executable}' '{PROGRAM}' '{ANSWER}' /none > '{tmp_path / 'answers'}'"
    with PseudoTerminal(["bash", "-c", command]) as terminal:
        terminal.wait_for("> $")
        terminal.press(b"one\ntwo\n")
        terminal.wait_for(SPEED + "> $")
        terminal.press(f"/save {tmp_path / 'chat.json'}\n".encode())
        terminal.wait_for("2 messages saved")
        terminal.press(b"x" * 5000 + b"\n")
        assert "warning: the terminal cuts lines after" in terminal.wait_for(SPEED + "> $")
        terminal.press(b"last\n" + CTRL_D)
        terminal.wait_for(SPEED)
        assert terminal.wait_for_end() == 0
    assert messages(tmp_path / "chat.json") == [("user", "one\ntwo"), ("assistant", ANSWER)]
    assert (tmp_path / "answers").read_text() == f"{ANSWER}\n" * 3  # no escape sequences, no wrapping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_an_answer_leaves_the_terminal_as_it_was(number: signal.Signals, endless: Path) -> None:
    with chat(endless) as terminal:
        terminal.press(b"Hi\r")
        terminal.wait_for("The dog")
        assert not terminal.echoes
        terminal.process.send_signal(number)
        assert terminal.wait_for_end() == 128 + number
        assert terminal.echoes


def test_a_long_text_is_pasted_whole(tmp_path: Path) -> None:
    """A terminal that reads line by line would cut lines at 4,095 bytes."""
    text = "\n".join(f"{n} " + "words " * 700 for n in range(3))
    with chat() as terminal:
        terminal.press(PASTE_BEGIN + text.replace("\n", "\r").encode() + PASTE_END + b"\r")
        terminal.wait_for(SPEED + "> $")
        terminal.press(f"/save {tmp_path / 'chat.json'}\r".encode())
        terminal.wait_for("2 messages saved")
    assert messages(tmp_path / "chat.json")[0] == ("user", text)
