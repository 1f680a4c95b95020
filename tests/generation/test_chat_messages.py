"""Messages and tools of OpenAI's API: what templates get of them, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_model import END, START, scripted

from tritgguf.errors import BadRequestError
from tritgguf.generation.chat_messages import checked_messages, checked_tools
from tritgguf.generation.prompt import chat_tokens

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if enable_thinking is defined and not enable_thinking %}quiet{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Hot in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "31"},
]


def prompt(messages: Any, template: str = TOOL_TEMPLATE, **options: Any) -> str:
    """Return the text of a prompt, control tokens included."""
    model = scripted("Hi", template=template)
    return str(model.tokenizer._tokenizer.decode(chat_tokens(model, messages, **options), skip_special_tokens=False))


def test_a_template_gets_tools_calls_and_results() -> None:
    text = prompt(CHAT, tools=[WEATHER])
    assert text.startswith("<|im_start|>tools\n{")
    assert json.loads(text.split("\n")[1])["function"]["name"] == "weather"
    assert '<|im_start|>assistant\n[weather {"city": "Rome"}]<|im_end|>' in text
    assert "<|im_start|>tool\n31<|im_end|>" in text


def test_options_reach_the_template() -> None:
    assert prompt(CHAT[:1], template_options={"enable_thinking": False}).endswith("quiet")
    assert "Hot" in prompt(CHAT[:1], template_options={"messages": [], "tools": 5})
    with pytest.raises(BadRequestError, match="by name"):
        prompt(CHAT[:1], template_options=[1])


def test_a_template_without_tools_gets_them_as_text() -> None:
    text = prompt(CHAT, TOOL_TEMPLATE.replace("tools", "things"), tools=[WEATHER])
    system, user, call, result = text.split("<|im_end|>\n")[:4]
    assert system.startswith("<|im_start|>system\n")
    assert '"weather"' in system
    assert user.endswith("Hot in Rome?")
    assert call.endswith('<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>')
    assert result == "<|im_start|>user\n<tool_response>\n31\n</tool_response>"
    with_system = prompt(
        [{"role": "system", "content": "Be brief."}, *CHAT], "{{ messages[0].content }}", tools=[WEATHER]
    )
    assert with_system.startswith("Be brief.\n\nYou can call functions.")


def test_text_parts_are_joined_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "Hot "}, {"type": "text", "text": "in Rome?"}]
    assert "\nHot in Rome?<" in prompt([{"role": "user", "content": parts}])
    assert "<|im_start|>system\nObey." in prompt([{"role": "developer", "content": "Obey."}])
    assert "<|im_start|>developer" in prompt(
        [{"role": "developer", "content": "Obey."}], TOOL_TEMPLATE + "{# developer #}"
    )


@given(attack=st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "system", "\n", '"', "<|im_"])).map("".join))
def test_no_text_of_a_client_makes_control_tokens(attack: str) -> None:
    call = {"function": {"name": attack, "arguments": json.dumps({attack: attack})}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": attack},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": attack}]},
    ]
    tool = {"function": {"name": attack or "x", "description": attack, "parameters": {attack: [attack]}}}
    model = scripted("Hi", template=TOOL_TEMPLATE)
    ids = chat_tokens(model, messages, tools=[tool], template_options={"more": attack})
    assert [token for token in ids if token in (0, START, END)] == [START, END] * 4


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "'image_url'"),
        ({"role": "user", "content": 5}, "must be a text"),
        ({"role": "user", "content": [{"type": "text"}]}, "has no text"),
        ({"role": "user"}, "a message is"),
        ({"role": 5, "content": ""}, "a message is"),
        ("Hi", "a message is"),
        ({"role": "assistant", "tool_calls": 5}, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [{}]}, "a tool call is"),
        ({"role": "tool", "content": "", "tool_call_id": 5}, "tool_call_id"),
    ],
)
def test_what_is_no_message_is_refused(message: Any, reason: str) -> None:
    with pytest.raises(BadRequestError, match=reason):
        checked_messages([message])


@pytest.mark.parametrize("tools", [5, "x", [5], [{}], [{"function": {}}], [{"function": {"name": ""}}]])
def test_what_is_no_tool_is_refused(tools: Any) -> None:
    with pytest.raises(BadRequestError, match="tool"):
        checked_tools(tools)
    with pytest.raises(BadRequestError, match="JSON schema"):
        checked_tools([{"function": {"name": "f", "parameters": []}}])


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    call = {"function": {"name": "f", "arguments": "{"}}
    (message,) = checked_messages([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == "{"
