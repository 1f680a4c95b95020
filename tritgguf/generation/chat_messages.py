"""Messages and tools in the form of OpenAI's API, checked and brought into the form that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from tritgguf.errors import BadRequestError

TOOL_INSTRUCTIONS = (
    "You can call functions. Here they are, one JSON object in each line:\n<tools>\n{tools}\n</tools>\n"
    "To call a function, write its name and its arguments as a JSON object within <tool_call> tags, and nothing else:\n"
    '<tool_call>\n{{"name": "the name", "arguments": {{"an argument": "its value"}}}}\n</tool_call>\n'
    "The results come back within <tool_response> tags."
)
"""What a model whose template does not know tools is told about them."""


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Return messages as templates expect them: contents are texts, arguments of calls are objects.

    A content may be None or a list of text parts. Raises BadRequestError for what is no message, and for contents that
    are no text, such as images.
    """
    found = messages if isinstance(messages, Sequence) and not isinstance(messages, str) else [messages]
    return [_checked_message(message) for message in found]


def _checked_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRequestError(f'a message is {{"role": ..., "content": ...}}, two texts, not {message!r:.60}')
    if "content" not in message and not message.get("tool_calls"):
        raise BadRequestError(f'a message is {{"role": ..., "content": ...}}, two texts, not {message!r:.60}')
    checked: dict[str, Any] = {"role": message["role"], "content": _text(message.get("content"))}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if message.get(name) is not None:
            if not isinstance(message[name], str):
                raise BadRequestError(f"{name} of a message must be a text, not {message[name]!r:.60}")
            checked[name] = message[name]
    if message.get("tool_calls"):
        calls = message["tool_calls"]
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise BadRequestError(f"tool_calls must be a list, not {calls!r:.60}")
        checked["tool_calls"] = [_checked_call(call) for call in calls]
    return checked


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise BadRequestError(f"the content of a message must be a text or a list of text parts, not {content!r:.60}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "refusal"):
            raise BadRequestError(f"the model reads text alone; a message has a part of the type {kind!r:.40}")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise BadRequestError(f"a text part of a message has no text but {text!r:.60}")
        texts.append(text)
    return "".join(texts)


def _checked_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRequestError(f'a tool call is {{"id": ..., "function": {{"name", "arguments"}}}}, not {call!r:.60}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # a model wrote it so; the template shows it as it is
            arguments = json.loads(arguments) if arguments.strip() else {}
    checked = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {**checked, "id": call["id"]} if isinstance(call.get("id"), str) else checked


def checked_tools(tools: Any) -> list[dict[str, Any]]:
    """Return tools as templates expect them; BadRequestError for anything but functions with names."""
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise BadRequestError(f"tools must be a list, not {tools!r:.60}")
    return [_checked_tool(tool) for tool in tools]


def _checked_tool(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRequestError(f'a tool is {{"type": "function", "function": {{"name": ...}}}}, not {tool!r:.60}')
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise BadRequestError(f"the parameters of the tool {function['name']:.40} must be a JSON schema")
    described = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": described}


def with_thinking(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for a template that calls thoughts `thinking`, as gpt-oss's does.

    It takes no content beside the thoughts of an answer that calls tools. The thoughts stay: the model goes on with
    them after the result.
    """
    written = []
    for message in messages:
        changed = {key: value for key, value in message.items() if key != "reasoning_content"}
        if message.get("reasoning_content"):
            changed["thinking"] = message["reasoning_content"]
            if message.get("tool_calls"):
                changed["content"] = ""
        written.append(changed)
    return written


def with_tools_as_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Return messages for a template that does not know tools: what it leaves out is written into their texts.

    The system message describes the tools; calls and their results stand in tags, as `TOOL_INSTRUCTIONS` say.
    """
    written = [_as_text(message) for message in messages]
    if tools:
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        instructions = TOOL_INSTRUCTIONS.format(tools=lines)
        if written and written[0]["role"] == "system":
            written[0] = {**written[0], "content": f"{written[0]['content']}\n\n{instructions}".strip()}
        else:
            written.insert(0, {"role": "system", "content": instructions})
    return written


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return dict(message)
    calls = (json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"])
    parts = [message["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
    return {"role": message["role"], "content": "\n".join(part for part in parts if part)}
