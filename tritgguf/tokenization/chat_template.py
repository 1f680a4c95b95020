"""Conversion of a chat into prompt tokens with the Jinja template of the model's file.

Two inputs are untrusted. The template comes with the file, so it runs in Jinja's sandbox in a separate process, with
limits on time and memory (`template_process`). And text in a message must not become control tokens: `<|im_end|>` in a
message is plain text, not the end of a turn. The same goes for tools, their arguments and results.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from tritgguf.tokenization.template_process import render_in_child

if TYPE_CHECKING:
    from tritgguf.tokenization.tokenizer import Tokenizer

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class Message(TypedDict):
    """One turn of a chat; `role` is system, user or assistant. Messages with tools have more fields."""

    role: str
    content: str


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Return the prompt of a chat, as transformers' `apply_chat_template` renders it; `options` are more variables.

    Raises BadRequestError with the template's own message if it rejects the chat, and DamagedFileError if the template
    is invalid.
    """
    values: dict[str, Any] = {
        **(options or {}),
        "tools": tools,
        "messages": [dict(message) for message in messages],
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
    }
    return render_in_child(template, values)


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return a chat's tokens. Control tokens come only from the template's text, never from a message or a tool.

    The tokens start with bos if the model uses it. Raises TritGgufError as `render` does.
    """
    control = _control_pattern(tokenizer)
    shield = _shield(tokenizer, template, [messages, tools, options]) if control else {}
    text = render(
        template,
        _shielded(messages, shield),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        add_generation_prompt=add_generation_prompt,
        tools=_shielded(tools, shield),
        options=_shielded(options, shield),
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
    """Return a pattern for the control tokens, with the white space that they strip; None if there are none."""
    parts = []
    for token in sorted(tokenizer.added_tokens.values(), key=lambda token: -len(token.content)):
        if token.special and token.content:
            left, right = r"\s*" * token.lstrip, r"\s*" * token.rstrip
            parts.append(left + re.escape(token.content) + right)
    return re.compile("|".join(parts)) if parts else None


def _shield(tokenizer: Tokenizer, template: str, values: Any) -> dict[str, str]:
    """Return a private-use character for each control token that occurs in the values, longest token first.

    Templates process message contents (trim, split, search), so only the control tokens in them are replaced, each by a
    character that occurs nowhere else.
    """
    contents = "\0".join(_texts(values))
    occurring = [text for text in sorted(tokenizer.control_texts, key=len, reverse=True) if text in contents]
    if not occurring:
        return {}
    used = set(contents) | set(template)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return {token_text: next(free) for token_text in occurring}


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value that JSON can hold."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _shielded(value: Any, shield: dict[str, str]) -> Any:
    """Return the value with marks in place of control tokens."""
    if not shield:
        return value
    if isinstance(value, str):
        return _replace_all(value, shield)
    if isinstance(value, Mapping):
        return {_shielded(key, shield): _shielded(part, shield) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_shielded(part, shield) for part in value]
    return value


def _segments(text: str, control: re.Pattern[str], marks: dict[str, str]) -> Iterator[str]:
    """Split a rendered prompt at control tokens, so that segments with marks contain no control tokens.

    A tokenizer splits at control tokens first, so the segments give the same tokens as the whole text. (One exception:
    a tokenizer that puts a space only before the first word of a text also puts it before a segment with marks.)
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
