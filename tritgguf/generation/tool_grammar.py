"""Grammars for answers that have to call a tool, in the model's own format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tritgguf.errors import BadRequestError
from tritgguf.generation.chat_format import ChatFormat
from tritgguf.generation.chat_messages import checked_tools
from tritgguf.generation.grammar import Grammar, check_llguidance, json_options

if TYPE_CHECKING:
    from tritgguf.generation.loaded_model import LoadedModel
    from tritgguf.tokenization.tokenizer import Tokenizer
_ANY = r"ANY: /(.|\n)*/"
_BREAK = r"BREAK: /\n{0,2}/"


def tool_grammar(
    model: LoadedModel,
    chat_format: ChatFormat,
    tools: Sequence[Mapping[str, Any]],
    *,
    name: str | None = None,
    parallel: bool = True,
    in_thoughts: bool = False,
) -> Grammar:
    """Return the grammar of an answer that calls tools, with arguments that follow their schemas.

    Args:
        model: what answers.
        chat_format: how it writes calls.
        tools: the functions, in the form of OpenAI's API.
        name: the function that has to be called; None for any of them.
        parallel: whether there may be several calls, where the format has them.
        in_thoughts: whether the prompt has begun the model's thoughts, which come before the calls.

    Raises:
        BadRequestError: no tools, none of that name, or parameters whose schema cannot be enforced.
        MissingExtraError: llguidance is not installed.

    """
    check_llguidance()
    from llguidance import LLMatcher

    functions = [tool["function"] for tool in checked_tools(tools)]
    if name is not None:
        functions = [function for function in functions if function["name"] == name]
    if not functions:
        raise BadRequestError("there is no tool to call" if name is None else f"there is no tool {name:.60} to call")
    writer = _GrammarWriter(model.tokenizer, chat_format)
    text = writer.grammar(functions, parallel=parallel and name is None, in_thoughts=in_thoughts)
    return Grammar(model.tokenizer, model.engine.model.config.vocab_size, LLMatcher.grammar_from_lark(text))


def _closed(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of arguments; a function takes none that it does not name, unless the schema says so."""
    says = {"additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}
    if "properties" not in parameters or says & parameters.keys():
        return parameters
    return {**parameters, "additionalProperties": False}


class _GrammarWriter:
    """Writes a grammar in Lark's notation for the vocabulary of a model."""

    def __init__(self, tokenizer: Tokenizer, chat_format: ChatFormat) -> None:
        self._form = chat_format
        self._tokens = {token.content: token_id for token_id, token in tokenizer.added_tokens.items()}

    def grammar(self, functions: Sequence[Mapping[str, Any]], *, parallel: bool, in_thoughts: bool) -> str:
        """Return the grammar of one call, or of several."""
        calls = self._calls(parallel)
        thoughts = self._thoughts(in_thoughts)
        start = f"thoughts{'' if in_thoughts else '?'} {calls}" if thoughts else calls
        rules = [f"start: {start}", "call: " + " | ".join(f"call_{number}" for number in range(len(functions)))]
        for number, function in enumerate(functions):
            schema = {**_closed(function.get("parameters", {"type": "object"})), "x-guidance": json_options()}
            rules.append(f"call_{number}: {self._call(function['name'], f'arguments_{number}')}")
            rules.append(f"arguments_{number}: %json {json.dumps(schema)}")
        return "\n".join([*rules, *thoughts])

    def _marker(self, text: str) -> str:
        """Return a marker as the token that it is, or as text."""
        return f"<[{self._tokens[text]}]>" if text in self._tokens else json.dumps(text)

    def _calls(self, parallel: bool) -> str:
        if self._form.tools == "mistral":
            more = '(", " call)*' if parallel else ""
            return f'{self._marker("[TOOL_CALLS]")} "[" call {more} "]"'
        if self._form.tools == "hermes":
            return 'call ("\\n" call)*' if parallel else "call"
        return "call+" if parallel and self._form.tools == "mistral-args" else "call"

    def _call(self, name: str, arguments: str) -> str:
        """Return the rule of the call of one function."""
        if self._form.tools == "mistral-args":
            return f"{self._marker('[TOOL_CALLS]')} {json.dumps(name)} {self._marker('[ARGS]')} {arguments}"
        if self._form.tools == "harmony":
            recipient = json.dumps(f"commentary to=functions.{name} ")
            parts = (self._marker(marker) for marker in ("<|channel|>", "<|constrain|>", "<|message|>"))
            return '{} {} {} "json" {} {}'.format(next(parts), recipient, *parts, arguments)
        field = "parameters" if self._form.tools == "llama" else "arguments"
        head = json.dumps(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{field}": ')
        call = f'{head} {arguments} "}}"'
        if self._form.tools != "hermes":
            return call
        return f'{self._marker("<tool_call>")} "\\n" {call} "\\n" {self._marker("</tool_call>")}'

    def _thoughts(self, in_thoughts: bool) -> list[str]:
        """Return the rules of what the model may think before it calls; none if it does not think."""
        if self._form.tools == "harmony":
            opening = f'{self._marker("<|channel|>")} "analysis" {self._marker("<|message|>")}'
            closing = f'{self._marker("<|end|>")} {self._marker("<|start|>")} "assistant"'
            return [f"thoughts: {opening} ANY {closing}", _ANY]
        if not self._form.thinks:
            return []
        opening = "" if in_thoughts else self._marker("<think>")
        if "</think>" in self._tokens:
            return [f"thoughts: {opening} ANY {self._marker('</think>')} BREAK", _ANY, _BREAK]
        return [f"thoughts: {opening} inside BREAK", r"inside[lazy]: /(.|\n)*<\/think>/", _BREAK]
