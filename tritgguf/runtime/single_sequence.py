"""A single sequence in a pool of its own: what benchmarks and tests run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tritgguf.errors import ContextFullError
from tritgguf.runtime.model import Model
from tritgguf.runtime.token_batch import TokenBatch


class SingleSequence:
    """A sequence that grows token by token, or by many at once.

    Attributes:
        model: what runs it.
        pool: where its keys and values are.
        context: how many tokens it may have.

    """

    def __init__(self, model: Model, context: int | None = None, *, cache_type: str | None = None) -> None:
        """Start empty; `context` None takes the trained length, `cache_type` as in `Model.new_kv_pool`."""
        self.model = model
        self.context = context or model.config.context_length
        self.pool = model.new_kv_pool(context=self.context, cache_type=cache_type)
        self._sequence = self.pool.allocate()

    @property
    def position(self) -> int:
        """How many tokens it has."""
        return int(self.pool.lengths[self._sequence])

    def resumable(self, position: int) -> int:
        """Return after how many tokens, at most `position`, it can go on; see `KVPool.resumable_after`."""
        return self.pool.resumable_after(self._sequence, position)

    def truncate(self, position: int) -> None:
        """Forget the tokens from `position` on; ValueError beyond them, or where it cannot go on."""
        self.pool.truncate(self._sequence, position)

    def forward(self, tokens: Sequence[int], *, all_logits: bool = False, generated: bool | None = None) -> np.ndarray:
        """Append tokens and return logits.

        Args:
            tokens: token ids, at least one.
            all_logits: whether to return every token's logits, not only the last one's.
            generated: whether they are computed as generated tokens or as a prompt; None: one token is generated.

        Returns:
            float32 [vocab_size], or [tokens, vocab_size].

        Raises:
            TritGgufError: they are more than the context holds, or a token does not exist.

        """
        ids, position = np.asarray(tokens, np.int64), self.position
        self.model.check_tokens(ids)
        if position + ids.size > self.context:
            raise ContextFullError(
                f"{position + ids.size} tokens do not fit into a context of {self.context};"
                " use a larger one (--ctx-size, context=)"
            )
        self.pool.reserve(self._sequence, ids.size)
        if generated is None:
            generated = ids.size == 1
        outputs = np.arange(0 if all_logits else ids.size - 1, ids.size)
        batch = TokenBatch(
            ids,
            np.arange(position, position + ids.size),
            np.full(ids.size, self._sequence, np.int64),
            0 if generated else ids.size,
            outputs,
        )
        logits = np.empty((len(outputs), self.model.config.vocab_size), np.float32)
        self.model.forward(batch, self.pool, logits)
        self.pool.advance(self._sequence, ids.size)
        return logits if all_logits else logits[0]
