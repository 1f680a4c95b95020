"""From a prompt to a text, or from several to several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from tritgguf.errors import BadRequestError
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.generation.prompt import prompt_tokens
from tritgguf.generation.result import Generation
from tritgguf.generation.sampling import Sampler, SamplingOptions, sampling_options
from tritgguf.generation.text_stream import UNLIMITED, TextStream

if TYPE_CHECKING:
    from tritgguf.tokenization.chat_template import Message

Prompt: TypeAlias = "str | Sequence[Message]"


@overload
def generate(
    model: LoadedModel | str | Path, prompt: Prompt, *, stream: Literal[True], **options: Any
) -> TextStream: ...


@overload
def generate(
    model: LoadedModel | str | Path, prompt: Prompt | None = None, *, stream: Literal[False] = False, **options: Any
) -> Generation: ...


@overload
def generate(
    model: LoadedModel | str | Path, prompt: Sequence[str], *, stream: Literal[False] = False, **options: Any
) -> list[Generation]: ...


def generate(
    model: LoadedModel | str | Path,
    prompt: Prompt | Sequence[Prompt] | None = None,
    *,
    messages: Sequence[Message] | None = None,
    system: str | None = None,
    raw: bool = False,
    max_tokens: int = UNLIMITED,
    stop: str | Sequence[str] = (),
    stream: bool = False,
    sampling: SamplingOptions | None = None,
    on_text: Callable[[str], None] | None = None,
    **options: Any,
) -> Generation | list[Generation] | TextStream:
    """Answer a prompt, continue a chat, or answer many prompts at once.

    Args:
        model: a loaded model, or the path of its file.
        prompt: a user's message; or a whole chat, a list of {"role": ..., "content": ...}; or a list of either, which
            are answered side by side, each as if it were alone.
        messages: a whole chat, as another name for `prompt`.
        system: a system message before the prompt.
        raw: continue the prompt as it is, without the chat template, control tokens in it included.
        max_tokens: how many tokens to generate at most; -1 goes on until the model stops or the context is full.
        stop: a text or several that end the answer; they are not part of it.
        stream: return an iterator over pieces of text, whose `result` is the generation.
        sampling: how tokens are chosen.
        on_text: receives each piece of text as it comes.
        **options: fields of `SamplingOptions`, such as temperature=0; they go before `sampling`.

    Returns:
        A `Generation`; for a list of prompts, a list of them in the same order; with `stream`, a `TextStream`.

    Raises:
        TritGgufError: a prompt longer than the context, no chat template in the file, impossible options.

    """
    if isinstance(model, str | Path):
        model = load(model)
    if not isinstance(model, LoadedModel):
        raise BadRequestError(f"generate needs a loaded model or the path of its file, not {model!r}")
    prompts, is_batch = _prompts(prompt, messages)
    if is_batch and (stream or on_text is not None):
        raise BadRequestError("only a single prompt can be streamed; give one, or leave stream and on_text out")
    stops, chosen = [stop] if isinstance(stop, str) else list(stop), sampling_options(sampling, options)
    tokens = [prompt_tokens(model, text, messages=chat, system=system, raw=raw) for text, chat in prompts]
    streams = [
        TextStream(model, ids, Sampler(chosen), max_tokens=max_tokens, stop=stops, continues_prompt=raw)
        for ids in tokens
    ]
    if is_batch:
        return [one.finish() for one in streams]
    return streams[0] if stream else streams[0].finish(on_text)


def _prompts(
    prompt: Prompt | Sequence[Prompt] | None, messages: Sequence[Message] | None
) -> tuple[list[tuple[str | None, Sequence[Message] | None]], bool]:
    """Return each prompt as a text or as the messages of a chat, and whether they are a batch."""
    if prompt is None or isinstance(prompt, str):
        return [(prompt, messages)], False
    parts: list[Any] = list(prompt) if isinstance(prompt, Sequence) else []
    if parts and all(isinstance(part, str) for part in parts):
        return [(part, messages) for part in parts], True
    if parts and all(_is_message(part) for part in parts) and messages is None:
        return [(None, parts)], False
    if parts and all(isinstance(part, list | tuple) and part and all(map(_is_message, part)) for part in parts):
        return [(None, list(part)) for part in parts], True
    raise BadRequestError(
        f"a prompt is a text, a list of messages, or a list of either, not {prompt!r:.60};"
        ' a message is {"role": ..., "content": ...}'
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value
