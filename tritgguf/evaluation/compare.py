"""Compare trit files: what they cost and what they are worth, without the check of the runner that `verify` makes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.evaluation.logits_store import LogitsStore
from tritgguf.evaluation.quantization_costs import (
    FileQuality,
    Progress,
    Runner,
    file_quality,
    quantization_costs,
    source_logits,
)
from tritgguf.evaluation.text_windows import common_windows, shipped_text
from tritgguf.evaluation.verify import open_all
from tritgguf.formats.scores import text_fingerprint
from tritgguf.runtime.compiler import prepare_kernels
from tritgguf.sources.hub_cache import revision_of

if TYPE_CHECKING:
    from tritgguf.reference.model import ReferenceModel


@dataclass(frozen=True)
class ComparisonReport:
    """The files of a comparison, and what they were compared with.

    Attributes:
        reference: the source's name, or the first file's.
        revision: the source's commit on the hub, if it is known.
        text: fingerprint of the text.
        tokens: number of tokens.
        perplexity_reference: of the reference.
        files: a row for each file.
        seconds: duration.

    """

    reference: str
    revision: str
    text: str
    tokens: int
    perplexity_reference: float
    files: list[FileQuality] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return what `compare --json` prints."""
        return {**vars(self), "files": [file.as_dict() for file in self.files]}


def compare_files(
    files: Sequence[str | Path],
    *,
    source: str | Path | None = None,
    text: str | None = None,
    tokens: int = 512,
    threads: int | None = None,
    isa: str | None = None,
    store: LogitsStore | None = None,
    progress: Progress | None = None,
) -> ComparisonReport:
    """Compare trit files with their source, or with the first of them, on one text.

    Args:
        files: the trit files, which split the text into the same tokens.
        source: a Hugging Face folder, a hub id or a stock GGUF file, as for `convert`; None: the first file is the
            reference, which needs no torch.
        text, tokens: as for `verify`.
        threads: number of threads, of the runner and of torch.
        isa: the runner's instruction set.
        store: where the source's logits are kept; None: nowhere.
        progress: called with the stage, the number of steps done and their total.

    Raises:
        TritGgufError: a file is of another source or splits the text differently, the text is too short, or torch is
            missing and the store lacks the source's logits.

    """
    start = time.perf_counter()
    report: Progress = progress or (lambda stage, done, total: None)
    opened, trit_files = open_all(source, files)
    text = shipped_text() if text is None else text
    windows = common_windows(trit_files, text, tokens)
    start += prepare_kernels(isa)
    runner = Runner(threads, isa)
    file_logits = [runner.logits_of(file, bits=16) for file in trit_files]

    def reference_model() -> ReferenceModel:
        from tritgguf.reference.model import ReferenceModel

        assert opened is not None
        report("load source", 0, 1)
        return ReferenceModel.open(opened, threads=threads)

    expected: Iterable[np.ndarray] = (
        map(runner.logits_of(trit_files[0], bits=16), windows)
        if opened is None
        else source_logits(opened, windows, store, reference_model)
    )
    costs = quantization_costs(expected, trit_files, file_logits, windows, report)
    return ComparisonReport(
        reference=str(trit_files[0].path) if opened is None else opened.name,
        revision="" if opened is None else revision_of(opened.files[0]),
        text=text_fingerprint(text),
        tokens=sum(map(len, windows)),
        perplexity_reference=costs[0].perplexity_reference,
        files=[file_quality(file, cost) for file, cost in zip(trit_files, costs, strict=True)],
        seconds=time.perf_counter() - start,
    )
