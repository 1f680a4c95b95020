"""A chat to a prompt, with the Jinja template that the model's file carries.

Two things are untrusted here. The template comes with the file, so it runs in Jinja's sandbox, with bounds on time
and memory (`template_limits`). And what a user types must not become control tokens: `<|im_end|>` in a
message is text that talks about a token, not the end of a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, TypedDict

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from tritgguf.errors import TritGgufError
from tritgguf.tokenization.template_limits import MOST_CHARACTERS, BoundedEnvironment, limited
from tritgguf.tokenization.tokenizer import Tokenizer

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class Message(TypedDict):
    """One turn of a chat; `role` is system, user or assistant."""

    role: str
    content: str


class _GenerationTag(Extension):
    """Lets `{% generation %}`, which marks the answers for training, stand for what it contains."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
) -> str:
    """Return the prompt that a template makes of a chat, as transformers' `apply_chat_template` renders it.

    Raises TritGgufError with the template's own message when it refuses the chat, or with what is wrong with
    it.
    """
    try:
        with limited():  # compiling too: Jinja computes constants then
            text = _compile(template).render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                bos_token=bos_token,
                eos_token=eos_token,
                add_generation_prompt=add_generation_prompt,
            )
        if len(text) > MOST_CHARACTERS:
            raise TemplateError(f"it makes a text of more than {MOST_CHARACTERS} characters")
        return text
    except MemoryError as error:
        raise TritGgufError(
            "the chat template takes too much memory; --raw gives the model your text as it is"
        ) from error
    except Exception as error:  # a template is a program of somebody else: anything may come
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TritGgufError(f"the chat template fails ({reason}); --raw gives the model your text as it is") from error


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
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Return a chat's tokens; only the template's own text becomes control tokens, never that of a message.

    Starts with bos where the model wants it. Raises TritGgufError as `render` does.
    """
    control = _control_pattern(tokenizer)
    shield = _shield(tokenizer, template, messages) if control else {}
    shielded: list[Message] = [
        {"role": message["role"], "content": _replace_all(message["content"], shield)} for message in messages
    ]
    text = render(
        template,
        shielded if shield else messages,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        add_generation_prompt=add_generation_prompt,
    )
    if not control or not shield:
        return tokenizer.encode(text, add_special=True, parse_special=True)
    unshield = {mark: token_text for token_text, mark in shield.items()}
    tokens: list[int] = []
    for segment in _segments(text, control, unshield):
        plain = _replace_all(segment, unshield)
        tokens += tokenizer.encode(plain, add_special=False, parse_special=plain == segment)
    return tokenizer.with_bos(tokens)


def _control_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern that matches the control tokens, with the white space that they take in."""
    parts = []
    for token in sorted(tokenizer.added_tokens.values(), key=lambda token: -len(token.content)):
        if token.special and token.content:
            left, right = r"\s*" * token.lstrip, r"\s*" * token.rstrip
            parts.append(left + re.escape(token.content) + right)
    return re.compile("|".join(parts)) if parts else None


def _shield(tokenizer: Tokenizer, template: str, messages: Sequence[Message]) -> dict[str, str]:
    """Return a private character for each control token that a message spells out, longest token first.

    Templates look at their messages' contents (trim, split, search), so these are rendered as they are but
    for the control tokens in them, for which a character stands that occurs nowhere else.
    """
    contents = "\0".join(message["content"] for message in messages)
    spelled = [text for text in sorted(tokenizer.control_texts, key=len, reverse=True) if text in contents]
    if not spelled:
        return {}
    used = set(contents) | set(template)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return {token_text: next(free) for token_text in spelled}


def _segments(text: str, control: re.Pattern[str], marks: dict[str, str]) -> Iterator[str]:
    """Cut a rendered prompt between control tokens so that marked text lies in segments without any.

    A tokenizer splits at control tokens before all else, so the tokens are those of the uncut text. (Except
    that one that puts a space in front of a text's first word alone also puts it in front of a marked
    segment.)
    """
    start = end = 0
    for match in [*control.finditer(text), None]:
        border = match.start() if match else len(text)
        if any(mark in text[end:border] for mark in marks):
            if start < end:
                yield text[start:end]
            yield text[end:border]
            start = border
        end = match.end() if match else border
    if start < end:
        yield text[start:]


def _replace_all(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text
