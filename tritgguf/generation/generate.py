"""From a prompt to a text, or from several to several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from tritgguf.errors import BadRequestError
from tritgguf.generation.grammar import compile_grammar
from tritgguf.generation.loaded_model import LoadedModel, loaded
from tritgguf.generation.prompt import prompt_tokens
from tritgguf.generation.result import Generation
from tritgguf.generation.sampling import Sampler, SamplingKeywords, SamplingOptions, sampling_options
from tritgguf.generation.stop_strings import stop_list
from tritgguf.generation.text_stream import UNLIMITED, TextStream

Prompt: TypeAlias = "str | Sequence[Message]"

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of `typing` from Python 3.11 on

    from tritgguf.tokenization.chat_template import Message

    class _Keywords(SamplingKeywords, total=False):
        system: str | None
        raw: bool
        max_tokens: int | None
        stop: str | Sequence[str] | None
        json_schema: Mapping[str, Any] | None
        grammar: str | None
        sampling: SamplingOptions | None

    class _KeywordsOfOne(_Keywords, total=False):
        messages: Sequence[Message] | None


@overload
def generate(
    model: LoadedModel | str | Path,
    prompt: Prompt | None = None,
    *,
    stream: Literal[True],
    **options: Unpack[_KeywordsOfOne],
) -> TextStream: ...


@overload
def generate(  # type: ignore[overload-overlap]  # a text is a Sequence[str] too; it is taken for a text
    model: LoadedModel | str | Path,
    prompt: Prompt | None = None,
    *,
    stream: Literal[False] = False,
    on_text: Callable[[str], None] | None = None,
    **options: Unpack[_KeywordsOfOne],
) -> Generation: ...


@overload
def generate(
    model: LoadedModel | str | Path,
    prompt: Sequence[Prompt],
    *,
    stream: Literal[False] = False,
    **options: Unpack[_Keywords],
) -> list[Generation]: ...


def generate(
    model: LoadedModel | str | Path,
    prompt: Prompt | Sequence[Prompt] | None = None,
    *,
    messages: Sequence[Message] | None = None,
    system: str | None = None,
    raw: bool = False,
    max_tokens: int | None = UNLIMITED,
    stop: str | Sequence[str] | None = (),
    json_schema: Mapping[str, Any] | None = None,
    grammar: str | None = None,
    stream: bool = False,
    sampling: SamplingOptions | None = None,
    on_text: Callable[[str], None] | None = None,
    **options: Unpack[SamplingKeywords],
) -> Generation | list[Generation] | TextStream:
    """Answer a prompt, continue a chat, or answer many prompts at once.

    Args:
        model: a loaded model, or the path of its file, which is then loaded for this call.
        prompt: a user's message; or a whole chat, a list of {"role": ..., "content": ...}; or a list of either, which
            are answered side by side, each as if it were alone.
        messages: a whole chat, another name for `prompt`.
        system: a system message before the prompt.
        raw: continue the prompt as it is, without the chat template, control tokens in it included.
        max_tokens: how many tokens to generate at most; -1 goes on until the model stops or the context is full.
        stop: a text or several that end the answer; they are not part of it. The first that is complete counts.
        json_schema: a JSON schema that the answer follows; {"type": "object"} for any JSON object.
        grammar: a grammar that the answer follows, in Lark's notation or llama.cpp's (docs/structured_output.md).
        stream: return an iterator over pieces of text, whose `result` is the generation.
        sampling: how tokens are chosen.
        on_text: receives each piece of text as it comes.
        **options: fields of `SamplingOptions`, such as temperature=0; they go before `sampling`.

    Returns:
        A `Generation`; for a list of prompts, a list of them in the same order; with `stream`, a `TextStream`.

    Raises:
        TritGgufError: a prompt longer than the context, no chat template in the file, impossible options, a schema or
            grammar that cannot be held.

    """
    model = loaded(model)
    prompts, is_batch = _prompts(prompt, messages)
    if is_batch and (stream or on_text is not None):
        raise BadRequestError("only a single prompt can be streamed; give one, or leave stream and on_text out")
    if stream and on_text is not None:
        raise BadRequestError("a stream is iterated over; leave stream or on_text out")
    stops, chosen = stop_list(stop), sampling_options(sampling, options)
    tokens = [prompt_tokens(model, text, messages=chat, system=system, raw=raw) for text, chat in prompts]

    rules = compile_grammar(model, json_schema=json_schema, grammar=grammar)

    def start(ids: list[int]) -> TextStream:
        sampler = Sampler(chosen, constraint=None if rules is None else rules.constraint())
        return TextStream(model, ids, sampler, max_tokens=max_tokens, stop=stops, continues_prompt=raw)

    if is_batch:
        return _finish_all(map(start, tokens))
    return start(tokens[0]) if stream else start(tokens[0]).finish(on_text)


def _finish_all(streams: Iterable[TextStream]) -> list[Generation]:
    """Start all, then generate all; end them when one fails or Ctrl-C comes, because nobody waits for the others."""
    started = list[TextStream]()
    try:
        for stream in streams:
            started.append(stream)
        return [stream.finish() for stream in started]
    finally:
        for stream in started:
            stream.close()


def _prompts(
    prompt: Prompt | Sequence[Prompt] | None, messages: Sequence[Message] | None
) -> tuple[list[tuple[str | None, Sequence[Message] | None]], bool]:
    """Return each prompt as a text or as the messages of a chat, and whether they are a batch."""
    if prompt is None or isinstance(prompt, str):
        return [(prompt, messages)], False
    parts: list[Any] = list(prompt) if isinstance(prompt, Sequence) else []
    if messages is not None:
        raise BadRequestError("messages hold the whole chat; give either a prompt or messages")
    if parts and all(_is_message(part) for part in parts):
        return [(None, parts)], False
    if parts and all(isinstance(part, str) or _is_chat(part) for part in parts):
        return [(part, None) if isinstance(part, str) else (None, list(part)) for part in parts], True
    raise BadRequestError(
        f"a prompt is a text, a list of messages, or a list of either, not {prompt!r:.60};"
        ' a message is {"role": ..., "content": ...}'
    )


def _is_chat(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value
