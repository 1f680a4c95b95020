"""The parts of a chat's answer as they come: content, thoughts and tool calls, in the form of OpenAI's chunks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tritgguf.generation.chat_format import ChatFormat
from tritgguf.generation.tool_calls import AnswerParser, ContentDelta, Delta, ReasoningDelta, ToolCallStart


class ChatDeltas:
    """Turns the text of one answer into deltas.

    Attributes:
        has_calls: whether the answer calls tools.

    """

    def __init__(
        self,
        chat_format: ChatFormat,
        *,
        tools: bool,
        in_thoughts: bool,
        names: Collection[str] = (),
        several: bool = True,
    ) -> None:
        """Begin; options as `AnswerParser` takes them. Without `several`, the first call counts."""
        self._several = several
        # The text of a model that neither thinks nor calls is its content, to the last space.
        is_plain = not (tools or chat_format.thinks or chat_format.tools == "harmony")
        options: dict[str, Any] = {"tools": tools, "names": names, "in_thoughts": in_thoughts}
        self._parser = None if is_plain else AnswerParser(chat_format, **options)

    @property
    def has_calls(self) -> bool:
        """Whether a call has begun."""
        return self._parser is not None and self._parser.calls > 0

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Return what a piece of text tells."""
        if self._parser is None:
            return [{"content": text}] if text else []
        return self._as_dicts(self._parser.feed(text))

    def finish(self) -> list[dict[str, Any]]:
        """Return what was held back, at the end."""
        return [] if self._parser is None else self._as_dicts(self._parser.finish())

    def _as_dicts(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        return [_as_dict(delta) for delta in deltas if self._several or getattr(delta, "index", 0) == 0]


def _as_dict(delta: Delta) -> dict[str, Any]:
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    if isinstance(delta, ReasoningDelta):
        return {"reasoning_content": delta.text}
    if isinstance(delta, ToolCallStart):
        function = {"name": delta.name, "arguments": ""}
        return {"tool_calls": [{"index": delta.index, "id": delta.call_id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}


def whole_message(deltas: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the message of an answer whose deltas are these."""
    content, reasoning, calls = list[str](), list[str](), dict[int, dict[str, Any]]()
    for delta in deltas:
        content.append(delta.get("content", ""))
        reasoning.append(delta.get("reasoning_content", ""))
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls[part["index"]] = {"id": part["id"], "type": "function", "function": dict(part["function"])}
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content), "refusal": None}
    if any(reasoning):
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message
