"""Encoding and decoding of text with the Hugging Face tokenizer in a GGUF file.

The bos token and the stop tokens come from the `tokenizer.ggml.*` keys, read as llama.cpp reads them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import tokenizers

from tritgguf.errors import DamagedFileError

KEY_HUGGINGFACE = "tokenizer.huggingface.json"
KEY_STOP_IDS = "tokenizer.ggml.eos_token_ids"
"""All ids of `eos_token_id` in Hugging Face's files, where one number does not say it."""

# Tokens that end a text because of their names, in addition to those in the file's keys. llama.cpp has the same list,
# because many files name only one of their model's stop tokens. The last two lines are separators between files, which
# code models write.
_STOP_TOKEN_NAMES = """
    <|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> <|calls|> <|flush|> <|endoftext|>
    <|end_of_text|> <end_of_turn> <turn|> <|tool_response> <end_of_utterance> <EOT> _<EOT> [EOT] [EOS]
    <eos> </s> <\uff5cend\u2581of\u2581sentence\uff5c> [e~[
    <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <reponame> <REPO>
    <|file_sep|>
"""

# Byte-level BPE pre-tokenizers whose models use a bos token if the file does not say.
_BOS_PRE_TOKENIZERS = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 tekken chameleon"
_MAX_TOKENS = 1 << 31
_LONG_TEXT = 4096  # characters; encoding one takes milliseconds


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Turn exceptions and Rust panics of the `tokenizers` library into TritGgufError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DamagedFileError(f"{what} ({error}); fetch the original or convert the model again") from error


class Tokenizer:
    """The tokenizer of a GGUF file.

    `bos_token` and `eos_token` are the tokens' texts ("" if there is none), `stop_tokens` the ids that end a text,
    `control_texts` the texts of control tokens, which only a chat template may write. Raises TritGgufError if the
    file's Hugging Face tokenizer is missing or damaged.
    """

    def __init__(self, metadata: Mapping[str, Any], *, name: str = "the file") -> None:
        self._name = name
        self._tokenizer = self._load(metadata)
        self._encoders: dict[bool, tokenizers.Tokenizer] = {}  # by whether they parse control tokens
        self._making_encoder = threading.Lock()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos_id = self._token_id(metadata, "bos")
        self.eos_id = self._token_id(metadata, "eos")
        self.add_bos = self.bos_id is not None and _adds_bos(metadata)
        self.bos_token = self._text_of(self.bos_id)
        self.eos_token = self._text_of(self.eos_id)
        self.added_tokens = self._tokenizer.get_added_tokens_decoder()
        self.control_texts = tuple(
            token.content for token in self.added_tokens.values() if token.special and token.content
        )
        self.stop_tokens = self._stop_tokens(metadata)

    def _load(self, metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
        serialized = metadata.get(KEY_HUGGINGFACE)
        if not isinstance(serialized, str):
            raise DamagedFileError(
                f"{self._name} carries no tokenizer ({KEY_HUGGINGFACE}); write it with `tritgguf convert`"
            )
        with tokenizer_errors(f"{self._name}: the tokenizer cannot be read"):
            return tokenizers.Tokenizer.from_str(serialized)

    def _token_id(self, metadata: Mapping[str, Any], name: str) -> int | None:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int) and 0 <= token < _MAX_TOKENS and self._tokenizer.id_to_token(token) is not None:
            return token
        return None

    def _text_of(self, token: int | None) -> str:
        return "" if token is None else self._tokenizer.id_to_token(token) or ""

    def _stop_tokens(self, metadata: Mapping[str, Any]) -> frozenset[int]:
        from_keys = (self._token_id(metadata, name) for name in ("eos", "eot", "eom"))
        # Only added tokens count: a vocabulary of source code may contain `</s>` as ordinary text.
        by_name = named_stops({token.content: token_id for token_id, token in self.added_tokens.items()})
        stated = {token for token in from_keys if token is not None} | {*stop_ids(metadata)}
        return frozenset(stated | by_name)

    def _encoder(self, parse_special: bool) -> tokenizers.Tokenizer:
        """Return what encodes with this setting, which the library has for all threads.

        A copy for each, where both are needed: none waits for the long text of another thread.
        """
        with self._making_encoder:
            if parse_special not in self._encoders:
                encoder = tokenizers.Tokenizer.from_str(self.as_json()) if self._encoders else self._tokenizer
                encoder.encode_special_tokens = not parse_special
                self._encoders[parse_special] = encoder
            return self._encoders[parse_special]

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def as_json(self) -> str:
        """Return the text of its tokenizer.json."""
        return self._tokenizer.to_str()

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the tokens of a text.

        `add_special` prepends the bos token if the model uses one and the text does not start with it.
        `parse_special` turns the text of a control token, such as `<|im_end|>`, into that token; otherwise it stays
        plain text. Surrogate escapes, which stand for invalid UTF-8 bytes, become replacement characters.
        """
        if not text.isascii():
            text = _without_surrogates(text)
        encoder = self._encoder(parse_special)
        with tokenizer_errors(f"{self._name}: the tokenizer cannot read this text"):
            if len(text) < _LONG_TEXT:
                tokens = encoder.encode(text, add_special_tokens=False).ids
            else:  # `encode` holds Python's lock, so that nothing else runs for as long as it takes
                tokens = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self.with_bos(tokens) if add_special else tokens

    def with_bos(self, tokens: list[int]) -> list[int]:
        """Return the tokens with bos prepended if the model uses one and it is missing."""
        if self.add_bos and self.bos_id is not None and tokens[:1] != [self.bos_id]:
            return [self.bos_id, *tokens]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the tokens, without control tokens."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def vocabulary_entry(self, token: int) -> str:
        """Return how the vocabulary writes a token, such as `Ġthe`; an empty text for one that it does not have."""
        return self._tokenizer.id_to_token(token) or ""

    @functools.cached_property
    def is_byte_level(self) -> bool:
        """Whether a character of the vocabulary's entries stands for a byte, as in GPT-2."""
        decoder = self._tokenizer.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    def has_text(self, token: int) -> bool:
        """Tell whether a token has text: it is in the vocabulary and is not a control token."""
        added = self.added_tokens.get(token)
        return self._tokenizer.id_to_token(token) is not None and not (added and added.special)


def stop_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the ids in KEY_STOP_IDS; none if the file lacks it."""
    ids = metadata.get(KEY_STOP_IDS)
    return [token for token in ids if type(token) is int and token >= 0] if isinstance(ids, list) else []


def named_stops(added: Mapping[str, int]) -> set[int]:
    """Return the ids of the added tokens (text -> id) that end a text because of their names."""
    stops = {added[text] for text in _STOP_TOKEN_NAMES.split() if text in added}
    # In models that stop at <|return|> or <|flush|>, <|end|> only ends one part of the answer.
    if added.keys() & {"<|return|>", "<|flush|>"} and added.keys() & {"<|call|>", "<|calls|>"}:
        stops.discard(added.get("<|end|>", -1))
    return stops


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Tell whether texts start with bos: from the file's key, otherwise from the tokenizer type."""
    add_bos = metadata.get("tokenizer.ggml.add_bos_token")
    if isinstance(add_bos, bool):
        return add_bos
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        return metadata.get("tokenizer.ggml.pre") in _BOS_PRE_TOKENIZERS.split()
    return metadata.get("tokenizer.ggml.model") == "llama"


def _without_surrogates(text: str) -> str:
    """Return a text that can be encoded: bytes that were invalid UTF-8, and lone surrogates, become U+FFFD."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
