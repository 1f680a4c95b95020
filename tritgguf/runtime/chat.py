"""A conversation that remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tritgguf.runtime.generation import Generation
from tritgguf.runtime.loaded_model import LoadedModel
from tritgguf.runtime.prompt import chat_tokens, system_message
from tritgguf.runtime.sampling import Sampler, SamplingOptions
from tritgguf.runtime.text_stream import UNLIMITED, TextStream

if TYPE_CHECKING:
    from tritgguf.tokenization.chat_template import Message


class Chat:
    """A conversation; each answer sees everything said before.

    `messages` is the history: the answers are what was streamed, whole or as far as it came.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        system: str | None = None,
        sampling: SamplingOptions | None = None,
        max_tokens: int = UNLIMITED,
    ) -> None:
        self._model = model
        self._sampler = Sampler(sampling or SamplingOptions())
        self._max_tokens = max_tokens
        self._start = system_message(system)
        self.messages: list[Message] = list(self._start)

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._start)

    def ask(self, text: str) -> TextStream:
        """Return the stream that answers a message; `keep` its result when it ends, however it ends.

        Raises TritGgufError, and leaves the history as it was, when there is no room for the message.
        """
        tokens = chat_tokens(self._model, [*self.messages, {"role": "user", "content": text}])
        stream = TextStream(self._model, tokens, self._sampler, max_tokens=self._max_tokens)
        self.messages.append({"role": "user", "content": text})
        return stream

    def keep(self, answer: Generation) -> None:
        """Add an answer to the history."""
        self.messages.append({"role": "assistant", "content": answer.text})
