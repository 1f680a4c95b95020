"""Answers that have to call a tool: what a model with random weights writes parses, and its arguments are valid."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from tritgguf.errors import BadRequestError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.chat_format import ChatFormat
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.generation.sampling import Sampler, SamplingOptions
from tritgguf.generation.text_stream import TextStream
from tritgguf.generation.tool_calls import AnswerParser, ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart
from tritgguf.generation.tool_grammar import tool_grammar
from tritgguf.tokenization.stream_decoder import StreamDecoder

pytest.importorskip("llguidance")

SCHEMAS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "description": "Not a grammar of llama.cpp's, ::= or not",
        "properties": {"city": {"type": "string", "maxLength": 9}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    'say "hi"': {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/tree"}},
        "required": ["tree"],
        "additionalProperties": False,
        "$defs": {"tree": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/tree"}}]}},
    },
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
PLAIN = [tool for tool in TOOLS if tool["function"]["name"] == "weather"]  # type: ignore[index]
FORMS = [ChatFormat(tools, False) for tools in ("hermes", "llama", "mistral", "mistral-args")]


@pytest.fixture(scope="module")
def model(tiny_trit_file: Callable[..., GgufFile]) -> LoadedModel:
    return load(tiny_trit_file("llama").path, context=1024)


def answer(model: LoadedModel, form: ChatFormat, tools: Any, seed: int, **options: Any) -> tuple[str, Any]:
    """Return why an answer ended and its deltas."""
    constraint = tool_grammar(model, form, tools, **options).constraint()
    ends = [model.tokenizer.encode(f"a{text}", add_special=False, parse_special=False)[-1] for text in '"]}>']
    wild = SamplingOptions(
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed, logit_bias=dict.fromkeys([*ends, 2], 4.0)
    )
    stream = TextStream(model, [5], Sampler(wild, constraint=constraint), max_tokens=500)
    generated = stream.finish()
    decoder = StreamDecoder(model.tokenizer, shown=form.marker_tokens(model.tokenizer))
    parser = AnswerParser(form, in_thoughts=options.get("in_thoughts", False))
    deltas = [delta for token in generated.tokens for delta in parser.feed(decoder.step(token))]
    return generated.finish_reason, deltas + parser.feed(decoder.flush()) + parser.finish()


def calls_of(deltas: Any) -> list[tuple[str, Any]]:
    names = [delta.name for delta in deltas if isinstance(delta, ToolCallStart)]
    texts = [""] * len(names)
    for delta in deltas:
        if isinstance(delta, ArgumentsDelta):
            texts[delta.index] += delta.text
    return [(name, json.loads(text)) for name, text in zip(names, texts, strict=True)]


@pytest.mark.parametrize("form", [*FORMS, ChatFormat("harmony", False)])
def test_required_calls_parse_and_their_arguments_are_valid(model: LoadedModel, form: ChatFormat) -> None:
    tools = PLAIN if form.tools in ("harmony", "mistral-args") else TOOLS  # they write the name as it is
    finished = 0
    for seed in range(4):
        reason, deltas = answer(model, form, tools, seed)
        if reason != "stop":
            continue
        finished += 1
        assert not [delta for delta in deltas if isinstance(delta, ContentDelta)]
        found = calls_of(deltas)
        assert found
        for name, arguments in found:
            jsonschema.validate(arguments, SCHEMAS[name])
    assert finished >= 2


def test_the_named_tool_is_called_once(model: LoadedModel) -> None:
    for seed in range(4):
        reason, deltas = answer(model, FORMS[0], TOOLS, seed, name='say "hi"')
        if reason == "stop":
            assert [name for name, _ in calls_of(deltas)] == ['say "hi"']
    _, deltas = answer(model, FORMS[0], PLAIN, 1, parallel=False)
    assert len(calls_of(deltas)) == 1


def test_thoughts_may_come_first(model: LoadedModel) -> None:
    reason, deltas = answer(model, ChatFormat("llama", True), PLAIN, 3, in_thoughts=True)
    if reason == "stop":
        assert any(isinstance(delta, ReasoningDelta) for delta in deltas)
        assert len(calls_of(deltas)) == 1


def test_what_cannot_be_required_is_refused(model: LoadedModel) -> None:
    with pytest.raises(BadRequestError, match="there is no tool nothing to call"):
        tool_grammar(model, FORMS[0], TOOLS, name="nothing")
    with pytest.raises(BadRequestError, match="there is no tool to call"):
        tool_grammar(model, FORMS[0], [])
    with pytest.raises(BadRequestError, match="not"):
        tool_grammar(model, FORMS[0], [{"function": {"name": "f", "parameters": {"not": {}}}}])


def test_a_function_takes_no_arguments_that_it_does_not_name(model: LoadedModel) -> None:
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
    for seed in range(3):
        reason, deltas = answer(model, FORMS[0], tools, seed, parallel=False)
        assert (reason, calls_of(deltas)) == ("stop", [("now", {})])
