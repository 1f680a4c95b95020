"""The commands of the chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import Capture
from scripted_model import scripted

from tritgguf.cli.chat_commands import ChatCommands
from tritgguf.errors import TritGgufError
from tritgguf.generation.chat import Chat


@pytest.fixture
def chat() -> Chat:
    return Chat(scripted("Red."), temperature=0)


@pytest.mark.parametrize(
    ("text", "is_command"),
    [
        ("/help", True),
        ("/?", True),
        ("/set temp 1", True),
        ("/frobnicate", True),
        ("/etc/hosts is what?", False),
        ("/ is a root", False),
        ("//comment", False),
        (" /help", False),
        ("/help\nme", False),
        ("help", False),
        ("", False),
    ],
)
def test_what_is_a_command(text: str, is_command: bool) -> None:
    assert ChatCommands.is_command(text) == is_command


@pytest.mark.parametrize("name", ["/exit", "/bye", "/quit"])
def test_leaving(chat: Chat, name: str) -> None:
    commands = ChatCommands(chat)
    assert commands.run("/help") is None
    assert not commands.has_ended
    assert commands.run(f"{name} ") is None
    assert commands.has_ended


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("temp 0.5", "temperature", 0.5),
        ("temperature 1", "temperature", 1.0),
        ("top-k 7", "top_k", 7),
        ("top_p 0.25", "top_p", 0.25),
        ("min-p 0", "min_p", 0.0),
        ("repeat-penalty 1.5", "repeat_penalty", 1.5),
        ("repeat-last-n -1", "repeat_last_n", -1),
        ("presence-penalty 1", "presence_penalty", 1.0),
        ("frequency-penalty 1", "frequency_penalty", 1.0),
        ("SEED 5", "seed", 5),
    ],
)
def test_settings_of_sampling(chat: Chat, setting: str, field: str, value: float) -> None:
    before = vars(chat.sampling).copy()
    ChatCommands(chat).run(f"/set {setting}")
    assert vars(chat.sampling) == {**before, field: value}


def test_other_settings(chat: Chat, capsys: Capture) -> None:
    commands = ChatCommands(chat)
    commands.run("/set system Be brief, be kind.")
    commands.run("/set predict 5")
    assert (chat.system, chat.max_tokens) == ("Be brief, be kind.", 5)
    commands.run("/set")
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().err.splitlines())
    assert shown["system"] == "Be brief, be kind."
    assert (shown["predict"], shown["temp"], shown["top-k"], shown["seed"]) == ("5", "0", "40", "-1")
    commands.run("/set n -2")
    commands.run("/set system")
    assert (chat.system, chat.max_tokens) == (None, -1)


@pytest.mark.parametrize(
    "line",
    [
        "/frobnicate",
        "/HELP",
        "/set frobnicate 1",
        "/set temp",
        "/set temp hot",
        "/set temp -1",
        "/set top-k 1.5",
        "/set predict -5",
        "/set logit-bias 5",
        "/save",
        "/load",
        "/load missing.json",
        "/regenerate",
    ],
)
def test_what_cannot_be_run_changes_nothing(chat: Chat, line: str) -> None:
    before: Any = (chat.messages.copy(), chat.sampling, chat.max_tokens)
    with pytest.raises(TritGgufError) as caught:
        ChatCommands(chat).run(line)
    assert 10 < len(str(caught.value)) < 200
    assert (chat.messages, chat.sampling, chat.max_tokens) == before


def test_saving_and_loading(chat: Chat, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "a chat.json"
    commands = ChatCommands(chat)
    chat.ask("A color?").finish()
    commands.run(f"/save {path}")
    commands.run("/clear")
    assert chat.messages == []
    commands.run(f"/load {path}")
    assert [message["content"] for message in chat.messages] == ["A color?", "Red."]
    chat.messages.pop()
    commands.run(f"/save {path}")  # its own file may be replaced
    assert "1 message saved" in capsys.readouterr().err


def test_a_file_of_somebody_else_is_never_replaced(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TritGgufError, match="exists already"):
        ChatCommands(chat).run(f"/save {tmp_path / 'notes.txt'}")
    assert (tmp_path / "notes.txt").read_text() == "mine"
