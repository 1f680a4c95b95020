"""The text that a model is calibrated on, as windows of tokens: a user's, or what the model itself writes.

Text of its own costs nobody a data set and looks like what the model will be used for: it is drawn from the model's
own distribution. Each text starts with a token drawn from the whole vocabulary, because from the same start a model
says much the same. (The first token at random and the rest sampled is what LLM-QAT found best, Liu et al., 2023.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tritgguf.convert import convert
from tritgguf.errors import TritGgufError
from tritgguf.sampling import Sampler, SamplingOptions
from tritgguf.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tritgguf.checkpoint import Source
    from tritgguf.generate import LoadedModel

WINDOW_TOKENS = 512
DEFAULT_TOKENS = 128 * WINDOW_TOKENS
DEFAULT_OWN_TOKENS = 32 * WINDOW_TOKENS  # which a model has to write one after the other
_WRITING_DEPTH = 4
_DRAWS = 10_000

Progress = Callable[[int, int], None]
"""Called with the tokens that are written and those wanted."""


def calibration_windows(
    source: Source,
    text: Path | None,
    tokens: int | None = None,
    *,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[list[int]], str]:
    """Return the windows of a text file, or of the model's own text, and a few words on where they come from.

    `tokens` None is for `DEFAULT_TOKENS` or `DEFAULT_OWN_TOKENS`.
    Raises TritGgufError for a file that cannot be read or is too short.
    """
    if text is None:
        wanted = tokens or DEFAULT_OWN_TOKENS
        windows = windows_of_own_text(source, wanted, seed=seed, threads=threads, progress=progress)
        return windows, f"own text, seed {seed}"
    try:
        content = text.read_text("utf-8", errors="replace")
    except OSError as error:
        raise TritGgufError(f"{text}: {error.strerror}; give a text file") from error
    try:
        return windows_of_text(source, content, tokens or DEFAULT_TOKENS), text.name
    except TritGgufError as error:
        raise TritGgufError(f"{text}: {error}") from error


def windows_of_text(source: Source, text: str, tokens: int) -> list[list[int]]:
    """Return windows of equal length from evenly spread places of a text.

    Each starts with the BOS token where the model uses one. There are fewer than `tokens` tokens in all when the text
    is shorter; TritGgufError when it does not fill one window.
    """
    tokenizer = _tokenizer(source)
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    length = window_length(source)
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    body = length - len(bos)
    if len(ids) < body:
        raise TritGgufError(f"the calibration text has {len(ids)} tokens; it needs at least {body}, better {tokens}")
    count = min(max(1, tokens // length), len(ids) // body)
    starts = np.linspace(0, len(ids) - body, count).astype(int).tolist()
    return [[*bos, *ids[start : start + body]] for start in starts]


def windows_of_own_text(
    source: Source, tokens: int, *, seed: int = 0, threads: int | None = None, progress: Progress | None = None
) -> list[list[int]]:
    """Return windows of equal length of text that the model itself writes.

    The model writes as a trit file of depth 4, in the folder for temporary files, so that it runs from the disk and
    memory does not grow with it. The same seed gives the same text.
    """
    from tritgguf.generate import load

    length = window_length(source)
    count = max(1, tokens // length)
    windows: list[list[int]] = []
    with tempfile.TemporaryDirectory(prefix="tritgguf-") as folder:
        file = Path(folder) / "writer.gguf"
        convert(source.name, file, depth=_WRITING_DEPTH, encoder="v2", threads=threads)
        model = load(file, context=length, threads=threads)
        sampler = Sampler(SamplingOptions(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed))
        starts = _random_starts(model, seed)
        for number in range(count):
            windows.append([])
            for token in _write(model, sampler, starts, length):
                windows[-1].append(token)
                if progress is not None:
                    progress(number * length + len(windows[-1]), count * length)
    return windows


def window_length(source: Source) -> int:
    """Return how many tokens a window has: 512, or the model's context if that is shorter."""
    metadata = source.metadata
    context = metadata[f"{metadata['general.architecture'].value}.context_length"].value
    return min(WINDOW_TOKENS, int(context))


def _write(model: LoadedModel, sampler: Sampler, starts: Iterator[list[int]], length: int) -> Iterator[int]:
    """Yield a window's tokens; where a text ends before the window does, the next one starts."""
    model.model.truncate(0)
    left = length
    ended: list[int] = []
    while left:
        start = next(starts)[:left]
        yield from start
        left -= len(start)
        logits = model.model.forward([*ended, *start])
        while left:
            token = sampler.sample(logits)
            yield token
            left -= 1
            if token in model.tokenizer.stop_tokens:
                ended = [token]
                break
            if left:
                logits = model.model.forward([token])


def _random_starts(model: LoadedModel, seed: int) -> Iterator[list[int]]:
    """Yield how texts start: BOS where the model uses it, and an ordinary token at random."""
    random = np.random.default_rng(seed)
    tokenizer = model.tokenizer
    while True:
        for _ in range(_DRAWS):
            token = int(random.integers(model.model.config.vocab_size))
            if tokenizer.has_text(token):
                break
        else:
            raise TritGgufError(f"{model.path}: its vocabulary has no ordinary tokens; give a text (--text)")
        yield tokenizer.with_bos([token])


def _tokenizer(source: Source) -> Tokenizer:
    return Tokenizer({key: value.value for key, value in source.metadata.items()}, name=source.name)
