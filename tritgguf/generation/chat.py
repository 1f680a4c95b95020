"""A conversation that remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritgguf.generation.grammar import compile_grammar
from tritgguf.generation.loaded_model import LoadedModel, loaded
from tritgguf.generation.prompt import chat_tokens, system_message
from tritgguf.generation.result import Generation
from tritgguf.generation.sampling import Sampler, SamplingKeywords, SamplingOptions, sampling_options
from tritgguf.generation.stop_strings import stop_list
from tritgguf.generation.text_stream import UNLIMITED, TextStream

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of `typing` from Python 3.11 on

    from tritgguf.tokenization.chat_template import Message


class Chat:
    """A conversation; each answer sees everything said before.

        chat = tritgguf.Chat(model, system="You are brief.")
        for piece in chat.ask("Name a colour."):
            print(piece, end="")
        print(chat.ask("Another one?").finish().text)

    Attributes:
        messages: the history. An answer joins it when its stream ends, whole or as far as it came.

    """

    def __init__(
        self,
        model: LoadedModel | str | Path,
        *,
        system: str | None = None,
        max_tokens: int = UNLIMITED,
        stop: str | Sequence[str] = (),
        json_schema: Mapping[str, Any] | None = None,
        grammar: str | None = None,
        sampling: SamplingOptions | None = None,
        **options: Unpack[SamplingKeywords],
    ) -> None:
        """Begin a chat.

        Args:
            model: a loaded model, which several chats may use at once, or the path of its file.
            system: a system message before everything else.
            max_tokens: as in `generate`, for each answer.
            stop: as in `generate`.
            json_schema: as in `generate`, for each answer.
            grammar: as in `generate`, for each answer.
            sampling: as in `generate`.
            **options: as in `generate`.

        Raises:
            TritGgufError: impossible or unknown options, a schema or grammar that cannot be held.

        """
        self._model = loaded(model)
        self._sampler = Sampler(sampling_options(sampling, options))
        self._rules = compile_grammar(self._model, json_schema=json_schema, grammar=grammar)
        self._max_tokens = max_tokens
        self._stop = stop_list(stop)
        self._start = system_message(system)
        self._stream: TextStream | None = None
        self.messages: list[Message] = list(self._start)

    def clear(self) -> None:
        """Forget everything but the system message."""
        self._end_answer()
        self.messages = list(self._start)

    def ask(self, text: str) -> TextStream:
        """Return the stream that answers a message. It ends the answer before, if that has not ended.

        Raises TritGgufError, and leaves the history as it was, when there is no room for the message.
        """
        self._end_answer()
        question: Message = {"role": "user", "content": text}
        tokens = chat_tokens(self._model, [*self.messages, question])
        if self._rules is not None:
            self._sampler.constraint = self._rules.constraint()
        self._stream = TextStream(
            self._model, tokens, self._sampler, max_tokens=self._max_tokens, stop=self._stop, on_end=self._remember
        )
        self.messages.append(question)
        return self._stream

    def _end_answer(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _remember(self, answer: Generation) -> None:
        self._stream = None
        self.messages.append({"role": "assistant", "content": answer.text})
