"""Single tokens as text, as log probabilities show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tritgguf.generation.sampling import TokenLogprobs
from tritgguf.tokenization.token_bytes import token_bytes
from tritgguf.tokenization.tokenizer import Tokenizer

_LOWEST = -9999.0  # what stands for minus infinity, which JSON does not have


class TokenTexts:
    """Texts and bytes of tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        """Return a token's text; for a part of a character its bytes, as OpenAI writes them."""
        raw = token_bytes(self._tokenizer, token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def piece(self, token: int) -> str | list[int]:
        """Return a token's text; for a part of a character its bytes, as llama-server writes them."""
        raw = token_bytes(self._tokenizer, token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return list(raw)

    def chat_logprobs(self, found: TokenLogprobs) -> dict[str, Any]:
        """Return a token's log probabilities in the shape of chat completions."""
        top = [self._entry(token, logprob) for token, logprob in found.top]
        return {**self._entry(found.token, found.logprob), "top_logprobs": top}

    def completion_logprobs(self, found: Sequence[tuple[TokenLogprobs, int]]) -> dict[str, Any]:
        """Return log probabilities in the shape of completions, each with its text's place in the answer.

        A token without one, the first of a prompt, gets null. The likeliest tokens are joined by the token itself.
        """
        shown: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for logprobs, offset in found:
            text, known = self.text(logprobs.token), not math.isnan(logprobs.logprob)
            top = {self.text(token): finite(logprob) for token, logprob in logprobs.top}
            shown["tokens"].append(text)
            shown["token_logprobs"].append(finite(logprobs.logprob) if known else None)
            shown["top_logprobs"].append({text: finite(logprobs.logprob)} | top if known else None)
            shown["text_offset"].append(offset)
        return shown

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(self._tokenizer, token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """Return a log probability that JSON can hold."""
    return max(logprob, _LOWEST)
