"""Grammars: what they allow, how an answer ends, and what is refused with which words."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from small_tokenizers import metadata, tokenizer

from tritgguf.errors import BadRequestError, DamagedFileError, MissingExtraError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.chat import Chat
from tritgguf.generation.generate import generate
from tritgguf.generation.grammar import JSON_OBJECT, Grammar, compile_grammar, json_schema_source
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.tokenization.tokenizer import Tokenizer

pytest.importorskip("llguidance")

VOCABULARY = 448  # logits of the tiny models; their tokenizers have fewer tokens
WILD: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
COLOURS = {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 2, "maxItems": 3}


@pytest.fixture(scope="module")
def model(tiny_trit_file: Callable[..., GgufFile]) -> LoadedModel:
    return load(tiny_trit_file("llama").path, context=512)


def after_x(tokens: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text that is not the beginning: some tokenizers put a space there."""
    before = tokens.encode("x", add_special=False, parse_special=False)
    return tokens.encode(f"x{text}", add_special=False, parse_special=False)[len(before) :]


def allowed_tokens(tokens: Tokenizer, schema: dict[str, Any], answer: list[int]) -> set[int]:
    """Return which tokens may follow an answer."""
    constraint = Grammar(tokens, VOCABULARY, json_schema_source(schema)).constraint()
    for token in answer:
        assert constraint.mask()[token] == 0
        constraint.accept(token)
    mask = constraint.mask()
    assert mask.shape == (VOCABULARY,)
    assert mask.dtype == np.float32
    assert set(np.unique(mask)) <= {0, -np.inf}
    return set(np.flatnonzero(mask == 0).tolist())


# -- masks


@pytest.mark.parametrize("kind", ["smollm", "qwen2", "llama-bpe", "gpt-2", "sentencepiece"])
def test_exactly_the_tokens_that_keep_to_the_schema_are_allowed(kind: str) -> None:
    tokens = tokenizer(kind)
    texts = [tokens._tokenizer.decode([5, token])[len(tokens._tokenizer.decode([5])) :] for token in range(VOCABULARY)]
    found = allowed_tokens(tokens, {"enum": ["dog", "fox", "x"]}, after_x(tokens, '"'))
    beginnings = {text[:end] for text in ('dog"', 'fox"', 'x"') for end in range(1, len(text) + 1)}
    assert {texts[token] for token in found} == beginnings & set(texts)


@pytest.mark.parametrize("kind", ["smollm", "sentencepiece"])
def test_a_character_may_come_byte_by_byte(kind: str) -> None:
    tokens = tokenizer(kind)
    answer = after_x(tokens, '"日"')
    assert len(answer) == 5
    assert allowed_tokens(tokens, {"const": "日"}, answer) == tokens.stop_tokens


def test_control_tokens_and_padding_never_come_inside() -> None:
    tokens = tokenizer()
    quote = tokens.encode('"', add_special=False, parse_special=False)
    found = allowed_tokens(tokens, {"type": "string"}, quote)
    assert len(found) > 250
    assert not found & set(tokens.added_tokens)
    assert max(found) < tokens.vocabulary_size


# -- answers


def test_the_grammars_end_is_the_answers_end(model: LoadedModel) -> None:
    answer = generate(model, "Hi", json_schema=COLOURS, seed=4, **WILD)
    assert answer.finish_reason == "stop"
    assert set(json.loads(answer.text)) <= {"red", "blue"}


def test_max_tokens_cuts_the_answer(model: LoadedModel) -> None:
    answer = generate(model, "Hi", json_schema=COLOURS, max_tokens=3, **WILD)
    assert (answer.finish_reason, len(answer.tokens)) == ("length", 3)


@pytest.mark.parametrize("grammar", ['root ::= ("red" | "blue"){2}', 'start: COLOUR~2\nCOLOUR: "red" | "blue"'])
def test_llama_cpps_and_larks_notation(model: LoadedModel, grammar: str) -> None:
    answer = generate(model, "Hi", grammar=grammar, seed=3, **WILD)
    assert re.fullmatch("(red|blue){2}", answer.text)
    assert answer.finish_reason == "stop"


def test_a_batch_gives_what_single_calls_give(model: LoadedModel) -> None:
    options: dict[str, Any] = {"json_schema": COLOURS, "seed": 5, "max_tokens": 60, **WILD}
    batch = generate(model, ["Hi", "The dog", "A"], **options)
    assert [answer.text for answer in batch] == [
        generate(model, text, **options).text for text in ("Hi", "The dog", "A")
    ]


def test_every_answer_of_a_chat_follows_the_grammar(model: LoadedModel) -> None:
    chat = Chat(model, grammar='root ::= "dog" | "fox"', **WILD)
    assert [chat.ask("Hi").finish().text in ("dog", "fox") for _ in range(3)] == [True] * 3


def test_a_regular_expression(model: LoadedModel) -> None:
    grammar = compile_grammar(model, regex="[ab]{2,3}c")
    assert grammar is not None
    constraint = grammar.constraint()
    for token in model.tokenizer.encode("abc", add_special=False, parse_special=False):
        assert constraint.mask()[token] == 0
        constraint.accept(token)
    assert set(np.flatnonzero(constraint.mask() == 0)) == model.tokenizer.stop_tokens


def test_nothing_given_is_no_grammar(model: LoadedModel) -> None:
    assert compile_grammar(model) is None


# -- refusals


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"json_schema": {"not": {}}}, "not"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"json_schema": {"type": "string", "format": "fancy"}}, "fancy"),
        ({"json_schema": {"minimum": 2, "maximum": 1, "type": "integer"}}, "Unsatisfiable"),
        ({"json_schema": {"$ref": "http://127.0.0.1/schema"}}, "does not fetch"),
        ({"json_schema": {"$ref": "#/$defs/none"}}, "none"),
        ({"json_schema": {"x-guidance": {"lenient": True}, "not": {}}}, "not"),
        ({"json_schema": {"const": object()}}, "serializable"),
        ({"json_schema": [1]}, "a JSON schema is a JSON object"),
        ({"grammar": "root ::= ("}, "Expected"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": 5}, "a grammar is a text"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": 5}, "a regular expression is a text"),
        ({"regex": "a", "grammar": "b"}, "an answer follows one grammar"),
    ],
)
def test_what_cannot_be_held_is_refused_with_the_reason(model: LoadedModel, rules: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRequestError, match=re.escape(reason)) as caught:
        compile_grammar(model, **rules)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_nesting_without_end_is_refused(model: LoadedModel) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(BadRequestError):
        compile_grammar(model, json_schema=schema)


def test_a_pattern_that_becomes_too_complex_ends_the_answer_with_an_error(model: LoadedModel) -> None:
    bias = {model.tokenizer.encode("a", add_special=False, parse_special=False)[0]: 100}
    with pytest.raises(BadRequestError, match="too many"):
        generate(model, "Hi", json_schema={"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}, logit_bias=bias)
    assert generate(model, "Hi", json_schema=COLOURS, **WILD).finish_reason == "stop"  # others go on


def test_without_llguidance_one_line_names_the_extra(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"pip install llguidance"):
        generate(model, "Hi", json_schema=JSON_OBJECT)


def test_a_model_without_a_stop_token_is_refused() -> None:
    keys = metadata(eos_token_id=None)
    tokens = Tokenizer(keys)
    tokens.stop_tokens = frozenset()
    with pytest.raises(BadRequestError, match="no stop token"):
        Grammar(tokens, VOCABULARY, json_schema_source(JSON_OBJECT))


def test_a_vocabulary_that_llguidance_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokenizer()
    monkeypatch.setattr(tokens, "as_json", lambda: "{}")
    with pytest.raises(DamagedFileError, match="llguidance cannot read"):
        Grammar(tokens, VOCABULARY, json_schema_source(JSON_OBJECT))
