"""One answer: the engine's tokens become pieces of text, which end at stop strings, and log probabilities."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Container, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from tritgguf.generation.loaded_model import LoadedModel
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.result import FinishReason
from tritgguf.generation.sampling import Sampler, TokenLogprobs
from tritgguf.generation.stop_strings import StopStrings
from tritgguf.serving.engine_thread import EngineThread
from tritgguf.tokenization.stream_decoder import StreamDecoder


@dataclass(frozen=True)
class PlacedLogprobs:
    """Log probabilities of a token, and where its text begins in the answer, in characters."""

    logprobs: TokenLogprobs
    offset: int


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer; the text may be empty."""

    text: str
    logprobs: list[PlacedLogprobs] = field(default_factory=list)


class Answer:
    """An answer to a prompt, as it is generated.

    Attributes:
        request: what the engine is asked for.
        finish_reason: why the answer has ended; None before.
        running: the request in the engine; None before it is submitted.
        generated: how many tokens it has.

    """

    def __init__(
        self,
        model: LoadedModel,
        prompt: Sequence[int],
        sampler: Sampler,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_stop_tokens: bool = False,
        continues_prompt: bool = False,
        shown_tokens: Container[int] = (),
        cache_prompt: bool = True,
        with_logprobs: bool = False,
    ) -> None:
        """Prepare an answer; TritGgufError for what the engine cannot answer.

        Args:
            model: what generates.
            prompt: token ids.
            sampler: chooses tokens; with `with_logprobs`, it notes their log probabilities.
            max_tokens: how many at most; None for as many as the context holds.
            stop: texts that end the answer and are not part of it.
            ignore_stop_tokens: whether the answer goes on where the model would end it.
            continues_prompt: whether the text goes on where the prompt ends, in the middle of a sentence perhaps.
            shown_tokens: control tokens that are part of the text.
            cache_prompt: whether the prompt's beginning is taken over from earlier requests.
            with_logprobs: whether pieces come with log probabilities.

        """
        self.request = Request(
            prompt=list(prompt),
            sampler=sampler,
            max_tokens=max_tokens,
            stop_tokens=frozenset() if ignore_stop_tokens else model.tokenizer.stop_tokens,
            cache_prompt=cache_prompt,
        )
        model.engine.check_request(self.request)
        self.finish_reason: FinishReason | None = None
        self.running: RunningRequest | None = None
        self._sampler, self._with_logprobs = sampler, with_logprobs
        self._decoder = StreamDecoder(model.tokenizer, prompt if continues_prompt else (), shown_tokens)
        self._stops = StopStrings(stop)
        self.generated = 0
        self._decoded = self._shown = 0  # characters
        self._held = list[PlacedLogprobs]()
        self._ends = list[int]()  # where the text of the first of these ends; a character may take several tokens

    async def pieces(self, engine_thread: EngineThread) -> AsyncGenerator[Piece, None]:
        """Generate the answer; raises the error that ends it. It is cancelled when the iteration ends early."""
        job = engine_thread.submit(self.request)
        self.running = job.running
        async with aclosing(job.tokens()) as tokens_of_passes:
            async for tokens in tokens_of_passes:
                text = "".join(self._step(token) for token in tokens)
                if self._stops.found:
                    self.finish_reason = "stop"
                piece = self._piece(text)
                if piece.text or piece.logprobs:
                    yield piece
                if self.finish_reason:
                    return
        self._decoded += len(rest := self._decoder.flush())
        self._note_ends()
        text = self._stops.feed(rest) + self._stops.flush()
        self.finish_reason = "stop" if self._stops.found else self.running.finish_reason or "interrupted"
        piece = self._piece(text)
        if piece.text or piece.logprobs:
            yield piece

    @property
    def end_logprobs(self) -> list[PlacedLogprobs]:
        """Those of the stop token with which the model has ended the answer, and which is not part of it."""
        if self._stops.found or self.running is None or self.running.finish_reason != "stop":
            return []
        return [PlacedLogprobs(found, self._decoded) for found in self._sampler.logprobs[self.generated :]]

    def _step(self, token: int) -> str:
        """Return what can be shown of the text with one more token."""
        if self._stops.found:
            return ""
        if self._with_logprobs:
            self._held.append(PlacedLogprobs(self._sampler.logprobs[self.generated], self._decoded))
        self.generated += 1
        text = self._decoder.step(token)
        self._decoded += len(text)
        if not self._decoder.holds_back:
            self._note_ends()
        return self._stops.feed(text)

    def _note_ends(self) -> None:
        self._ends += [self._decoded] * (len(self._held) - len(self._ends))

    def _piece(self, text: str) -> Piece:
        """Return a piece of text with the log probabilities of the tokens that begin in it or before.

        Tokens without text belong to the text before them. What follows does not matter, so that an answer has the same
        tokens whether they come one by one or at once.
        """
        self._shown += len(text)
        ends = [*self._ends, *[self._shown + 1] * len(self._held)]  # the text of the others is not complete
        shown = [
            held for held, end in zip(self._held, ends, strict=False) if held.offset < self._shown or end <= self._shown
        ]
        self._held, self._ends = self._held[len(shown) :], self._ends[len(shown) :]
        return Piece(text, shown)
