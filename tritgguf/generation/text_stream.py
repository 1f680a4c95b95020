"""One generation as a stream of text: the engine gives tokens, this makes text of them and knows where to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tritgguf.errors import DamagedFileError
from tritgguf.generation.loaded_model import LoadedModel
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.generation.result import FinishReason, Generation, Timings
from tritgguf.generation.sampling import Sampler
from tritgguf.generation.stop_strings import StopStrings
from tritgguf.tokenization.stream_decoder import StreamDecoder

UNLIMITED = -1


class TextStream(Iterator[str]):
    """One generation: an iterator over the pieces of text as they come; then ask for the `result`.

    Interrupting the iteration is safe at any point: `result` then has what came until then. What an earlier request
    has in common with the prompt's beginning is not evaluated again.
    """

    def __init__(
        self,
        model: LoadedModel,
        prompt_tokens: list[int],
        sampler: Sampler,
        *,
        max_tokens: int | None = UNLIMITED,
        stop: Sequence[str] = (),
        continues_prompt: bool = False,
        on_end: Callable[[Generation], None] | None = None,
    ) -> None:
        """Queue the generation.

        Args:
            model: what generates.
            prompt_tokens: the prompt, at least one token.
            sampler: chooses tokens.
            max_tokens: how many at most; UNLIMITED or None for as many as the context holds.
            stop: texts that end the generation and are not part of it.
            continues_prompt: whether the text goes on where the prompt ends, in the middle of a sentence perhaps.
            on_end: called once with the result when the stream ends, however it ends.

        Raises:
            TritGgufError: the prompt is empty, does not fit the context, or has a token that does not exist, or the
                logit bias has; `max_tokens` is anything else.

        """
        _check_vocabulary(model, prompt_tokens)
        sampler.options.check_vocabulary(model.engine.model.config.vocab_size)
        self._model, self._sampler, self._on_end = model, sampler, on_end
        self._decoder = StreamDecoder(model.tokenizer, prompt_tokens if continues_prompt else ())
        self._stops = StopStrings(stop)
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._finish_reason: FinishReason = "interrupted"
        request = Request(
            prompt=prompt_tokens,
            sampler=sampler,
            max_tokens=None if max_tokens == UNLIMITED else max_tokens,
            stop_tokens=model.tokenizer.stop_tokens,
        )
        self._request: RunningRequest = model.engine.submit(request)
        self._source = model.engine.tokens(self._request)
        self._ended = False

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        """Return the next piece of text: complete characters, never empty."""
        if self._ended:
            raise StopIteration
        try:
            for token in self._source:
                self._tokens.append(token)
                piece = self._keep(self._stops.feed(self._decoder.step(token)))
                if self._stops.found:
                    self._end("stop")
                if piece or self._ended:
                    break
            else:
                piece = self._keep(self._stops.feed(self._decoder.flush()) + self._stops.flush())
                self._end("stop" if self._stops.found else self._request.finish_reason or "interrupted")
        except BaseException:  # Ctrl-C, or an error of the engine
            self.close()
            raise
        if not piece:
            raise StopIteration
        return piece

    def close(self) -> None:
        """End the generation if it has not ended; `result` has what came until now."""
        if not self._ended:
            self._end("interrupted")

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self._ended = True
            self._model.engine.cancel(self._request)

    def finish(self, on_text: Callable[[str], None] | None = None) -> Generation:
        """Generate to the end; `on_text` receives each piece of text as it comes, and may raise an error to end it."""
        try:
            for piece in self:
                if on_text:
                    on_text(piece)
        finally:
            self.close()
        return self.result()

    def result(self) -> Generation:
        """Return the generation, as far as it has come."""
        return Generation(
            text="".join(self._pieces),
            tokens=list(self._tokens),
            finish_reason=self._finish_reason,
            prompt_tokens=self._request.request.prompt,
            seed=self._sampler.seed,
            timings=Timings(
                load_seconds=self._model.load_seconds,
                prompt_tokens=self._request.evaluated_prompt_tokens,
                prompt_seconds=self._request.prompt_seconds,
                decode_tokens=self._request.decoded_tokens,
                decode_seconds=self._request.decode_seconds,
                cached_tokens=self._request.cached,
                drafted_tokens=self._request.drafted_tokens,
                accepted_tokens=self._request.accepted_tokens,
            ),
        )

    def _keep(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece

    def _end(self, reason: FinishReason) -> None:
        self._ended, self._finish_reason = True, reason
        if not self._request.ended:
            self._model.engine.cancel(self._request)
        if self._on_end is not None:
            self._on_end(self.result())


def _check_vocabulary(model: LoadedModel, tokens: list[int]) -> None:
    vocabulary = model.engine.model.config.vocab_size
    if max(tokens, default=0) >= vocabulary:
        raise DamagedFileError(
            f"{model.path}: the tokenizer gives token {max(tokens)} and the model knows {vocabulary}; convert it again"
        )
