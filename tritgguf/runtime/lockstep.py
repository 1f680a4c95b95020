"""Several texts written side by side, a token of each at a time.

The weights are read once for a token of every text instead of once for a token, so that a crew of texts is written
several times as fast as one after the other. What one text becomes does not depend on the others.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.threads.crew import Crew
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.forward import Prefill
from tritgguf.runtime.kv_cache import cache_bytes, caches_of_texts
from tritgguf.runtime.model import bend, check_tokens
from tritgguf.runtime.weights import ModelWeights

_MOST_TEXTS = 64
_CACHE_BYTES = 1 << 30


class Lockstep:
    """A model that writes texts side by side, straight from its file.

    Attributes:
        most_texts: how many it should write at once, so that their caches stay within a gigabyte.

    Raises TritGgufError for a file that is no trit model or is damaged.

    """

    def __init__(self, file: GgufFile, *, context: int, threads: int | None = None) -> None:
        """Map the weights of `file`; `context` is the length of the texts, `threads` None the physical cores."""
        self._config, self._context, self._crew = ModelConfig.from_file(file), context, Crew(threads)
        self._file = file  # keeps the map open
        self._weights = ModelWeights(file, self._config)
        self._prefill = Prefill(self._config, self._weights, self._crew, bits=8, exact=False)
        self.most_texts = max(1, min(_MOST_TEXTS, _CACHE_BYTES // cache_bytes(self._config, context)))
        self.begin(0)

    def begin(self, texts: int) -> None:
        """Begin new texts."""
        self._caches = caches_of_texts(self._config, texts, self._context, self._crew.threads)
        self._logits = np.zeros((texts, self._config.vocab_size), np.float32)
        self._position = 0

    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token to each text.

        Args:
            tokens: int64 [texts], of the vocabulary.

        Returns:
            float32 [texts, vocab_size], the logits of the next ones, valid until the next call.

        Raises:
            ValueError: the texts have reached their length.
            TritGgufError: a token does not exist.

        """
        if self._position == self._context:
            raise ValueError("the texts are as long as they may be")
        check_tokens(tokens, self._config, self._file)
        hidden = self._prefill.run(tokens, self._position, self._caches)
        self._weights.head.multiply(hidden, self._logits, self._crew)
        bend(self._config, self._logits)
        self._position += 1
        return self._logits
