"""Answers that follow a grammar: a JSON schema, a regular expression, or a grammar in Lark's or llama.cpp's notation.

The library llguidance knows which tokens may come next. It computes that for the next token in a thread of its own,
without Python's lock, while the model evaluates the token before.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from tritgguf.errors import BadRequestError, MissingExtraError, TritGgufError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from tritgguf.generation.loaded_model import LoadedModel

JSON_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of any JSON object."""

# Between the parts of a JSON text: at most a line break with its indentation. More says nothing, and small models
# write it without end.
_WHITESPACE = r"\x20|\n[\x20\t]{0,24}"


class TokenConstraint(Protocol):
    """Says which tokens may come next in one answer."""

    def allowed(self) -> np.ndarray:
        """Return which tokens may come next: bool [vocabulary], not to be changed.

        Once nothing can follow, only stop tokens are allowed.
        """

    def accept(self, token: int) -> None:
        """Take note of the next token of the answer, one of those allowed."""


class Grammar:
    """A grammar that llguidance has compiled; the constraints of several answers may come from it.

    Attributes:
        source: the grammar in llguidance's own form.

    """

    def __init__(self, model: LoadedModel, source: str) -> None:
        """Compile; raises BadRequestError for what is no grammar or is too complex, as `compile_grammar`."""
        from llguidance import LLMatcher, LLParserLimits

        self.source = source
        self._stop_tokens = model.tokenizer.stop_tokens
        self._size = model.engine.model.config.vocab_size
        with _grammar_errors():
            limits = LLParserLimits(verbose_errors=False)
            self._matcher = LLMatcher(_vocabulary(model), source, log_level=0, limits=limits)
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
        return Grammar(model, _json_source(json_schema))
    if grammar is not None:
        return Grammar(model, _lark_source(grammar))
    if regex is not None:
        return Grammar(model, _regex_source(regex))
    return None


def check_llguidance() -> None:
    """Raise MissingExtraError unless llguidance can be imported."""
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "grammars and JSON schemas need llguidance; install it with `pip install 'tritgguf[grammar]'`"
        ) from error


def json_options() -> dict[str, Any]:
    """Return llguidance's options for JSON: no keyword is ignored, and little white space is written."""
    return {"lenient": False, "whitespace_pattern": _WHITESPACE}


def _json_source(schema: Mapping[str, Any]) -> str:
    check_llguidance()
    from llguidance import LLMatcher

    if not isinstance(schema, Mapping):
        raise BadRequestError(f"a JSON schema is a JSON object, not {schema!r:.60}")
    with _grammar_errors():
        return LLMatcher.grammar_from_json_schema(json.dumps(dict(schema)), overrides=json_options())  # type: ignore[arg-type]


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
    """The constraint of one answer: a matcher, and the mask for its next token, computed in another thread."""

    def __init__(self, matcher: LLMatcher, stop_tokens: frozenset[int], size: int) -> None:
        self._matcher, self._stop_tokens, self._size = matcher, stop_tokens, size
        self._mask: Future[np.ndarray] = _executor(os.getpid()).submit(self._advance, None)

    def allowed(self) -> np.ndarray:
        """Return which tokens may come next; see `TokenConstraint`."""
        return self._mask.result()

    def accept(self, token: int) -> None:
        """Begin to compute what may come behind a token; see `TokenConstraint`."""
        if token not in self._stop_tokens:
            self._mask = _executor(os.getpid()).submit(self._advance, token)

    def _advance(self, token: int | None) -> np.ndarray:
        """Go on by a token, and return which may follow: bool [vocabulary]."""
        with _grammar_errors():
            if token is not None:
                self._matcher.consume_token(token)
                _check(self._matcher)
            bits = self._matcher.compute_bitmask()
        _check(self._matcher)
        mask = np.zeros(self._size, np.uint8)
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=min(self._size, 8 * len(bits)), bitorder="little")
        mask[: len(allowed)] = allowed
        return mask.view(bool)


@lru_cache(maxsize=1)
def _executor(process: int) -> ThreadPoolExecutor:
    """Return the thread that computes masks; a forked process gets its own."""
    return ThreadPoolExecutor(1, thread_name_prefix="tritgguf-grammar")


_vocabularies: WeakKeyDictionary[LoadedModel, LLTokenizer] = WeakKeyDictionary()
_making_vocabulary = threading.Lock()


def _vocabulary(model: LoadedModel) -> LLTokenizer:
    """Return a model's tokens as llguidance knows them; made once for each model, which takes a moment."""
    from llguidance import LLTokenizer

    with _making_vocabulary:
        if model not in _vocabularies:
            stops = sorted(model.tokenizer.stop_tokens)
            if not stops:
                raise BadRequestError(f"{model.path} has no stop token, so an answer that follows a grammar cannot end")
            try:
                tokenizer = LLTokenizer(model.tokenizer.as_json(), n_vocab=_size(model), eos_token=stops)
            except Exception as error:
                raise TritGgufError(f"{model.path}: llguidance cannot read the tokenizer ({error})") from error
            _vocabularies[model] = tokenizer
        return _vocabularies[model]


def _size(model: LoadedModel) -> int:
    """Return the tokens of the model or of its tokenizer, whichever has more."""
    return max(model.engine.model.config.vocab_size, model.tokenizer.vocabulary_size)


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
    words = " ".join(reason.partition("<state>")[0].split())
    return BadRequestError(f"the grammar or JSON schema cannot be used ({words:.300})")
