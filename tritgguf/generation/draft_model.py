"""Drafts of a smaller model with the same vocabulary, which always takes its likeliest token.

It has keys and values of its own. They follow the requests: what the model behind the engine rejects is cut off, what
has come since is evaluated before the next draft. Nothing that it computes reaches an answer, so it may read generated
tokens as a prompt, share pages with other requests and go without memory: then there is no draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tritgguf.errors import BadRequestError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.prefix_cache import PrefixCache, common_length
from tritgguf.generation.request import RunningRequest
from tritgguf.runtime.kv_pool import KVPool, PoolExhaustedError, pages_for
from tritgguf.runtime.model import Model
from tritgguf.runtime.token_batch import TokenBatch

_TOKENS_AT_ONCE = 512  # that have come since and are evaluated before a pass; the rest waits for the next one
_FEW = 4  # tokens that take less time as generated ones than as a prompt
_ACCEPTED = 0.7  # share of the tokens, before anything is known
_WEIGHT = 4.0  # what this is worth, in tokens
_FORGOTTEN = 64  # so many tokens are remembered before they count half
_FORGIVEN = 256  # tokens without a draft until drafts are trusted again, roughly


@dataclass
class _Follower:
    """A request's sequence in the draft model, and how often its drafts were right.

    Attributes:
        sequence: its number in the pool.
        stored: how many of the request's tokens have keys and values.
        length: tokens of the request when `draft` was made.
        draft: the tokens that were guessed to come next; all but the last one have keys and values.

    """

    sequence: int
    stored: int
    length: int = 0
    draft: list[int] = field(default_factory=list)
    right: float = _WEIGHT * _ACCEPTED
    guessed: float = _WEIGHT

    def learn(self, tokens: Sequence[int]) -> None:
        """Compare the draft with the tokens that came; `stored` then counts those that were evaluated for it."""
        came = tokens[self.length :]
        right = common_length(self.draft, came)
        if self.draft:
            self.right += right
            self.guessed += right + (right < min(len(self.draft), len(came)))
            if self.guessed > _FORGOTTEN:
                self.right, self.guessed = self.right / 2, self.guessed / 2
            self.stored = min(self.stored + min(right, len(self.draft) - 1), len(tokens) - 1)
        else:  # it was not worth it; some time it is tried again
            self.right += (self.guessed - self.right) * min(1.0, len(came) / _FORGIVEN)
        self.length, self.draft = len(tokens), []


class DraftModel:
    """Drafts the likeliest tokens of a model, for several requests at once.

    Attributes:
        step_cost: see `Drafter`.

    """

    def __init__(self, model: Model, pool: KVPool, *, vocabulary: int, step_cost: float) -> None:
        """Use a model, and a pool for as many sequences as requests run at once.

        `vocabulary` is the number of tokens that drafts may have.
        """
        self.step_cost = step_cost
        self._model, self._pool, self._vocabulary = model, pool, vocabulary
        self._prefixes = PrefixCache(pool)
        self._followers: dict[RunningRequest, _Follower] = {}

    def expect(self, requests: Sequence[RunningRequest], most: Sequence[int]) -> list[list[float]]:
        """Tell by the drafts before how probably the next ones are right; see `Drafter.expect`."""
        expected = []
        for request, count in zip(requests, most, strict=True):
            follower = self._follower(request)
            if follower is None:
                expected.append(list[float]())
                continue
            follower.learn(request.tokens)
            room = max(0, min(count, self._pool.context - len(request.tokens) + 1))
            right = min(1.0, follower.right / follower.guessed)
            expected.append([right**place for place in range(1, room + 1)])
        return expected

    def draft(self, requests: Sequence[RunningRequest], lengths: Sequence[int]) -> list[list[int]]:
        """Evaluate what has come since, then one token after another of all drafts together."""
        left, behind = _TOKENS_AT_ONCE, list[tuple[RunningRequest, int]]()
        ready = dict[RunningRequest, int]()
        for request, length in zip(requests, lengths, strict=True):
            follower = self._followers.get(request)
            if follower is None or not length or not left:
                continue
            self._pool.truncate(follower.sequence, follower.stored)
            missing = len(request.tokens) - follower.stored
            count = min(missing, left)
            if not self._knows(self._next_tokens(request, count)) or not self._reserve(follower, count + length - 1):
                continue
            left -= count
            behind.append((request, count))
            if count == missing:
                ready[request] = length
        self._catch_up(behind)
        for place in range(1, max(ready.values(), default=0)):
            self._extend([request for request, length in ready.items() if length > place])
        return [self._followers[request].draft if request in ready else [] for request in requests]

    def forget(self, request: RunningRequest) -> None:
        """Free a request's sequence; its pages stay, for others that begin alike."""
        follower = self._followers.pop(request, None)
        if follower is not None:
            pages = self._pool.pages(follower.sequence)
            self._prefixes.insert(request.tokens[: follower.stored], pages)
            self._pool.free(follower.sequence)

    def check(self) -> None:
        """Raise AssertionError unless every page is free or held once by each of its owners."""
        self._pool.check(self._prefixes.held_pages())

    def _follower(self, request: RunningRequest) -> _Follower | None:
        """Return a request's follower, a new one perhaps; None without a sequence for it."""
        if request not in self._followers:
            if not self._pool.free_sequences:
                self._forget_waiting()
            if not self._pool.free_sequences:
                return None
            prefix = self._prefixes.match(request.tokens[:-1])
            sequence = self._pool.allocate(prefix.pages, prefix.length)
            self._followers[request] = _Follower(sequence, prefix.length, len(request.tokens))
        return self._followers[request]

    def _forget_waiting(self) -> None:
        """Free the sequences of requests that had to give way."""
        for request in [request for request in self._followers if request.sequence is None]:
            self.forget(request)

    def _reserve(self, follower: _Follower, tokens: int) -> bool:
        """Make room for so many more tokens; False where there is none."""
        try:
            self._prefixes.evict(self._pool.missing_pages(follower.sequence, tokens) - self._pool.free_pages)
            self._pool.reserve(follower.sequence, tokens)
        except (PoolExhaustedError, MemoryError):
            return False
        return True

    def _catch_up(self, behind: Sequence[tuple[RunningRequest, int]]) -> None:
        """Evaluate so many of each request's tokens; the last one's logits give the first token of its draft."""
        for few in (False, True):
            chunks = [(request, count) for request, count in behind if (count <= _FEW) == few]
            if chunks:
                self._evaluate([(request, self._next_tokens(request, count)) for request, count in chunks], few)
        for request, count in behind:
            follower = self._followers[request]
            follower.stored += count
            if follower.stored < len(request.tokens):
                follower.draft = []  # there is more to evaluate

    def _knows(self, tokens: Sequence[int]) -> bool:
        """Tell whether the draft model has all tokens; some fill up the vocabulary of the other one alone."""
        return max(tokens) < self._model.config.vocab_size

    def _next_tokens(self, request: RunningRequest, count: int) -> list[int]:
        stored = self._followers[request].stored
        return request.tokens[stored : stored + count]

    def _extend(self, requests: Sequence[RunningRequest]) -> None:
        """Draft one more token for each."""
        self._evaluate([(request, self._followers[request].draft[-1:]) for request in requests], True)

    def _evaluate(self, chunks: Sequence[tuple[RunningRequest, list[int]]], generated: bool) -> None:
        """Evaluate tokens of each request and draft the likeliest one after the last."""
        followers = [self._followers[request] for request, _ in chunks]
        parts = [
            (follower.sequence, int(self._pool.lengths[follower.sequence]), tokens, 1)
            for follower, (_, tokens) in zip(followers, chunks, strict=True)
        ]
        logits = np.empty((len(parts), self._model.config.vocab_size), np.float32)
        self._model.forward(TokenBatch.of_chunks(parts, 0 if generated else len(parts)), self._pool, logits)
        for follower, (_, tokens), row in zip(followers, chunks, logits, strict=True):
            self._pool.advance(follower.sequence, len(tokens))
            follower.draft.append(int(np.argmax(row[: self._vocabulary])))


def drafting(draft: Model, model: Model, sequences: int) -> DraftModel:
    """Return what drafts for a model, with a pool for so many sequences of the context that the draft model has."""
    context = draft.config.context_length
    pages = pages_for(draft.config, context, sequences)
    pool = draft.new_kv_pool(context=context, sequences=sequences, pages=pages)
    step_cost = draft.file_bytes / model.file_bytes  # decode takes as long as reading the weights does
    return DraftModel(draft, pool, vocabulary=model.config.vocab_size, step_cost=step_cost)


def check_vocabularies(file: GgufFile, draft: GgufFile) -> None:
    """Raise BadRequestError unless two models have the same tokens; one may have more, which fill its matrices up."""
    tokens, others = (one.metadata.get("tokenizer.ggml.tokens") or [] for one in (file, draft))
    shared = min(len(tokens), len(others))
    if tokens[:shared] != others[:shared] or not shared:
        place = common_length(tokens, others)
        raise BadRequestError(
            f"{draft.path} has another vocabulary than {file.path}, from token {place} on; a draft model needs the same"
        )
