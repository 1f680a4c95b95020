"""Is a trit file right? Two separate questions, answered on the same windows of text.

*Runner*: do this package's kernels compute what the file says? The runner's logits stand against those of
transformers, in float32, with the file's dequantized weights. Any difference is arithmetic. It is measured twice:
with exact activations, where only the rounding of float32 is left, and with 16-bit ones; and how far the 8-bit ones
that `run` takes for prompts are from these.

*Quantization*: what did the conversion cost? The trit model stands against the source model. The trit model's
logits are the runner's, for they are what a user gets; the source's are those of transformers in float32.

Memory: one float32 copy of the model (the dequantized weights replace the source's in place) and the runner's
logits for the whole text, 4 bytes for each token and vocabulary entry: 311 MB for 512 tokens of a vocabulary
of 151,936.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tritgguf.errors import TritGgufError
from tritgguf.evaluation.divergence import Comparison, compare_logits
from tritgguf.evaluation.text_windows import shipped_text, tokenized_windows

if TYPE_CHECKING:
    from tritgguf.evaluation.layer_errors import LayerError
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.sources.source import Source
_SIZES = {
    "block_count": "layers",
    "embedding_length": "width",
    "feed_forward_length": "feed-forward width",
    "attention.head_count": "heads",
    "attention.head_count_kv": "key-value heads",
}

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
    from tritgguf.evaluation.layer_errors import layer_errors
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.reference.model import ReferenceModel, require_torch
    from tritgguf.sources.open import open_source

    start = time.perf_counter()
    report: Progress = progress or (lambda stage, done, total: None)
    require_torch()
    trit_file = GgufFile(file)
    opened = open_source(str(source))
    check_same_model(trit_file, opened)
    windows = tokenized_windows(trit_file, shipped_text() if text is None else text, tokens)
    runner_logits: list[np.ndarray] = []
    of_prompts = []
    both = (_runner_logits(trit_file, windows, threads, isa, bits=bits) for bits in (16, 8))
    for window, logits, prompt_logits in zip(windows, *both, strict=True):
        report("runner", len(runner_logits), len(windows))
        runner_logits.append(logits)
        of_prompts.append(compare_logits(logits, prompt_logits, window[1:]))

    report("load source", 0, 1)
    reference = ReferenceModel.open(opened, threads=threads)
    comparisons = []
    for done, (window, ours) in enumerate(zip(windows, runner_logits, strict=True)):
        report("source", done, len(windows))
        comparisons.append(compare_logits(reference.logits(window), ours, window[1:]))
    quantization = Comparison.concatenate(comparisons)

    reference.load_file(trit_file, progress=partial(report, "load dequantized weights"))
    exact_logits = _runner_logits(trit_file, windows, threads, isa, bits=16, exact=True)
    difference = difference_int16 = largest = 0.0
    for done, (window, ours, exact) in enumerate(zip(windows, runner_logits, exact_logits, strict=True)):
        report("dequantized", done, len(windows))
        theirs = reference.logits(window)
        difference = max(difference, float(np.abs(exact - theirs).max()))
        difference_int16 = max(difference_int16, float(np.abs(ours - theirs).max()))
        largest = max(largest, float(np.abs(theirs).max()))
    report("dequantized", len(windows), len(windows))
    del reference
    of_layers = None
    if layers:
        equally_long = [window for window in windows if len(window) == len(windows[0])]
        of_layers = layer_errors(opened, trit_file, equally_long, threads=threads, progress=partial(report, "layers"))
    return VerifyReport(
        source=opened.name,
        file=trit_file.path,
        tokens=sum(map(len, windows)),
        windows=len(windows),
        max_rel_logit_diff=difference / largest,
        max_rel_logit_diff_int16=difference_int16 / largest,
        kl_int8=Comparison.concatenate(of_prompts).kl_mean,
        kl_mean=quantization.kl_mean,
        kl_p99=quantization.kl_p99,
        top1_agreement=quantization.top1_agreement,
        perplexity=quantization.perplexity,
        perplexity_reference=quantization.perplexity_reference,
        seconds=time.perf_counter() - start,
        layers=of_layers,
    )


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


def _runner_logits(
    file: GgufFile,
    windows: Sequence[Sequence[int]],
    threads: int | None,
    isa: str | None,
    *,
    bits: int,
    exact: bool = False,
) -> Iterator[np.ndarray]:
    """Yield the runner's logits of every window: float32 [tokens, vocabulary] each."""
    from tritgguf.generation.engine import Engine
    from tritgguf.generation.request import Request
    from tritgguf.runtime.model import Model

    model = Model(file, threads=threads, prefill_bits=bits, exact=exact, isa=isa)
    cache_type = "f16" if bits == 8 else "f32"
    engine = Engine(model, context=max(map(len, windows)), parallel=1, cache_type=cache_type)
    for window in windows:
        yield engine.outputs(engine.submit(Request(list(window), wanted="logits", cache_prompt=False)))
