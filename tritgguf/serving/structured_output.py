"""What form an answer must have: by `response_format`, `json_schema`, `grammar`, or because it must call a tool."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tritgguf.generation.chat_format import ChatFormat
from tritgguf.generation.grammar import JSON_OBJECT, Grammar, compile_grammar
from tritgguf.generation.tool_grammar import tool_grammar
from tritgguf.serving.errors import bad_request
from tritgguf.serving.protocol import ChatBody, CompletionBody, ResponseFormat
from tritgguf.serving.tool_choice import ToolChoice

if TYPE_CHECKING:
    from tritgguf.generation.loaded_model import LoadedModel

_MOST_GRAMMARS = 32


class Grammars:
    """Compiles grammars, and keeps those that were used last: programs ask for the same form again and again."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._kept: OrderedDict[str, Grammar | None] = OrderedDict()
        self._lock = threading.Lock()  # requests are prepared in several threads

    def of_request(self, body: ChatBody | CompletionBody) -> Grammar | None:
        """Return the grammar that a request asks for; None for any text.

        Raises ApiError for more than one, and BadRequestError for one that cannot be held, with the reason.
        """
        name = _given(body)
        if name is None:
            return None
        if name == "grammar":
            return self._compiled(name, lambda: compile_grammar(self._model, grammar=body.grammar), body.grammar)
        schema = _schema_of_format(body.response_format) if name == "response_format" else body.json_schema
        return self._compiled("json_schema", lambda: compile_grammar(self._model, json_schema=schema), schema)

    def of_calls(self, body: ChatBody, choice: ToolChoice, written: ChatFormat, *, in_thoughts: bool) -> Grammar | None:
        """Return the grammar of an answer that has to call tools; raises as `of_request` does."""
        if (name := _given(body)) is not None:
            raise bad_request(f"an answer has one form: {name} cannot be had with a tool that must be called", name)

        def compile_calls() -> Grammar:
            return tool_grammar(self._model, written, choice.tools, parallel=choice.several, in_thoughts=in_thoughts)

        return self._compiled("tools", compile_calls, [choice.tools, choice.several, in_thoughts])

    def _compiled(self, kind: str, compile_source: Callable[[], Grammar | None], source: Any) -> Grammar | None:
        key = kind + json.dumps(source)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        compiled = compile_source()
        with self._lock:
            self._kept[key] = compiled
            if len(self._kept) > _MOST_GRAMMARS:
                self._kept.popitem(last=False)
        return compiled


def _given(body: ChatBody | CompletionBody) -> str | None:
    """Return the parameter that gives the form of the answer; None for none."""
    given = {
        "response_format": _schema_of_format(body.response_format),
        "json_schema": body.json_schema,
        "grammar": body.grammar or None,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise bad_request(f"an answer has one form: give either {' or '.join(names)}", names[0])
    return names[0] if names else None


def _schema_of_format(response_format: ResponseFormat | None) -> Any:
    if response_format is None or response_format.type == "text":
        return None
    named = response_format.json_schema
    schema = response_format.schema_ if named is None else named.schema_
    if response_format.type == "json_object":
        return JSON_OBJECT if schema is None else schema
    if schema is None:
        raise bad_request("response_format of type json_schema needs json_schema.schema", "response_format")
    return schema
