"""From a prompt to a text: loading a model, one generation as a stream, and a chat that remembers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tritgguf.runtime.generation import Generation
from tritgguf.runtime.loaded_model import LoadedModel
from tritgguf.runtime.prompt import prompt_tokens
from tritgguf.runtime.sampling import Sampler, SamplingOptions
from tritgguf.runtime.text_stream import UNLIMITED, TextStream

if TYPE_CHECKING:
    from tritgguf.tokenization.chat_template import Message


def generate(
    model: LoadedModel,
    prompt: str | None = None,
    *,
    messages: Sequence[Message] | None = None,
    system: str | None = None,
    raw: bool = False,
    max_tokens: int = UNLIMITED,
    sampling: SamplingOptions | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Answer a prompt, or continue a chat.

    Give either `prompt`, one user message with an optional `system` message before it, or `messages`, a whole
    chat: a list of {"role": ..., "content": ...}. The model's chat template applies, unless `raw`, which
    continues `prompt` as it is, control tokens in it included. `max_tokens` -1 goes on until the model stops
    or the context is full. `on_text` receives each piece of text as it comes.

    Raises TritGgufError: prompt longer than the context, no chat template in the file, impossible sampling
    options.
    """
    tokens = prompt_tokens(model, prompt, messages=messages, system=system, raw=raw)
    stream = TextStream(
        model, tokens, Sampler(sampling or SamplingOptions()), max_tokens=max_tokens, continues_prompt=raw
    )
    return stream.finish(on_text)
