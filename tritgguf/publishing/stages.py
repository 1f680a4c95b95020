"""The stages of publishing: one function for each (source, configuration, stage), which notes what it has made.

A stage that has been done with the same settings, and whose file is unchanged, is skipped. Stages communicate through
the output folder alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cpu_kernels.threads.cores import physical_cores
from tritgguf.conversion.convert import ConvertProgress, convert
from tritgguf.diagnostics.bench import bench, processor_name
from tritgguf.evaluation.logits_store import LogitsStore
from tritgguf.evaluation.quantization_costs import FileQuality, Progress
from tritgguf.evaluation.recorded_scores import ScoreRecorder
from tritgguf.evaluation.text_windows import shipped_text
from tritgguf.evaluation.verify import verify_files
from tritgguf.exporters.export import export
from tritgguf.formats.durable_output import PART_SUFFIXES, disk_errors
from tritgguf.formats.file_kinds import is_hub_id
from tritgguf.formats.scores import text_fingerprint
from tritgguf.formats.text_file import read_text
from tritgguf.publishing.configurations import Configuration
from tritgguf.publishing.inputs import SourceInputs, needs_importance
from tritgguf.publishing.plan_file import PlannedSource, PublishPlan
from tritgguf.publishing.state import State
from tritgguf.version import __version__

_SPEED_TOKENS, _SPEED_REPETITIONS = 64, 3
CONVERT, VERIFY, BENCH, EXPORT, CARD = "convert", "verify", "bench", "export", "card"


@dataclass(frozen=True)
class Job:
    """A source in a configuration."""

    plan: PublishPlan
    source: PlannedSource
    configuration: Configuration

    @property
    def name(self) -> str:
        """Name of its folder, and of its repository on the hub."""
        return f"{self.source.name}-trit-{self.configuration.name}"

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.plan.output / self.name

    @property
    def trit_file(self) -> Path:
        """The packed file."""
        return self.folder / f"{self.name}.gguf"

    def export_path(self, to: str) -> Path:
        """Return the folder or file of an export."""
        return self.folder / "hf" if to == "hf" else self.folder / f"{self.name}-{to}.gguf"

    @property
    def base_model(self) -> str | None:
        """The source's hub id, if it is one."""
        location = self.source.location
        return location if is_hub_id(location) and not Path(location).exists() else None


@dataclass(frozen=True)
class Stages:
    """What all stages need: the notes about the output, the number of threads, and whom to tell how far they are."""

    state: State
    threads: int | None
    progress: Progress

    def check_ours(self, job: Job) -> None:
        """Raise BadRequestError if a file that is not of `publish` is where a job would write."""
        self.state.check_ours(CONVERT, job.trit_file)
        for to in job.plan.exports:
            self.state.check_ours(EXPORT, job.export_path(to))

    def convert(self, job: Job, inputs: SourceInputs) -> float:
        """Make the packed file; return the seconds that encoding it took when it was made."""
        settings = _conversion_settings(job, inputs)
        if (done := self.state.result(CONVERT, job.trit_file, settings)) is not None:
            return float(done["seconds"])
        self.state.check_ours(CONVERT, job.trit_file)
        with disk_errors(job.folder):
            job.folder.mkdir(parents=True, exist_ok=True)
        is_again = self.state.begun(CONVERT, job.trit_file, settings)
        part = job.trit_file.with_name(job.trit_file.name + PART_SUFFIXES[1])
        encoder = inputs.encoder(job.configuration)

        def show(state: ConvertProgress) -> None:
            self.progress(f"{job.name}: encoding", state.bytes_done, state.bytes_total)

        report = convert(
            job.source.location,
            job.trit_file,
            depth=job.configuration.depth,
            output_depth=job.configuration.output_depth,
            embedding_depth=job.configuration.embedding_depth,
            encoder=encoder,
            importance=inputs.importance if needs_importance(encoder) else None,
            windows=inputs.windows(job.configuration),
            choice=job.configuration.choice_with(inputs.costs(job.configuration)),
            recipe=job.configuration.recipe,
            threads=self.threads,
            overwrite=True,
            resume=is_again and part.exists(),
            progress=show,
        )
        self.state.finish(CONVERT, job.trit_file, settings, {"seconds": report.seconds, "warnings": report.warnings})
        return report.seconds

    def verify(self, jobs: Sequence[Job], store: LogitsStore | None) -> dict[str, FileQuality]:
        """Measure and record what quantization costs, of files of one source; return name -> quality.

        Files that were measured on the same text are not measured again.
        """
        if not jobs:
            return {}
        text = shipped_text() if jobs[0].plan.text is None else read_text(jobs[0].plan.text)
        settings = {"version": __version__, "text": text_fingerprint(text), "tokens": jobs[0].plan.tokens}
        done = {job.name: self.state.result(VERIFY, job.trit_file, settings) for job in jobs}
        missing = [job for job in jobs if done[job.name] is None]
        recorder = ScoreRecorder([job.trit_file for job in missing])
        reports = verify_files(
            jobs[0].source.location,
            [job.trit_file for job in missing],
            text=text,
            tokens=jobs[0].plan.tokens,
            threads=self.threads,
            store=store,
            progress=self.progress,
        )
        for job, report in zip(missing, reports, strict=True):
            with self.state.changing(CONVERT, job.trit_file):
                recorder.record(report)
            quality = _quality_with_score(report.quality)
            done[job.name] = {
                "seconds": report.seconds / len(reports),
                "quality": quality.as_dict(),
                "report": report.as_dict(),
            }
            self.state.finish(VERIFY, job.trit_file, settings, done[job.name])
        return {job.name: FileQuality(**{**done[job.name]["quality"], "file": job.trit_file}) for job in jobs}

    def bench(self, job: Job) -> float | None:
        """Measure how fast a file generates, in tokens per second."""
        settings = {
            "version": __version__,
            "processor": processor_name(),
            "threads": self.threads or physical_cores(),
            "tokens": [_SPEED_TOKENS, _SPEED_REPETITIONS],
        }
        if (done := self.state.result(BENCH, job.trit_file, settings)) is None:
            self.progress(f"{job.name}: speed", 0, 1)
            report = bench(
                job.trit_file,
                prompt_tokens=0,
                generated_tokens=_SPEED_TOKENS,
                threads=self.threads,
                repetitions=_SPEED_REPETITIONS,
                by_kernel=False,
            )
            done = {"tokens_per_second": None if report.decode is None else report.decode.mean}
            self.state.finish(BENCH, job.trit_file, settings, done)
            self.progress(f"{job.name}: speed", 1, 1)
        speed = done["tokens_per_second"]
        return None if speed is None else float(speed)

    def export(self, job: Job, to: str) -> Path:
        """Export a packed file; an earlier export of ours is replaced."""
        output = job.export_path(to)
        settings = {"version": __version__, "to": to, "file": self.state.checksum_of(CONVERT, job.trit_file)}
        if self.state.result(EXPORT, output, settings) is not None:
            return output
        self.state.check_ours(EXPORT, output)
        if output.is_dir():
            with disk_errors(output):
                shutil.rmtree(output)
        report = export(
            job.trit_file,
            output,
            to=to,
            base_model=job.base_model,
            threads=self.threads,
            overwrite=True,
            progress=lambda _, done, total: self.progress(f"{job.name}: export {to}", done, total),
        )
        self.state.finish(EXPORT, output, settings, {"bytes": report.output_bytes})
        return output


def _quality_with_score(quality: FileQuality) -> FileQuality:
    """Return a file's row after its score was recorded, which makes it a little larger."""
    n_bytes = quality.file.stat().st_size
    per_weight = quality.bits_per_weight * n_bytes / quality.file_bytes
    return replace(quality, file_bytes=n_bytes, bits_per_weight=per_weight)


def _conversion_settings(job: Job, inputs: SourceInputs) -> dict[str, Any]:
    """Return what determines the bytes of a packed file."""
    source, calibration = inputs.source, job.plan.calibration
    files = []
    for path in source.files:
        status = path.stat()
        files.append([path.name, status.st_size, status.st_mtime_ns])
    with_text = inputs.needs_text(job.configuration)
    text = asdict(calibration) | {
        "text": None if calibration.text is None else text_fingerprint(read_text(calibration.text))
    }
    return {
        "version": __version__,
        "source": sorted(files),
        "configuration": job.configuration.settings(),
        "encoder": inputs.encoder(job.configuration).name,
        "calibration": text if with_text else None,
        # What is calculated on a text depends on the number of threads.
        "threads": (inputs.threads or physical_cores()) if with_text else None,
    }
