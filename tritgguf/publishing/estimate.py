"""What a plan will need, before anything is made: sizes, disk, memory and time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu_kernels.threads.cores import physical_cores
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.calibration.end_to_end import training_bytes
from tritgguf.conversion.default_encoder import seconds_on_text
from tritgguf.conversion.depths import apply_rules
from tritgguf.conversion.encoders import Calibrated, encoder_of_the_rest
from tritgguf.conversion.file_metadata import file_metadata
from tritgguf.conversion.plan import planned_tensor
from tritgguf.conversion.requested_depths import requested_depths
from tritgguf.evaluation.text_windows import WINDOW_TOKENS
from tritgguf.formats.gguf_writer import planned_file_bytes
from tritgguf.publishing.configurations import Configuration
from tritgguf.publishing.inputs import SourceInputs
from tritgguf.publishing.jobs import jobs_of
from tritgguf.publishing.plan_file import PublishPlan
from tritgguf.publishing.publish import check_options
from tritgguf.sources.source import Source, weights_of

_BYTES_OF_EXPORT = {"hf": 2.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
# With two threads on AVX2, from what AVX-512 takes (docs/publishing.md): only the order of magnitude is meant.
_MEASURED_THREADS = 2
_SECONDS_PER_WEIGHT_ENCODED = 7e-9
_SECONDS_PER_WEIGHT_EXPORTED = 1.5e-8
_SECONDS_PER_WEIGHT_LOADED = 3e-8  # by transformers: the source, and the decoded weights of one of its files
_SECONDS_PER_WEIGHT_AND_TOKEN_VERIFIED = 2e-11
_SECONDS_PER_WEIGHT_AND_TOKEN_OF_DEPTHS = 3e-11  # a text is written, and depths are chosen on it
_BENCHED_TOKENS = 5 * WINDOW_TOKENS // 8
_SECONDS_PER_WEIGHT_AND_TOKEN_BENCHED = 2.5e-11


@dataclass(frozen=True)
class PlannedFile:
    """A file that is to be made: its size without the scores in it, and the seconds for all its stages."""

    source: str
    configuration: str
    folder: str
    file_bytes: int
    export_bytes: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a plan needs.

    Attributes:
        files: a row for each file.
        disk_bytes: of all files and exports; free_bytes: what is free there.
        memory_bytes: at most, while the largest source is verified or trained.
        seconds: for everything.
        not_fetched: hub ids whose files are not in the cache; nothing is known of them.

    """

    files: list[PlannedFile]
    disk_bytes: int
    free_bytes: int
    memory_bytes: int
    seconds: float
    not_fetched: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return what `publish --dry-run --json` prints."""
        return {**vars(self), "files": [vars(file) for file in self.files]}


def estimate(plan: PublishPlan, threads: int | None) -> Estimate:
    """Estimate a plan; nothing is written. Raises TritGgufError as `publish` does for what is impossible."""
    threads = threads or physical_cores()
    files: list[PlannedFile] = []
    memory = seconds_of_sources = 0.0
    not_fetched = [source.location for source in plan.sources if not _is_here(source.location)]
    for planned in plan.sources:
        if planned.location in not_fetched:
            continue
        inputs = SourceInputs(plan, planned, threads)
        source = inputs.source
        check_options(plan, planned, source)
        weights = weights_of(source)
        memory = max(memory, inputs.evaluation_bytes, *(_training_bytes(inputs, one) for one in plan.configurations))
        seconds_of_sources += weights * (
            _SECONDS_PER_WEIGHT_LOADED + (plan.tokens + WINDOW_TOKENS) * _SECONDS_PER_WEIGHT_AND_TOKEN_VERIFIED
        )
        for job in jobs_of(plan, planned):
            exports = [round(weights * _BYTES_OF_EXPORT[to]) for to in plan.exports]
            files.append(
                PlannedFile(
                    planned.name,
                    job.configuration.name,
                    str(job.folder),
                    file_bytes(source, job.configuration),
                    sum(exports),
                    _seconds(plan, inputs, job.configuration, weights),
                )
            )
    speedup = threads / _MEASURED_THREADS
    return Estimate(
        files,
        sum(file.file_bytes + file.export_bytes for file in files),
        shutil.disk_usage(_existing(plan.output)).free,
        int(memory),
        seconds_of_sources / speedup + sum(file.seconds for file in files),
        not_fetched,
    )


def _training_bytes(inputs: SourceInputs, configuration: Configuration) -> int:
    """Return the memory for training a source as a whole; 0 if the configuration does not."""
    inner = encoder_of_the_rest(inputs.encoder(configuration))
    if not isinstance(inner, Calibrated) or inner.end_to_end is None:
        return 0
    in_blocks = [tensor for tensor in inputs.source.tensors if quantized_tensor(tensor.name)]
    return training_bytes(sum(math.prod(tensor.shape) for tensor in in_blocks))


def file_bytes(source: Source, configuration: Configuration) -> int:
    """Return the size of a configuration's file without scores: at most, where depths are chosen by measurement."""
    if configuration.target_size is not None:
        return configuration.target_size
    depths = requested_depths(source, configuration.options)
    quantized = [name for name in depths if quantized_tensor(name)]
    depths |= apply_rules(quantized, configuration.choice.keep)
    tensors = [planned_tensor(tensor.name, tensor.shape, depths[tensor.name]) for tensor in source.tensors]
    whole = planned_file_bytes(file_metadata(source.metadata, tensors, configuration.encoder, ""), tensors)
    if configuration.target_bpw is None:
        return whole
    packed = [tensor for tensor in tensors if depths[tensor.name]]
    others = whole - sum(tensor.n_bytes for tensor in packed)
    return others + round(sum(math.prod(tensor.shape) for tensor in packed) * configuration.target_bpw / 8)


def _seconds(plan: PublishPlan, inputs: SourceInputs, configuration: Configuration, weights: int) -> float:
    speedup = inputs.threads / _MEASURED_THREADS
    each = _SECONDS_PER_WEIGHT_ENCODED
    each += plan.tokens * _SECONDS_PER_WEIGHT_AND_TOKEN_VERIFIED
    each += _BENCHED_TOKENS * _SECONDS_PER_WEIGHT_AND_TOKEN_BENCHED if plan.bench else 0.0
    each += len(plan.exports) * _SECONDS_PER_WEIGHT_EXPORTED
    seconds = weights * each / speedup
    if not inputs.needs_text(configuration):
        return seconds
    encoder = inputs.encoder(configuration)
    tokens, threads, inner = inputs.tokens_of(configuration), inputs.threads, encoder_of_the_rest(encoder)
    if not encoder.needs_text:
        return seconds + weights * tokens * _SECONDS_PER_WEIGHT_AND_TOKEN_OF_DEPTHS / speedup
    calibrated = inner if isinstance(inner, Calibrated) else Calibrated()
    return seconds + seconds_on_text(inputs.source, calibrated, tokens, threads)


def _is_here(location: str) -> bool:
    """Tell whether a source is on this machine: looking at it must not download it."""
    from huggingface_hub import try_to_load_from_cache

    return Path(location).exists() or isinstance(try_to_load_from_cache(location, "config.json"), str)


def _existing(folder: Path) -> Path:
    """Return the nearest folder that exists."""
    folder = folder.absolute()
    candidates: Sequence[Path] = (folder, *folder.parents)
    return next(path for path in candidates if path.exists())
