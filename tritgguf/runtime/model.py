"""A model that runs straight from its file: the key-value cache and the choice between prefill and decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cpu_kernels.simd.instruction_set import choose
from cpu_kernels.threads.crew import CompilingCrew, Crew, announcing_compilation
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.decode import Decoder
from tritgguf.runtime.forward import Prefill
from tritgguf.runtime.kv_cache import CACHE_TYPES, DEFAULT_CACHE_TYPE, KeyValueCache, check_cache_fits
from tritgguf.runtime.weights import ModelWeights

BATCH_TOKENS = 512


class Model:
    """A model with a cache of the tokens it has seen.

    Attributes:
        config: the model's sizes.
        context: how many tokens the cache holds.
        position: how many tokens are in it.
        crew: the threads that run it.

    Raises TritGgufError for a file that is no trit model or is damaged.

    """

    def __init__(
        self,
        file: GgufFile,
        *,
        context: int | None = None,
        threads: int | None = None,
        prefill_bits: int = 8,
        exact: bool = False,
        cache_type: str | None = None,
    ) -> None:
        """Map the weights of `file`.

        `context` None takes the trained length, `threads` None the physical cores. `prefill_bits` are those of the
        activations of prompts, 8 or 16; generated tokens have 16. `exact` multiplies all activations with 31 bits, at
        a fraction of the speed; `verify` asks for it. `cache_type` is what keys and values are kept in, "f16" or
        "f32"; None is float16, or float32 where `exact` asks for exactness.
        """
        try:
            choose()
        except ValueError as error:
            raise TritGgufError(str(error)) from error
        self.config = ModelConfig.from_file(file)
        self.crew = Crew(threads)
        self.context = context or self.config.context_length
        self.position = 0
        self._exact = exact
        self._file = file  # keeps the map open
        self._weights = ModelWeights(file, self.config)
        cache_type = cache_type or ("f32" if exact else DEFAULT_CACHE_TYPE)
        if context is not None and cache_type in CACHE_TYPES:
            check_cache_fits(self.config, context, cache_type, str(file.path))
        self._cache = KeyValueCache(self.config, self.context, self.crew.threads, cache_type)
        self._prefill = Prefill(self.config, self._weights, self.crew, bits=16 if exact else prefill_bits, exact=exact)
        self._decoder = Decoder(self.config, self._weights, self.crew)

    def compile(self, announce: Callable[[], None]) -> None:
        """Compile every kernel that the model needs, or load it from the cache.

        Otherwise the first tokens would have to wait for it. `announce` is called once if something is really
        compiled, which happens on a machine's first run and takes about half a minute.
        """
        crew = self.crew
        try:
            self._prefill.crew = self._decoder.crew = CompilingCrew(1)
            with announcing_compilation(announce):
                hidden = self._prefill.run(np.zeros(2, np.int64), 0, self._cache.arrays)
                logits = self._decoder.run(0, 0, self._cache.arrays)
                self._weights.head.multiply_vector(hidden.x[-1], logits, CompilingCrew(1))
        finally:
            self._prefill.crew = self._decoder.crew = crew

    def truncate(self, position: int) -> None:
        """Forget the cache from `position` on."""
        if not 0 <= position <= self.position:
            raise ValueError("a cache can only be cut within what it holds")
        self.position = position

    def forward(self, tokens: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        """Append tokens to the cache and return logits.

        Args:
            tokens: token ids, at least one.
            all_logits: whether to return every token's logits, not only the last one's.

        Returns:
            float32 [vocab_size], valid until the next call, or [tokens, vocab_size].

        Raises:
            TritGgufError: the cache cannot hold so many tokens, or a token does not exist.

        """
        ids = np.asarray(tokens, dtype=np.int64)
        check_tokens(ids, self.config, self._file)
        if self.position + ids.size > self.context:
            raise TritGgufError(
                f"{self.position + ids.size} tokens do not fit into a context of {self.context}; use a larger one (-c)"
            )
        self._cache.reserve(self.position + ids.size)
        if ids.size == 1 and not self._exact:
            logits = self._decoder.run(int(ids[0]), self.position, self._cache.arrays)
            bend(self.config, logits)
            self.position += 1
            return logits[np.newaxis].copy() if all_logits else logits
        logits = np.empty((ids.size if all_logits else 1, self.config.vocab_size), np.float32)
        for start in range(0, ids.size, BATCH_TOKENS):
            batch = ids[start : start + BATCH_TOKENS]
            hidden = self._prefill.run(batch, self.position, self._cache.arrays)
            self.position += len(batch)
            if all_logits:
                self._weights.head.multiply(hidden, logits[start : start + len(batch)], self.crew, exact=self._exact)
        if not all_logits:
            self._weights.head.multiply_vector(hidden.x[-1], logits[0], self.crew, exact=self._exact)
        bend(self.config, logits)
        return logits if all_logits else logits[0]


def check_tokens(ids: np.ndarray, config: ModelConfig, file: GgufFile) -> None:
    """Raise TritGgufError when there are no tokens, or one that does not exist."""
    if ids.size == 0 or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise TritGgufError(f"{file.path}: tokens must be from 0 to {config.vocab_size - 1}")


def bend(config: ModelConfig, logits: np.ndarray) -> None:
    """Scale logits and bend them to their bound, in place, where the model says so."""
    cap = config.logit_softcap
    if config.logit_scale != 1:
        logits *= config.logit_scale
    if cap:
        np.tanh(logits / cap, out=logits)
        logits *= cap
