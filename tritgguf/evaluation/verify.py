"""Verify a trit file: two separate questions, answered on the same windows of text.

*Runner*: do this package's kernels compute the file's model correctly? The runner's logits are compared with those of
transformers in float32 with the file's dequantized weights, so any difference is arithmetic. It is measured with exact
activations, where only float32 rounding is left, and with 16-bit activations. The 8-bit activations that `run` uses
for prompts are compared with the 16-bit ones.

*Quantization*: how much quality did the conversion lose? The trit model is compared with the source model. The trit
model's logits are the runner's, because users get these; the source's are those of transformers in float32. The
source's logits are computed once for all files.

Memory: one float32 copy of the model (the dequantized weights replace the source's in place) and the logits of two
models for one window, 4 bytes per token and vocabulary entry: twice 311 MB for 512 tokens and a vocabulary of 151,936.
The runner computes its 16-bit logits twice, so that they need not be stored until the weights are replaced.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from tritgguf.errors import TritGgufError
from tritgguf.evaluation.divergence import Comparison, compare_logits, largest_difference
from tritgguf.evaluation.logits_store import LogitsStore
from tritgguf.evaluation.quantization_costs import (
    FileQuality,
    Progress,
    Runner,
    bits_per_weight,
    quantization_costs,
    source_logits,
)
from tritgguf.evaluation.text_windows import common_windows, shipped_text
from tritgguf.formats.scores import text_fingerprint
from tritgguf.runtime.compiler import prepare_kernels

if TYPE_CHECKING:
    from tritgguf.evaluation.layer_errors import LayerError
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.reference.model import ReferenceModel
    from tritgguf.sources.source import Source

_DIMENSIONS = {
    "block_count": "layers",
    "embedding_length": "width",
    "feed_forward_length": "feed-forward width",
    "attention.head_count": "heads",
    "attention.head_count_kv": "key-value heads",
}


@dataclass(frozen=True)
class VerifyReport:
    """Results of `verify`; KL divergences are in nats."""

    source: str
    file: Path
    tokens: int
    windows: int
    max_rel_logit_diff: float
    """Runner with exact activations: the largest logit difference divided by the largest logit."""
    max_rel_logit_diff_int16: float
    """The same with 16-bit activations, which `run` uses for generated tokens."""
    kl_int8: float
    """Mean KL divergence between 16-bit and 8-bit activations, which `run` uses for prompts."""
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    perplexity_reference: float
    seconds: float
    """Duration of the whole verification, for all files."""
    layers: list[LayerError] | None = None
    """Errors of each decoder block, if requested."""
    file_bytes: int = 0
    bits_per_weight: float = 0.0
    """Of the whole file."""
    tokens_per_second: float | None = None
    """Speed of generating, if it was measured."""
    text: str = ""
    """Fingerprint of the text, see `text_fingerprint`."""
    revision: str = ""
    """The source's commit on the hub, if it is known."""

    @property
    def quality(self) -> FileQuality:
        """The file's row of a comparison."""
        return FileQuality(**{field.name: getattr(self, field.name) for field in fields(FileQuality)})

    def as_dict(self) -> dict[str, Any]:
        """Return what `verify --json` prints."""
        return {
            "source": self.source,
            "file": str(self.file),
            "revision": self.revision,
            "text": self.text,
            "tokens": self.tokens,
            "windows": self.windows,
            "runner": {
                "max_rel_logit_diff": self.max_rel_logit_diff,
                "max_rel_logit_diff_int16": self.max_rel_logit_diff_int16,
                "kl_int8": self.kl_int8,
            },
            "quantization": {
                "kl_mean": self.kl_mean,
                "kl_p99": self.kl_p99,
                "top1_agreement": self.top1_agreement,
                "perplexity": self.perplexity,
                "perplexity_reference": self.perplexity_reference,
            },
            "file_bytes": self.file_bytes,
            "bits_per_weight": self.bits_per_weight,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            **({} if self.layers is None else {"layers": [vars(layer) for layer in self.layers]}),
        }


@dataclass(frozen=True)
class RunnerErrors:
    """The runner's measures of a file in a `VerifyReport`, with the same names."""

    max_rel_logit_diff: float
    max_rel_logit_diff_int16: float
    kl_int8: float


def verify(
    source: str | Path,
    file: str | Path,
    *,
    text: str | None = None,
    tokens: int = 512,
    layers: bool = False,
    threads: int | None = None,
    isa: str | None = None,
    store: LogitsStore | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare a trit GGUF file with the source it was converted from.

    Args:
        source: a Hugging Face folder, a hub id or a stock GGUF file, as for `convert`.
        file: the trit file.
        text: the text itself; None means the text that ships with the package.
        tokens: number of tokens of the text to evaluate; fewer if the text is shorter. They are split into independent
            windows of up to 512 tokens, each with a BOS token at the start if the model uses one. KL divergence and
            agreement are measured at every position, perplexity at positions whose next token is in the same window.
        layers: whether to measure the error of each decoder block too, on the windows of full length.
        threads: number of threads, of the runner and of torch.
        isa: the runner's instruction set.
        store: where the source's logits are kept for the next files; None: nowhere.
        progress: called with the stage, the number of steps done and their total.

    Raises:
        TritGgufError: torch or transformers is missing, the file was not converted from the source, or the text is too
            short.

    """
    (report,) = verify_files(
        source,
        [file],
        text=text,
        tokens=tokens,
        layers=layers,
        threads=threads,
        isa=isa,
        store=store,
        progress=progress,
    )
    return report


def verify_files(
    source: str | Path,
    files: Sequence[str | Path],
    *,
    text: str | None = None,
    tokens: int = 512,
    layers: bool = False,
    threads: int | None = None,
    isa: str | None = None,
    store: LogitsStore | None = None,
    progress: Progress | None = None,
) -> list[VerifyReport]:
    """Compare several trit GGUF files with their common source; return one report per file, in order.

    The source's logits are computed once for all files. Arguments and errors are those of `verify`; TritGgufError also
    if the files tokenize the text differently.
    """
    from tritgguf.reference.model import require_torch
    from tritgguf.sources.hub_cache import revision_of

    if not files:
        return []
    start = time.perf_counter()
    report: Progress = progress or (lambda stage, done, total: None)
    require_torch()
    opened, trit_files = open_all(source, files)
    text = shipped_text() if text is None else text
    windows = common_windows(trit_files, text, tokens)
    start += prepare_kernels(isa)
    progresses = [report if len(trit_files) == 1 else _with_file_name(report, file) for file in trit_files]
    costs, errors = _measures(opened, trit_files, windows, Runner(threads, isa), store, report, progresses)
    block_errors = [
        _layer_errors(opened, file, windows, threads, progress_of_file) if layers else None
        for file, progress_of_file in zip(trit_files, progresses, strict=True)
    ]
    seconds = time.perf_counter() - start
    return [
        VerifyReport(
            source=opened.name,
            file=file.path,
            tokens=sum(map(len, windows)),
            windows=len(windows),
            **vars(error),
            **cost.as_dict(),
            seconds=seconds,
            layers=blocks,
            file_bytes=file.path.stat().st_size,
            bits_per_weight=bits_per_weight(file),
            text=text_fingerprint(text),
            revision=revision_of(opened.files[0]),
        )
        for file, cost, error, blocks in zip(trit_files, costs, errors, block_errors, strict=True)
    ]


def _measures(
    source: Source,
    files: Sequence[GgufFile],
    windows: Sequence[Sequence[int]],
    runner: Runner,
    store: LogitsStore | None,
    report: Progress,
    progresses: Sequence[Progress],
) -> tuple[list[Comparison], list[RunnerErrors]]:
    """Return what quantization costs and the runner's errors, of every file; `progresses` has a callback for each."""
    from tritgguf.reference.model import ReferenceModel

    report("load source", 0, 1)
    reference = ReferenceModel.open(source, threads=runner.threads)
    expected = source_logits(source, windows, store, lambda: reference)
    file_logits = [runner.logits_of(file, bits=16) for file in files]
    costs = quantization_costs(expected, files, file_logits, windows, report)
    return costs, [
        runner_errors(reference, file, windows, runner, progress)
        for file, progress in zip(files, progresses, strict=True)
    ]


@overload
def open_all(source: str | Path, files: Sequence[str | Path]) -> tuple[Source, list[GgufFile]]: ...
@overload
def open_all(source: str | Path | None, files: Sequence[str | Path]) -> tuple[Source | None, list[GgufFile]]: ...
def open_all(source: str | Path | None, files: Sequence[str | Path]) -> tuple[Source | None, list[GgufFile]]:
    """Open a source, unless it is None, and trit files that were made of it; TritGgufError if one was not."""
    from tritgguf.formats.gguf_file import open_trit_file
    from tritgguf.sources.open import open_source

    trit_files = [open_trit_file(file) for file in files]
    if source is None:
        return None, trit_files
    opened = open_source(str(source))
    for file in trit_files:
        check_same_model(file, opened)
    return opened, trit_files


def _with_file_name(report: Progress, file: GgufFile) -> Progress:
    """Return a progress callback that adds the file's name to the stage."""
    return lambda stage, done, total: report(f"{stage} of {file.path.name}", done, total)


def runner_errors(
    reference: ReferenceModel,
    file: GgufFile,
    windows: Sequence[Sequence[int]],
    runner: Runner,
    report: Progress,
) -> RunnerErrors:
    """Compare the runner's logits with those of `reference` after loading the file's dequantized weights into it."""
    reference.load_file(file, progress=partial(report, "load dequantized weights"))
    prompt_comparisons = []
    exact_logits = runner.logits_of(file, bits=16, exact=True)
    logits, prompt_logits = (runner.logits_of(file, bits=bits) for bits in (16, 8))
    exact = int16 = largest = 0.0
    for done, window in enumerate(windows):
        report("dequantized", done, len(windows))
        expected = reference.logits(window)
        largest = max(largest, float(np.abs(expected).max()))
        exact = max(exact, largest_difference(expected, exact_logits(window)))
        found = logits(window)
        int16 = max(int16, largest_difference(expected, found))
        del expected  # at most two sets of logits are in memory
        prompt_comparisons.append(compare_logits(found, prompt_logits(window), window[1:]))
        del found
    report("dequantized", len(windows), len(windows))
    return RunnerErrors(exact / largest, int16 / largest, Comparison.concatenate(prompt_comparisons).kl_mean)


def _layer_errors(
    source: Source, file: GgufFile, windows: Sequence[Sequence[int]], threads: int | None, report: Progress
) -> list[LayerError]:
    """Return the errors of every block, on the windows of full length."""
    from tritgguf.evaluation.layer_errors import layer_errors

    equally_long = [window for window in windows if len(window) == len(windows[0])]
    return layer_errors(source, file, equally_long, threads=threads, progress=partial(report, "layers"))


def check_same_model(file: GgufFile, source: Source) -> None:
    """Raise TritGgufError unless file and source have the same dimensions and tensors of the same names and shapes.

    output.weight may be missing on one side, because tied embeddings can be stored with or without it.
    """
    ours = _dimensions(file.metadata)
    theirs = _dimensions({key: value.value for key, value in source.metadata.items()})
    differences = [f"{what} {ours[what]} against {theirs[what]}" for what in ours if ours[what] != theirs[what]]
    if not differences:
        shapes = {name: info.shape for name, info in file.tensors.items()}
        expected = {tensor.name: tuple(tensor.shape) for tensor in source.tensors}
        differences = [
            f"tensor {name} has shape {shapes.get(name, 'none')} against {expected.get(name, 'none')}"
            for name in dict.fromkeys([*shapes, *expected])
            if name != "output.weight" and shapes.get(name) != expected.get(name)
        ]
    if differences:
        raise TritGgufError(
            f"{file.path} was not converted from {source.name}: {', '.join(differences[:3])}; "
            "name the source it was converted from"
        )


def _dimensions(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the architecture and dimensions of a model, by their names in messages."""
    arch = metadata.get("general.architecture")
    return {"architecture": arch, **{what: metadata.get(f"{arch}.{key}", "none") for key, what in _DIMENSIONS.items()}}
