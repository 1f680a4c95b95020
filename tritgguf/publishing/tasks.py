"""Tasks: what a stage computes, as functions that run wherever the output folder is.

They take no notes about what they make. A task that was killed is run again with the same arguments: it resumes an
unfinished file, and leaves a finished one as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tritgguf.conversion.convert import Conversion, ConvertProgress, convert_together
from tritgguf.conversion.report import ConvertReport
from tritgguf.diagnostics.bench import generation_speed
from tritgguf.evaluation.divergence import Comparison
from tritgguf.evaluation.logits_store import user_store
from tritgguf.evaluation.quantization_costs import Progress, Runner, quantization_costs, source_logits
from tritgguf.evaluation.text_windows import common_windows, shipped_text
from tritgguf.evaluation.verify import RunnerErrors, open_all, runner_errors
from tritgguf.exporters.export import export
from tritgguf.formats.durable_output import PART_SUFFIXES, disk_errors
from tritgguf.formats.text_file import read_text
from tritgguf.publishing.inputs import SourceInputs, needs_importance
from tritgguf.publishing.jobs import Job
from tritgguf.publishing.plan_file import PublishPlan
from tritgguf.publishing.state import checksum
from tritgguf.reference.model import ReferenceModel


@dataclass(frozen=True)
class Task:
    """A call of one of the functions below.

    Attributes:
        function, arguments: what is called; `progress` is added.
        name: for messages.
        memory_bytes, disk_bytes: what it takes at most, about.
        alone: whether it measures time, so that nothing else may run beside it.
        node: address of the machine that has to run it; empty for any.

    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    name: str
    memory_bytes: int = 0
    disk_bytes: int = 0
    alone: bool = False
    node: str = ""


class Executor(Protocol):
    """Runs tasks."""

    shards: int
    """Into how many tasks an evaluation is split."""
    takes_all_sources: bool
    """Whether a stage is done for all sources at once, or source after source."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Yield the place of each task in `tasks` and its result, as they end; the error of the first that fails."""


class HereExecutor:
    """Runs tasks one after the other in this process."""

    shards = 1
    takes_all_sources = False

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Yield the place and the result of each task, in order."""
        for place, task in enumerate(tasks):
            yield place, task.function(*task.arguments, progress=self._progress)


@dataclass(frozen=True)
class Encoded:
    """A packed file that was made: the seconds that it took, 0 if an earlier try had finished it, and warnings."""

    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


def encode(
    inputs: SourceInputs, jobs: Sequence[Job], replaced: Mapping[str, str], *, progress: Progress
) -> list[Encoded]:
    """Make the packed files of some configurations of a source, all in one pass where their encoders allow it.

    `replaced` maps a job's name to the checksum of the file that it replaces, empty for none.
    """
    inputs.report_to(progress)
    made = {job.name: Encoded() for job in jobs}
    missing = [job for job in jobs if _is_missing(job.trit_file, replaced[job.name])]
    conversions = {job.name: _conversion(job, inputs) for job in missing}
    for group in _passes(missing, conversions):
        what = group[0].name if len(group) == 1 else f"{len(group)} configurations of {inputs.planned.name}"

        def show(state: ConvertProgress, what: str = what) -> None:
            progress(f"{what}: encoding", state.bytes_done, state.bytes_total)

        reports = convert_together(
            inputs.source, [conversions[job.name] for job in group], threads=inputs.threads, progress=show
        )
        made |= {job.name: _encoded(report) for job, report in zip(group, reports, strict=True)}
    return [made[job.name] for job in jobs]


def _encoded(report: ConvertReport) -> Encoded:
    return Encoded(report.seconds, (*report.warnings, *report.notes))


def _conversion(job: Job, inputs: SourceInputs) -> Conversion:
    """Return the conversion that makes a job's packed file; it resumes one that was interrupted."""
    configuration, encoder = job.configuration, inputs.encoder(job.configuration)
    return Conversion(
        job.trit_file,
        configuration.options_with(inputs.costs(configuration)),
        encoder,
        inputs.importance if needs_importance(encoder) else None,
        inputs.windows(configuration),
        overwrite=True,
        resume=job.trit_file.with_name(job.trit_file.name + PART_SUFFIXES[1]).exists(),
    )


def _passes(jobs: Sequence[Job], conversions: Mapping[str, Conversion]) -> list[list[Job]]:
    """Split jobs into those that can be encoded together: an encoder that follows the blocks is alone."""
    alone = [job for job in jobs if conversions[job.name].quantizer.in_block_order]
    together = [job for job in jobs if job not in alone]
    return [group for group in (together, *([job] for job in alone)) if group]


def evaluate(
    inputs: SourceInputs,
    files: Sequence[Path],
    first_and_last: tuple[int, int] | None,
    checked: Path | None,
    *,
    progress: Progress,
) -> tuple[list[Comparison], RunnerErrors | None]:
    """Compare packed files of a source with it on some windows of the plan's text.

    Args:
        inputs: the source and the plan.
        files: the packed files.
        first_and_last: the first window and the one after the last; None means all.
        checked: the file whose logits are also compared with those of transformers, on the first window; None: none.
        progress: called with the stage, the number of steps done and their total.

    """
    source, opened = open_all(inputs.planned.location, files)
    windows = common_windows(opened, text_of(inputs.plan), inputs.plan.tokens)
    chosen = windows if first_and_last is None else windows[slice(*first_and_last)]
    runner = Runner(inputs.threads, None)
    loaded: list[ReferenceModel] = []

    def reference() -> ReferenceModel:
        if not loaded:
            progress(f"{inputs.planned.name}: load source", 0, 1)
            loaded.append(ReferenceModel.open(source, threads=inputs.threads))
        return loaded[0]

    def show(stage: str, done: int, total: int) -> None:
        progress(f"{inputs.planned.name}: {stage}", done, total)

    expected = source_logits(source, chosen, user_store(), reference)
    file_logits = [runner.logits_of(file, bits=16) for file in opened]
    costs = quantization_costs(expected, opened, file_logits, chosen, show)
    if checked is None:
        return costs, None
    file = next(file for file in opened if file.path == checked)
    return costs, runner_errors(reference(), file, windows[:1], runner, show)


def text_of(plan: PublishPlan) -> str:
    """Return the text that a plan's files are evaluated on."""
    return shipped_text() if plan.text is None else read_text(plan.text)


def measure_speed(job: Job, threads: int, *, progress: Progress) -> float:
    """Return how fast a file generates, in tokens per second."""
    progress(f"{job.name}: speed", 0, 1)
    speed = generation_speed(job.trit_file, threads)
    progress(f"{job.name}: speed", 1, 1)
    return speed


def make_exports(
    jobs: Sequence[tuple[Job, str]], replaced: Mapping[str, str], threads: int, *, progress: Progress
) -> list[int]:
    """Export packed files, each in a format; return the size of each export in bytes.

    `replaced` maps the path of an export to the checksum of what it replaces, empty for nothing.
    """
    for job, to in jobs:
        output = job.export_path(to)
        if not _is_missing(output, replaced[str(output)]):
            continue
        if output.is_dir():
            with disk_errors(output):
                shutil.rmtree(output)

        def show(tensor: str, done: int, total: int, job: Job = job, to: str = to) -> None:
            progress(f"{job.name}: export {to}", done, total)

        export(
            job.trit_file,
            output,
            to=to,
            base_model=job.base_model,
            threads=threads,
            overwrite=True,
            progress=show,
        )
    return [_size(job.export_path(to)) for job, to in jobs]


def _size(path: Path) -> int:
    files: Iterable[Path] = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _is_missing(path: Path, replaced: str) -> bool:
    """Tell whether an output is still to be made: it appears whole, in place of what was there before."""
    return not path.exists() or checksum(path) == replaced
