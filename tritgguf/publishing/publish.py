"""Publish: every source of a plan in every configuration, packed, exported, measured and described."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from cpu_kernels.threads.cores import physical_cores
from tritgguf.conversion.plan import check_conversion
from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.evaluation.quantization_costs import FileQuality, Progress
from tritgguf.publishing.cards import write_cards
from tritgguf.publishing.inputs import SourceInputs
from tritgguf.publishing.jobs import jobs_of
from tritgguf.publishing.plan_file import PlannedSource, PublishPlan
from tritgguf.publishing.stages import Stages
from tritgguf.publishing.state import State
from tritgguf.publishing.tasks import Executor, HereExecutor
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
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> PublishReport:
    """Make what a plan asks for; what an earlier run has finished is not made again.

    Args:
        plan: the plan.
        threads: number of threads of each task; None means all of this machine.
        executor: what runs the tasks; None: this process.
        progress: called with the stage, the number of steps done and their total, unless the executor has its own.

    Raises:
        TritGgufError: a source or option is impossible, which is found before anything is made; or a stage fails. What
            is finished stays, and the next run goes on from there.

    """
    started = time.perf_counter()
    cores = threads or physical_cores()
    here = executor or HereExecutor(progress or (lambda stage, done, total: None))
    require_torch()
    result, state = PublishReport(), State(plan.output)
    all_inputs = [SourceInputs(plan, source, cores) for source in plan.sources]
    for inputs in all_inputs:
        check_options(plan, inputs.planned, inputs.source)
    started += prepare_kernels()
    with state.locked():
        stages = Stages(State(plan.output), here)
        for job in itertools.chain.from_iterable(jobs_of(plan, source) for source in plan.sources):
            stages.check_ours(job)
        for group in [all_inputs] if here.takes_all_sources else [[inputs] for inputs in all_inputs]:
            _publish_sources(group, stages, result)
        result.warnings += stages.warnings
    result.seconds = time.perf_counter() - started
    return result


def check_options(plan: PublishPlan, planned: PlannedSource, source: Source) -> None:
    """Raise BadRequestError unless every configuration is possible with a source."""
    for configuration in plan.configurations:
        try:
            check_conversion(source, configuration.options, configuration.parsed_encoder)
        except TritGgufError as error:
            where = f"{plan.file}: {configuration.name} of {planned.name}"
            raise BadRequestError(f"{where}: {error}") from error


def _publish_sources(sources: Sequence[SourceInputs], stages: Stages, result: PublishReport) -> None:
    """Run all stages of some sources. Scores are recorded before exports, whose cards show them."""
    plan, threads = sources[0].plan, sources[0].threads
    jobs = [jobs_of(plan, inputs.planned) for inputs in sources]
    with _timed(result, "encode"):
        stages.encode(sources)
    with _timed(result, "verify"):
        measured = stages.verify(sources)
    with _timed(result, "bench"):
        speeds = stages.bench(list(itertools.chain(*jobs)), threads) if plan.bench else {}
    with _timed(result, "export"):
        stages.export(jobs, threads)
    for of_source in jobs:
        qualities = [replace(measured[job.name], tokens_per_second=speeds.get(job.name)) for job in of_source]
        result.warnings += write_cards(stages.state, of_source, qualities)
        result.files += [
            PublishedFile(
                job.source.name, job.configuration.name, str(job.folder), quality, stages.encoding_seconds(job)
            )
            for job, quality in zip(of_source, qualities, strict=True)
        ]


@contextmanager
def _timed(report: PublishReport, stage: str) -> Iterator[None]:
    """Add the seconds of the block to a kind of stage."""
    start = time.perf_counter()
    yield
    report.stage_seconds[stage] = report.stage_seconds.get(stage, 0.0) + time.perf_counter() - start
