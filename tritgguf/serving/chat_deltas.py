"""The parts of a chat's answer as they come, and the message that they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def whole_message(deltas: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the message of an answer whose deltas, in the form of OpenAI's chunks, are these."""
    content, reasoning, calls = list[str](), list[str](), dict[int, dict[str, Any]]()
    for delta in deltas:
        content.append(delta.get("content") or "")
        reasoning.append(delta.get("reasoning_content") or "")
        for part in delta.get("tool_calls", ()):
            call = calls.setdefault(part["index"], {"id": "", "type": "function", "function": _no_function()})
            call["id"] = part.get("id") or call["id"]
            for name, text in part.get("function", {}).items():
                call["function"][name] += text
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content), "refusal": None}
    if any(reasoning):
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message


def _no_function() -> dict[str, str]:
    return {"name": "", "arguments": ""}
