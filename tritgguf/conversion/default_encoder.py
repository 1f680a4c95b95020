"""The encoder of `convert` where the user names none.

At one or two trits a small model needs calibration: without it, it talks nonsense. A model that would take longer than
`LONGEST_SECONDS` is calibrated only if the user asks for it: large models lose less, and nobody expects a command to
take a night. Trits need none: dequantized ones are recovered, and packed ones are copied, unless another depth is asked
for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cpu_kernels.threads.cores import physical_cores
from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.end_to_end import EndToEnd
from tritgguf.calibration.text import DEFAULT_GENERATED_TOKENS, WINDOW_TOKENS
from tritgguf.calibration.tuning import Tuning
from tritgguf.conversion.depths import F16_DEPTH, DepthOptions, apply_rules
from tritgguf.conversion.encoders import V2, Automatic, Calibrated, Encoder, ScaleSearch
from tritgguf.conversion.recovery import holds_trits
from tritgguf.conversion.requested_depths import packable_matrices, requested_depths, unpacked_matrices
from tritgguf.errors import TritGgufError
from tritgguf.reference.model import require_torch
from tritgguf.sources.source import Source, weights_of, weights_of_a_token

DEEPEST_TO_CALIBRATE = 2
"""With more trits, little is lost without calibration."""
LONGEST_SECONDS = 3600
"""What is estimated to take longer is not calibrated by default."""
_SECONDS_PER_WEIGHT_AND_TOKEN = 4.5e-11
_SECONDS_PER_WEIGHT = 2e-7
"""For writing a text and calibrating on it, with two threads on AVX2; weights of the whole model (docs/quality.md)."""
_TRAINING_SECONDS = 8e-11
"""For each weight, token and epoch of end-to-end training, likewise."""
_BLOCK_TRAINING_SECONDS = 7e-11
"""The same of training of blocks."""
MEASURING_PASSES = 0.3
"""What measuring the costs of depths takes, as a part of calibrating on the default number of tokens."""
_MEASURED_THREADS = 2


@dataclass(frozen=True)
class DefaultEncoder:
    """An encoder, and lines that tell the user what it takes or misses."""

    encoder: Encoder
    notes: list[str] = field(default_factory=list)


def default_encoder(
    source: Source, options: DepthOptions, tokens: int, threads: int | None, longest: float | None = None
) -> DefaultEncoder:
    """Choose the encoder for a source: calibration on text of its own if most of it is packed at a depth of 1 or 2.

    Args:
        source: the model.
        options: the requested depths.
        tokens: length of the text that the model would write.
        threads: processor cores to use; None means all.
        longest: seconds that calibration may take; None means `LONGEST_SECONDS`.

    Raises TritGgufError if the depths contradict the source, before a text is written.

    """
    depths = requested_depths(source, options)
    packable = packable_matrices(source, depths)
    kept = apply_rules(packable, options.choice.keep)
    depths |= kept
    encoded = [name for name in packable if depths[name] not in (F16_DEPTH, source.packed_depth(name))]
    of_few_trits = [name for name in encoded if depths[name] <= DEEPEST_TO_CALIBRATE]
    if not encoded:
        return DefaultEncoder(Automatic())
    if 2 * sum(packable[name] for name in of_few_trits) <= sum(packable[name] for name in encoded):
        return DefaultEncoder(Automatic(ScaleSearch()))
    if holds_trits(source, unpacked_matrices(source, packable, kept), options.max_recovered_depth, ThreadPool(threads)):
        return DefaultEncoder(Automatic())
    # Not `Automatic` from here on: it would search the same matrices for trits again.
    try:
        require_torch()
    except TritGgufError as error:
        lost = "warning: not calibrated, so that the file loses much more of the model than it has to"
        return DefaultEncoder(V2(), [f"{lost}: {error}"])
    seconds = calibration_seconds(weights_of(source), tokens, threads, used=weights_of_a_token(source))
    if seconds > (LONGEST_SECONDS if longest is None else longest):
        lost = "so the file loses more of the model than it has to (--encoder calibrated takes the time)"
        return DefaultEncoder(ScaleSearch(), [f"not calibrated, because that would take {about(seconds)}; {lost}"])
    note = f"calibrating on {tokens} tokens that the model writes: {about(seconds)}"
    return DefaultEncoder(Calibrated(), [f"{note} (--encoder v2: seconds, but much is lost)"])


def calibration_seconds(weights: int, tokens: int, threads: int | None = None, *, used: int | None = None) -> float:
    """Estimate how long a model takes to write this many tokens and to be calibrated on them.

    `used` is how many of the weights a token uses; None means all. `threads` None means all processor cores.
    """
    per_token = (weights if used is None else used) * _SECONDS_PER_WEIGHT_AND_TOKEN
    seconds = tokens * per_token + weights * _SECONDS_PER_WEIGHT
    return seconds * _MEASURED_THREADS / (threads or physical_cores())


def training_seconds(weights: int, tokens: int, settings: Tuning | EndToEnd, threads: int | None = None) -> float:
    """Estimate how long training of blocks or end to end takes; `threads` None means all processor cores."""
    each = _TRAINING_SECONDS if isinstance(settings, EndToEnd) else _BLOCK_TRAINING_SECONDS
    passes = settings.passes(max(1, tokens // WINDOW_TOKENS))
    return weights * tokens * passes * each * _MEASURED_THREADS / (threads or physical_cores())


def seconds_on_text(source: Source, encoder: Calibrated, tokens: int, threads: int | None = None) -> float:
    """Estimate how long calibration on a text takes, with all training; `threads` None means all processor cores."""
    weights = weights_of(source)
    seconds = calibration_seconds(weights, tokens, threads, used=weights_of_a_token(source))
    trained = [settings for settings in (encoder.tuning, encoder.end_to_end) if settings is not None]
    return seconds + sum(training_seconds(weights, tokens, settings, threads) for settings in trained)


def calibration_note(
    source: Source, encoder: Calibrated, tokens: int, threads: int | None, *, measures: bool = False
) -> str:
    """Return a line that says how long calibration takes, with all training, and with measuring the costs of depths."""
    seconds, what = seconds_on_text(source, encoder, tokens, threads), "calibrating"
    if measures:
        seconds += MEASURING_PASSES * seconds_on_text(source, Calibrated(), DEFAULT_GENERATED_TOKENS, threads)
    if encoder.tuning is not None:
        what += " and training blocks" if encoder.end_to_end is None else ", training blocks"
    if encoder.end_to_end is not None:
        what += " and training end to end"
    return f"{what} on {tokens} tokens: {about(seconds)}"


def about(seconds: float) -> str:
    """Return an estimated time in words."""
    if seconds < 60:
        return "less than a minute"
    return f"about {math.ceil(seconds / 60)} min" if seconds < 5400 else f"about {math.ceil(seconds / 3600)} h"
