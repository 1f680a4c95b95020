"""One generation as a stream of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from tritgguf.errors import TritGgufError
from tritgguf.runtime.generation import FinishReason, Generation, Timings
from tritgguf.runtime.loaded_model import LoadedModel
from tritgguf.runtime.sampling import Sampler
from tritgguf.tokenization.stream_decoder import StreamDecoder

UNLIMITED = -1
_PREFILL_TOKENS = 512  # of a long prompt at once, so that Ctrl-C is heard in between


class TextStream:
    """One generation: iterate over it for the pieces of text as they come, then ask for the `result`.

    What the cache holds of the prompt already, from an earlier turn of the same chat, is not evaluated again.
    Interrupting the iteration is safe at any point: `result` then has what came until then.
    `continues_prompt` says that the text goes on where the prompt ends, in the middle of a sentence perhaps.
    Raises TritGgufError when the prompt is empty or does not fit the context.
    """

    def __init__(
        self,
        model: LoadedModel,
        prompt_tokens: list[int],
        sampler: Sampler,
        *,
        max_tokens: int = UNLIMITED,
        continues_prompt: bool = False,
    ) -> None:
        _check_prompt(model, prompt_tokens)
        self._loaded = model
        self._prompt_tokens = prompt_tokens
        self._sampler = sampler
        self._max_tokens = max_tokens if max_tokens >= 0 else None
        self._decoder = StreamDecoder(model.tokenizer, prompt_tokens if continues_prompt else ())
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._finish_reason: FinishReason = "interrupted"
        self._evaluated = self._decoded = 0
        self._prompt_seconds = self._decode_seconds = 0.0

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text; each is complete characters and never empty."""
        logits = self._prefill()
        self._sampler.accept(self._prompt_tokens)
        while (reason := self._reason_to_stop()) is None:
            start = time.perf_counter()
            if self._tokens:
                logits = self._evaluate(self._tokens[-1:])
                self._decoded += 1
            token = self._sampler.sample(logits)
            self._sampler.accept([token])
            if self._tokens:
                self._decode_seconds += time.perf_counter() - start
            if token in self._loaded.tokenizer.stop_tokens:
                reason = "stop"
                break
            self._tokens.append(token)
            yield from self._keep(self._decoder.step(token))
        yield from self._keep(self._decoder.flush())
        self._finish_reason = reason

    def finish(self, on_text: Callable[[str], None] | None = None) -> Generation:
        """Generate to the end; `on_text` receives each piece of text as it comes."""
        for piece in self:
            if on_text:
                on_text(piece)
        return self.result()

    def result(self) -> Generation:
        """Return the generation, as far as it has come."""
        return Generation(
            text="".join(self._pieces),
            tokens=list(self._tokens),
            finish_reason=self._finish_reason,
            prompt_tokens=self._prompt_tokens,
            seed=self._sampler.seed,
            timings=Timings(
                load_seconds=self._loaded.load_seconds,
                prompt_tokens=self._evaluated,
                prompt_seconds=self._prompt_seconds,
                decode_tokens=self._decoded,
                decode_seconds=self._decode_seconds,
            ),
        )

    def _reason_to_stop(self) -> FinishReason | None:
        if len(self._tokens) == self._max_tokens:
            return "length"
        if self._tokens and self._loaded.model.position >= self._loaded.model.context:
            return "context"
        return None

    def _keep(self, piece: str) -> Iterator[str]:
        if piece:
            self._pieces.append(piece)
            yield piece

    def _prefill(self) -> Any:
        """Evaluate the prompt behind what the cache shares with it; return the last token's logits."""
        start = time.perf_counter()
        cached, prompt = self._loaded.cached_tokens, self._prompt_tokens
        shared = 0
        # The last token is evaluated in any case: its logits are wanted.
        while shared < min(len(cached), len(prompt) - 1) and cached[shared] == prompt[shared]:
            shared += 1
        del cached[shared:]
        self._loaded.model.truncate(shared)
        for first in range(shared, len(prompt), _PREFILL_TOKENS):
            logits = self._evaluate(prompt[first : first + _PREFILL_TOKENS])
        self._evaluated = len(prompt) - shared
        self._prompt_seconds = time.perf_counter() - start
        return logits

    def _evaluate(self, tokens: list[int]) -> Any:
        logits = self._loaded.model.forward(tokens)
        self._loaded.cached_tokens += tokens
        return logits


def _check_prompt(model: LoadedModel, tokens: list[int]) -> None:
    context, vocabulary = model.model.context, model.model.config.vocab_size
    if not tokens:
        raise TritGgufError("the prompt is empty; give the model something to continue")
    if len(tokens) > context:
        raise TritGgufError(f"the prompt has {len(tokens)} tokens, the context holds {context}; shorten it or raise -c")
    if max(tokens) >= vocabulary:
        raise TritGgufError(
            f"{model.path}: the tokenizer gives token {max(tokens)} and the model knows {vocabulary}; convert it again"
        )
