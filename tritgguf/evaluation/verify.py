"""Is a trit file right? Two separate questions, answered on the same windows of text.

*Runner*: do this package's kernels compute what the file says? The runner's logits stand against those of
transformers, in float32, with the file's dequantized weights. Any difference is arithmetic. It is measured twice:
with exact activations, where only the rounding of float32 is left, and with 16-bit ones; and how far the 8-bit ones
that `run` takes for prompts are from these.

*Quantization*: what did the conversion cost? The trit model stands against the source model. The trit model's
logits are the runner's, for they are what a user gets; the source's are those of transformers in float32. They are
computed once, however many files are compared with them.

Memory: one float32 copy of the model (the dequantized weights replace the source's in place) and the logits of two
models for one window, 4 bytes for each token and vocabulary entry: twice 311 MB for 512 tokens of a vocabulary of
151,936. The runner computes its 16-bit logits twice instead of keeping them until the weights are replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.errors import TritGgufError
from tritgguf.evaluation.divergence import Comparison, compare_logits, largest_difference
from tritgguf.evaluation.text_windows import WINDOW_TOKENS, common_windows, shipped_text

if TYPE_CHECKING:
    from tritgguf.evaluation.layer_errors import LayerError
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.reference.model import ReferenceModel
    from tritgguf.sources.source import Source

_SIZES = {
    "block_count": "layers",
    "embedding_length": "width",
    "feed_forward_length": "feed-forward width",
    "attention.head_count": "heads",
    "attention.head_count_kv": "key-value heads",
}

Logits = Callable[[Sequence[int]], np.ndarray]
Progress = Callable[[str, int, int], None]
"""Called with the stage, the steps done and the steps in all."""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` measured; the divergences are in nats."""

    source: str
    file: Path
    tokens: int
    windows: int
    max_rel_logit_diff: float
    """Runner with exact activations: the largest difference over the largest logit."""
    max_rel_logit_diff_int16: float
    """The same with 16-bit activations, as `run` has them for generated tokens."""
    kl_int8: float
    """From 16-bit activations to 8-bit ones, as `run` has them for prompts: the mean divergence."""
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    perplexity_reference: float
    seconds: float
    """Of the whole verification, with all its files."""
    layers: list[LayerError] | None = None
    """Where the error comes from, if that was asked for."""

    def as_dict(self) -> dict[str, Any]:
        """Return what `verify --json` prints."""
        return {
            "source": self.source,
            "file": str(self.file),
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
            "seconds": self.seconds,
            **({} if self.layers is None else {"layers": [vars(layer) for layer in self.layers]}),
        }


@dataclass(frozen=True)
class _RunnerErrors:
    """The measures of the runner in a `VerifyReport`, under the same names."""

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
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare a trit GGUF file with the source it was converted from.

    `source` is whatever `convert` takes: an HF folder, a stock GGUF file or a hub id. `text` is the text
    itself; without it the text that ships with the package is read. Its first `tokens` tokens are evaluated
    (fewer if it is shorter; the report says how many) in windows of up to 512 tokens that do not see each
    other, each starting with the BOS token where the model uses one. Divergence and agreement count at every
    position, perplexity at every position whose next token lies in the same window. `threads` counts for the
    runner and for torch, `isa` names the runner's instruction set. `layers` asks for each block's error too, on the
    windows of full length.

    Raises TritGgufError when torch or transformers is missing, when source and file do not belong together or
    when the text is too short.
    """
    (report,) = verify_files(
        source, [file], text=text, tokens=tokens, layers=layers, threads=threads, isa=isa, progress=progress
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
    progress: Progress | None = None,
) -> list[VerifyReport]:
    """Compare several trit GGUF files with the source they were converted from, each as `verify` does.

    The source's logits are computed once for all of them. Returns one report for each file, in their order.

    Raises TritGgufError as `verify` does, and when the files split the text into different tokens.
    """
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.reference.model import ReferenceModel, require_torch
    from tritgguf.sources.open import open_source

    if not files:
        return []
    start = time.perf_counter()
    report: Progress = progress or (lambda stage, done, total: None)
    require_torch()
    trit_files = [GgufFile(file) for file in files]
    opened = open_source(str(source))
    for file in trit_files:
        check_same_model(file, opened)
    windows = common_windows(trit_files, shipped_text() if text is None else text, tokens)

    runner = _Runner(threads, isa)
    of_files = [runner.logits_of(file, bits=16) for file in trit_files]
    report("load source", 0, 1)
    reference = ReferenceModel.open(opened, threads=threads)
    costs = _costs_of_quantization(reference, of_files, windows, report)
    progresses = [report if len(trit_files) == 1 else _naming(report, file) for file in trit_files]
    errors = [
        _errors_of_runner(reference, file, windows, runner, progress_of_file)
        for file, progress_of_file in zip(trit_files, progresses, strict=True)
    ]
    del reference
    of_layers = [
        _errors_of_layers(opened, file, windows, threads, progress_of_file) if layers else None
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
        )
        for file, cost, error, blocks in zip(trit_files, costs, errors, of_layers, strict=True)
    ]


@dataclass(frozen=True)
class _Runner:
    """The runner's threads and instruction set."""

    threads: int | None
    isa: str | None

    def logits_of(self, file: GgufFile, *, bits: int, exact: bool = False) -> Logits:
        """Return a function from a window of tokens to logits, float32 [tokens, vocabulary]."""
        from tritgguf.generation.engine import Engine
        from tritgguf.generation.request import Request
        from tritgguf.runtime.model import Model

        model = Model(file, threads=self.threads, prefill_bits=bits, exact=exact, isa=self.isa)
        engine = Engine(model, context=WINDOW_TOKENS, parallel=1, cache_type="f16" if bits == 8 else "f32")

        def logits(window: Sequence[int]) -> np.ndarray:
            return engine.outputs(engine.submit(Request(list(window), wanted="logits", cache_prompt=False)))

        return logits


def _naming(report: Progress, file: GgufFile) -> Progress:
    """Return a progress callback whose stages name the file."""
    return lambda stage, done, total: report(f"{stage} of {file.path.name}", done, total)


def _costs_of_quantization(
    reference: ReferenceModel,
    of_files: Sequence[Logits],
    windows: Sequence[Sequence[int]],
    report: Progress,
) -> list[Comparison]:
    """Compare the runner's logits of every file with those of the source, which `reference` has the weights of."""
    parts: list[list[Comparison]] = [[] for _ in of_files]
    for done, window in enumerate(windows):
        report("source", done, len(windows))
        expected = reference.logits(window)
        for logits, comparisons in zip(of_files, parts, strict=True):
            comparisons.append(compare_logits(expected, logits(window), window[1:]))
    report("source", len(windows), len(windows))
    return [Comparison.concatenate(comparisons) for comparisons in parts]


def _errors_of_runner(
    reference: ReferenceModel,
    file: GgufFile,
    windows: Sequence[Sequence[int]],
    runner: _Runner,
    report: Progress,
) -> _RunnerErrors:
    """Compare the runner's logits with those of transformers; `reference` receives the file's dequantized weights."""
    reference.load_file(file, progress=partial(report, "load dequantized weights"))
    of_prompts = []
    exact_logits = runner.logits_of(file, bits=16, exact=True)
    logits, prompt_logits = (runner.logits_of(file, bits=bits) for bits in (16, 8))
    exact = int16 = largest = 0.0
    for done, window in enumerate(windows):
        report("dequantized", done, len(windows))
        expected = reference.logits(window)
        largest = max(largest, float(np.abs(expected).max()))
        exact = max(exact, largest_difference(expected, exact_logits(window)))
        ours = logits(window)
        int16 = max(int16, largest_difference(expected, ours))
        del expected  # no more than two sets of logits are in memory
        of_prompts.append(compare_logits(ours, prompt_logits(window), window[1:]))
        del ours
    report("dequantized", len(windows), len(windows))
    return _RunnerErrors(exact / largest, int16 / largest, Comparison.concatenate(of_prompts).kl_mean)


def _errors_of_layers(
    source: Source, file: GgufFile, windows: Sequence[Sequence[int]], threads: int | None, report: Progress
) -> list[LayerError]:
    """Return the error of every block, on the windows of full length."""
    from tritgguf.evaluation.layer_errors import layer_errors

    equally_long = [window for window in windows if len(window) == len(windows[0])]
    return layer_errors(source, file, equally_long, threads=threads, progress=partial(report, "layers"))


def check_same_model(file: GgufFile, source: Source) -> None:
    """Raise TritGgufError unless the file's tensors are the source's, name by name and shape by shape.

    A head of its own on one side only is fine: it is a question of how the source was stored.
    """
    ours = _sizes(file.metadata)
    theirs = _sizes({key: value.value for key, value in source.metadata.items()})
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


def _sizes(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells two models apart at a glance, by its name in messages."""
    arch = metadata.get("general.architecture")
    return {"architecture": arch, **{what: metadata.get(f"{arch}.{key}") for key, what in _SIZES.items()}}
