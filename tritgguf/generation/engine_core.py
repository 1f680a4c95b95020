"""The loop of the engine: admit requests, plan, run a forward pass, deliver. One thread at a time may call it."""

from __future__ import annotations

import operator
import time
from collections import deque

import numpy as np

from tritgguf.generation.prefix_cache import Prefix, PrefixCache, common_length
from tritgguf.generation.request import RunningRequest
from tritgguf.generation.result import FinishReason
from tritgguf.generation.scheduler import Budget, Chunk, plan
from tritgguf.generation.speculation import Speculation
from tritgguf.generation.state_marks import StateMarks
from tritgguf.runtime.kv_pool import KVPool, PoolExhaustedError
from tritgguf.runtime.model import Model
from tritgguf.runtime.token_batch import TokenBatch

_WORTH_WAITING = 64  # tokens that a request in front is about to evaluate, and this one would evaluate again


class EngineCore:
    """Requests that wait and that run, the pool of their keys and values, and the cache of prefixes.

    Attributes:
        waiting: requests that have no sequence yet, first come, first served.
        running: requests that have one, in the order of their admission.
        prefix_cache: pages of requests that have ended.

    """

    def __init__(self, model: Model, pool: KVPool, budget: Budget, speculation: Speculation | None = None) -> None:
        self.waiting: deque[RunningRequest] = deque()
        self.running: list[RunningRequest] = []
        self.prefix_cache = PrefixCache(pool)
        self._marks = StateMarks(pool, self.prefix_cache)
        self._model, self._pool, self._budget, self._speculation = model, pool, budget, speculation
        self._logits = np.zeros((0, 0), np.float32)

    def step(self) -> bool:
        """Run one forward pass; return whether there was anything to do."""
        start = time.perf_counter()
        self.remove_ended()
        self._admit()
        planned = plan(self.running, self._budget)
        chunks = self._reserve(self._with_drafts(planned))
        if not chunks:
            return bool(planned)  # all of them had to give way; they are admitted again with other pages
        try:
            outputs = self._forward(chunks)
        except Exception as error:
            for chunk in chunks:
                chunk.request.error = error
        else:
            self._deliver_all(chunks, outputs, start)
        self.remove_ended()
        return True

    def remove_ended(self) -> None:
        """Free the sequences of requests that have ended, and keep their pages for later requests."""
        for request in [waiting for waiting in self.waiting if waiting.ended]:
            self.waiting.remove(request)
            self._forget_drafts(request)
        for request in [running for running in self.running if running.ended]:
            self.running.remove(request)
            wanted = request.request.cache_prompt and request.request.keep_prompt
            if wanted and request.error is None:
                pages, states = self._pool.pages(_sequence_of(request)), self._marks.of_ended(request)
                tokens = request.tokens[: request.evaluated]
                self.prefix_cache.insert(tokens, pages, request.computed_as_prompt, states)
            self._free(request)
            self._forget_drafts(request)

    def held_states(self) -> list[int]:
        """Return all copies of states that the cache of prefixes and requests have."""
        return [*self.prefix_cache.held_states(), *(copy for one in self.running for copy in one.state_marks.values())]

    def _free(self, request: RunningRequest) -> None:
        self._marks.forget(request)
        self._pool.free(_sequence_of(request))
        request.sequence = None

    # -- admission

    def _admit(self) -> None:
        """Let waiting requests run while there are sequences, and pages for their prompts."""
        for request in list(self.waiting):
            if not self._pool.free_sequences:
                return
            if self._should_wait(request):
                continue
            try:
                has_room = self._start(request)
            except Exception as error:  # no memory for a page, for example
                request.error = error
                continue
            if not has_room:
                return
            self.waiting.remove(request)
            self.running.append(request)

    def _should_wait(self, request: RunningRequest) -> bool:
        """Tell whether another request is about to evaluate the same prefix, which this one can then take over."""
        if not request.request.cache_prompt:
            return False
        return any(
            self._will_share(other, common_length(other.request.prompt, request.tokens[:-1]))
            for other in self.running
            if other.is_prompt and other.request.cache_prompt
        )

    def _will_share(self, other: RunningRequest, common: int) -> bool:
        """Tell whether a running request is about to evaluate many of the first `common` tokens, to be taken over."""
        if self._pool.states is not None:
            return self._marks.awaits(other, common)
        return self._pool.surely_resumable(common) >= other.evaluated + _WORTH_WAITING

    def _start(self, request: RunningRequest) -> bool:
        """Give a request a sequence that begins with what is stored of its prefix; False without room for the rest."""
        prefix = self._longest_prefix(request)
        length, computed_as_prompt = prefix.length, prefix.prompt_tokens
        sequence = self._pool.allocate(prefix.pages, length, prefix.state)
        missing = self._pool.missing_pages(sequence, len(request.tokens) - length)
        self.prefix_cache.evict(missing - self._pool.free_pages)
        if missing > self._pool.free_pages:
            self._pool.free(sequence)
            return False
        request.sequence, request.evaluated = sequence, length
        # What follows on keys and values of another kind is not what a prompt alone would give.
        request.computed_as_prompt = request.prompt_length if computed_as_prompt == length else computed_as_prompt
        request.cached = max(request.cached, min(length, request.prompt_length))
        self._marks.plan(request, prefix)
        return True

    def _longest_prefix(self, request: RunningRequest) -> Prefix:
        """Return the longest stored prefix, in the cache or of a running request.

        Generated tokens have other activations than prompts. A prompt takes over what was computed of either, so that
        a chat goes on from its answers; logits and hidden states are always those of a prompt.
        """
        if not request.request.cache_prompt:
            return Prefix([], 0, 0)
        prompt_only = request.request.wanted != "tokens"
        most = len(request.tokens) - 1  # the last token is evaluated in any case: its logits are wanted
        if request.request.wanted != "tokens":
            most = min(most, request.request.first_output)
        elif len(request.tokens) > request.prompt_length:  # preempted: generated tokens are computed as before
            most = request.prompt_length
        wanted = request.tokens[:most]
        best = self.prefix_cache.match(wanted, prompt_only=prompt_only)
        for other in self.running:
            stored = min(other.evaluated, other.computed_as_prompt) if prompt_only else other.evaluated
            if other.request.cache_prompt:
                best = self._better(best, other, common_length(other.tokens[:stored], wanted))
        return best

    def _better(self, best: Prefix, other: RunningRequest, common: int) -> Prefix:
        """Return the longer prefix: the best one so far, or what a running request has of the first `common` tokens."""
        pages, state = self._pool.pages(_sequence_of(other)), None
        best = best._replace(common=max(best.common, common))
        if self._pool.states is None:
            length = self._pool.resumable(pages, common)
        else:
            length, state = self._marks.latest(other, common) or (0, None)
        if length <= best.length:
            return best
        return Prefix(pages, length, min(length, other.computed_as_prompt), state, best.common)

    # -- drafts and room

    def _with_drafts(self, chunks: list[Chunk]) -> list[Chunk]:
        """Return chunks of which some have drafts."""
        if self._speculation is None:
            return chunks
        try:
            return self._speculation.with_drafts(chunks, self._pool.context)
        except Exception as error:
            for chunk in chunks:
                if not chunk.is_prompt:
                    chunk.request.error = error
            return [chunk for chunk in chunks if chunk.is_prompt]

    def _forget_drafts(self, request: RunningRequest) -> None:
        if self._speculation is not None:
            self._speculation.forget(request)

    def _reserve(self, chunks: list[Chunk]) -> list[Chunk]:
        """Make room for every chunk's tokens; requests that were admitted last give way where there is none."""
        kept = list[Chunk]()
        for chunk in chunks:
            try:
                if chunk.request in self.running and (fitting := self._make_room(chunk)) is not None:
                    kept.append(fitting)
            except Exception as error:  # no memory for a page, for example
                chunk.request.error = error
        return [chunk for chunk in kept if chunk.request in self.running]

    def _make_room(self, chunk: Chunk) -> Chunk | None:
        """Reserve a chunk's tokens, a draft only where pages are free; None where its own request had to give way."""
        sequence = _sequence_of(chunk.request)
        while True:
            missing = self._pool.missing_pages(sequence, chunk.tokens)
            self.prefix_cache.evict(missing - self._pool.free_pages)
            try:
                self._pool.reserve(sequence, chunk.tokens)
            except PoolExhaustedError:
                if chunk.draft:
                    chunk = chunk.without_draft()
                    continue
                latest = self.running[-1]
                self._preempt(latest)
                if latest is chunk.request:
                    return None
            else:
                return chunk

    def _preempt(self, request: RunningRequest) -> None:
        """Let a request wait again, in front of all others; its tokens have to be evaluated again."""
        self.running.remove(request)
        self._free(request)
        request.evaluated = 0
        self.waiting.appendleft(request)

    # -- the forward pass

    def _forward(self, chunks: list[Chunk]) -> list[np.ndarray]:
        """Evaluate chunks; return the logits or hidden states of each: float32 [outputs, width], until the next."""
        parts = []
        for chunk in chunks:
            request = chunk.request
            tokens = request.tokens[request.evaluated : request.evaluated + chunk.tokens]
            parts.append((_sequence_of(request), request.evaluated, [*tokens, *chunk.draft], chunk.outputs))
        batch = TokenBatch.of_chunks(parts, sum(chunk.is_prompt for chunk in chunks))
        wanted = {chunk.request.request.wanted for chunk in chunks if chunk.outputs}
        count, sizes = len(batch.outputs), self._model.config.dimensions
        hidden = np.empty((count, sizes.hidden), np.float32) if "hidden" in wanted else None
        logits = self._logits_buffer(count) if wanted - {"hidden"} else None
        self._model.forward(batch, self._pool, logits, hidden)
        rows, first = list[np.ndarray](), 0
        for chunk in chunks:
            self._pool.advance(_sequence_of(chunk.request), chunk.tokens)
            outputs = hidden if chunk.request.request.wanted == "hidden" else logits
            last = first + chunk.outputs
            rows.append(np.zeros((0, 0), np.float32) if outputs is None else outputs[first:last])
            first = last
        return rows

    def _logits_buffer(self, rows: int) -> np.ndarray:
        if len(self._logits) < rows:
            self._logits = np.empty((rows, self._model.config.vocab_size), np.float32)
        return self._logits[:rows]

    # -- delivery

    def _deliver_all(self, chunks: list[Chunk], outputs: list[np.ndarray], start: float) -> None:
        """Deliver every chunk; an error ends its own request, and what is more than an error is raised at the end."""
        escaped: BaseException | None = None
        for chunk, rows in zip(chunks, outputs, strict=True):
            try:
                self._deliver(chunk, rows, start)
            except BaseException as error:
                chunk.request.error = error
                if not isinstance(error, Exception):
                    escaped = error
        if escaped is not None:
            raise escaped

    def _deliver(self, chunk: Chunk, rows: np.ndarray, start: float) -> None:
        """Note what a chunk's evaluation has given: outputs, or the next tokens, and the time that the pass took."""
        request = chunk.request
        before = request.evaluated
        request.evaluated += chunk.tokens - len(chunk.draft)
        if request.request.wanted != "tokens":
            self._keep_outputs(request, rows)
            if request.evaluated == len(request.tokens):
                request.finish_reason = "length"
        elif len(rows):
            self._sample_all(chunk, rows)
        seconds = time.perf_counter() - start
        if chunk.is_prompt:
            request.evaluated_prompt_tokens += chunk.tokens
            request.prompt_seconds += seconds
        else:
            request.decoded_tokens += request.evaluated - before
            request.decode_seconds += seconds

    def _sample_all(self, chunk: Chunk, rows: np.ndarray) -> None:
        """Choose a token, and another one for every token of the draft that was chosen too; forget the others."""
        request = chunk.request
        request.drafted_tokens += len(chunk.draft)
        try:
            self._sample(request, rows[0])
            for guess, row in zip(chunk.draft, rows[1:], strict=True):
                if request.finish_reason is not None or request.tokens[-1] != guess:
                    break
                request.evaluated += 1
                request.accepted_tokens += 1
                self._sample(request, row)
        finally:
            if chunk.draft:
                self._pool.truncate(_sequence_of(request), request.evaluated)

    def _keep_outputs(self, request: RunningRequest, rows: np.ndarray) -> None:
        """Keep the outputs of the last tokens evaluated; those of a request that had to give way come once more."""
        if not len(rows):
            return
        first, reduce_outputs = request.request.first_output, request.request.reduce_outputs
        if reduce_outputs is not None:
            rows = reduce_outputs(rows, request.evaluated - len(rows))
        if request.outputs is None:
            request.outputs = np.empty((request.prompt_length - first, rows.shape[1]), rows.dtype)
        last = request.evaluated - first
        request.outputs[last - len(rows) : last] = rows

    def _sample(self, request: RunningRequest, logits: np.ndarray) -> None:
        """Choose the next token; deliver it, and end the request where that is due."""
        sampler = request.request.sampler
        assert sampler is not None
        generated = len(request.tokens) - request.prompt_length
        if generated == request.request.max_tokens:  # none is wanted
            request.finish_reason = "length"
            return
        if not generated:
            sampler.accept(request.request.prompt)
        token = operator.index(sampler.sample(logits))
        if not 0 <= token < len(logits):
            raise ValueError(f"the sampler chose token {token}, and the model has {len(logits)}")
        sampler.accept([token])
        if token in request.request.stop_tokens:
            request.finish_reason = "stop"
            return
        request.tokens.append(token)
        request.generated.append(token)
        request.finish_reason = self._reason_to_end(request, generated + 1)

    def _reason_to_end(self, request: RunningRequest, generated: int) -> FinishReason | None:
        if generated == request.request.max_tokens:
            return "length"
        return "context" if request.evaluated >= self._pool.context else None


def _sequence_of(request: RunningRequest) -> int:
    """Return the sequence of a request that runs."""
    assert request.sequence is not None
    return request.sequence
