"""What the configurations of one source share: its calibration texts, importance and sensitivities, each made once."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tritgguf.calibration.text import DEFAULT_GENERATED_TOKENS, DEFAULT_TOKENS, WINDOW_TOKENS, vocabulary_size
from tritgguf.conversion.default_encoder import default_encoder
from tritgguf.conversion.depths import Costs, Measure, MeasuredCosts
from tritgguf.conversion.encoders import Automatic, Encoder, Importance, ImportanceSearch, Windows, encoder_of_the_rest
from tritgguf.conversion.importance_file import importance_of
from tritgguf.conversion.own_text import SavedText, calibration_windows
from tritgguf.conversion.plan import MEASURED_TOKENS
from tritgguf.evaluation.quantization_costs import Progress
from tritgguf.evaluation.text_windows import WINDOW_TOKENS as EVALUATED_AT_ONCE
from tritgguf.formats.durable_output import replace_text
from tritgguf.publishing.configurations import Configuration
from tritgguf.publishing.plan_file import PlannedSource, PublishPlan
from tritgguf.publishing.state import WORK_FOLDER, digest
from tritgguf.reference.model import require_torch
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source, file_states, weights_of
from tritgguf.version import __version__

_PROGRAM_BYTES = 600_000_000  # Python, torch and transformers
_SENSITIVITY_WINDOWS, _SENSITIVITY_TOKENS = 8, 128  # many short texts: these are soon written


@dataclass(frozen=True)
class _TextLength:
    """The length of a text, and of each of its windows, in tokens."""

    tokens: int
    window: int = WINDOW_TOKENS


class SourceInputs:
    """A source, and what is made of it for its configurations when the first of them needs it."""

    def __init__(self, plan: PublishPlan, planned: PlannedSource, threads: int) -> None:
        self.plan, self.planned, self.threads = plan, planned, threads
        self._progress: Progress = _no_progress
        self._texts: dict[_TextLength, list[list[int]]] = {}
        self._costs: dict[_TextLength, MeasuredCosts] = {}

    def __reduce__(self) -> tuple[type[SourceInputs], tuple[PublishPlan, PlannedSource, int]]:
        """Travel to another process without what was made here."""
        return SourceInputs, (self.plan, self.planned, self.threads)

    def report_to(self, progress: Progress) -> None:
        """Set whom to tell how far the text and the importance are."""
        self._progress = progress

    @property
    def largest_matrix_bytes(self) -> int:
        """Size of the largest matrix in the source."""
        return max(tensor.matrix_bytes for tensor in self.source.tensors)

    @property
    def source_bytes(self) -> int:
        """Size of the source's weights on disk."""
        return sum(tensor.stored_bytes for tensor in self.source.tensors)

    @property
    def evaluation_bytes(self) -> int:
        """Memory for evaluating a file: the source in float32, a tensor of it twice, and two windows' logits."""
        largest = max(math.prod(tensor.shape) for tensor in self.source.tensors)
        logits = min(EVALUATED_AT_ONCE, self.plan.tokens) * vocabulary_size(self.source)
        return 4 * (weights_of(self.source) + largest + 2 * logits) + _PROGRAM_BYTES

    @cached_property
    def source(self) -> Source:
        """The source, opened."""
        return open_source(self.planned.location)

    def encoder(self, configuration: Configuration) -> Encoder:
        """Return the encoder of a configuration; what `auto` means depends on the source."""
        encoder = configuration.parsed_encoder
        if encoder != Automatic() or configuration.choice.needs_text:
            return encoder
        # A plan may take a night: `--dry-run` shows its time.
        return default_encoder(self.source, configuration.options, self._tokens, self.threads, math.inf).encoder

    def needs_text(self, configuration: Configuration) -> bool:
        """Tell whether a configuration needs a calibration text."""
        encoder = self.encoder(configuration)
        return encoder.needs_text or needs_importance(encoder) or configuration.choice.needs_text

    def windows(self, configuration: Configuration) -> Windows | None:
        """Return the calibration text that a configuration's conversion takes; None for none."""
        if self.encoder(configuration).needs_text or configuration.choice.needs_text:
            return self._text(self._length(configuration))
        return None

    def costs(self, configuration: Configuration) -> MeasuredCosts:
        """Return the costs of depths, shared by all configurations that measure them on the same text."""
        length = self._length(configuration)
        if length not in self._costs:
            thresholds = [one.sensitivity for one in self.plan.configurations if one.sensitivity is not None]
            file = self._text_file(length, ".costs.json")
            self._costs[length] = _SavedCosts(file, partial(self._costs_settings, length), thresholds)
        return self._costs[length]

    def _costs_settings(self, length: _TextLength) -> Any:
        """Return what costs that are measured on a text of this length depend on."""
        return [__version__, file_states(self.source), self._text(length), self.threads]

    @cached_property
    def importance(self) -> Importance:
        """The importance of the matrices' columns, measured on the whole calibration text."""
        from tritgguf.calibration.importance import measure_importance

        file = self._work_file("importance.gguf")
        file.parent.mkdir(parents=True, exist_ok=True)
        measure_importance(
            self.planned.location,
            file,
            self._text(_TextLength(self._tokens)),
            text=self._origin,
            threads=self.threads,
            overwrite=True,
            progress=lambda done, total: self._progress("importance", done, total),
        )
        return importance_of(self.planned.location, file)[0]

    def tokens_of(self, configuration: Configuration) -> int:
        """Return the length of the calibration text that a configuration takes."""
        return self._length(configuration).tokens

    def _length(self, configuration: Configuration) -> _TextLength:
        if self.encoder(configuration).needs_text:
            return _TextLength(self._tokens)
        if configuration.choice.has_target:
            return _TextLength(min(MEASURED_TOKENS, self._tokens))
        return _TextLength(min(_SENSITIVITY_WINDOWS * _SENSITIVITY_TOKENS, self._tokens), _SENSITIVITY_TOKENS)

    @property
    def _origin(self) -> str:
        calibration = self.plan.calibration
        return f"own text, seed {calibration.seed}" if calibration.text is None else calibration.text.name

    @property
    def _tokens(self) -> int:
        default = DEFAULT_GENERATED_TOKENS if self.plan.calibration.text is None else DEFAULT_TOKENS
        return self.plan.calibration.tokens or default

    def _text(self, length: _TextLength) -> list[list[int]]:
        """Return a calibration text; one that the model writes can be resumed."""
        if length not in self._texts:
            require_torch()
            calibration = self.plan.calibration
            kept = self._text_file(length)
            kept.parent.mkdir(parents=True, exist_ok=True)
            with SavedText(kept, resume=kept.with_name(f"{kept.name}.part.text").exists()) as saved:
                self._texts[length], _ = calibration_windows(
                    self.source,
                    calibration.text,
                    length.tokens,
                    window=length.window,
                    seed=calibration.seed,
                    threads=self.threads,
                    saved=saved,
                    progress=lambda done, total: self._progress("generating text", done, total),
                )
        return self._texts[length]

    def _text_file(self, length: _TextLength, suffix: str = "") -> Path:
        return self._work_file(f"{length.tokens}-tokens-by-{length.window}{suffix}")

    def _work_file(self, name: str) -> Path:
        return self.plan.output / WORK_FOLDER / f"{self.planned.name}.{name}"


class _SavedCosts(MeasuredCosts):
    """Costs that are also kept in a file, so that a run that was interrupted after measuring them need not do it again.

    `settings` returns what they depend on beside matrices and depths.
    """

    def __init__(self, file: Path, settings: Callable[[], Any], thresholds: Iterable[float]) -> None:
        super().__init__(thresholds)
        self._file, self._settings = file, settings

    def of(self, kind: str, names: list[str], some_depths: Sequence[int], measure: Measure) -> Costs:
        """Return the costs: known ones, or those in the file, or measured ones."""
        return super().of(kind, names, some_depths, partial(self._saved, kind, measure))

    def _saved(self, kind: str, measure: Measure, names: list[str], some_depths: Sequence[int]) -> Costs:
        key, kept = digest([self._settings(), kind, names, list(some_depths)]), {}
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            kept = dict(json.loads(self._file.read_text("utf-8")))
            return {name: {int(depth): float(cost) for depth, cost in of.items()} for name, of in kept[key].items()}
        costs = measure(names, some_depths)
        replace_text(self._file, json.dumps({**kept, key: costs}) + "\n")
        return costs


def _no_progress(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


def needs_importance(encoder: Encoder) -> bool:
    """Tell whether an encoder takes an importance matrix."""
    return isinstance(encoder_of_the_rest(encoder), ImportanceSearch)
