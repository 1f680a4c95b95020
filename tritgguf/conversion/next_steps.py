"""What to do with a converted file: run it, and calibrate it where that gains much."""

from __future__ import annotations

import shlex

from tritgguf.calibration.text import DEFAULT_GENERATED_TOKENS
from tritgguf.conversion.default_encoder import about, calibration_seconds
from tritgguf.conversion.report import ConvertReport

_UNCALIBRATED = ("v2", "best")
# By depth; `docs/quality.md` has the figures.
_GAIN_AT_TWO = "of a model of 135M weights 4 times smaller, and that of one of 1.5B up to 1.8 times"
_GAINS = {1: _GAIN_AT_TWO, 2: _GAIN_AT_TWO, 3: "of a model of 135M weights 6 times smaller"}


def next_steps(report: ConvertReport) -> list[str]:
    """Return lines that say what to type next."""
    file = shlex.quote(str(report.output))
    steps = [f'run it: tritgguf run {file} -p "Why is the sky blue?"']
    if report.encoder in _UNCALIBRATED and report.depth in _GAINS and not report.from_trits:
        seconds = calibration_seconds(report.weights, DEFAULT_GENERATED_TOKENS, 2, used=report.used_weights)
        steps.append(
            f"come closer to the original: calibrating made the divergence {_GAINS[report.depth]};"
            f" it takes {about(seconds)} on two cores, and PyTorch (pip install torch transformers accelerate);"
            " the same command with --encoder calibrated --overwrite does it"
        )
    return steps
