"""Answers in the forms of the model families, cut anywhere: content, thoughts and tool calls."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import encode, tokenizer

from tritgguf.generation.chat_format import ChatFormat, chat_format
from tritgguf.generation.tool_calls import AnswerParser, ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart
from tritgguf.tokenization.stream_decoder import StreamDecoder

HERMES, THINKING = ChatFormat("hermes", False), ChatFormat("hermes", True)
LLAMA, HARMONY = ChatFormat("llama", False), ChatFormat("harmony", False)
MISTRAL, MISTRAL_ARGS = ChatFormat("mistral", False), ChatFormat("mistral-args", False)
CITY = '{"city": "Rome \\"\\u00e9</tool_call>[]{"}'
OTHER = '{"a": [1, {"b": null}], "c": -2.5e3}'


def parsed(form: ChatFormat, pieces: list[str], **options: Any) -> tuple[str, str, list[tuple[str, str]]]:
    """Return content, thoughts, and name and arguments of each call."""
    parser = AnswerParser(form, **options)
    content, thoughts, calls = "", "", list[tuple[str, str]]()
    for delta in [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish():
        if isinstance(delta, ContentDelta):
            content += delta.text
        elif isinstance(delta, ReasoningDelta):
            thoughts += delta.text
        elif isinstance(delta, ToolCallStart):
            assert delta.index == len(calls)
            assert delta.call_id
            calls.append((delta.name, ""))
        else:
            assert isinstance(delta, ArgumentsDelta)
            assert delta.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    return content, thoughts, calls


EXAMPLES: list[tuple[ChatFormat, str, tuple[str, str, list[tuple[str, str]]]]] = [
    (HERMES, "Hello.\n", ("Hello.\n", "", [])),
    (HERMES, "a < b <tool> <tool_cal", ("a < b <tool> <tool_cal", "", [])),
    (
        HERMES,
        f'I look.\n<tool_call>\n{{"name": "w", "arguments": {CITY}}}\n</tool_call>',
        ("I look.", "", [("w", CITY)]),
    ),
    (
        HERMES,
        f'<tool_call>{{"arguments": {CITY}, "name": "w"}}</tool_call>\n<tool_call>{{"name":"v","arguments":{OTHER}}}',
        ("", "", [("w", CITY), ("v", OTHER)]),
    ),
    (
        HERMES,  # SmolLM2 writes a list
        f'<tool_call>[{{"name": "w", "arguments": {CITY}}}, {{"name": "v", "arguments": {OTHER}}}]</tool_call>',
        ("", "", [("w", CITY), ("v", OTHER)]),
    ),
    (HERMES, '<tool_call>\n{"name": "w"}\n</tool_call>\n', ("", "", [("w", "{}")])),
    (HERMES, '<tool_call>{"name": "w", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", "", [("w", '{"a": 1}')])),
    (HERMES, "<tool_call>nothing</tool_call>", ("<tool_call>nothing</tool_call>", "", [])),
    (HERMES, 'Yes. <tool_call>{"nam', ("Yes.", "", [])),  # cut
    (HERMES, '{"name": "w", "arguments": {}}', ('{"name": "w", "arguments": {}}', "", [])),
    (HERMES, '```json\n{"name": 1}\n```', ('```json\n{"name": 1}\n```', "", [])),
    (HERMES, '<tool_call>{"name": "w", "arguments": {"a', ("", "", [("w", '{"a')])),
    (THINKING, "<think>\nHm.\n</think>\n\nYes.", ("Yes.", "Hm.", [])),
    (
        THINKING,
        f'<think>Hm.</think><tool_call>{{"name": "w", "arguments": {CITY}}}</tool_call>',
        ("", "Hm.", [("w", CITY)]),
    ),
    (THINKING, "<think>Hm", ("", "Hm", [])),
    (LLAMA, f'{{"name": "w", "parameters": {CITY}}}', ("", "", [("w", CITY)])),
    (LLAMA, f'<|python_tag|>{{"type": "function", "name": "w", "parameters": {CITY}}}', ("", "", [("w", CITY)])),
    (
        LLAMA,
        f'{{"name": "w", "parameters": {CITY}}}; {{"name": "v", "parameters": {OTHER}}}',
        ("", "", [("w", CITY), ("v", OTHER)]),
    ),
    (LLAMA, '{"a": 1} is JSON.', ('{"a": 1} is JSON.', "", [])),
    (LLAMA, 'No: {"name": "w"}', ('No: {"name": "w"}', "", [])),
    (
        MISTRAL,
        f'[TOOL_CALLS][{{"name": "w", "arguments": {CITY}, "id": "abcdefghi"}}, {{"name": "v", "arguments": {OTHER}}}]',
        ("", "", [("w", CITY), ("v", OTHER)]),
    ),
    (
        MISTRAL_ARGS,
        f"Wait.[TOOL_CALLS]w[ARGS]{CITY}[TOOL_CALLS]v[CALL_ID]abcdefghi[ARGS]{OTHER}",
        ("Wait.", "", [("w", CITY), ("v", OTHER)]),
    ),
    (
        HARMONY,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        ("Yes.", "Hm.", []),
    ),
    (
        HARMONY,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.w "
        f"<|constrain|>json<|message|>{CITY}<|call|>",
        ("", "Hm.", [("w", CITY)]),
    ),
    (
        HARMONY,
        f" to=functions.w<|channel|>commentary json<|message|>{CITY}<|call|><|start|>assistant<|channel|>commentary"
        "<|message|>I look.<|end|>",
        ("I look.", "", [("w", CITY)]),
    ),
    (
        HARMONY,  # as openai-harmony writes it: a space in front of the constraint, thoughts and answers in parts
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>analysis<|message|>Rome.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.\n<|end|><|start|>assistant to=functions.w"
        f"<|channel|>commentary <|constrain|>json<|message|>{CITY}<|call|><|start|>assistant<|channel|>final"
        "<|message|>It is < 30.<|return|>",
        ("I look.\n\nIt is < 30.", "Hm.\n\nRome.", [("w", CITY)]),
    ),
    (HARMONY, "Just text.", ("Just text.", "", [])),
]


@pytest.mark.parametrize(("form", "text", "expected"), EXAMPLES)
def test_an_answer_means_the_same_however_it_is_cut(form: ChatFormat, text: str, expected: Any) -> None:
    assert parsed(form, [text]) == expected
    assert parsed(form, list(text)) == expected
    for cut in range(len(text)):
        assert parsed(form, [text[:cut], text[cut:]]) == expected


@pytest.mark.parametrize(("form", "text"), [example[:2] for example in EXAMPLES if example[0].tools != "harmony"])
def test_without_tools_a_call_is_content(form: ChatFormat, text: str) -> None:
    content, thoughts, calls = parsed(form, list(text), tools=False, names=["w"])
    assert calls == []
    if not form.thinks:
        assert (content, thoughts) == (text, "")


BARE = f'{{"name": "w", "arguments": {CITY}}}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BARE, ("", "", [("w", CITY)])),
        (f"```json\n{BARE}\n```", ("", "", [("w", CITY)])),
        (f"```\n{BARE}\n```\nSo.", ("So.", "", [("w", CITY)])),
        (BARE.replace('"w"', '"other"'), (BARE.replace('"w"', '"other"'), "", [])),
        ("```python\nprint()\n```", ("```python\nprint()\n```", "", [])),
        ("```", ("```", "", [])),
        (f"So: {BARE}", (f"So: {BARE}", "", [])),
    ],
)
def test_a_call_without_tags_counts_at_the_beginning(text: str, expected: Any) -> None:
    for pieces in [[text], list(text), *([text[:cut], text[cut:]] for cut in range(len(text)))]:
        assert parsed(HERMES, pieces, names=["w"]) == expected


@pytest.mark.parametrize("form", [HERMES, THINKING, MISTRAL, MISTRAL_ARGS])
def test_a_marker_that_the_end_cuts_behind_a_call_is_left_out(form: ChatFormat) -> None:
    call = (
        f"[TOOL_CALLS]w[ARGS]{OTHER}"
        if form is MISTRAL_ARGS
        else f'{form.markers[0]}{{"name": "w", "arguments": {OTHER}}}'
    )
    end = form.markers[1] if form.tools == "hermes" else ""
    for text in (end, f"{end}\n{form.markers[0]}", *([end + "<think>"] if form.thinks else [])):
        for cut in range(len(text)):
            assert parsed(form, [call + text[:cut]]) == ("", "", [("w", OTHER)]), text[:cut]


def test_thoughts_that_the_prompt_begins() -> None:
    assert parsed(THINKING, list("\nHm.\n</think>\n\nYes."), in_thoughts=True) == ("Yes.", "Hm.", [])


def test_arguments_come_while_they_are_written() -> None:
    parser = AnswerParser(HERMES)
    parser.feed('<tool_call>{"name": "w", "arguments": {"a')
    assert parser.feed("bc") == [ArgumentsDelta(0, "bc")]
    assert parser.feed('": 1}') == [ArgumentsDelta(0, '": 1}')]
    assert parser.feed("}</tool_call>") == []


def test_an_id_of_the_model_is_kept() -> None:
    deltas = AnswerParser(MISTRAL).feed('[TOOL_CALLS][{"id": "abcdefghi", "name": "w", "arguments": {}}]')
    assert deltas[0] == ToolCallStart(0, "abcdefghi", "w")
    (start, _) = AnswerParser(MISTRAL).feed('[TOOL_CALLS][{"name": "w", "arguments": {}}]')
    assert isinstance(start, ToolCallStart)
    assert len(start.call_id) == 9


@given(
    text=st.lists(
        st.sampled_from(['{"name": ', '"w"', "<tool_call>", "}", "{", ",", ":", '"', "</think>", "[", "\\", "a"])
    ).map("".join),
    form=st.sampled_from([HERMES, THINKING, LLAMA, MISTRAL, MISTRAL_ARGS, HARMONY]),
)
def test_nonsense_never_fails_and_cuts_do_not_matter(text: str, form: ChatFormat) -> None:
    assert parsed(form, [text], names=["w"]) == parsed(form, list(text), names=["w"])


@given(value=st.dictionaries(st.text(max_size=5), st.recursive(st.text() | st.integers() | st.none(), st.lists)))
def test_arguments_are_those_that_were_written(value: dict[str, Any]) -> None:
    text = f"<tool_call>\n{json.dumps({'name': 'w', 'arguments': value}, ensure_ascii=False)}\n</tool_call>"
    _, _, calls = parsed(HERMES, list(text))
    assert json.loads(calls[0][1]) == value


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, HERMES),
        ("{{ messages }}", HERMES),
        ("...<tool_call>... <think>", THINKING),
        ("{% if tools %}<|start_header_id|>", LLAMA),
        ("<|python_tag|>", LLAMA),
        ("[TOOL_CALLS]", MISTRAL),
        ("[TOOL_CALLS][ARGS]", MISTRAL_ARGS),
        ("<|start|><|channel|>", HARMONY),
    ],
)
def test_the_template_shows_the_format(template: str | None, expected: ChatFormat) -> None:
    assert chat_format(template) == expected


def test_markers_that_are_control_tokens_are_seen() -> None:
    tokens = tokenizer()
    form = ChatFormat("hermes", False)
    (marker,) = form.marker_tokens(tokens)
    ids = [*encode(tokens, "Hi"), marker, 2, *encode(tokens, "dog")]
    decoder = StreamDecoder(tokens, shown=frozenset([marker, 2]))
    assert "".join(map(decoder.step, ids)) + decoder.flush() == "Hi<tool_call><|im_end|>dog"
    decoder = StreamDecoder(tokens)
    assert "".join(map(decoder.step, ids)) + decoder.flush() == "Hi<tool_call>dog"
