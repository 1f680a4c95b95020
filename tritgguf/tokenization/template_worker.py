"""The process that renders chat templates: it reads requests and writes answers, a line of JSON each.

It is started by `template_process`, does nothing else, and ends with its input. A request has the arguments of
`chat_template.render` and `seconds`, the time that it may take. An answer has one of

    text: the prompt,
    refused: why the template does not want this chat, in its own words,
    failed: what is wrong with the template,
    memory: true, when it takes too much;

and `last`: whether the process ends now, because after such a failure a fresh one is better.

This module imports as little as it can: the first prompt waits for it.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from tritgguf.tokenization.template_limits import MOST_CHARACTERS, BoundedEnvironment, TakesTooLongError, limited


class _RefusedError(TemplateError):
    """The template has called `raise_exception`."""


class _GenerationTag(Extension):
    """Lets `{% generation %}`, which marks the answers for training, stand for what it contains."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program in front, which may go on
    for line in iter(sys.stdin.buffer.readline, b""):
        reply = answer(json.loads(line))
        sys.stdout.buffer.write(json.dumps(reply).encode("ascii") + b"\n")
        sys.stdout.buffer.flush()
        if reply["last"]:
            break


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    values = dict(request)
    template, seconds = values.pop("template"), values.pop("seconds")
    try:
        with limited(seconds):  # compiling too: Jinja computes constants then
            text = _compile(template).render(tools=None, documents=None, **values)
        if len(text) > MOST_CHARACTERS:
            raise TemplateError(f"it makes a text of more than {MOST_CHARACTERS} characters")
        return {"text": text, "last": False}
    except MemoryError:
        return {"memory": True, "last": True}
    except Exception as error:  # a template is a program of somebody else: anything may come
        kind = "refused" if isinstance(error, _RefusedError) else "failed"
        reason = " ".join(str(error).split()) or type(error).__name__
        return {kind: reason, "last": isinstance(error, TakesTooLongError)}


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Replace Jinja's filter, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
