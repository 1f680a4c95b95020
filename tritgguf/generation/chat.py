"""A conversation that remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritgguf.errors import BadRequestError
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
        max_tokens: the largest length of an answer, as in `generate`.

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
        self._grammar = compile_grammar(self._model, json_schema=json_schema, grammar=grammar)
        self.max_tokens = max_tokens
        self._stop = stop_list(stop)
        self._start = system_message(system)
        self._stream: TextStream | None = None
        self.messages: list[Message] = list(self._start)

    @property
    def system(self) -> str | None:
        """The system message; None for none. A new one counts from the next message on, for the whole history."""
        return self._start[0]["content"] if self._start else None

    @system.setter
    def system(self, text: str | None) -> None:
        self._end_answer()
        said = self.messages[1:] if self.messages[:1] == self._start[:1] and self._start else self.messages
        self._start = system_message(text)
        self.messages = [*self._start, *said]

    @property
    def sampling(self) -> SamplingOptions:
        """How tokens are chosen; assign other options for the answers to come."""
        return self._sampler.options

    @sampling.setter
    def sampling(self, options: SamplingOptions) -> None:
        self._sampler = Sampler(options)

    def clear(self) -> None:
        """Forget everything but the system message."""
        self._end_answer()
        self.messages = list(self._start)

    def ask(self, text: str) -> TextStream:
        """Return the stream that answers a message. It ends the answer before, if that has not ended.

        Raises TritGgufError, and leaves the history as it was, when there is no room for the message.
        """
        self._end_answer()
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def regenerate(self) -> TextStream:
        """Return the stream of another answer to the last message, which takes the place of the one before.

        Raises BadRequestError when there is no message to answer, or as `ask`.
        """
        self._end_answer()
        answered = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        messages = self.messages[:-1] if answered else self.messages
        if not messages or messages[-1]["role"] != "user":
            raise BadRequestError("there is no message to answer again; ask something first")
        return self._answer(messages)

    def _answer(self, messages: list[Message]) -> TextStream:
        """Return the stream that answers the last of the messages, which become the history."""
        tokens = chat_tokens(self._model, messages)
        if self._grammar is not None:
            self._sampler.constraint = self._grammar.constraint()
        self._stream = TextStream(
            self._model, tokens, self._sampler, max_tokens=self.max_tokens, stop=self._stop, on_end=self._remember
        )
        self.messages[:] = messages
        return self._stream

    def _end_answer(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _remember(self, answer: Generation) -> None:
        self._stream = None
        self.messages.append({"role": "assistant", "content": answer.text})
