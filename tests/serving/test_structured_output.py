"""Answers in a form that the request asks for, judged by OpenAI's `.parse` and jsonschema."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema  # type: ignore[import-untyped]
import pytest
from pydantic import BaseModel
from serving import RunningServer

HELLO: Any = [{"role": "user", "content": "Name a color."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["color", "count"],
    "additionalProperties": False,
}


class Color(BaseModel):
    name: Literal["red", "green", "blue"]
    bright: bool


@pytest.mark.parametrize("stream", [False, True])
def test_openais_parse(server: RunningServer, stream: bool) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "response_format": Color, "max_tokens": 60, "seed": 1}
    if stream:
        with server.openai.chat.completions.stream(**options) as events:
            for _ in events:
                pass
            completion = events.get_final_completion()
    else:
        completion = server.openai.chat.completions.parse(**options)
    assert isinstance(completion.choices[0].message.parsed, Color)
    assert completion.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "color", "schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
    ],
)
def test_a_schema_holds_for_every_answer(server: RunningServer, form: dict[str, Any]) -> None:
    body = {"messages": HELLO, "n": 3, "max_tokens": 80, "temperature": 2, "seed": 4, **form}
    choices = server.post("/v1/chat/completions", **body).json()["choices"]
    for choice in choices:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    text = server.post("/v1/completions", prompt="Color: ", max_tokens=80, seed=4, **form).json()["choices"][0]["text"]
    jsonschema.validate(json.loads(text), SCHEMA)


def test_any_object_and_a_grammar(server: RunningServer) -> None:
    body: Any = {"messages": HELLO, "max_tokens": 200, "temperature": 1.5, "logit_bias": {"92": 20}, "seed": 1}
    answer = server.post("/v1/chat/completions", response_format={"type": "json_object"}, **body).json()
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), dict)
    assert answer["choices"][0]["message"]["content"].startswith("{")
    for grammar in ('root ::= "yes" | "no"', 'start: "yes" | "no"'):
        answer = server.post("/v1/completions", prompt="Well? ", grammar=grammar, seed=2).json()
        assert answer["choices"][0]["text"] in ("yes", "no")


def test_forms_that_cannot_be_held(server: RunningServer) -> None:
    for form in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "colour"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/nowhere"}}}},
        {"grammar": "root ::= ("},
        {"json_schema": {"type": "object"}, "grammar": 'root ::= "a"'},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "xml"}},
        {"response_format": "json"},
    ):
        for stream in (False, True):
            error = server.error("/v1/chat/completions", messages=HELLO, stream=stream, **form)
            assert error["message"]
    server.check_idle()


def test_the_same_form_is_compiled_once(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from tritgguf.serving import structured_output

    server.post("/v1/completions", prompt="a", max_tokens=1, json_schema=SCHEMA)
    monkeypatch.setattr(structured_output, "compile_grammar", None)
    assert server.post("/v1/completions", prompt="a", max_tokens=1, json_schema=SCHEMA).status_code == 200
