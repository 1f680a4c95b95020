"""A prompt that is part of the answer (`echo`), with log probabilities of its own tokens where they are wanted."""

from __future__ import annotations

from tritgguf.generation.prompt_logprobs import PromptLogprobs
from tritgguf.generation.request import Request
from tritgguf.generation.sampling import TokenLogprobs
from tritgguf.serving.answers import PlacedLogprobs
from tritgguf.serving.service import Service
from tritgguf.tokenization.stream_decoder import StreamDecoder


class ScoredPrompt:
    """A prompt as text.

    Attributes:
        text: its text, without control tokens.
        logprobs: those of its tokens, after `score`; the first has none.

    """

    def __init__(self, service: Service, prompt: list[int], top_logprobs: int | None) -> None:
        """Take a prompt; `top_logprobs` None wants no log probabilities."""
        self._service, self._prompt, self._top = service, prompt, top_logprobs
        decoder, pieces = StreamDecoder(service.model.tokenizer), list[str]()
        self._offsets, length = list[int](), 0
        for token in prompt:
            self._offsets.append(length)
            pieces.append(decoder.step(token))
            length += len(pieces[-1])
        self.text = "".join([*pieces, decoder.flush()])
        self.logprobs: list[PlacedLogprobs] = []

    async def score(self) -> None:
        """Evaluate the prompt, if log probabilities are wanted."""
        if self._top is None:
            return
        first = TokenLogprobs(self._prompt[0], float("nan"), ())
        found = [first]
        if len(self._prompt) > 1:
            reducer = PromptLogprobs(self._prompt, self._top)
            request = Request(self._prompt, wanted="logits", reduce_outputs=reducer.reduce)
            async with self._service.room:
                running = await self._service.engine_thread.submit(request).outputs()
            assert running.outputs is not None
            self._service.totals.add(running)
            found += reducer.of_tokens(running.outputs)
        self.logprobs = [PlacedLogprobs(*pair) for pair in zip(found, self._offsets, strict=True)]
