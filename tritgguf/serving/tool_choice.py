"""`tool_choice`: whether an answer may call tools, must, or must call a certain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tritgguf.serving.errors import ApiError, bad_request
from tritgguf.serving.protocol import ChatBody


@dataclass(frozen=True)
class ToolChoice:
    """The tools of a request.

    Attributes:
        tools: those that the answer may call, in the form of OpenAI's API.
        must_call: whether it has to call one.
        several: whether it may call more than one.

    """

    tools: list[dict[str, Any]]
    must_call: bool = False
    several: bool = True

    @property
    def names(self) -> list[str]:
        """The names of the tools; what is no tool is refused when the prompt is made."""
        functions = (tool.get("function") for tool in self.tools)
        return [str(function.get("name")) for function in functions if isinstance(function, dict)]


def tool_choice(body: ChatBody) -> ToolChoice:
    """Return a request's choice; ApiError for one that its tools do not allow."""
    tools, choice, several = body.tools or [], body.tool_choice, body.parallel_tool_calls is not False
    if choice is None or choice == "auto":
        return ToolChoice(tools, several=several)
    if choice == "none":
        return ToolChoice([])
    if choice == "required":
        if not tools:
            raise _error("tool_choice is required, and there are no tools")
        return ToolChoice(tools, must_call=True, several=several)
    name = _named(choice)
    chosen = [tool for tool in tools if isinstance(tool.get("function"), dict) and tool["function"].get("name") == name]
    if not chosen:
        raise _error(f"tool_choice names {name!r:.80}, which is none of the tools")
    return ToolChoice(chosen, must_call=True, several=False)


def _named(choice: str | dict[str, Any]) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _error('tool_choice must be auto, none, required, or {"type": "function", "function": {"name": ...}}')
    return name


def _error(message: str) -> ApiError:
    return bad_request(message, "tool_choice")
