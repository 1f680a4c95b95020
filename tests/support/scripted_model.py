"""A loaded model whose answer is written down beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from small_tokenizers import encode, tokenizer
from tiny_models import CHAT_TEMPLATE

from tritgguf.runtime.loaded_model import LoadedModel

VOCABULARY = 448
START, END = 1, 2


class ScriptedModel:
    """Says its script, one token for each call, whatever it is told; behaves like a Model in all else.

    The second likeliest token is always the one behind it in the vocabulary.
    """

    def __init__(self, script: Sequence[int], context: int = 512) -> None:
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.context = context
        self.script = list(script)
        self.cache: list[int] = []
        self.calls: list[list[int]] = []
        self.interrupt_in_call: int | None = None
        self._logits = np.zeros(VOCABULARY, np.float32)

    @property
    def position(self) -> int:
        return len(self.cache)

    def forward(self, tokens: Sequence[int]) -> np.ndarray:
        assert 0 < len(tokens) <= self.context - self.position
        self.calls.append(list(tokens))
        if len(self.calls) == self.interrupt_in_call:
            self.cache += tokens[:1]  # stopped half-way
            raise KeyboardInterrupt
        self.cache += tokens
        token = self.script.pop(0) if self.script else END
        self._logits[:] = 0
        self._logits[token : token + 2] = 9, 5
        return self._logits

    def truncate(self, position: int) -> None:
        assert 0 <= position <= self.position
        del self.cache[position:]


def scripted(script: Sequence[int] | str, context: int = 512, template: str | None = CHAT_TEMPLATE) -> Any:
    """A LoadedModel; a script given as text ends the turn after it."""
    tokens = tokenizer()
    if isinstance(script, str):
        script = [*encode(tokens, script), END]
    return LoadedModel(
        path=Path("model.gguf"),
        model=ScriptedModel(script, context),  # type: ignore[arg-type]
        tokenizer=tokens,
        chat_template=template,
        load_seconds=0.25,
    )
