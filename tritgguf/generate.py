"""From a prompt to a text: loading a model, one generation as a stream, and a chat that remembers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tritgguf.errors import TritGgufError
from tritgguf.sampling import Sampler, SamplingOptions
from tritgguf.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from tritgguf.chat_template import Message
    from tritgguf.model import Model

UNLIMITED = -1
_PREFILL_TOKENS = 512  # of a long prompt at once, so that Ctrl-C is heard in between

FinishReason = Literal["stop", "length", "context", "interrupted"]


@dataclass
class LoadedModel:
    """A model ready to generate; `cached_tokens` are those whose keys and values its cache holds."""

    path: Path
    model: Model
    tokenizer: Tokenizer
    chat_template: str | None
    load_seconds: float
    cached_tokens: list[int] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Timings:
    """Seconds and token counts of one generation; tokens that were in the cache already do not count."""

    load_seconds: float
    prompt_tokens: int
    prompt_seconds: float
    decode_tokens: int
    decode_seconds: float

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of the prompt's evaluation."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of generation, sampling included."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @classmethod
    def total(cls, parts: Sequence[Timings]) -> Timings:
        """Add up the generations of one loaded model."""
        return cls(
            load_seconds=parts[0].load_seconds,
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            prompt_seconds=sum(part.prompt_seconds for part in parts),
            decode_tokens=sum(part.decode_tokens for part in parts),
            decode_seconds=sum(part.decode_seconds for part in parts),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what `run --json` prints."""
        return {
            **vars(self),
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


@dataclass(frozen=True)
class Generation:
    """A generated text, its tokens, and why it ended.

    `finish_reason`: "stop" (the model ended it), "length" (max_tokens), "context" (no room left),
    "interrupted".
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: list[int]
    seed: int
    timings: Timings


def load(
    path: str | Path,
    *,
    context: int | None = None,
    threads: int | None = None,
    prefill_bits: int = 8,
    exact: bool = False,
    cache_type: str | None = None,
    on_compilation: Callable[[], None] | None = None,
) -> LoadedModel:
    """Open a trit GGUF file for generation.

    `context` is the room for prompt and answer, in tokens (None: what the model was trained for), `threads`
    the number of threads (None: all cores). `prefill_bits`, `exact` and `cache_type` say how exactly activations are
    multiplied and kept, see `Model`. `on_compilation` is called if the kernels have to be compiled first,
    which takes about half a minute on a machine's first run. Raises TritGgufError when the file is damaged or of
    an unknown kind.
    """
    start = time.perf_counter()
    from tritgguf.gguf_file import GgufFile
    from tritgguf.model import Model

    file = GgufFile(path)
    tokenizer = Tokenizer(file.metadata, name=str(path))
    template = file.metadata.get("tokenizer.chat_template")
    model = Model(file, context=context, threads=threads, prefill_bits=prefill_bits, exact=exact, cache_type=cache_type)
    model.compile(on_compilation or (lambda: None))
    return LoadedModel(
        path=Path(path),
        model=model,
        tokenizer=tokenizer,
        chat_template=template if isinstance(template, str) else None,
        load_seconds=time.perf_counter() - start,
    )


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


def prompt_tokens(
    model: LoadedModel,
    prompt: str | None,
    *,
    messages: Sequence[Message] | None = None,
    system: str | None = None,
    raw: bool = False,
) -> list[int]:
    """Return the tokens of a prompt or of a chat; the parameters are those of `generate`."""
    if messages is not None:
        if prompt is not None or system is not None or raw:
            raise TritGgufError("messages hold the whole chat: give neither a prompt, nor a system message, nor raw")
        return chat_tokens(model, messages)
    if prompt is None:
        raise TritGgufError("there is nothing to generate from; give a prompt or messages")
    if raw and system is not None:
        raise TritGgufError("raw takes the prompt as it is; leave the system message out or write it into the prompt")
    if raw:
        return model.tokenizer.encode(prompt, add_special=True, parse_special=True)
    return chat_tokens(model, [*system_message(system), {"role": "user", "content": prompt}])


def system_message(system: str | None) -> list[Message]:
    """Return the beginning of a chat: the system message, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


def chat_tokens(model: LoadedModel, messages: Sequence[Message]) -> list[int]:
    """Return the prompt of a chat's next answer; TritGgufError when the file has no chat template."""
    if model.chat_template is None:
        raise TritGgufError(f"{model.path} has no chat template, it may be a base model; continue a text with --raw")
    from tritgguf.chat_template import encode_chat

    try:
        return encode_chat(model.tokenizer, model.chat_template, messages)
    except TritGgufError as error:
        raise TritGgufError(f"{model.path}: {error}") from error


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
