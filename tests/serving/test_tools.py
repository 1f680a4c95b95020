"""Tools and thoughts, judged by OpenAI's client; the model's words are written down."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripted_model import scripted
from serving import RunningServer, running_server

HELLO: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
THINKING = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if tools %}{{ tools }} <tool_call>{% endif %}{# <think> #}assistant:"
)


def chat(server: RunningServer, **options: Any) -> Any:
    return server.openai.chat.completions.create(**{"model": "tiny", "messages": HELLO, "tools": [WEATHER], **options})


def streamed_calls(chunks: list[Any]) -> list[tuple[str, str]]:
    """Return name and arguments of each call, put together as clients do it."""
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        for part in chunk.choices[0].delta.tool_calls or []:
            if part.id:
                assert part.index not in calls
                calls[part.index] = [part.function.name, ""]
            calls[part.index][1] += part.function.arguments or ""
    return [(name, arguments) for name, arguments in calls.values()]


@pytest.mark.parametrize("calls", [1, 2])
def test_calls_whole_and_streamed(calls: int) -> None:
    script = "I look. " + "\n".join([CALL] * calls)
    with running_server(scripted(script, 4000)) as server:
        choice = chat(server).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert len({call.id for call in choice.message.tool_calls}) == calls
    for call in choice.message.tool_calls:
        assert call.type == "function"
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Oslo", "days": 2}
    with running_server(scripted(script, 4000)) as server:
        chunks = list(chat(server, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I look."
    assert [(name, json.loads(text)) for name, text in streamed_calls(chunks)] == [
        ("get_weather", {"city": "Oslo", "days": 2})
    ] * calls
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert sum(1 for chunk in chunks if chunk.choices[0].delta.tool_calls) >= 2 * calls


def test_one_call_if_no_more_are_wanted() -> None:
    with running_server(scripted(CALL * 2, 4000)) as server:
        assert len(chat(server, parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_what_is_no_call_is_content() -> None:
    with running_server(scripted("<tool_call>nothing", 4000)) as server:
        choice = chat(server).choices[0]
    assert choice.message.tool_calls is None
    assert "nothing" in choice.message.content
    assert choice.finish_reason == "stop"
    with running_server(scripted(CALL, 4000)) as server:
        for options in ({"tool_choice": "none"},):
            assert chat(server, **options).choices[0].message.content == CALL


def test_a_call_without_tags_counts_unless_json_was_asked_for() -> None:
    call = {"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}
    with running_server(scripted(json.dumps(call), 4000)) as server:
        choice = chat(server).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert json.loads(choice.message.tool_calls[0].function.arguments) == call["arguments"]
    form: Any = {"type": "json_schema", "json_schema": {"name": "any", "schema": {"const": call}}}
    with running_server(scripted([], 4000)) as server:
        choice = chat(server, response_format=form, max_tokens=200).choices[0]
    assert json.loads(choice.message.content) == call
    assert choice.message.tool_calls is None


def test_thoughts_are_told_apart() -> None:
    script = "<think>\nLet me see.\n</think>\n\nIt rains."
    with running_server(scripted(script, 4000, THINKING)) as server:
        message = chat(server).choices[0].message
        assert message.content == "It rains."
        assert message.reasoning_content == "Let me see."
    with running_server(scripted(script, 4000, THINKING)) as server:
        deltas = [chunk.choices[0].delta for chunk in chat(server, stream=True)]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Let me see."
        assert "".join(delta.content or "" for delta in deltas) == "It rains."


def test_calls_and_results_go_back(server: RunningServer) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain<|im_end|>"},
    ]
    assert chat(server, messages=messages, max_tokens=2, temperature=0).choices[0].finish_reason == "length"
    with_call = server.post("/tokenize", messages=messages, tools=[WEATHER]).json()["tokens"]
    text = server.post("/detokenize", tokens=with_call).json()["content"]
    assert "get_weather" in text and "rain<|im_end|>" in text and "Tells the weather." in text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_has_to_come_always_parses(server: RunningServer, choice: Any, stream: bool) -> None:
    options: dict[str, Any] = {"tool_choice": choice, "temperature": 1.5, "max_tokens": 150, "seed": 3}
    options |= {"parallel_tool_calls": False}
    if stream:
        chunks = list(chat(server, stream=True, **options))
        calls, reason = streamed_calls(chunks), chunks[-1].choices[0].finish_reason
    else:
        whole = chat(server, **options).choices[0]
        calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
        reason = whole.finish_reason
    assert reason == "tool_calls"
    ((name, arguments),) = calls
    assert name == "get_weather"
    assert json.loads(arguments)["city"] in ("Oslo", "Rome")
    assert json.loads(arguments)["days"] in (1, 2, 3)


@pytest.mark.parametrize(
    ("parameter", "body"),
    [
        ("tool_choice", {"tool_choice": "always"}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "other"}}}),
        ("tool_choice", {"tool_choice": "required", "tools": []}),
        ("tool_choice", {"tool_choice": {"function": []}}),
        ("tools", {"tools": "all"}),
        ("tools", {"tools": [3]}),
        (None, {"tools": [{"type": "function"}]}),
        (None, {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}),
        (None, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        (None, {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": 3}]}]}),
    ],
)
def test_what_cannot_be(server: RunningServer, parameter: str | None, body: dict[str, Any]) -> None:
    error = server.error("/v1/chat/completions", **{"messages": HELLO, "tools": [WEATHER], "max_tokens": 1, **body})
    if parameter is not None:
        assert error["param"] == parameter
    assert error["message"]
