"""From messages and texts to the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.generation.loaded_model import LoadedModel

if TYPE_CHECKING:
    from tritgguf.tokenization.chat_template import Message


def prompt_tokens(
    model: LoadedModel,
    prompt: str | None,
    *,
    messages: Sequence[Message] | None = None,
    system: str | None = None,
    raw: bool = False,
) -> list[int]:
    """Return the tokens of a prompt or of a chat; the parameters are those of `generate`."""
    if messages is not None:
        if prompt is not None or system is not None or raw:
            raise BadRequestError("messages hold the whole chat: give neither a prompt, nor a system message, nor raw")
        return chat_tokens(model, messages)
    if prompt is None:
        raise BadRequestError("there is nothing to generate from; give a prompt or messages")
    if raw and system is not None:
        raise BadRequestError("raw takes the prompt as it is; leave the system message out or write it into the prompt")
    if raw:
        return model.tokenizer.encode(prompt, add_special=True, parse_special=True)
    return chat_tokens(model, [*system_message(system), {"role": "user", "content": prompt}])


def system_message(system: str | None) -> list[Message]:
    """Return the beginning of a chat: the system message, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


def chat_tokens(model: LoadedModel, messages: Sequence[Message]) -> list[int]:
    """Return the prompt of a chat's next answer; TritGgufError for what is no chat, or without a chat template."""
    for message in messages if isinstance(messages, Sequence) else [messages]:
        if not is_message(message):
            raise BadRequestError(f'a message is {{"role": ..., "content": ...}}, two texts, not {message!r:.60}')
    if model.chat_template is None:
        raise BadRequestError(
            f"{model.path} has no chat template, it may be a base model; continue a text as it is (--raw, raw=True)"
        )
    from tritgguf.tokenization.chat_template import encode_chat

    try:
        return encode_chat(model.tokenizer, model.chat_template, messages)
    except TritGgufError as error:
        raise type(error)(f"{model.path}: {error}") from error


def is_message(value: Any) -> bool:
    """Tell whether a value is a message: a role and a content, both texts."""
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))
