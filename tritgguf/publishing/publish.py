"""Publish: every source of a plan in every configuration, packed, exported, measured and described."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.conversion.depths import apply_rules
from tritgguf.conversion.requested_depths import requested_depths
from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.evaluation.logits_store import LogitsStore
from tritgguf.evaluation.quantization_costs import FileQuality, Progress
from tritgguf.publishing.cards import write_cards
from tritgguf.publishing.inputs import SourceInputs
from tritgguf.publishing.plan_file import PlannedSource, PublishPlan
from tritgguf.publishing.stages import Job, Stages
from tritgguf.publishing.state import State
from tritgguf.publishing.upload import Upload
from tritgguf.reference.model import require_torch
from tritgguf.runtime.compiler import prepare_kernels
from tritgguf.sources.source import Source


@dataclass(frozen=True)
class PublishedFile:
    """A packed file: what it is made of, what it is worth, and the seconds that encoding took when it was made."""

    source: str
    configuration: str
    folder: str
    quality: FileQuality
    encoding_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**vars(self), "quality": self.quality.as_dict()}


@dataclass
class PublishReport:
    """What `publish` made, and the seconds of each kind of stage in this run."""

    files: list[PublishedFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    uploads: list[Upload] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return what `publish --json` prints."""
        return {
            **vars(self),
            "files": [file.as_dict() for file in self.files],
            "uploads": [vars(upload) for upload in self.uploads],
        }


def publish(
    plan: PublishPlan,
    *,
    threads: int | None = None,
    store: LogitsStore | None = None,
    progress: Progress | None = None,
) -> PublishReport:
    """Make what a plan asks for; what an earlier run has finished is not made again.

    Args:
        plan: the plan.
        threads: number of threads.
        store: where logits of sources are kept; None: nowhere.
        progress: called with the stage, the number of steps done and their total.

    Raises:
        TritGgufError: a source or option is impossible, which is found before anything is made; or a stage fails. What
            is finished stays, and the next run goes on from there.

    """
    started = time.perf_counter()
    report: Progress = progress or (lambda stage, done, total: None)
    require_torch()
    result, state = PublishReport(), State(plan.output)
    all_inputs = [SourceInputs(plan, source, threads, report) for source in plan.sources]
    for inputs in all_inputs:
        check_options(plan, inputs.planned, inputs.source)
    started += prepare_kernels()
    with state.locked():
        stages = Stages(State(plan.output), threads, report)
        for job in itertools.chain.from_iterable(jobs_of(plan, source) for source in plan.sources):
            stages.check_ours(job)
        for inputs in all_inputs:
            _publish_source(plan, inputs, stages, store, result)
    result.seconds = time.perf_counter() - started
    return result


def jobs_of(plan: PublishPlan, source: PlannedSource) -> list[Job]:
    """Return a source's jobs."""
    return [Job(plan, source, configuration) for configuration in plan.configurations]


def check_options(plan: PublishPlan, planned: PlannedSource, source: Source) -> None:
    """Raise BadRequestError unless every configuration is possible with a source."""
    names = [tensor.name for tensor in source.tensors if quantized_tensor(tensor.name)]
    for configuration in plan.configurations:
        try:
            requested_depths(source, configuration.options)
            apply_rules(names, configuration.choice.keep)
        except TritGgufError as error:
            where = f"{plan.file}: {configuration.name} of {planned.name}"
            raise BadRequestError(f"{where}: {error}") from error


def _publish_source(
    plan: PublishPlan, inputs: SourceInputs, stages: Stages, store: LogitsStore | None, result: PublishReport
) -> None:
    """Run all stages of a source. Scores are recorded before exports, whose cards show them."""
    jobs = jobs_of(plan, inputs.planned)
    with _timed(result, "encode"):
        seconds = [stages.convert(job, inputs) for job in jobs]
    with _timed(result, "verify"):
        measured = stages.verify(jobs, store)
    with _timed(result, "bench"):
        qualities = [
            replace(measured[job.name], tokens_per_second=stages.bench(job) if plan.bench else None) for job in jobs
        ]
    with _timed(result, "export"):
        for job in jobs:
            for to in plan.exports:
                stages.export(job, to)
    result.warnings += write_cards(stages.state, jobs, qualities)
    result.files += _rows(jobs, qualities, seconds)


def _rows(jobs: Sequence[Job], qualities: Sequence[FileQuality], seconds: Sequence[float]) -> list[PublishedFile]:
    return [
        PublishedFile(job.source.name, job.configuration.name, str(job.folder), quality, encoding)
        for job, quality, encoding in zip(jobs, qualities, seconds, strict=True)
    ]


@contextmanager
def _timed(report: PublishReport, stage: str) -> Iterator[None]:
    """Add the seconds of the block to a kind of stage."""
    start = time.perf_counter()
    yield
    report.stage_seconds[stage] = report.stage_seconds.get(stage, 0.0) + time.perf_counter() - start
