"""Chats in files: the messages as JSON, in the form that chat APIs take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritgguf.errors import DamagedFileError, TritGgufError
from tritgguf.formats.durable_output import replace_text
from tritgguf.formats.text_file import read_text

if TYPE_CHECKING:
    from tritgguf.tokenization.chat_template import Message


def save_messages(path: Path, messages: Sequence[Message]) -> None:
    """Write messages to a file, `{"messages": [{"role": ..., "content": ...}, ...]}`; it is replaced if it exists.

    Raises TritGgufError if it cannot be written or is no regular file.
    """
    path = path.resolve()  # so that a link stays one
    if path.exists() and not path.is_file():
        raise TritGgufError(f"{path}: is no regular file; name another one")
    replace_text(path, json.dumps({"messages": list(messages)}, ensure_ascii=False, indent=1) + "\n")


def load_messages(path: Path) -> list[Message]:
    """Return the messages of a file that `save_messages` wrote, or of a JSON list of messages.

    Raises TritGgufError if it cannot be read or contains anything else.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: is no JSON ({error}); give a file that /save wrote") from error
    messages = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise DamagedFileError(f'{path}: has no "messages" of a chat; give a file that /save wrote')
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
