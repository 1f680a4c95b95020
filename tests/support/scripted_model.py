"""A fake loaded model that generates a given list of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pool_config import pool_config
from small_tokenizers import encode, tokenizer
from tiny_models import CHAT_TEMPLATE

from tritgguf.errors import TritGgufError
from tritgguf.generation.engine import Engine
from tritgguf.generation.loaded_model import LoadedModel
from tritgguf.runtime.kv_pool import KVPool
from tritgguf.runtime.token_batch import TokenBatch
from tritgguf.tokenization.tokenizer import Tokenizer

VOCABULARY = 448
START, END = 1, 2


class ScriptedModel:
    """Generates the tokens of its script, one per output, for any input; otherwise behaves like a Model.

    The second likeliest token is always the next one in the vocabulary.

    Attributes:
        calls: the tokens of each forward pass.

    """

    def __init__(self, script: Sequence[int]) -> None:
        rotations: dict[str, Any] = {"rotations": (), "long_rotations": ()}  # those of a model without LongRoPE
        self.config = pool_config(2, hidden=4, vocab_size=VOCABULARY, context_length=4096, **rotations)
        self.config.dimensions.vocabulary = VOCABULARY
        self.file_bytes = 0
        self.script = list(script)
        self.calls: list[list[int]] = []
        self.interrupt_in_call: int | None = None
        self._texts: dict[int, list[int]] = {}
        self._last_sequence = 0

    @property
    def text(self) -> list[int]:
        """The tokens of the sequence that the last forward pass continued."""
        return self._texts[self._last_sequence]

    def new_kv_pool(self, **options: Any) -> KVPool:
        pages = options["sequences"] * (options["context"] // 256 + 2)
        return KVPool(self.config, **{**options, "pages": options["pages"] or pages, "cache_type": "f16"})

    def check_tokens(self, tokens: np.ndarray) -> None:
        if tokens.max() >= VOCABULARY:
            raise TritGgufError("tokens must be from 0 to 447")

    def forward(
        self, batch: TokenBatch, kv: KVPool, logits: np.ndarray | None, hidden: np.ndarray | None = None
    ) -> None:
        assert kv.writable(batch.sequences, batch.positions)
        self.calls.append(batch.tokens.tolist())
        if len(self.calls) == self.interrupt_in_call:
            raise KeyboardInterrupt
        for token, position, sequence in zip(batch.tokens, batch.positions, batch.sequences, strict=True):
            text = self._texts.setdefault(int(sequence), [])
            text[int(position) :] = [int(token)]
            self._last_sequence = int(sequence)
        if hidden is not None:
            hidden[:] = np.arange(len(hidden))[:, np.newaxis]
        for row in [] if logits is None else logits:
            token = self.script.pop(0) if self.script else END
            row[:] = 0
            row[token : token + 2] = 9, 5


def scripted(
    script: Sequence[int] | str,
    context: int = 512,
    template: str | None = CHAT_TEMPLATE,
    tokens: Tokenizer | None = None,
) -> Any:
    """Return a LoadedModel with a ScriptedModel as its attribute `model`; a script given as text ends the turn."""
    tokens = tokens or tokenizer()
    if isinstance(script, str):
        script = [*encode(tokens, script), END]
    model: Any = ScriptedModel(script)
    loaded: Any = LoadedModel(
        path=Path("model.gguf"),
        tokenizer=tokens,
        chat_template=template,
        load_seconds=0.25,
        engine=Engine(model, context=context, parallel=4),
    )
    loaded.model = model
    return loaded


def set_context(loaded: Any, context: int) -> None:
    """Give a scripted model an engine with another context length."""
    loaded.engine = Engine(loaded.model, context=context, parallel=4)
