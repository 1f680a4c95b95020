"""The process that renders chat templates: it reads requests and writes answers, a line of JSON each.

`template_process` starts it; it ends when its input ends. A request has the arguments of `chat_template.render` and
`seconds`, the time limit. An answer has one of

    text: the prompt,
    refused: the message with which the template rejects the chat,
    failed: the error in the template,
    memory: true, if it exceeded the memory limit;

and `last`: whether the process ends after this failure and must be replaced.

This module imports as little as possible, because the first prompt waits for it.
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

from tritgguf.tokenization.template_limits import (
    MOST_CHARACTERS,
    BoundedEnvironment,
    TemplateTimeoutError,
    resource_limits,
)


class _RefusedError(TemplateError):
    """The template called `raise_exception`."""


class _GenerationTag(Extension):
    """Renders the content of `{% generation %}` blocks, which mark answers for training."""

    tags = {"generation"}  # noqa: RUF012 (declared so in the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which may continue
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
        with resource_limits(seconds):  # includes compiling, because Jinja evaluates constants then
            text = _compile(template).render({"tools": None, "documents": None, **values})
        if len(text) > MOST_CHARACTERS:
            raise TemplateError(f"it makes a text of more than {MOST_CHARACTERS} characters")
        return {"text": text, "last": False}
    except MemoryError:
        return {"memory": True, "last": True}
    except Exception as error:  # a template is untrusted code: any exception is possible
        field = "refused" if isinstance(error, _RefusedError) else "failed"
        reason = " ".join(str(error).split()) or type(error).__name__
        return {field: reason, "last": isinstance(error, TemplateTimeoutError)}


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
    """Convert to JSON without HTML escapes, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
