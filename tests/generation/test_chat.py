"""A chat: answers again, other settings in the middle, saved and loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from scripted_model import END, scripted, set_context
from small_tokenizers import encode

from tritgguf.errors import BadRequestError, ContextFullError, DamagedFileError, TritGgufError
from tritgguf.generation.chat import Chat
from tritgguf.generation.sampling import SamplingOptions
from tritgguf.generation.saved_chat import load_messages, save_messages

MESSAGES: Any = [{"role": "user", "content": "Ein Bär?\n"}, {"role": "assistant", "content": "Ja."}]


def answers(chat: Chat, model: Any, answer: str) -> None:
    model.model.script = [*encode(model.tokenizer, answer), END]


def contents(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.messages]


def test_another_answer_takes_the_place_of_the_one_before() -> None:
    model = scripted("Red.")
    chat = Chat(model, system="Be brief.")
    chat.ask("A color?").finish()
    answers(chat, model, "Blue.")
    assert chat.regenerate().finish().text == "Blue."
    assert contents(chat) == ["Be brief.", "A color?", "Blue."]
    said = model.tokenizer.decode(model.model.text)
    assert said.startswith("system\nBe brief.\nuser\nA color?\nassistant\nBlue.")
    assert "Red" not in said


def test_another_answer_after_one_that_was_stopped() -> None:
    model = scripted("The dog sleeps.")
    chat = Chat(model)
    next(chat.ask("What?"))
    answers(chat, model, "Red.")
    chat.regenerate().finish()
    assert contents(chat) == ["What?", "Red."]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_nothing_to_answer_again(system: str | None) -> None:
    with pytest.raises(BadRequestError, match="no message to answer again"):
        Chat(scripted("Red."), system=system).regenerate()


def test_another_answer_without_room_leaves_the_chat_as_it_was() -> None:
    model = scripted("Red.")
    chat = Chat(model)
    chat.ask("A color?").finish()
    set_context(model, 5)
    with pytest.raises(ContextFullError):
        chat.regenerate()
    assert contents(chat) == ["A color?", "Red."]


def test_another_system_message_counts_from_the_next_message_on() -> None:
    model = scripted("Red.")
    chat = Chat(model)
    chat.ask("A color?").finish()
    for system in ("Be brief.", "Be long.", None, "Be kind."):
        chat.system = system
        assert chat.system == system
        assert contents(chat) == [*([] if system is None else [system]), "A color?", "Red."]
    answers(chat, model, "Blue.")
    chat.ask("Another?").finish()
    said = model.tokenizer.decode(model.model.text)
    assert said.startswith("system\nBe kind.\nuser\nA color?\nassistant\nRed.\nuser\nAnother?\nassistant\nBlue.")
    chat.clear()
    assert contents(chat) == ["Be kind."]


def test_other_options_count_from_the_next_answer_on() -> None:
    model = scripted("")
    chat = Chat(model, temperature=0, max_tokens=2)
    model.model.script = [40] * 9
    assert chat.ask("A?").finish().tokens == [40, 40]
    chat.sampling = SamplingOptions(temperature=0, repeat_penalty=10)  # 40 falls behind 41, the second likeliest
    chat.max_tokens = 1
    assert chat.ask("B?").finish().tokens == [41]
    assert chat.sampling.repeat_penalty == 10


def test_a_saved_chat_is_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    save_messages(path, MESSAGES)
    assert json.loads(path.read_text("utf-8")) == {"messages": MESSAGES}
    assert load_messages(path) == MESSAGES
    save_messages(path, MESSAGES[:1])
    assert load_messages(path) == MESSAGES[:1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["chat.json"]


def test_a_list_of_messages_is_a_chat_too(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([{**message, "name": "x"} for message in MESSAGES]))
    assert load_messages(tmp_path / "list.json") == MESSAGES


@pytest.mark.parametrize(
    "content", ["", "{", "5", "{}", '{"messages": 5}', '{"messages": [{"role": "user"}]}', "[" * 100_000, "[5]"]
)
def test_what_is_no_chat(tmp_path: Path, content: str) -> None:
    (tmp_path / "chat.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"chat\.json: .*give a file that /save wrote"):
        load_messages(tmp_path / "chat.json")


def test_files_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(TritGgufError, match="cannot be written"):
        save_messages(tmp_path / "missing" / "chat.json", MESSAGES)
    with pytest.raises(TritGgufError, match="cannot be read"):
        load_messages(tmp_path / "chat.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")
def test_a_link_stays_one_and_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "chat.json")
    save_messages(tmp_path / "link", MESSAGES)
    assert (tmp_path / "link").is_symlink()
    assert load_messages(tmp_path / "chat.json") == MESSAGES
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TritGgufError, match="is no regular file"):
        save_messages(tmp_path / "pipe", MESSAGES)
