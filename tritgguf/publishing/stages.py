"""The stages of publishing: each finds what is missing, has it made by tasks, and notes what they have made.

A stage that has been done with the same settings, and whose file is unchanged, is skipped. Stages communicate through
the output folder alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tritgguf.diagnostics.bench import COMPARED_REPETITIONS, COMPARED_TOKENS, processor_name
from tritgguf.evaluation.divergence import Comparison
from tritgguf.evaluation.quantization_costs import FileQuality, file_quality
from tritgguf.evaluation.recorded_scores import ScoreRecorder, source_name
from tritgguf.evaluation.text_windows import common_windows
from tritgguf.formats.durable_output import PART_SUFFIXES, disk_errors
from tritgguf.formats.gguf_file import open_trit_file
from tritgguf.formats.scores import Score, text_fingerprint
from tritgguf.formats.text_file import read_text
from tritgguf.publishing import tasks
from tritgguf.publishing.inputs import SourceInputs
from tritgguf.publishing.jobs import Job, jobs_of
from tritgguf.publishing.state import State
from tritgguf.publishing.tasks import Executor, Task
from tritgguf.sources.hub_cache import revision_of
from tritgguf.sources.source import file_states
from tritgguf.version import __version__

CONVERT, VERIFY, BENCH, EXPORT, CARD = "convert", "verify", "bench", "export", "card"
_MATRICES_IN_MEMORY = 4  # while a source is encoded, about
_LARGEST_RUNNER_ERROR = 1e-2  # of the largest logit; rounding to float32 makes about 1e-4


@dataclass(frozen=True)
class Stages:
    """What all stages need: the notes about the output, what runs the tasks, and a list for warnings."""

    state: State
    executor: Executor
    warnings: list[str] = field(default_factory=list)

    def check_ours(self, job: Job) -> None:
        """Raise BadRequestError if a file that is not of `publish` is where a job would write."""
        self.state.check_ours(CONVERT, job.trit_file)
        for to in job.plan.exports:
            self.state.check_ours(EXPORT, job.export_path(to))

    def encode(self, sources: Sequence[SourceInputs]) -> None:
        """Make the packed files of all configurations of some sources."""
        work, settings = [], {}
        for inputs in sources:
            missing = []
            for job in jobs_of(inputs.plan, inputs.planned):
                settings[job.name] = _conversion_settings(job, inputs)
                if self.state.result(CONVERT, job.trit_file, settings[job.name]) is None:
                    self.state.check_ours(CONVERT, job.trit_file)
                    missing.append(job)
            if missing:
                replaced = {job.name: self._begin_file(job, settings[job.name]) for job in missing}
                work.append((inputs, missing, replaced))
        todo = [
            Task(
                tasks.encode,
                (inputs, jobs, replaced),
                f"encoding of {inputs.planned.name}",
                _MATRICES_IN_MEMORY * inputs.largest_matrix_bytes,
                len(jobs) * inputs.source_bytes,
            )
            for inputs, jobs, replaced in work
        ]
        for place, made in self.executor.run(todo):
            for job, one in zip(work[place][1], made, strict=True):
                result = {"seconds": one.seconds, "warnings": list(one.warnings)}
                self.state.finish(CONVERT, job.trit_file, settings[job.name], result)
        for job in itertools.chain.from_iterable(jobs_of(inputs.plan, inputs.planned) for inputs in sources):
            noted = self.state.noted(CONVERT, job.trit_file)["warnings"]
            self.warnings.extend(f"{job.name}: {warning}" for warning in noted)

    def encoding_seconds(self, job: Job) -> float:
        """Return the seconds that encoding a file took when it was made."""
        return float(self.state.noted(CONVERT, job.trit_file)["seconds"])

    def verify(self, sources: Sequence[SourceInputs]) -> dict[str, FileQuality]:
        """Measure and record what quantization costs, of the files of some sources; return job's name -> quality.

        Files that were measured on the same text are not measured again. The first file that is measured of a source
        is also compared with transformers, which tells whether the runner computes such a model correctly.
        """
        shards: list[tuple[_Measurement, tuple[Any, ...]]] = []
        measurements = []
        for inputs in sources:
            measurement = _Measurement(inputs, self.state, self.executor.shards)
            measurements.append(measurement)
            shards += [(measurement, arguments) for arguments in measurement.shards]
        todo = [
            Task(
                tasks.evaluate,
                arguments,
                f"evaluation of {measurement.name}",
                measurement.memory_bytes,
            )
            for measurement, arguments in shards
        ]
        for place, result in self.executor.run(todo):
            measurement, arguments = shards[place]
            measurement.add(arguments, result)
            if measurement.is_complete:
                measurement.record()
        self.warnings.extend(itertools.chain.from_iterable(one.warnings() for one in measurements))
        return {name: quality for measurement in measurements for name, quality in measurement.qualities().items()}

    def bench(self, jobs: Sequence[Job], threads: int) -> dict[str, float]:
        """Measure how fast files generate; return job's name -> tokens per second."""
        settings = {
            "version": __version__,
            "processor": processor_name(),
            "threads": threads,
            "tokens": [COMPARED_TOKENS, COMPARED_REPETITIONS],
        }
        missing = [job for job in jobs if self.state.result(BENCH, job.trit_file, settings) is None]
        todo = [Task(tasks.measure_speed, (job, threads), f"speed of {job.name}", alone=True) for job in missing]
        for place, speed in self.executor.run(todo):
            self.state.finish(BENCH, missing[place].trit_file, settings, {"tokens_per_second": speed})
        return {job.name: self.state.noted(BENCH, job.trit_file)["tokens_per_second"] for job in jobs}

    def export(self, sources: Sequence[Sequence[Job]], threads: int) -> None:
        """Export packed files, of each of some sources; an earlier export of ours is replaced."""
        work, settings = [], {}
        for jobs in sources:
            missing, replaced = [], {}
            for job, to in [(one, to) for one in jobs for to in one.plan.exports]:
                output = job.export_path(to)
                of_file = self.state.checksum_of(CONVERT, job.trit_file)
                settings[output] = {"version": __version__, "to": to, "file": of_file}
                if self.state.result(EXPORT, output, settings[output]) is None:
                    self.state.check_ours(EXPORT, output)
                    missing.append((job, to))
                    replaced[str(output)] = self.state.begin(EXPORT, output, settings[output])
            if missing:
                work.append((missing, replaced, threads))
        todo = [
            Task(tasks.make_exports, arguments, f"exports of {arguments[0][0][0].source.name}") for arguments in work
        ]
        for place, sizes in self.executor.run(todo):
            for (job, to), size in zip(work[place][0], sizes, strict=True):
                output = job.export_path(to)
                self.state.finish(EXPORT, output, settings[output], {"bytes": size})

    def _begin_file(self, job: Job, settings: Any) -> str:
        """Note that a packed file is begun; return the checksum of the one that it replaces, empty for none."""
        with disk_errors(job.folder):
            job.folder.mkdir(parents=True, exist_ok=True)
            if not self.state.has_begun(CONVERT, job.trit_file, settings):
                for suffix in PART_SUFFIXES[1:]:  # unfinished, and made with other settings
                    job.trit_file.with_name(job.trit_file.name + suffix).unlink(missing_ok=True)
        return self.state.begin(CONVERT, job.trit_file, settings)


class _Measurement:
    """The evaluation of a source's files: which are missing, in which shards, and what came out."""

    def __init__(self, inputs: SourceInputs, state: State, shards: int) -> None:
        self.name, self.memory_bytes = inputs.planned.name, inputs.evaluation_bytes
        self._inputs, self._state = inputs, state
        self._jobs = jobs_of(inputs.plan, inputs.planned)
        self._text = tasks.text_of(inputs.plan)
        self._settings: dict[str, Any] = {
            "version": __version__,
            "text": text_fingerprint(self._text),
            "tokens": inputs.plan.tokens,
        }
        self._missing = [job for job in self._jobs if state.result(VERIFY, job.trit_file, self._settings) is None]
        self._results: dict[int, list[Comparison]] = {}
        self._runner: dict[str, float] = {}
        self.shards: list[tuple[Any, ...]] = []
        if self._missing:
            files = [job.trit_file for job in self._missing]
            self._recorder = ScoreRecorder(files)
            windows = common_windows([open_trit_file(file) for file in files], self._text, inputs.plan.tokens)
            self._tokens = sum(map(len, windows))
            bounds = np.linspace(0, len(windows), min(shards, len(windows)) + 1).astype(int).tolist()
            self.shards = [
                (inputs, files, (first, last), files[0] if first == 0 else None)
                for first, last in itertools.pairwise(bounds)
            ]

    def add(self, shard: tuple[Any, ...], result: tuple[list[Comparison], Any]) -> None:
        """Take the result of a shard."""
        self._results[shard[2][0]], errors = result
        if errors is not None:
            self._runner = vars(errors)

    @property
    def is_complete(self) -> bool:
        """Whether all shards are there."""
        return len(self._results) == len(self.shards)

    def record(self) -> None:
        """Write the scores into the files and note them."""
        in_order = [self._results[first] for first in sorted(self._results)]
        for job, parts in zip(self._missing, zip(*in_order, strict=True), strict=True):
            cost = Comparison.concatenate(parts)
            location = self._inputs.source.name
            score = Score(
                **cost.as_dict(),
                tokens=self._tokens,
                text=self._settings["text"],
                source=source_name(location),
                revision=revision_of(self._inputs.source.files[0]),
            )
            with self._state.changing(CONVERT, job.trit_file):
                self._recorder.record(job.trit_file, score)
            quality = file_quality(open_trit_file(job.trit_file), cost)
            checked = job is self._missing[0]
            result = {"quality": quality.as_dict(), "runner": self._runner if checked else None}
            self._state.finish(VERIFY, job.trit_file, self._settings, result)

    def warnings(self) -> list[str]:
        """Return a line for each file whose logits differ from those of transformers, where they were compared."""
        errors = {job: self._state.noted(VERIFY, job.trit_file)["runner"] for job in self._jobs}
        return [
            f"{job.trit_file}: the runner's logits differ from those of transformers by"
            f" {runner['max_rel_logit_diff']:.0e} of the largest, which is more than rounding; do not publish it"
            for job, runner in errors.items()
            if runner is not None and runner["max_rel_logit_diff"] > _LARGEST_RUNNER_ERROR
        ]

    def qualities(self) -> dict[str, FileQuality]:
        """Return job's name -> quality."""
        noted = {job.name: (job.trit_file, self._state.noted(VERIFY, job.trit_file)["quality"]) for job in self._jobs}
        return {name: FileQuality(**{**quality, "file": file}) for name, (file, quality) in noted.items()}


def _conversion_settings(job: Job, inputs: SourceInputs) -> dict[str, Any]:
    """Return what determines the bytes of a packed file."""
    calibration = job.plan.calibration
    with_text = inputs.needs_text(job.configuration)
    text = asdict(calibration) | {
        "text": None if calibration.text is None else text_fingerprint(read_text(calibration.text))
    }
    return {
        "version": __version__,
        "source": file_states(inputs.source),
        "configuration": job.configuration.settings(),
        "encoder": inputs.encoder(job.configuration).name,
        "calibration": text if with_text else None,
        # What is calculated on a text depends on the number of threads.
        "threads": inputs.threads if with_text else None,
    }
