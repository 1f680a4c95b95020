"""From messages and texts to the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.generation.chat_messages import checked_messages, checked_tools, with_thinking, with_tools_as_text
from tritgguf.generation.prompt_format import PromptFormat

if TYPE_CHECKING:
    from tritgguf.tokenization.chat_template import Message


def prompt_tokens(
    model: PromptFormat,
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


def chat_tokens(
    model: PromptFormat,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the prompt of a chat's next answer.

    Args:
        model: what answers.
        messages: the chat, in the form of OpenAI's API: contents are texts, None or lists of text parts; answers may
            have `tool_calls`, and their results come in messages of the role `tool`.
        tools: functions that the answer may call, in that form too. A template that does not know tools gets them
            described in the system message.
        template_options: more variables for the template, such as `enable_thinking`.

    Raises:
        TritGgufError: what is no chat, a content that is no text, or a model without a chat template.

    """
    chat, functions = checked_messages(messages), checked_tools(tools)
    if not isinstance(template_options, Mapping | None):
        raise BadRequestError(f"options of the chat template are given by name, not as {template_options!r:.60}")
    if model.chat_template is None:
        raise BadRequestError(
            f"{model.path} has no chat template, it may be a base model; continue a text as it is (--raw, raw=True)"
        )
    from tritgguf.tokenization.chat_template import encode_chat

    template = model.chat_template
    if "developer" not in template:
        chat = [{**message, "role": "system"} if message["role"] == "developer" else message for message in chat]
    if ".thinking" in template and "reasoning_content" not in template:
        chat = with_thinking(chat)
    if "tools" not in template:
        chat, functions = with_tools_as_text(chat, functions), []
    try:
        return encode_chat(model.tokenizer, template, chat, tools=functions or None, options=template_options)
    except TritGgufError as error:
        raise type(error)(f"{model.path}: {error}") from error
