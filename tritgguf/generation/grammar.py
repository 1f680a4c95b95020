"""Answers that follow a grammar: a JSON schema, a regular expression, or a grammar in Lark's or llama.cpp's notation.

The library llguidance computes which tokens may come next, without holding Python's lock.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from tritgguf.errors import BadRequestError, DamagedFileError, MissingExtraError, TritGgufError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from tritgguf.generation.loaded_model import LoadedModel
    from tritgguf.tokenization.tokenizer import Tokenizer

JSON_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of any JSON object."""

# Between the parts of a JSON text: at most a line break with its indentation. More says nothing, and small models
# write it without end.
_WHITESPACE = r"\x20|\n[\x20\t]{0,24}"
_WORTH_A_THREAD = 0.0005  # seconds that a mask takes
# The masks of eight tokens, by the byte that has a bit for each: float32 [256, 8].
_MASKS_OF_8 = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder="little"),
    np.float32(0),
    np.float32(-np.inf),
)


class TokenConstraint(Protocol):
    """Says which tokens may come next in one answer."""

    def mask(self) -> np.ndarray:
        """Return what to add to the next token's logits: float32 [vocabulary], 0 for what may come and -inf otherwise.

        Where only the end can follow, stop tokens alone may come.
        """

    def accept(self, token: int) -> None:
        """Take note of the next token of the answer, one of those that may come."""


class Grammar:
    """A grammar that llguidance has compiled; the constraints of several answers may come from it.

    Attributes:
        source: the grammar in llguidance's own form.

    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, source: str) -> None:
        """Compile for a model with `vocab_size` logits; BadRequestError for what is no grammar or is too complex."""
        from llguidance import LLMatcher, LLParserLimits

        self.source = source
        self._stop_tokens, self._size = tokenizer.stop_tokens, vocab_size
        vocabulary = _vocabulary(tokenizer, vocab_size)
        with _grammar_errors():
            limits = LLParserLimits(verbose_errors=False)
            self._matcher = LLMatcher(vocabulary, source, log_level=0, limits=limits)
        _check(self._matcher)

    def constraint(self) -> TokenConstraint:
        """Return the constraint of a new answer."""
        return _GrammarConstraint(self._matcher.deep_copy(), self._stop_tokens, self._size)


def compile_grammar(
    model: LoadedModel,
    *,
    json_schema: Mapping[str, Any] | None = None,
    grammar: str | None = None,
    regex: str | None = None,
) -> Grammar | None:
    """Return what the model's answers have to follow; None if nothing is given.

    Args:
        model: what generates.
        json_schema: a JSON schema; `JSON_OBJECT` is that of any object. Every keyword that could not be enforced is
            refused.
        grammar: a grammar in the notation of Lark as llguidance extends it, or in llama.cpp's GBNF.
        regex: a regular expression for the whole answer, in the syntax of Rust's regex crate.

    Raises:
        BadRequestError: more than one of them; one that is invalid, too complex or not supported, with the reason.
        MissingExtraError: llguidance is not installed.

    """
    if (json_schema, grammar, regex).count(None) < 2:
        raise BadRequestError("an answer follows one grammar; give a JSON schema, a grammar or a regular expression")
    if json_schema is not None:
        source = json_schema_source(json_schema)
    elif grammar is not None:
        source = _lark_source(grammar)
    elif regex is not None:
        source = _regex_source(regex)
    else:
        return None
    return Grammar(model.tokenizer, model.engine.model.config.vocab_size, source)


def check_llguidance() -> None:
    """Raise MissingExtraError unless llguidance can be imported."""
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "grammars and JSON schemas need llguidance; install it with `pip install llguidance`"
        ) from error


def json_options() -> dict[str, Any]:
    """Return llguidance's options for JSON: no keyword is ignored, and little white space is written."""
    return {"lenient": False, "whitespace_pattern": _WHITESPACE}


def json_schema_source(schema: Mapping[str, Any]) -> str:
    """Return a JSON schema in the form that `Grammar` takes; errors as `compile_grammar`."""
    check_llguidance()
    from llguidance import LLMatcher

    if not isinstance(schema, Mapping):
        raise BadRequestError(f"a JSON schema is a JSON object, not {schema!r:.60}")
    with _grammar_errors():
        text = json.dumps(dict(schema))
        return LLMatcher.grammar_from_json_schema(text, overrides=json_options())  # type: ignore[arg-type]


def _lark_source(grammar: str) -> str:
    check_llguidance()
    from llguidance import grammar_from

    if not isinstance(grammar, str):
        raise BadRequestError(f"a grammar is a text, not {grammar!r:.60}")
    with _grammar_errors():
        return grammar_from("grammar", grammar)


def _regex_source(regex: str) -> str:
    check_llguidance()
    from llguidance import LLMatcher

    if not isinstance(regex, str):
        raise BadRequestError(f"a regular expression is a text, not {regex!r:.60}")
    with _grammar_errors():
        return LLMatcher.grammar_from_regex(regex)


class _GrammarConstraint:
    """The constraint of one answer: a matcher, and the mask for its next token.

    The first mask, which is the slowest, is computed while the prompt is evaluated, and later ones while a token is if
    they take long. A short one disturbs the threads of the forward pass for longer than it takes by itself.
    """

    def __init__(self, matcher: LLMatcher, stop_tokens: frozenset[int], size: int) -> None:
        self._matcher, self._stop_tokens, self._size = matcher, stop_tokens, size
        self._seconds = 0.0  # that the last mask took
        self._mask: Future[np.ndarray] = _executor(os.getpid()).submit(self._advance, None)

    def mask(self) -> np.ndarray:
        """Return what to add to the next token's logits; see `TokenConstraint`."""
        return self._mask.result()

    def accept(self, token: int) -> None:
        """Begin to compute what may come behind a token; see `TokenConstraint`."""
        if token in self._stop_tokens:
            return
        if self._seconds > _WORTH_A_THREAD:
            self._mask = _executor(os.getpid()).submit(self._advance, token)
        else:
            self._mask = Future()
            self._mask.set_result(self._advance(token))

    def _advance(self, token: int | None) -> np.ndarray:
        """Go on by a token, and return the mask for the next."""
        start = time.perf_counter()
        with _grammar_errors():
            if token is not None:
                self._matcher.consume_token(token)
                _check(self._matcher)
            bits = self._matcher.compute_bitmask()
        _check(self._matcher)
        mask = _MASKS_OF_8.take(np.frombuffer(bits, np.uint8), axis=0).reshape(-1)[: self._size]
        self._seconds = time.perf_counter() - start
        return mask


@lru_cache(maxsize=1)
def _executor(process: int) -> ThreadPoolExecutor:
    """Return the thread that computes masks; a forked process gets its own."""
    return ThreadPoolExecutor(1, thread_name_prefix="tritgguf-grammar")


_vocabularies: WeakKeyDictionary[Tokenizer, LLTokenizer] = WeakKeyDictionary()
_making_vocabulary = threading.Lock()


def _vocabulary(tokenizer: Tokenizer, size: int) -> LLTokenizer:
    """Return a model's tokens as llguidance knows them; made once for each tokenizer, which takes a moment."""
    from llguidance import LLTokenizer

    with _making_vocabulary:
        if tokenizer not in _vocabularies:
            stops, size = sorted(tokenizer.stop_tokens), max(size, tokenizer.vocabulary_size)
            if not stops:
                raise BadRequestError("the model has no stop token, so an answer that follows a grammar could not end")
            try:
                _vocabularies[tokenizer] = LLTokenizer(tokenizer.as_json(), n_vocab=size, eos_token=stops)
            except Exception as error:
                raise DamagedFileError(f"llguidance cannot read the model's tokenizer ({error})") from error
        return _vocabularies[tokenizer]


@contextmanager
def _grammar_errors() -> Iterator[None]:
    """Turn exceptions and Rust panics of llguidance into BadRequestError."""
    try:
        yield
    except TritGgufError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _refusal(str(error)) from error


def _check(matcher: LLMatcher) -> None:
    """Raise BadRequestError if a matcher has failed."""
    if matcher.is_error():
        raise _refusal(matcher.get_error())


def _refusal(reason: str) -> BadRequestError:
    """Return the error for a grammar that llguidance refuses; of its reason, the first lines say what is wrong."""
    words = " ".join(re.split("<state>|<backtrace>", reason)[0].split())
    return BadRequestError(f"the grammar or JSON schema cannot be used ({words:.300})")
