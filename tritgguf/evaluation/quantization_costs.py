"""What quantization costs: the logits of files, computed by the runner, against those of a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.errors import TritGgufError
from tritgguf.evaluation.divergence import Comparison, compare_logits
from tritgguf.evaluation.logits_store import LogitsStore, logits_key
from tritgguf.evaluation.text_windows import WINDOW_TOKENS

if TYPE_CHECKING:
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.reference.model import ReferenceModel
    from tritgguf.sources.source import Source

Logits = Callable[[Sequence[int]], np.ndarray]
Progress = Callable[[str, int, int], None]
"""Called with the stage, the number of steps done and their total."""


@dataclass(frozen=True)
class FileQuality:
    """What a file costs and what it is worth: a row of a comparison; divergences in nats, against the reference."""

    file: Path
    file_bytes: int
    bits_per_weight: float
    """Of the whole file."""
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    tokens_per_second: float | None = None
    """Speed of generating; None where it was not measured."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**vars(self), "file": str(self.file)}


@dataclass(frozen=True)
class Runner:
    """Computes logits with this package's kernels."""

    threads: int | None
    isa: str | None

    def logits_of(self, file: GgufFile, *, bits: int, exact: bool = False) -> Logits:
        """Return a function from a window of tokens to its logits, float32 [tokens, vocabulary]."""
        from tritgguf.generation.engine import Engine
        from tritgguf.generation.request import Request
        from tritgguf.runtime.model import Model

        model = Model(file, threads=self.threads, prefill_bits=bits, exact=exact, isa=self.isa)
        engine = Engine(model, context=WINDOW_TOKENS, parallel=1, cache_type="f16" if bits == 8 else "f32")

        def logits(window: Sequence[int]) -> np.ndarray:
            return engine.outputs(engine.submit(Request(list(window), wanted="logits", cache_prompt=False)))

        return logits


def source_logits(
    source: Source,
    windows: Sequence[Sequence[int]],
    store: LogitsStore | None,
    reference: Callable[[], ReferenceModel],
) -> Iterator[np.ndarray]:
    """Yield a source's logits of each window, float32 [tokens, vocabulary]: from the store, or computed and kept there.

    `reference` returns the source in transformers. It is called if the store lacks the logits.
    """
    key, tokens = ("", 0) if store is None else (logits_key(source, windows), sum(map(len, windows)))
    kept = None if store is None else store.find(key, tokens)
    if kept is not None:
        position = 0
        for window in windows:
            yield np.array(kept[position : position + len(window)])
            position += len(window)
        return
    model = reference()
    with nullcontext(_keep_nothing) if store is None else store.keeping(key, tokens) as keep:
        for window in windows:
            logits = model.logits(window)
            keep(logits)
            yield logits


def _keep_nothing(logits: np.ndarray) -> None:
    """Keep nothing."""


def quantization_costs(
    expected: Iterable[np.ndarray],
    files: Sequence[GgufFile],
    file_logits: Sequence[Logits],
    windows: Sequence[Sequence[int]],
    report: Progress,
) -> list[Comparison]:
    """Compare the logits of every file with the expected ones of each window; TritGgufError if vocabularies differ."""
    parts: list[list[Comparison]] = [[] for _ in file_logits]
    report("source", 0, len(windows))
    for done, (window, reference) in enumerate(zip(windows, expected, strict=True), start=1):
        for file, logits, comparisons in zip(files, file_logits, parts, strict=True):
            found = logits(window)
            if found.shape != reference.shape:
                raise TritGgufError(
                    f"{file.path}: has a vocabulary of {found.shape[1]} tokens, not {reference.shape[1]} as what it is"
                    " compared with; compare files of one model"
                )
            comparisons.append(compare_logits(reference, found, window[1:]))
        report("source", done, len(windows))
    return [Comparison.concatenate(comparisons) for comparisons in parts]


def bits_per_weight(file: GgufFile) -> float:
    """Return a file's size in bits for each of its weights."""
    return 8 * file.path.stat().st_size / sum(info.n_weights for info in file.tensors.values())


def file_quality(file: GgufFile, cost: Comparison) -> FileQuality:
    """Return a file's row of a comparison."""
    return FileQuality(
        file.path,
        file.path.stat().st_size,
        bits_per_weight(file),
        cost.kl_mean,
        cost.kl_p99,
        cost.top1_agreement,
        cost.perplexity,
    )
