"""The text that a model is calibrated on, as windows of tokens: a user's, or what the model itself writes.

Text of its own costs nobody a data set and looks like what the model will be used for: it is drawn from the model's
own distribution, at temperature 1. (That sampling does better than taking the likeliest token is from LLM-QAT, Liu et
al., 2023.) From one start a model says much the same, so each text starts with one of many openings, of prose,
documentation, code, tables and dialogues; a token at random, as in that paper, does worse (`docs/quality.md`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tritgguf.calibration.text import (
    DEFAULT_TOKENS,
    WINDOW_TOKENS,
    plain_tokens,
    tokenizer_of,
    vocabulary_size,
    window_length,
    windows_of_text,
)
from tritgguf.conversion.convert import convert
from tritgguf.conversion.encoders import V2
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.journal import JobLog
from tritgguf.generation.engine import Engine
from tritgguf.generation.request import Request
from tritgguf.generation.sampling import Sampler, SamplingOptions
from tritgguf.runtime.kv_pool import page_bytes, pages_of
from tritgguf.runtime.model import Model

if TYPE_CHECKING:
    from tritgguf.sources.source import Source
DEFAULT_OWN_TOKENS = 32 * WINDOW_TOKENS  # which the model has to write first
_WRITING_DEPTH = 4
_MOST_TEXTS = 64  # at once
_MOST_CACHE_BYTES = 1 << 30
_OPENINGS = (
    *("The ", "In ", '"', "Once upon a time", "Dear ", "To whom it may concern", "Chapter 1\n\n", "For example, "),
    *("Abstract\n\n", "Theorem", "Let ", "How to ", "What is ", "Question: ", "Answer: ", "User: ", "A: "),
    *("# ", "## Installation\n\n", "Usage: ", "Features\n\n", "Changelog\n\n", "Note that ", "License"),
    *("1. ", "- ", "| ", "Ingredients:\n", "<html>", '{"', "SELECT ", "#include <", "function "),
    *("def ", "import ", "class ", '"""', "Returns ", "This module ", "Parameters\n"),
)

Progress = Callable[[int, int], None]
"""Called with the tokens that are written and those wanted."""


def calibration_windows(
    source: Source,
    text: Path | None,
    tokens: int | None = None,
    *,
    seed: int = 0,
    threads: int | None = None,
    saved: SavedText | None = None,
    progress: Progress | None = None,
) -> tuple[list[list[int]], str]:
    """Return the windows of a text file, or of the model's own text, and a few words on where they come from.

    `tokens` None is for `DEFAULT_TOKENS` or `DEFAULT_OWN_TOKENS`; the rest is as in `windows_of_own_text`.
    Raises TritGgufError for a file that cannot be read or is too short.
    """
    if text is None:
        wanted = tokens or DEFAULT_OWN_TOKENS
        windows = windows_of_own_text(source, wanted, seed=seed, threads=threads, saved=saved, progress=progress)
        return windows, f"own text, seed {seed}"
    try:
        content = text.read_text("utf-8", errors="replace")
    except OSError as error:
        raise TritGgufError(f"{text}: {error.strerror}; give a text file") from error
    try:
        return windows_of_text(source, content, tokens or DEFAULT_TOKENS), text.name
    except TritGgufError as error:
        raise TritGgufError(f"{text}: {error}") from error


def windows_of_own_text(
    source: Source,
    tokens: int,
    *,
    seed: int = 0,
    threads: int | None = None,
    saved: SavedText | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Return windows of equal length of text that the model itself writes.

    The model writes as a trit file of depth 4, in the folder for temporary files, so that it runs from the disk and
    memory does not grow with it. The same seed gives the same text. Windows that `saved` has are not written again.
    """
    length = window_length(source)
    count = max(1, tokens // length)
    job = {"text": source.name, "seed": seed, "windows": count, "length": length}
    windows = [] if saved is None else saved.open(job, vocabulary_size(source))
    if len(windows) == count:
        return windows
    tokenizer = tokenizer_of(source)
    openings = [tokenizer.with_bos(ids) for text in _OPENINGS if (ids := plain_tokens(tokenizer, text))]
    if not openings:
        raise TritGgufError(f"{source.name}: its vocabulary has no ordinary tokens; give a text (--text)")
    with tempfile.TemporaryDirectory(prefix="tritgguf-") as folder:
        path = Path(folder) / "writer.gguf"
        depth = _WRITING_DEPTH
        convert(
            source.name, path, depth=depth, output_depth=depth, embedding_depth=depth, encoder=V2(), threads=threads
        )
        engine = _writer(path, length, threads)
        while len(windows) < count:
            done = len(windows)
            numbers = range(done, min(count, done + engine.parallel))
            texts = [_Text(openings, tokenizer.stop_tokens, np.random.default_rng([seed, n])) for n in numbers]

            def show(tokens: int, done: int = done) -> None:
                if progress is not None:
                    progress(done * length + tokens, count * length)

            for window in _write(engine, texts, length, show):
                windows.append(window)
                if saved is not None:
                    saved.add(window)
    return windows


class SavedText:
    """Saves the windows of own text beside the file that they are for, so that an interruption does not lose them.

    A context manager: at its end they are removed, unless an interruption ends it or an unfinished file is left behind,
    which will need them again.

    Args:
        output: the file that is to be written.
        resume: whether windows of an earlier run are taken over; otherwise they are written anew.

    """

    def __init__(self, output: Path, *, resume: bool) -> None:
        self._output, self._resume = output, resume
        self._path = output.with_name(f"{output.name}.part.text")
        self._log: JobLog | None = None

    def open(self, job: Mapping[str, object], vocabulary_size: int) -> list[list[int]]:
        """Return the windows that are there.

        Raises TritGgufError where they are of another job, or damaged.
        """
        self._log = JobLog(self._path, self._output, job)
        windows = self._log.entries() if self._resume else []
        for window in windows:
            if not isinstance(window, list) or len(window) != job["length"]:
                raise self._log.misfit("is damaged")
            if not all(type(token) is int and 0 <= token < vocabulary_size for token in window):
                raise self._log.misfit("is damaged")
        if not windows:
            self._log.begin()
        return windows

    def add(self, window: list[int]) -> None:
        """Save a window."""
        if self._log is not None:
            self._log.append([window])

    def __enter__(self) -> SavedText:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        interrupted = error is not None and not isinstance(error, Exception)
        if not interrupted and not self._output.with_name(f"{self._output.name}.part").exists():
            self._path.unlink(missing_ok=True)


def _writer(path: Path, length: int, threads: int | None) -> Engine:
    """Return an engine for as many texts of this length at once as their keys and values fit into a gigabyte."""
    model = Model(GgufFile(path), threads=threads, decode_bits=8)
    pages = _MOST_CACHE_BYTES // page_bytes(model.config)
    texts = max(1, min(_MOST_TEXTS, pages // (pages_of(length) + 1)))
    return Engine(model, context=length, parallel=texts)


class _Text:
    """Says how a window of own text goes on; where a text ends before the window does, the next one starts.

    It chooses the tokens of a `Request` in place of a `Sampler`.
    """

    def __init__(self, openings: Sequence[list[int]], ends: frozenset[int], random: np.random.Generator) -> None:
        self._openings, self._ends, self._random = openings, ends, random
        self.seed = int(random.integers(1 << 32))
        self._sampler = Sampler(SamplingOptions(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=self.seed))
        self.beginning = self._opening()
        self._waiting: list[int] = []

    def accept(self, tokens: Iterable[int]) -> None:
        """Do nothing: no token is penalized."""

    def sample(self, logits: np.ndarray) -> int:
        """Return the next token, drawn by float32 logits [vocabulary] unless an opening is to be written."""
        if self._waiting:
            return self._waiting.pop(0)
        token = self._sampler.sample(logits)
        if token in self._ends:
            self._waiting = self._opening()
        return token

    def _opening(self) -> list[int]:
        return list(self._openings[int(self._random.integers(len(self._openings)))])


def _write(engine: Engine, texts: Sequence[_Text], length: int, show: Callable[[int], None]) -> list[list[int]]:
    """Return a window of each text; `show` is called with the tokens that are written."""
    requests = []
    for text in texts:
        prompt = text.beginning[:length]
        wanted = length - len(prompt)
        requests.append(engine.submit(Request(prompt, sampler=text, max_tokens=wanted, cache_prompt=False)))
    while engine.step():
        show(sum(len(request.tokens) for request in requests))
    for request in requests:
        if request.error is not None:
            raise request.error
    return [request.tokens for request in requests]
